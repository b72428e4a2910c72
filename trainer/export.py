"""Export a trained autoencoder as the folder that diffusers and `CodecConfig.url` load; or a trained latent network as the
folder that `LatentLPIPSConfig.url` loads."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from data.images import ImageError, read_image
from data.reader import open_dataset
from data.schema import Sample
from data.transforms import training_image
from trainer import optim, train_state
from trainer.checkpoint.folder import NAME
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.checkpoint.retention import unique_hold
from trainer.config import CodecConfig, RunConfig, resolve_url
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.export_check import difference_to_diffusers, read_by_diffusers
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.codec_files import CONFIG_FILE, meta_autoencoder
from trainer.models.codec_files import WEIGHTS_FILE as AUTOENCODER_FILE
from trainer.models.latent_network_files import WEIGHTS_FILE as NETWORK_FILE
from trainer.models.latent_network_files import LatentNetworkInfo, write_latent_network
from trainer.models.reconstruction import Reconstruction
from trainer.run_folder import CHECKPOINTS, CONFIG, RunFolder
from trainer.tasks.base import Task
from trainer.tasks.latent_network import LatentNetworkTask
from trainer.tensors import pixels_to_images

LATENTS_FILE = "latents.json"
_WRITTEN = {CONFIG_FILE, AUTOENCODER_FILE, NETWORK_FILE, LATENTS_FILE}
"""Files of an earlier export, in whose place a new one comes."""
_STATISTICS_SAMPLES, _STATISTICS_PIXELS = 512, 512 * 128 * 128
"""Images that are encoded at most, and their pixels: of large images fewer say as much."""
_BATCH_PIXELS = 64 * 64 * 64
_CHECKED_IMAGES = 8

T = TypeVar("T")


def export_run(
    run_dir: str, out: str, *, dtype: torch.dtype = torch.float16, scale_of: str | None = None
) -> dict[str, float]:
    """What the run's task has to export, as its function below does.

    Raises:
        UserError: not a run of the autoencoder or the latent_network task, no checkpoint, or `out` holds something else.
    """
    config = _config(run_dir)
    if config.task.kind != "latent_network":
        return export_autoencoder(run_dir, out, dtype=dtype, scale_of=scale_of)
    if scale_of is not None:
        raise UserError("--scale-of: is about an autoencoder's latents, and the run is of latent_network; leave it out")
    return export_latent_network(run_dir, out, dtype=dtype)


def usage(run_dir: str, out: str) -> list[str]:
    """How to use what `export_run` wrote, in lines to paste.

    Raises:
        UserError: nothing that it wrote is there.
    """
    config, where = _config(run_dir), Path(out).resolve()
    if config.task.kind == "latent_network":
        return [f"for LatentLPIPS: --set task.perceptual.url={where}"]
    if first := _first_stage(config):
        return [f"a second stage, which refines the latents of {first.url}: diffusers' AutoencoderKL reads it; "
                "no task.codec, which is of images"]  # fmt: skip
    codec = Codec(meta_autoencoder(str(where)))
    fields = f"latent_channels: {codec.latent_channels}, downsampling: {codec.downsampling}"
    lines = [f"for stage 2: --set 'task.codec={{url: {where}, {fields}}}'"]
    if config.task.kind == "autoencoder" and config.task.trained == "decoder":
        if config.init_from and _has_no_scale(resolve_url(config.init_from.url).rstrip("/")):
            lines.append(
                "it began with a run, beside whose weights there is no scale: unless --scale-of gave one, scale and shift were "
                "measured anew, and a stage 2 that is there already needs those of its own codec"
            )
        lines.append(
            f"its decoder for LPL alone, beside the codec whose latents it shares: --set task.perceptual.decoder_url={where}"
        )
    return lines


@torch.no_grad()
def export_autoencoder(
    run_dir: str, out: str, *, dtype: torch.dtype = torch.float16, scale_of: str | None = None
) -> dict[str, float]:
    """Write `config.json`, safetensors weights and `latents.json` of a run's averaged autoencoder; returns what was measured.

    Scale and shift make the latents of the run's own data zero-mean and of unit variance (Rombach et al. 2022, appendix
    G); `latents.json` has mean and deviation of each channel. What was written is read by diffusers and compared with the
    trained module (`trainer.export_check`), then appears whole, by rename, in place of an earlier one. Neither the weights of
    LPIPS nor, unless it reconstructs a teacher's latents, the teacher are needed.

    Args:
        scale_of: URL of an autoencoder whose scale and shift are written instead. Where the decoder alone was trained it is
            `init_from.url` by itself, if that is one: latents stay as they were, so their scale does.

    Raises:
        UserError: not a run of the autoencoder task, no checkpoint, `out` holds something else, or diffusers computes
            something else from it; then nothing was written.
    """
    config = _config(run_dir)
    if config.task.kind != "autoencoder":
        raise UserError(
            f"{run_dir}: a run of {config.task.kind}; export takes a run of the autoencoder task, or of latent_network"
        )
    target, given = _target(out), _given_scale(config, scale_of)
    first = _first_stage(config)
    teacher = load_codec(first, "task.teacher") if first else None
    module = Reconstruction(config.task).eval()
    step = _read_average(run_dir, module)
    _round(module.autoencoder, dtype)
    images = pixels_to_images(_pixels(config)[0])
    batches = images.split(max(1, _BATCH_PIXELS // images[0, 0].numel()))
    inputs = batches if teacher is None else [teacher.encode(batch) for batch in batches]
    statistics = latent_statistics(torch.cat([_raw_latents(module, x) for x in inputs]))
    shift, scale = given or (statistics.mean, 1.0 / statistics.deviation)
    module.autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale, sample_size=inputs[0].shape[-1])

    def write(folder: Path) -> dict[str, float]:
        nn.Module.to(module.autoencoder, dtype)  # diffusers' own `to` warns of nothing
        module.autoencoder.save_pretrained(folder, safe_serialization=True)
        nn.Module.to(module.autoencoder, torch.float32)
        about = {"run": config.name, "step": step, "images": len(images), "resolution": images.shape[-1]}
        about |= {"scaling_factor": scale, "shift_factor": shift, **statistics.to_json()}
        (folder / LATENTS_FILE).write_text(json.dumps(about, indent=1) + "\n")
        difference = difference_to_diffusers(folder, module, inputs[: max(1, _CHECKED_IMAGES // len(inputs[0]))])
        return {"psnr_db": _psnr(_reconstructing(folder, module, teacher), batches), "difference": difference}

    measured = _put_in_place(target, write)
    return {"step": step, "scaling_factor": scale, "shift_factor": shift, **measured}


@torch.no_grad()
def export_latent_network(run_dir: str, out: str, *, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Write `config.json` and `model.safetensors` of a run's averaged latent network, without its classifier; returns what
    was measured: `accuracy` is on up to 512 images of the run's own data, which it has seen. The heads are not written, so
    whoever reads it takes uniform ones.

    Raises:
        UserError: not a run of the latent_network task, no checkpoint, or `out` holds something else.
    """
    config = _config(run_dir)
    if config.task.kind != "latent_network":
        raise UserError(f"{run_dir}: a run of {config.task.kind}; a latent network comes of the latent_network task")
    target = _target(out)
    task = LatentNetworkTask(config, torch.device("cpu"))
    step, ema = _restored(run_dir, config, task)
    info = LatentNetworkInfo(
        latent_channels=task.module.latent_channels,
        model=config.task.model,
        scaling_factor=task.codec.scaling_factor,
        shift_factor=task.codec.shift_factor,
        resolution=config.phases[-1].resolution,
    )
    with ema.in_place_of_weights():
        network = task.module.eval()
        pixels, samples = _pixels(config)
        latents = [task.codec.encode(pixels_to_images(chunk)) for chunk in pixels.split(64)]
        classes = torch.cat([network(chunk).argmax(1) for chunk in latents])
        labels = torch.tensor([sample.label for sample in samples])
        _put_in_place(target, lambda folder: write_latent_network(folder, info, network, dtype))
    return {"step": step, "accuracy": (classes == labels).double().mean().item()}


