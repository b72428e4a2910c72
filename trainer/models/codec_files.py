"""The files of a frozen autoencoder: diffusers' `config.json` and safetensors weights, in a folder or on any fsspec URL.

Foreign values are checked before anything is built from them, and the module is built without memory until the weights
confirm its sizes.
"""

import inspect
import json
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from fsspec import AbstractFileSystem
from torch import Tensor

from trainer.errors import UserError, one_line
from trainer.models.tensor_files import open_url, read_bytes, read_safetensors

Autoencoder = AutoencoderKL | AsymmetricAutoencoderKL | AutoencoderTiny | VQModel
CLASSES: dict[str, type[Autoencoder]] = {
    "AutoencoderKL": AutoencoderKL,
    "AsymmetricAutoencoderKL": AsymmetricAutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "VQModel": VQModel,
}

WHAT = "the autoencoder"
CONFIG_FILE = "config.json"
RUN_FILE = "config.yaml"
"""Of a run, whose folder is no autoencoder's."""
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLE_FILE = "diffusion_pytorch_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 8 << 30
MAX_BLOCKS, MAX_LAYERS_PER_BLOCK, MAX_LATENT_CHANNELS, MAX_CODES = 16, 64, 1024, 1 << 20

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
UPSAMPLING = ("nearest", "nearest-exact", "bilinear", "bicubic")
DEPRECATED_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in weights written by diffusers before 0.17, Stable Diffusion 1.x among them."""


def meta_autoencoder(url: str) -> Autoencoder:
    """The autoencoder that `config.json` describes, on the meta device: sizes in a foreign config cost no memory.

    Raises:
        UserError: the file is missing, unreadable, too large, or of no supported autoencoder; the message names it.
    """
    fs, root = open_url(url, WHAT)
    path = f"{root}/{CONFIG_FILE}"
    if not fs.exists(path) and fs.exists(f"{root}/{RUN_FILE}"):
        raise UserError(
            f"{url}: the folder of a run; `loupe export {url} FOLDER` writes what it has trained, give FOLDER"
        )
    config = _read_config(fs, path)
    name = config["_class_name"]
    # Only what its constructor takes: diffusers writes more than that, and warns of it when it reads it back.
    known = {key: config[key] for key in inspect.signature(CLASSES[name]).parameters if key in config}
    try:
        with torch.device("meta"):
            vae = CLASSES[name].from_config(known)
    except Exception as e:  # diffusers raises whatever a foreign value runs into, ZeroDivisionError included
        raise UserError(f"{path}: not a valid {name} config ({one_line(e)})") from None
    assert isinstance(vae, Autoencoder)
    if "shift_factor" not in known and config.get("shift_factor") is not None:
        # An export's, of a class whose constructor has none; diffusers keeps it in its config, too.
        vae.register_to_config(shift_factor=config["shift_factor"])
    return vae


def load_weights(url: str, vae: Autoencoder) -> None:
    """Give `vae`, on the meta device, the folder's weights, in float32 and on the CPU.

    Raises:
        UserError: the file is missing, unreadable, too large, or holds other weights; the message names it.
    """
    fs, root = open_url(url, WHAT)
    path = f"{root}/{WEIGHTS_FILE}"
    weights = _read_weights(fs, path, type(vae).__name__)
    _check_weights(weights, vae.state_dict(), path)
    vae.load_state_dict(weights, assign=True)


# --------------------------------------------------------------------------------------------------------------- reading


def _missing(path: str) -> UserError:
    return UserError(
        f"{path}: no such file; give the folder of a diffusers autoencoder with {CONFIG_FILE} and {WEIGHTS_FILE}"
    )


def _read_weights(fs: AbstractFileSystem, path: str, class_name: str) -> dict[str, Tensor]:
    folder = path.rpartition("/")[0]
    try:
        if not fs.exists(path) and fs.exists(f"{folder}/{PICKLE_FILE}"):
            raise UserError(f"{path}: no such file, and {PICKLE_FILE} beside it is a pickle, which is never read; where "
                            f"you trust it, write {class_name}.from_pretrained(FOLDER).save_pretrained(ANOTHER) with "
                            "diffusers once, and give that one")  # fmt: skip
        weights = read_safetensors(fs, path, MAX_WEIGHTS_BYTES, WHAT)
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({one_line(e)})") from None
    return {current_name(name): weight.float() for name, weight in weights.items()}


def current_name(name: str) -> str:
    """Of a tensor that an old diffusers named."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in DEPRECATED_ATTENTION:
        parts[-2] = DEPRECATED_ATTENTION[parts[-2]]
    return ".".join(parts)


def _check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], path: str) -> None:
    for names, what in (
        (expected.keys() - weights.keys(), "lacks"),
        (weights.keys() - expected.keys(), "has a foreign"),
    ):
        if names:
            raise UserError(
                f"{path}: {what} {min(names)} ({len(names)} such); not the weights of the {CONFIG_FILE} beside it"
            )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(weight.shape)}, {CONFIG_FILE} says "
                            f"{tuple(expected[name].shape)}; not the weights of the config beside it")  # fmt: skip
        if not weight.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; copy or convert the weights again")


# ------------------------------------------------------------------------------------------------------- foreign configs


