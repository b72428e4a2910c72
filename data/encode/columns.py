"""Columns of what frozen networks made of samples: their descriptions, the bytes of a value, and the files between stages.

A value is what `safetensors` makes of a sample's tensors, so it says its own shapes and dtype, and reading it runs nothing:

    latents    `latents`: (C, h, w), or of moments (2C, h, w), the means first, then the logarithms of the variances
    text       `ID.tokens`: (L, T), and `ID.pooled`: (P,) if any, of each caption that was encoded; ID is `caption_id` of it

Latents are raw: scale and shift, which belong to a run's autoencoder, are applied when they are read. In a dataset such a
column has the MDS encoding `bytes` and its description stands in dataset.json's `columns`; an empty value means that there is
none for this sample. Between stages the columns of a shard are a parquet file: `key`, `content`, and a binary column for each.

C channels, h and w sides of the latents, L tokens, T and P channels of token states and of pooled text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from trainer.errors import UserError

MDS_ENCODING = "bytes"
KEY, CONTENT = "key", "content"
LATENTS = "latents"
"""Name of the tensor, and of the column unless told otherwise."""
METADATA = b"loupe.columns"
"""Of the parquet schema: JSON, column -> description."""
MAX_VALUE_BYTES = 64 << 20

DType = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Count = Annotated[int, Field(gt=0, le=1 << 20)]
Revision = Annotated[str, Field(pattern="^[0-9a-f]{16,128}$")]
T = TypeVar("T", bound="Column")


class Column(BaseModel):
    """What all descriptions have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: DType

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class LatentsColumn(Column):
    """Latents of the centre crop. Equal descriptions: latents that a run may mix."""

    kind: Literal["latents"] = "latents"
    holds: Literal["mean", "moments"]
    """The posterior's mean, or mean and log variance to draw from."""
    codec: str
    """URL of the autoencoder, without credentials; for people."""
    codec_class: str
    revision: Revision
    """sha256 of the weights that make latents: autoencoders that differ in their decoders alone have the same."""
    channels: Count
    """Of a latent, without its variance."""
    downsampling: Count
    resolution: Count
    """Side of the square images in pixels; of buckets, of the square of about equal area."""
    crop: Literal["centre"] = "centre"
    decode: Literal["fast", "balanced", "exact"] = "balanced"
    """How JPEGs that are larger were shrunk, as `data.decode` has it."""
    buckets: dict[str, tuple[Count, Count]] = {}
    """Name of each aspect bucket to (height, width) of its images in pixels; empty: squares."""

    @model_validator(mode="after")
    def _divides(self) -> "LatentsColumn":
        for side in (self.resolution, *(side for shape in self.buckets.values() for side in shape)):
            if side % self.downsampling:
                raise ValueError(f"{side} px is no multiple of the downsampling, {self.downsampling}")
        return self

    @property
    def stored_channels(self) -> int:
        return self.channels * (2 if self.holds == "moments" else 1)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(height, width) in pixels by bucket; of squares by the empty name."""
        return self.buckets or {"": (self.resolution, self.resolution)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of what is stored of an image of so many pixels."""
        return self.stored_channels, height // self.downsampling, width // self.downsampling

    def value_bytes(self) -> int:
        """Of the largest value, about."""
        area = max(height * width for height, width in self.shapes.values())
        return self.stored_channels * area // self.downsampling**2 * self.torch_dtype.itemsize


class TextColumn(Column):
    """States that one frozen text encoder gives for captions."""

    kind: Literal["text"] = "text"
    encoder: str
    """URL and folder of the encoder, without credentials; for people."""
    family: Literal["clip", "t5", "gemma", "siglip"]
    revision: Revision
    """sha256 of the weights, as bfloat16: an encoder is the same in both precisions that it runs in."""
    width: Count
    """T."""
    pooled_width: Count | None = None
    """P; absent: none is stored."""
    max_tokens: Count
    hidden_state: Annotated[int, Field(le=-1)] = -1
    padding: Literal["masked", "seen"] = "masked"
    captions_per_kind: Count | None = None
    """The first so many captions of each kind were encoded; absent: all."""

    def value_bytes(self, num_captions: int) -> int:
        """Of captions as long as they may be."""
        return num_captions * (self.max_tokens * self.width + (self.pooled_width or 0)) * self.torch_dtype.itemsize