def _config(run_dir: str) -> RunConfig:
    folder = RunFolder(run_dir)
    if not folder.exists(CONFIG):
        raise UserError(f"{run_dir}: no run folder ({CONFIG} is missing)")
    return folder.config()


def _first_stage(config: RunConfig) -> CodecConfig | None:
    """Whose latents a second stage reconstructs; None where images are."""
    if config.task.kind != "autoencoder" or config.task.reconstructs != "latents":
        return None
    return config.task.teacher


def _given_scale(config: RunConfig, scale_of: str | None) -> tuple[float, float] | None:
    """(shift, scale) of the autoencoder whose latents these are; None: to be measured."""
    assert config.task.kind == "autoencoder"
    url, field = scale_of, "--scale-of"
    if url is None and config.task.trained == "decoder" and config.init_from:
        url, field = resolve_url(config.init_from.url).rstrip("/"), "init_from.url"
        if _has_no_scale(url):
            return None
    if url is None:
        return None
    try:
        codec = Codec(meta_autoencoder(url))
    except UserError as e:
        mend = (
            ""
            if scale_of
            else "; its scale and shift go with its latents: give --scale-of FOLDER of an autoencoder that has them"
        )
        raise UserError(f"{field}: {e}{mend}") from None
    return codec.shift_factor, codec.scaling_factor


