"""What a run's task has to export, and how to use it."""

import shutil
from pathlib import Path

import torch

from trainer.config import resolve_url
from trainer.errors import UserError
from trainer.export.autoencoder import export_autoencoder, first_stage, has_no_scale
from trainer.export.latent_network import export_latent_network
from trainer.export.target import free_target, put_in_place, upload
from trainer.export.weights import config_of
from trainer.models.autoencoders import Codec
from trainer.models.codec_files import meta_autoencoder


def export_run(
    run_dir: str, out: str, *, dtype: torch.dtype = torch.float16, scale_of: str | None = None
) -> dict[str, float]:
    """What the run's task has to export, as its function below does.

    Raises:
        UserError: not a run of the autoencoder or the latent_network task, no checkpoint, or `out` holds something else.
    """
    config = config_of(run_dir)
    if config.task.kind != "latent_network":
        return export_autoencoder(run_dir, out, dtype=dtype, scale_of=scale_of)
    if scale_of is not None:
        raise UserError("--scale-of: is about an autoencoder's latents, and the run is of latent_network; leave it out")
    return export_latent_network(run_dir, out, dtype=dtype)


def push_export(out: str, url: str) -> None:
    """Copy a whole export to storage, where it appears whole.

    Raises:
        UserError: `out` is no folder of this machine, or `url` holds something else or cannot be written.
    """
    folder = free_target(out).folder
    if folder is None or not folder.is_dir():
        raise UserError(
            f"--push: copies a folder of this machine, and OUT is {out}; write to the URL itself, without --push"
        )
    target = free_target(url)
    if target.folder is None:
        upload(folder, target)
    else:
        put_in_place(target, lambda new: shutil.copytree(folder, new, dirs_exist_ok=True))


def usage(run_dir: str, out: str) -> list[str]:
    """How to use what `export_run` wrote, in lines to paste.

    Raises:
        UserError: nothing that it wrote is there.
    """
    config, where = config_of(run_dir), out if "://" in out else Path(out).resolve()
    if config.task.kind == "latent_network":
        return [f"for LatentLPIPS: --set task.perceptual.url={where}"]
    if first := first_stage(config):
        return [f"a second stage, which refines the latents of {first.url}: diffusers' AutoencoderKL reads it; "
                "no task.codec, which is of images"]  # fmt: skip
    codec = Codec(meta_autoencoder(str(where)))
    fields = f"latent_channels: {codec.latent_channels}, downsampling: {codec.downsampling}"
    lines = [f"for stage 2: --set 'task.codec={{url: {where}, {fields}}}'"]
    if config.task.kind == "autoencoder" and config.task.trained == "decoder":
        if config.init_from and has_no_scale(resolve_url(config.init_from.url).rstrip("/")):
            lines.append(
                "it began with a run, beside whose weights there is no scale: unless --scale-of gave one, scale and shift were "
                "measured anew, and a stage 2 that is there already needs those of its own codec"
            )
        lines.append(
            f"its decoder for LPL alone, beside the codec whose latents it shares: --set task.perceptual.decoder_url={where}"
        )
    return lines