Description = Annotated[LatentsColumn | TextColumn, Field(discriminator="kind")]
_ANY: TypeAdapter[LatentsColumn | TextColumn] = TypeAdapter(Description)


def parse_column(tree: Any, *, where: str) -> LatentsColumn | TextColumn:
    """A description as dataset.json or a sidecar has it; `where` names the column in errors.

    Raises:
        UserError: it is none, or of a later version.
    """
    try:
        return _ANY.validate_python(tree)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("latents", "text"))
        raise UserError(
            f"{where}: {f'{field}: ' if field else ''}{first['msg']}; encode and build again with this version of the code"
        ) from None


def parse_latents(tree: Any, *, where: str) -> LatentsColumn:
    """As `parse_column`, of latents.

    Raises:
        UserError: also where the column holds text.
    """
    return _of_kind(parse_column(tree, where=where), LatentsColumn, where)


def parse_text(tree: Any, *, where: str) -> TextColumn:
    return _of_kind(parse_column(tree, where=where), TextColumn, where)


def _of_kind(column: Column, kind: type[T], where: str) -> T:
    if not isinstance(column, kind):
        other = "latents" if isinstance(column, LatentsColumn) else "states of a text encoder"
        raise UserError(f"{where}: the column holds {other}; name another column")
    return column


# --------------------------------------------------------------------------------------------------------------- values


def caption_id(caption: str) -> str:
    """What a caption's states are found by, whatever order or kind it later stands in."""
    return xxhash.xxh3_64(caption.encode()).hexdigest()


def cast(values: Tensor, column: Column, key: str) -> Tensor:
    """Float32 values in the column's dtype.

    Raises:
        UserError: they are not finite, or no longer after the cast.
    """
    if not values.isfinite().all():
        raise UserError(
            f"{key}: the network gives values that are not finite; leave the sample out, or look at the weights"
        )
    stored = values.to(column.torch_dtype)
    if not stored.isfinite().all():
        largest = values.abs().max().item()
        raise UserError(f"{key}: holds {largest:.4g}, too large for {column.dtype}; take --dtype bfloat16 or float32")
    return stored


def latents_to_bytes(latents_CHW: Tensor) -> bytes:
    """In the dtype that they have."""
    return safetensors.torch.save({LATENTS: latents_CHW.contiguous()})


def bytes_to_latents(value: bytes, column: LatentsColumn, height: int, width: int, *, where: str) -> Tensor:
    """A sample's raw latents in the stored dtype, `column.latent_shape(height, width)`.

    Args:
        height, width: of the batch's images, in pixels.

    Raises:
        UserError: it is no such value, or of an image of another shape.
    """
    latents = _tensors(value, where).get(LATENTS)
    expected = column.latent_shape(height, width)
    if latents is None or latents.dtype != column.torch_dtype:
        raise UserError(f"{where}: is not what the column's description says; encode and build the dataset again")
    if tuple(latents.shape) != expected:
        raise UserError(
            f"{where}: latents of shape {tuple(latents.shape)}, expected {expected} for images of {height} x {width} px; "
            "encode and build with the same buckets"
        )
    return latents


def states_to_bytes(states: Mapping[str, tuple[Tensor, Tensor | None]]) -> bytes:
    """Caption -> token states (L, T) and pooled output (P,)."""
    tensors: dict[str, Tensor] = {}
    for caption, (tokens_LT, pooled_P) in states.items():
        # copies, as safetensors takes none that share memory, and a batch's states do
        tensors[f"{caption_id(caption)}.tokens"] = tokens_LT.clone(memory_format=torch.contiguous_format)
        if pooled_P is not None:
            tensors[f"{caption_id(caption)}.pooled"] = pooled_P.clone(memory_format=torch.contiguous_format)
    return safetensors.torch.save(tensors)


