"""Stored columns in a batch, in place of what a run would compute: which ones, and a sample's part of them.

U captions of a batch, N their tokens together, L tokens of one, T and P channels of token states and of pooled text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.encode.columns import LatentsColumn, TextColumn, bytes_to_latents, bytes_to_states
from data.images import ImageError
from data.schema import Sample

NO_LATENTS = "no_latents"
"""Reason of a substitution."""


@dataclass(frozen=True)
class States:
    """Of one text encoder, for the captions of a batch that are stored. Few tensors: each is a file between processes."""

    captions: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each caption."""
    tokens_NT: Tensor
    """One caption after the other, in the stored dtype."""
    pooled_UP: Tensor | None

    def by_caption(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Caption -> token states (L, T) and pooled output (P,); views."""
        tokens = self.tokens_NT.split(list(self.lengths))
        pooled = [None] * len(self.captions) if self.pooled_UP is None else list(self.pooled_UP)
        return {
            caption: (tokens_LT, pooled_P)
            for caption, tokens_LT, pooled_P in zip(self.captions, tokens, pooled, strict=True)
        }


@dataclass(frozen=True)
class Stored:
    """What the loader's processes take from columns. Picklable and small."""

    latents: Mapping[str, Mapping[int, tuple[str, LatentsColumn]]] = field(default_factory=dict)
    """Dataset -> resolution -> the column; empty: the run encodes images."""
    text: Mapping[str, Sequence[tuple[str, TextColumn] | None]] = field(default_factory=dict)
    """Dataset -> the column of each of the run's text encoders; None: the run encodes captions."""

    @property
    def names(self) -> tuple[str, ...]:
        """Columns that are read."""
        of_latents = (name for columns in self.latents.values() for name, _ in columns.values())
        of_text = (column[0] for columns in self.text.values() for column in columns if column)
        return tuple(dict.fromkeys((*of_latents, *of_text)))

    def latents_of(self, dataset: str, sample: Sample, resolution: int, shape: tuple[int, int]) -> Tensor:
        """A sample's raw latents or moments, in the stored dtype.

        Args:
            shape: (height, width) of the images of the batch, in pixels.

        Raises:
            ImageError: none is stored for this sample.
            UserError: they do not fit their description or the batch.
        """
        name, column = self.latents[dataset][resolution]
        value = sample.columns.get(name, b"")
        if not value:
            raise ImageError(NO_LATENTS, f"its column {name} is empty")
        return bytes_to_latents(value, column, *shape, where=f"{dataset}/{sample.key}: column {name}")

    def states_of(self, samples: Sequence[tuple[str, Sample, str]]) -> tuple[States | None, ...]:
        """Of (dataset, sample, its caption): the states of each of the run's encoders, as far as they are stored.

        Raises:
            UserError: they do not fit their description.
        """
        if not self.text:
            return ()
        count = len(next(iter(self.text.values())))
        return tuple(self._states_of(i, samples) for i in range(count))

    def _states_of(self, encoder: int, samples: Sequence[tuple[str, Sample, str]]) -> States | None:
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for dataset, sample, caption in samples:
            column = self.text[dataset][encoder]
            if column is None or caption in found:
                continue
            name, description = column
            where = f"{dataset}/{sample.key}: column {name}"
            states = bytes_to_states(sample.columns.get(name, b""), description, caption, where=where)
            if states is not None:
                found[caption] = states
        if not found:
            return None
        pooled = [pooled_P for _, pooled_P in found.values() if pooled_P is not None]
        return States(
            tuple(found),
            tuple(len(tokens_LT) for tokens_LT, _ in found.values()),
            torch.cat([tokens_LT for tokens_LT, _ in found.values()]),
            torch.stack(pooled) if pooled else None,
        )
