"""The files of a latent network: `config.json` and `model.safetensors`, in a folder or on any fsspec URL.

    config.json         `LatentNetworkInfo`
    model.safetensors   stages.<i>.convs.<j>.{weight,bias}, stages.<i>.norms.<j>.{weight,bias} where there is a norm, and
                        perhaps heads.<i>, one non-negative number a channel: LPIPS's 1x1 heads. i and j count from 0.

Nothing in them is trusted: sizes are bounded, and the network is built without memory until the weights confirm its sizes.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from fsspec import AbstractFileSystem
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from trainer.config import LatentVGGConfig, Section
from trainer.errors import UserError, one_line
from trainer.models.latent_vgg import LatentVGG, trunk_state, uniform_heads
from trainer.models.tensor_files import open_url, read_bytes, read_safetensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 1 << 16
MAX_WEIGHTS_BYTES = 2 << 30
WHAT = "the latent network"


class LatentNetworkInfo(Section):
    """config.json."""

    format: Literal["loupe-latent-network"] = "loupe-latent-network"
    version: Literal[1] = 1
    latent_channels: Annotated[int, Field(ge=1, le=1024)]
    model: LatentVGGConfig = LatentVGGConfig()
    scaling_factor: PositiveFloat | None = None
    """Scale and shift of the autoencoder whose latents it has learned; absent: nobody knows."""
    shift_factor: float | None = None
    resolution: PositiveInt | None = None
    """Of the images that it was trained on last, in pixels."""


def write_latent_network(folder: Path, info: LatentNetworkInfo, network: LatentVGG, dtype: torch.dtype) -> None:
    """Both files, into a folder that is there; without the classifier."""
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in trunk_state(network).items()}
    safetensors.torch.save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(info.model_dump(mode="json"), indent=2) + "\n")


def read_latent_network(url: str) -> tuple[LatentNetworkInfo, LatentVGG, list[Tensor]]:
    """(what it is, the network without a classifier, its heads): float32, on the CPU. Heads that the file lacks are uniform.

    Raises:
        UserError: a file is missing, unreadable, too large, or of something else; the message names it.
    """
    fs, root = open_url(url, WHAT)
    try:
        info = _read_info(fs, f"{root}/{CONFIG_FILE}")
        path = f"{root}/{WEIGHTS_FILE}"
        weights = read_safetensors(fs, path, MAX_WEIGHTS_BYTES, WHAT)
    except FileNotFoundError as e:
        raise UserError(f"{url}: no latent network there ({one_line(e)}); give a folder with {CONFIG_FILE} "
                        f"and {WEIGHTS_FILE}, as `loupe export` writes it of the recipe latent_network") from None  # fmt: skip
    with torch.device("meta"):
        network = LatentVGG(info.model, info.latent_channels)
    # of a user's own network the classifier may still be there
    state = {name: weight.float() for name, weight in weights.items() if not name.startswith("classifier.")}
    heads = uniform_heads(info.model)
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if any(name.startswith("heads.") for name in state):
        expected |= {f"heads.{i}": head.shape for i, head in enumerate(heads)}
    _check_weights(state, expected, path)
    heads = [state.pop(f"heads.{i}", head) for i, head in enumerate(heads)]
    for i, head in enumerate(heads):
        if (head < 0).any():
            raise UserError(f"{path}: heads.{i} has negative numbers; LPIPS's heads have none, clamp them to 0")
    network.load_state_dict(state, assign=True)
    return info, network.requires_grad_(False).eval(), heads


def _read_info(fs: AbstractFileSystem, path: str) -> LatentNetworkInfo:
    try:
        tree = json.loads(read_bytes(fs, path, MAX_CONFIG_BYTES, WHAT))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({one_line(e)})") from None
    if not isinstance(tree, dict) or "latent_channels" not in tree:
        raise UserError(f"{path} is not a latent network's: it names no latent_channels; give a folder that "
                        "`loupe export` wrote of a run of the latent_network task")  # fmt: skip
    try:
        return LatentNetworkInfo.model_validate(tree)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def _check_weights(weights: dict[str, Tensor], expected: dict[str, torch.Size], path: str) -> None:
    for names, what in (
        (expected.keys() - weights.keys(), "lacks"),
        (weights.keys() - expected.keys(), "has a foreign"),
    ):
        if names:
            raise UserError(f"{path} {what} {min(names)} ({len(names)} such); not the weights of the "
                            f"{CONFIG_FILE} beside it")  # fmt: skip
    for name, weight in weights.items():
        if weight.shape != expected[name]:
            raise UserError(f"{path}: {name} has shape {tuple(weight.shape)}, the {CONFIG_FILE} beside it says "
                            f"{tuple(expected[name])}")  # fmt: skip
        if not weight.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; copy or export it again")
