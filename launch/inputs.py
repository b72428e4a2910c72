"""What a run reads, by field, and whether what is local of it is there. No torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from data.wds import index_folder
from launch import snapshot
from trainer.config import (
    AutoencoderConfig,
    LPIPSConfig,
    PerceptualConfig,
    ReconstructionsConfig,
    RunConfig,
    resolve_url,
)
from trainer.errors import UserError
from trainer.run_folder import CONFIG


def inputs(config: RunConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(field, URL, files of which it holds one) of all that a run reads."""
    for name, dataset in config.data.datasets.items():
        yield f"data.datasets.{name}.url", dataset.url, ("index.json",)
    if config.task.kind == "latent_diffusion":
        yield "task.codec.url", config.task.codec.url, ("config.json",)
        if config.task.text.kind == "frozen":
            for i, encoder in enumerate(config.task.text.encoders):
                weights = f"{encoder.weights_folder}/config.json".lstrip("/")
                yield f"task.text.encoders.{i}.url", encoder.url, (weights,)
        if any(phase.perceptual for phase in config.phases):
            yield from _perceptual_inputs(config.task.perceptual)
    if config.task.kind == "latent_network":
        yield "task.codec.url", config.task.codec.url, ("config.json",)
    if config.task.kind == "autoencoder":
        yield from _autoencoder_inputs(config.task)
    if config.reconstructions:
        yield from _reconstructions_inputs(config.reconstructions)
    if config.validation and config.validation.dataset:
        yield "validation.dataset.url", config.validation.dataset.url, ("index.json",)
    if config.init_from:
        yield "init_from.url", config.init_from.url, ()


def _perceptual_inputs(config: PerceptualConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    match config.kind:
        case "lpl" if config.decoder_url:
            yield "task.perceptual.decoder_url", config.decoder_url, ("config.json",)
        case "reweighting" if config.of.decoder_url and config.variance_ratio is None:
            yield "task.perceptual.of.decoder_url", config.of.decoder_url, ("config.json",)
        case "latent_lpips":
            yield "task.perceptual.url", config.url, ("config.json", "model.safetensors")
        case "image_space":
            yield from _lpips_inputs("task.perceptual.lpips", config.lpips)


def _autoencoder_inputs(config: AutoencoderConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if config.lpips:
        yield from _lpips_inputs("task.lpips", config.lpips)
    if config.teacher:
        yield "task.teacher.url", config.teacher.url, ("config.json",)
    if config.image_space and (config.image_space.decoded_weight or config.image_space.input_weight):
        yield from _lpips_inputs("task.image_space.lpips", config.image_space.lpips)


def _reconstructions_inputs(config: ReconstructionsConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    if config.dataset:
        yield "reconstructions.dataset.url", config.dataset.url, ("index.json",)
    if config.features_url is not None:
        yield "reconstructions.features_url", config.features_url, ()
    if config.lpips:
        yield from _lpips_inputs("reconstructions.lpips", config.lpips)


def _lpips_inputs(section: str, config: LPIPSConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for field, url in (("url", config.url), ("heads_url", config.heads_url)):
        if url is not None:
            yield f"{section}.{field}", url, ()


def check_local(field: str, url: str, files: tuple[str, ...], *, included: tuple[str, ...] = ()) -> None:
    """
    Args:
        included: files and folders that the job's copy of the code holds though git does not know them.

    Raises:
        UserError: it is on this machine's disks, and not there or not what the field wants.
    """
    path = resolve_url(url).removeprefix("file://")
    if "://" in path:
        return
    if not files and not os.path.exists(path):
        mend = "give a run folder, a checkpoint or weights in safetensors"
        if field != "init_from.url":
            mend = f"put the weights there, or --set {field}=..."
        raise UserError(f"{field}: no {url}; {mend}")
    if "index.json" in files:
        path = index_folder(path)
    if files and not os.path.isdir(path):
        raise UserError(f"{field}: no folder {url}; put it there, or --set {field}=...")
    if "config.json" in files and os.path.isfile(os.path.join(path, CONFIG)):
        raise UserError(
            f"{field}: {url} is a run; `loupe export {url} FOLDER` writes what it has trained, and FOLDER goes here"
        )
    for file in files:
        if not os.path.isfile(os.path.join(path, file)):
            hint = "; name subfolders with weights_folder and tokenizer_folder" if "encoders" in field else ""
            writer = "`loupe data build` writes" if file == "index.json" else "diffusers or `loupe export` writes"
            if field == "task.perceptual.url":
                writer = "`loupe export` writes of a run of the latent_network task"
            raise UserError(f"{field}: {url} has no {file}; it is not what {writer}{hint}")
    if url.startswith("repo://") and not snapshot.would_hold(Path(path), included=included):
        raise UserError(
            f"{field}: {url} would be missing in the job's copy of the code, unknown to git; `git add` it, or --include it"
        )