def bytes_to_states(
    value: bytes, column: TextColumn, caption: str, *, where: str
) -> tuple[Tensor, Tensor | None] | None:
    """A caption's token states (L, T) and pooled output (P,) in the stored dtype; None: it was not encoded.

    Raises:
        UserError: it is no such value.
    """
    tensors, name = _tensors(value, where) if value else {}, caption_id(caption)
    tokens_LT, pooled_P = tensors.get(f"{name}.tokens"), tensors.get(f"{name}.pooled")
    if tokens_LT is None:
        return None
    wrong = (
        tokens_LT.ndim != 2
        or tokens_LT.shape[1] != column.width
        or not 0 < len(tokens_LT) <= column.max_tokens
        or (None if pooled_P is None else tuple(pooled_P.shape)) != (column.pooled_width and (column.pooled_width,))
        or any(tensor.dtype != column.torch_dtype for tensor in (tokens_LT, pooled_P) if tensor is not None)
    )
    if wrong:
        raise UserError(f"{where}: is not what the column's description says; encode and build the dataset again")
    return tokens_LT, pooled_P


def _tensors(value: bytes, where: str) -> dict[str, Tensor]:
    if len(value) > MAX_VALUE_BYTES:
        raise UserError(f"{where}: {len(value)} bytes, more than the {MAX_VALUE_BYTES} it may have")
    try:
        return safetensors.torch.load(value)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as e:
        raise UserError(f"{where}: is no column's value ({e}); encode and build the dataset again") from None


# ------------------------------------------------------------------------------------------------------- between stages


@dataclass(frozen=True)
class Sidecar:
    """What `encode` has put out for the samples of a shard."""

    where: str
    """The file, for messages."""
    columns: Mapping[str, LatentsColumn | TextColumn]
    contents: Mapping[str, bytes]
    """Key -> xxh3_128 of the image file that was encoded."""
    values: Mapping[str, Mapping[str, bytes]]
    """Key -> column -> value."""

    @property
    def described(self) -> dict[str, dict[str, Any]]:
        """The descriptions, as dataset.json takes them."""
        return {name: column.model_dump(mode="json") for name, column in self.columns.items()}

    def of(self, key: str, content: bytes) -> Mapping[str, bytes] | None:
        """A sample's values by column; None: it was not encoded.

        Args:
            content: xxh3_128 of the image that the latents are to stand for.

        Raises:
            UserError: latents of another image, such as one whose faces were not blurred yet.
        """
        values = self.values.get(key)
        if values is None:
            return None
        if self.contents[key] != content and any(isinstance(column, LatentsColumn) for column in self.columns.values()):
            raise UserError(f"{self.where}: {key}: the latents are of another image than the one to be stored; encode the "
                            "very samples that the dataset is built from")  # fmt: skip
        return values


def write_sidecar(
    path: Path,
    keys: Sequence[str],
    contents: Sequence[bytes],
    values: Mapping[str, Sequence[bytes]],
    columns: Mapping[str, Column],
) -> None:
    """A row for each key, in this order. `contents`, `values`: as `Sidecar` has them, by row."""
    import pyarrow as pa  # the training side imports this module as well, and needs no parquet
    import pyarrow.parquet as pq

    assert values.keys() == columns.keys()
    described = {name: column.model_dump(mode="json") for name, column in columns.items()}
    schema = pa.schema(
        [(KEY, pa.string()), (CONTENT, pa.binary(16)), *((name, pa.binary()) for name in columns)],
        metadata={METADATA: json.dumps(described, sort_keys=True).encode()},
    )
    table = pa.table({KEY: list(keys), CONTENT: list(contents), **values}, schema=schema)
    # Not compressed: the low bits of such numbers are noise.
    pq.write_table(table, path, compression="none", use_dictionary=False)


def read_sidecar(path: Path, *, where: str) -> Sidecar:
    """
    Args:
        where: names the file in errors.

    Raises:
        UserError: it is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        described = json.loads((table.schema.metadata or {})[METADATA])
        rows = table.select([KEY, CONTENT, *described]).to_pylist()
        contents = {str(row[KEY]): bytes(row[CONTENT]) for row in rows}
        values = {str(row[KEY]): {name: bytes(row[name]) for name in described} for row in rows}
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError) as e:
        raise UserError(f"{where}: not a file of columns ({e}); run `loupe data encode` again") from None
    columns = {name: parse_column(tree, where=f"{where}: {name}") for name, tree in described.items()}
    return Sidecar(where, columns, contents, values)