def _has_no_scale(url: str) -> bool:
    """Whether weights lie there alone: a file of them, a run, or a checkpoint."""
    return (
        url.endswith(".safetensors")
        or RunFolder(url).exists(CONFIG)
        or NAME.fullmatch(url.rpartition("/")[2]) is not None
    )


def _target(out: str) -> Path:
    if "://" in out:
        raise UserError(f"{out}: exports are written to a folder of this machine; give a path, and copy it from there")
    target = Path(out)
    if target.exists() and not (target / CONFIG_FILE).is_file():
        raise UserError(f"{out}: exists and is not what an export writes; give another")
    foreign = sorted({path.name for path in target.iterdir()} - _WRITTEN) if target.exists() else []
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]}, which no export writes and replacing it would lose; give another")
    return target


def _restored(run_dir: str, config: RunConfig, task: Task) -> tuple[int, EMA]:
    """The newest checkpoint's step, and its average; its weights are in the task's module."""
    ema, optimizer = EMA(task.module), optim.build_optimizer(task.module, config.optim)
    restored = _manager(run_dir).restore(train_state.tensors(task, ema, optimizer), hold=unique_hold("export"))
    if restored is None:
        raise UserError(f"{run_dir}: no checkpoint to export; train first")
    return restored.step, ema


def _read_average(run_dir: str, module: nn.Module) -> int:
    """Fill the module with the newest checkpoint's averaged weights, and nothing else is read; returns its step."""
    targets = module.state_dict()

    def choose(index: Index, where: str) -> dict[str, Tensor]:
        names = {name: f"ema.{name}" if f"ema.{name}" in index.tensors else f"model.{name}" for name in targets}
        for name, target in targets.items():
            stored = index.tensors.get(names[name])
            if stored is None or tuple(stored.size) != tuple(target.shape):
                found = "is not there" if stored is None else f"has shape {list(stored.size)}"
                raise UserError(f"{where}: {names[name]} {found}, the run's config has it of {list(target.shape)}; export with "
                                "the code that wrote it")  # fmt: skip
        return {names[name]: target for name, target in targets.items()}

    restored = _manager(run_dir).read(choose, hold=unique_hold("export"))
    if restored is None:
        raise UserError(f"{run_dir}: no checkpoint to export; train first")
    return restored.step


