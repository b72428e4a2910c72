"""The frozen networks of `loupe data encode`: the very classes that a run has, loaded once in each worker.

B batch, C channels, h and w sides of the latents, L tokens, T and P channels of token states and of pooled text.
"""

import hashlib
import multiprocessing
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from data.batches import Decode
from data.encode.columns import DType, LatentsColumn, TextColumn
from trainer.config import EncoderConfig, FrozenTextConfig
from trainer.errors import UserError, one_line
from trainer.evaluate.codec_report import choose_device
from trainer.models.autoencoders import Codec
from trainer.tensors import pixels_to_images

if TYPE_CHECKING:
    from trainer.models.frozen_encoder import FrozenEncoder

Holds = Literal["mean", "moments"]
_HASHED_AT_A_TIME = 1 << 24
"""Numbers."""

# -------------------------------------------------------------------------------------------------------------- latents


def latents_column(
    codec: Codec,
    url: str,
    *,
    holds: Holds,
    dtype: DType,
    resolution: int,
    buckets: Mapping[str, tuple[int, int]] | None = None,
    decode: Decode = "balanced",
) -> LatentsColumn:
    """What describes latents of `codec`.

    Args:
        url: where the codec is, without credentials.

    Raises:
        UserError: images of this size do not go with the codec, or it has no moments.
    """
    if holds == "moments" and not codec.has_posterior:
        raise UserError(
            f"--latents: {url} is a {type(codec.vae).__name__}, which gives latents without variances; take mean"
        )
    for side in (resolution, *(side for shape in (buckets or {}).values() for side in shape)):
        if side % codec.downsampling:
            below = side // codec.downsampling * codec.downsampling
            raise UserError(f"--resolution: {side} px is no multiple of the autoencoder's downsampling, {codec.downsampling}; "
                            f"take {below or codec.downsampling} or {below + codec.downsampling}")  # fmt: skip
    return LatentsColumn(
        holds=holds,
        dtype=dtype,
        codec=url,
        codec_class=type(codec.vae).__name__,
        revision=codec_revision(codec),
        channels=codec.latent_channels,
        downsampling=codec.downsampling,
        resolution=resolution,
        buckets=dict(buckets or {}),
        decode=decode,
    )


@dataclass(frozen=True)
class LoadCodec:
    """Call it in a worker for its `EncodeImages`. Picklable."""

    url: str
    holds: Holds
    revision: str
    """That the weights must have: on another machine the URL may mean others."""
    device: str = "auto"
    num_threads: int | None = None
    """Of torch, on the CPU; absent: as it is."""

    def __call__(self) -> "EncodeImages":
        """
        Raises:
            UserError: no autoencoder there, or another one.
        """
        device = _own_device(self.device)
        _set_threads(device, self.num_threads)
        codec = Codec.load(self.url)
        _check_revision("--codec", codec_revision(codec), self.revision)
        return EncodeImages(codec.to(device), device, moments=self.holds == "moments")


class EncodeImages:
    """Pixels to raw latents, in float32."""

    def __init__(self, codec: Codec, device: torch.device, *, moments: bool) -> None:
        self._codec, self._device, self._moments = codec, device, moments

    @torch.no_grad()
    def __call__(self, pixels_BHWC: NDArray[np.uint8]) -> Tensor:
        """(B, C, h, w), or (B, 2C, h, w) of moments, on the host."""
        pixels_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).contiguous()
        images_BCHW = pixels_to_images(pixels_BCHW.to(self._device))
        codec = self._codec
        raw_BCHW = codec.encode_moments(images_BCHW) if self._moments else codec.encode_raw(images_BCHW)
        return raw_BCHW.float().cpu()


def codec_revision(codec: Codec) -> str:
    """sha256 of the weights that latents follow from."""
    return weights_hash(codec.encoder_weights().items(), torch.float32)


# ----------------------------------------------------------------------------------------------------------------- text


def text_column(
    config: EncoderConfig, url: str, *, dtype: DType, captions_per_kind: int | None, revision: str
) -> TextColumn:
    """What describes states of a frozen text encoder. `url`: where it is, without credentials."""
    return TextColumn(
        dtype=dtype,
        encoder=url + (f"#{config.weights_folder}" if config.weights_folder else ""),
        family=config.family,
        revision=revision,
        width=config.width,
        pooled_width=config.pooled_width,
        max_tokens=config.max_tokens,
        hidden_state=config.hidden_state,
        padding=config.padding,
        captions_per_kind=captions_per_kind,
    )


