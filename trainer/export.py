"""Export a trained autoencoder as the folder that diffusers and `CodecConfig.url` load; or a trained latent network as the
folder that `LatentLPIPSConfig.url` loads."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from data.images import read_image
from data.reader import open_dataset
from data.schema import Sample
from data.transforms import training_image
from trainer import optim, train_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import unique_hold
from trainer.config import RunConfig, resolve_url
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.models.autoencoders import Codec
from trainer.models.latent_network_files import LatentNetworkInfo, write_latent_network
from trainer.run_folder import CHECKPOINTS, CONFIG, RunFolder
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tasks.base import Task
from trainer.tasks.latent_network import LatentNetworkTask
from trainer.tensors import pixels_to_images

_STATISTICS_SAMPLES = 512

T = TypeVar("T")


def export_run(run_dir: str, out: str, *, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """What the run's task has to export, as its function below does.

    Raises:
        UserError: not a run of the autoencoder or the latent_network task, no checkpoint, or `out` holds something else.
    """
    config = _config(run_dir)
    if config.task.kind == "latent_network":
        return export_latent_network(run_dir, out, dtype=dtype)
    return export_autoencoder(run_dir, out, dtype=dtype)


@torch.no_grad()
def export_autoencoder(run_dir: str, out: str, *, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Write `config.json` and safetensors weights of a run's averaged autoencoder; returns what was measured.

    Scale and shift make the latents of the run's own data zero-mean and of unit variance (Rombach et al. 2022, appendix
    G). The folder appears whole, by rename, in place of an earlier one.

    Raises:
        UserError: not a run of the autoencoder task, no checkpoint, or `out` holds something else.
    """
    config = _config(run_dir)
    if config.task.kind != "autoencoder":
        raise UserError(
            f"{run_dir}: a run of {config.task.kind}; export takes a run of the autoencoder task, or of latent_network"
        )
    target = _target(out)
    task = AutoencoderTask(config, torch.device("cpu"))
    step, ema = _restored(run_dir, config, task)
    with ema.in_place_of_weights():
        autoencoder = task.module.autoencoder.eval()
        images = pixels_to_images(_pixels(config)[0])
        raw = torch.cat([autoencoder.encode(chunk).latent_dist.mean for chunk in images.split(64)])
        shift, scale = raw.mean().item(), 1.0 / raw.std().item()
        autoencoder.register_to_config(
            shift_factor=shift, scaling_factor=scale, sample_size=config.phases[-1].resolution
        )

        def write(folder: Path) -> float:
            nn.Module.to(autoencoder, dtype)  # diffusers' own `to` warns of nothing
            autoencoder.save_pretrained(folder, safe_serialization=True)
            return _psnr(Codec.load(str(folder)), images)

        psnr = _put_in_place(target, write)
    return {"step": step, "scaling_factor": scale, "shift_factor": shift, "psnr_db": psnr}


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


def _target(out: str) -> Path:
    target = Path(out)
    if target.exists() and not (target / "config.json").is_file():
        raise UserError(f"{out}: exists and is not what an export writes; give another")
    return target


def _restored(run_dir: str, config: RunConfig, task: Task) -> tuple[int, EMA]:
    """The newest checkpoint's step, and its average; its weights are in the task's module."""
    ema, optimizer = EMA(task.module), optim.build_optimizer(task.module, config.optim)
    folder = RunFolder(run_dir)
    manager = CheckpointManager(f"{folder.url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version="")
    restored = manager.restore(train_state.tensors(task, ema, optimizer), hold=unique_hold("export"))
    if restored is None:
        raise UserError(f"{run_dir}: no checkpoint to export; train first")
    return restored.step, ema


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
    """Up to 512 images of the run's first dataset, spread over it, uint8 (N, 3, H, W); and their rows."""
    name, d = next(iter(config.data.datasets.items()))
    dataset = open_dataset(resolve_url(d.url), name=name, max_samples=d.max_samples, cache_dir=config.data.cache_dir)
    count = min(_STATISTICS_SAMPLES, dataset.num_samples)
    resolution = config.phases[-1].resolution
    samples = [dataset.read(i * dataset.num_samples // count) for i in range(count)]
    pixels = [training_image(read_image(sample.image, min_side=resolution), resolution) for sample in samples]
    return torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels]), samples


def _psnr(codec: Codec, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the written files' reconstructions, in dB, over all pixels."""
    error = [
        (codec.decode(codec.encode(chunk)).clamp(-1, 1) - chunk).square().mean((1, 2, 3)) for chunk in images.split(64)
    ]
    return float(10 * torch.log10(4.0 / torch.cat(error).mean()))
