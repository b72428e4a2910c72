"""Export a trained autoencoder as the folder that diffusers and `CodecConfig.url` load."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from trainer.checkpoint.folder import NAME
from trainer.config import CodecConfig, RunConfig, resolve_url
from trainer.errors import UserError
from trainer.export.autoencoder_check import difference_to_diffusers, read_by_diffusers
from trainer.export.target import LATENTS_FILE, free_target, put_in_place
from trainer.export.weights import config_of, pixels_of, read_average, round_to
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.codec_files import meta_autoencoder
from trainer.models.reconstruction import Reconstruction
from trainer.run_folder import CONFIG, RunFolder
from trainer.tensors import pixels_to_images

_BATCH_PIXELS = 64 * 64 * 64
_CHECKED_IMAGES = 8


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
    config = config_of(run_dir)
    if config.task.kind != "autoencoder":
        raise UserError(
            f"{run_dir}: a run of {config.task.kind}; export takes a run of the autoencoder task, or of latent_network"
        )
    target, given = free_target(out), _given_scale(config, scale_of)
    first = first_stage(config)
    teacher = load_codec(first, "task.teacher") if first else None
    module = Reconstruction(config.task).eval()
    step = read_average(run_dir, module)
    round_to(module.autoencoder, dtype)
    images = pixels_to_images(pixels_of(config)[0])
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

    measured = put_in_place(target, write)
    return {"step": step, "scaling_factor": scale, "shift_factor": shift, **measured}


def first_stage(config: RunConfig) -> CodecConfig | None:
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
        if has_no_scale(url):
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


def has_no_scale(url: str) -> bool:
    """Whether weights lie there alone: a file of them, a run, or a checkpoint."""
    return (
        url.endswith(".safetensors")
        or RunFolder(url).exists(CONFIG)
        or NAME.fullmatch(url.rpartition("/")[2]) is not None
    )


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