def _manager(run_dir: str) -> CheckpointManager:
    return CheckpointManager(
        f"{RunFolder(run_dir).url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version=""
    )


def _round(module: nn.Module, dtype: torch.dtype) -> None:
    """To what is written, and stays in float32."""
    for name, parameter in module.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not parameter.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name}: holds values that are not finite in {kind}; take --dtype float32, and if they are not "
                            "finite in that either, the run has diverged: look at its metrics")  # fmt: skip


def _put_in_place(target: Path, write: Callable[[Path], T]) -> T:
    """`write` a new folder beside `target`, then put it there whole, by rename, in place of an earlier one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        written = write(temporary)
        for path in (temporary, *temporary.iterdir()):  # made for this user alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        earlier = temporary.with_name(f"{temporary.name}.old")
        if target.exists():
            target.rename(earlier)
        temporary.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _pixels(config: RunConfig) -> tuple[Tensor, list[Sample]]:
    """Up to 512 images of the run's first dataset, spread over it, uint8 (N, 3, H, W); and their rows. Unreadable ones, which
    training has counted, are passed over.

    Raises:
        UserError: none can be read.
    """
    name, d = next(iter(config.data.datasets.items()))
    dataset = open_dataset(resolve_url(d.url), name=name, max_samples=d.max_samples, cache_dir=config.data.cache_dir)
    resolution = config.phases[-1].resolution
    count = min(_STATISTICS_SAMPLES, max(1, _STATISTICS_PIXELS // resolution**2), dataset.num_samples)
    samples, pixels = [], []
    for i in range(count):
        sample = dataset.read(i * dataset.num_samples // count)
        try:
            image = read_image(sample.image, min_side=resolution)
        except ImageError:
            continue
        samples.append(sample)
        pixels.append(torch.from_numpy(training_image(image, resolution)).permute(2, 0, 1))
    if not pixels:
        raise UserError(f"data.datasets.{name}: none of {count} images can be read, and scale and shift are measured on "
                        "them; look at it with `loupe data verify`")  # fmt: skip
    return torch.stack(pixels), samples


# ------------------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class LatentStatistics:
    """Of raw latents, over images and pixels."""

    mean: float
    deviation: float
    channel_means: tuple[float, ...]
    channel_deviations: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.channel_means, "std": self.channel_deviations}


def latent_statistics(raw_BCHW: Tensor) -> LatentStatistics:
    """
    Raises:
        UserError: they are all the same, or not finite.
    """
    raw = raw_BCHW.double()
    mean, deviation = raw.mean().item(), raw.std().item()
    if not (deviation > 1e-6 and deviation < float("inf")):
        raise UserError(f"latents of the run's data have a deviation of {deviation:.2g}: this autoencoder has learned nothing, "
                        "or has diverged; look at its metrics")  # fmt: skip
    dims = (0, 2, 3)
    return LatentStatistics(mean, deviation, tuple(raw.mean(dims).tolist()), tuple(raw.std(dims).tolist()))


def _raw_latents(module: Reconstruction, x: Tensor) -> Tensor:
    """As its forward pass has them, without what is decoded of them."""
    encoded = module.encode(x)
    return encoded if isinstance(module.autoencoder, VQModel) else encoded.chunk(2, dim=1)[0]


def _reconstructing(folder: Path, module: Reconstruction, teacher: Codec | None) -> Callable[[Tensor], Tensor]:
    """What the written files make of images, by this code's own reader, or for a second stage by diffusers."""
    if teacher is None:
        codec = Codec.load(str(folder))
        return lambda images: codec.decode(codec.encode(images))
    second: Any = read_by_diffusers(folder, type(module.autoencoder))
    return lambda images: teacher.decode(second(teacher.encode(images)).sample)


def _psnr(reconstruct: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over all pixels."""
    error = [(reconstruct(images).clamp(-1, 1) - images).square().mean((1, 2, 3)) for images in batches]
    return float(10 * torch.log10(4.0 / torch.cat(error).mean()))