def _read_config(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        config = json.loads(read_bytes(fs, path, MAX_CONFIG_BYTES, WHAT))
    except FileNotFoundError:
        raise _missing(path) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({one_line(e)})") from None
    name = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if not isinstance(name, str) or name not in CLASSES:
        raise UserError(f"{path}: _class_name is {name!r}; supported are {', '.join(CLASSES)}")
    check = _Check(config, path)
    if name in ("AutoencoderKL", "VQModel"):
        levels = check.widths("block_out_channels")
        check.layers("layers_per_block")
        check.block_types(levels, levels)
        if name == "VQModel":
            check.codebook()
    elif name == "AsymmetricAutoencoderKL":
        downs, ups = check.widths("down_block_out_channels"), check.widths("up_block_out_channels")
        check.need(ups == downs, "up_block_out_channels", f"as long as down_block_out_channels, {downs}")
        check.layers("layers_per_down_block")
        check.layers("layers_per_up_block")
        check.block_types(downs, ups)
    else:
        check.tiny()
    check.common()
    return config


class _Check:
    """Rules on the fields of one config. A field that is absent has diffusers' default, which every rule allows."""

    def __init__(self, config: dict[str, Any], path: str) -> None:
        self._config, self._path = config, path

    def need(self, ok: bool, field: str, rule: str) -> None:
        if not ok:
            raise UserError(f"{self._path}: {field} is {self._config.get(field)!r}; it must be {rule}")

    def widths(self, field: str, default: tuple[int, ...] = (64,)) -> int:
        """A list of channels; returns its length."""
        values: Any = self._config.get(field, list(default))
        ok = isinstance(values, list) and 1 <= len(values) <= MAX_BLOCKS and all(_is_count(v) for v in values)
        self.need(ok, field, f"a list of 1 to {MAX_BLOCKS} positive integers")
        return len(values)

    def layers(self, field: str) -> None:
        self.need(_is_count(self._config.get(field, 1), MAX_LAYERS_PER_BLOCK), field, f"1 to {MAX_LAYERS_PER_BLOCK}")

    def block_types(self, num_down: int, num_up: int) -> None:
        for field, allowed, count in (
            ("down_block_types", DOWN_BLOCKS, num_down), ("up_block_types", UP_BLOCKS, num_up)
        ):  # fmt: skip
            found: Any = self._config.get(field, [allowed[0]])
            ok = isinstance(found, list) and len(found) == count and all(block in allowed for block in found)
            self.need(ok, field, f"{count} of {', '.join(allowed)}, as many as there are block channels")

    def tiny(self) -> None:
        levels = {}
        for side, blocks in (("encoder", (1, 3, 3, 3)), ("decoder", (3, 3, 3, 1))):
            widths = f"{side}_block_out_channels"
            levels[side] = self.widths(widths, (64,) * 4)
            equal = len(set(self._config.get(widths, [64]))) == 1
            self.need(equal, widths, "equal numbers: the convolutions between stages keep the width")
            counts: Any = self._config.get(f"num_{side}_blocks", list(blocks))
            ok = isinstance(counts, list) and len(counts) == levels[side]
            self.need(ok and all(_is_count(n, MAX_LAYERS_PER_BLOCK) for n in counts), f"num_{side}_blocks",
                      f"as many numbers, 1 to {MAX_LAYERS_PER_BLOCK}, as {widths} has")  # fmt: skip
        same = levels["encoder"] == levels["decoder"]
        self.need(same, "decoder_block_out_channels", f"as long as encoder_block_out_channels, {levels['encoder']}")
        self.need(self._config.get("upsampling_scaling_factor", 2) == 2, "upsampling_scaling_factor", "2")
        upsampling = self._config.get("upsample_fn", "nearest")
        self.need(upsampling in UPSAMPLING, "upsample_fn", f"one of {', '.join(UPSAMPLING)}")

    def codebook(self) -> None:
        codes: Any = self._config.get("num_vq_embeddings", 256)
        self.need(_is_count(codes, MAX_CODES), "num_vq_embeddings", f"1 to {MAX_CODES}")
        channels, width = self._config.get("latent_channels", 3), self._config.get("vq_embed_dim")
        self.need(width is None or width == channels, "vq_embed_dim", f"latent_channels, {channels}, or null")
        group = self._config.get("norm_type", "group") == "group"
        self.need(group, "norm_type", "group: a decoder whose norms see the latents is not supported")

    def common(self) -> None:
        for field in ("in_channels", "out_channels"):
            self.need(self._config.get(field, 3) == 3, field, "3: images are RGB (a second stage, which refines another "
                      "autoencoder's latents, has the number of their channels, and is no codec of images)")  # fmt: skip
        channels = self._config.get("latent_channels", 4)
        self.need(_is_count(channels, MAX_LATENT_CHANNELS), "latent_channels", f"1 to {MAX_LATENT_CHANNELS}")
        scale: Any = self._config.get("scaling_factor", 1.0)
        self.need(_is_number(scale) and scale > 0, "scaling_factor", "a positive number")
        shift: Any = self._config.get("shift_factor")
        self.need(shift is None or _is_number(shift), "shift_factor", "a number or null")
        for field in ("latents_mean", "latents_std"):
            self.need(self._config.get(field) is None, field, "null: latents scaled per channel are not supported")


def _is_count(x: object, at_most: float = float("inf")) -> bool:
    return type(x) is int and 1 <= x <= at_most


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e6