def text_encoders(given: str) -> tuple[EncoderConfig, ...]:
    """Encoders that `--text` names: a YAML file, or YAML itself, with the fields of `task.text` or of one of its encoders.

    Raises:
        UserError: neither.
    """
    source = "--text"
    if Path(given).is_file():
        source = f"--text: {given}"
        given = Path(given).read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(given)
        if not isinstance(tree, dict):
            raise UserError(f"{source}: neither a file nor a mapping; give a file, or "
                            "'{family: clip, url: FOLDER, width: 768, pooled_width: 768}'")  # fmt: skip
        if "encoders" in tree:
            return FrozenTextConfig.model_validate(tree).encoders
        return (EncoderConfig.model_validate(tree),)
    except yaml.YAMLError as e:
        raise UserError(f"{source}: not YAML ({one_line(e)})") from None
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{source}: {f'{field}: ' if field else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def text_revision(config: EncoderConfig, field: str) -> str:
    """Of the encoder that `config` names; loads it, on the CPU."""
    return encoder_revision(_load_text(config, torch.device("cpu"), field))


def encoder_revision(encoder: torch.nn.Module) -> str:
    """sha256 of a frozen text encoder's weights as bfloat16, whatever precision they are in."""
    return weights_hash(sorted(encoder.state_dict().items()), torch.bfloat16)


@dataclass(frozen=True)
class LoadText:
    """Call it in a worker for its `EncodeCaptions`. Picklable."""

    config: EncoderConfig
    revision: str
    field: str = "--text"
    device: str = "auto"
    num_threads: int | None = None

    def __call__(self) -> "EncodeCaptions":
        """
        Raises:
            UserError: no such encoder there, or another one.
        """
        device = _own_device(self.device)
        _set_threads(device, self.num_threads)
        return EncodeCaptions(self.config, device, self.revision, self.field)


class EncodeCaptions:
    """Captions to what the encoder gives for them, in float32."""

    def __init__(self, config: EncoderConfig, device: torch.device, revision: str, field: str) -> None:
        self._encoder, self._device = _load_text(config, device, field), device
        _check_revision(field, encoder_revision(self._encoder), revision)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[tuple[Tensor, Tensor | None, bool]]:
        """Of each caption: token states (L, T) without padding that is zero, pooled output (P,) if any, and whether it was
        longer than the encoder takes."""
        encoder, device = self._encoder, self._device
        tokens = encoder.tokenize(captions)
        states_BLT, pooled_BP = encoder(tokens.ids_BL.to(device), tokens.mask_BL.to(device))
        states_BLT = states_BLT.float().cpu()
        pooled = [None] * len(captions) if pooled_BP is None else list(pooled_BP.float().cpu())
        lengths = tokens.mask_BL.sum(1).tolist() if encoder.zero_padding else [states_BLT.shape[1]] * len(captions)
        rows = zip(states_BLT, lengths, pooled, tokens.cut, strict=True)
        return [(states_LT[:length], pooled_P, cut) for states_LT, length, pooled_P, cut in rows]


def _load_text(config: EncoderConfig, device: torch.device, field: str) -> "FrozenEncoder":
    """As a run with `task.text.kind: frozen` has it."""
    from trainer.models.frozen_encoder import FrozenEncoder
    from trainer.models.frozen_text import FrozenText  # imports transformers, which takes seconds

    [encoder] = FrozenText(FrozenTextConfig(encoders=(config,)), device, field=field).encoders
    assert isinstance(encoder, FrozenEncoder)
    return encoder


# --------------------------------------------------------------------------------------------------------------- common


def weights_hash(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """sha256 of names, shapes and values in `dtype`: the same whatever file, order of files or device they came from."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)};".encode())
        flat = weight.detach().flatten()
        for start in range(0, len(flat), _HASHED_AT_A_TIME):
            part = flat[start : start + _HASHED_AT_A_TIME].to(dtype).cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_revision(option: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{option}: its weights here are {found[:12]}, and {expected[:12]} where the command was given; give "
                        "all workers the same files")  # fmt: skip


def _own_device(name: str) -> torch.device:
    """A worker's device: of several GPUs, unless one is named, the next for each process that was started."""
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    number = re.search(r"(\d+)$", multiprocessing.current_process().name)
    return torch.device("cuda", (int(number[1]) - 1) % torch.cuda.device_count() if number else 0)


def _set_threads(device: torch.device, num_threads: int | None) -> None:
    if num_threads and device.type == "cpu":
        torch.set_num_threads(num_threads)
