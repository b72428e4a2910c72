"""Text and class encoders. An encoder prepares captions on the host and encodes them on the device.

B batch, L tokens, T width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.config import ByteTextConfig, ClassLabelConfig, TextConfig
from trainer.errors import UserError
from trainer.models.condition import Condition
from trainer.models.layers import MLP, QKV, joint_attention


class TextInput(Protocol):
    """What an encoder's `prepare` gives and its `forward` takes."""

    @property
    def num_cut(self) -> int:
        """Captions that were longer than the encoder takes."""

    def to(self, device: torch.device) -> "TextInput": ...

    def trimmed(self) -> "TextInput":
        """Without the places that are padding in every caption: nothing looks at them. On the host."""


def trimmed_length(mask_BL: Tensor) -> int:
    """Up to the last place that is real in some caption; each encoder has one at least. The mask is on the host."""
    return int(mask_BL.any(0).numpy().nonzero()[0].max()) + 1


@dataclass(frozen=True)
class TokenInput:
    """Token ids ready for the device."""

    ids_BL: Tensor
    mask_BL: Tensor
    num_cut: int = 0

    def to(self, device: torch.device) -> "TokenInput":
        return TokenInput(
            self.ids_BL.to(device, non_blocking=True), self.mask_BL.to(device, non_blocking=True), self.num_cut
        )

    def trimmed(self) -> "TokenInput":
        length = trimmed_length(self.mask_BL)
        return TokenInput(self.ids_BL[:, :length], self.mask_BL[:, :length], self.num_cut)


class TextEncoder(nn.Module, ABC):
    """Common interface; `forward` takes what `prepare` gives and returns a `Condition`. `None` as a caption is the null
    condition of classifier-free guidance."""

    frozen: bool = False
    """Not trained, and not part of what is sharded and saved."""
    dropouts: tuple[float, ...] = ()
    """Share of samples that each of several encoders is not to see."""
    token_width: int
    pooled_width: int
    """0: there is no pooled text."""

    @abstractmethod
    def prepare(
        self,
        captions: Sequence[str | None],
        labels: Sequence[int] | None = None,
        dropped: Sequence[Sequence[bool]] = (),
        known: Sequence[Mapping[str, tuple[Tensor, Tensor | None]]] = (),
    ) -> TextInput:
        """Tokens of captions, or of the samples' labels, on the host. `dropped[i][b]`: encoder i does not see caption b.
        `known[i]`: of some captions what the frozen encoder i gives for them, token states (L, T) and pooled output (P,)."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fresh weights, from torch's global generator."""


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = QKV(width, num_heads, norm=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def forward(self, x_BLT: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLT = x_BLT + self.out(joint_attention([(self.qkv, self.norm1(x_BLT))], mask_BL))
        out: Tensor = x_BLT + self.mlp(self.norm2(x_BLT))
        return out


class ByteEncoder(TextEncoder):
    """A small transformer over UTF-8 bytes, trained with the denoiser: needs no vocabulary and no download."""

    BEGIN, PADDING, VOCABULARY = 256, 257, 258

    def __init__(self, config: ByteTextConfig) -> None:
        super().__init__()
        self.max_bytes = config.max_bytes
        self.token_width = self.pooled_width = config.width
        self.embedding = nn.Embedding(self.VOCABULARY, config.width)
        self.positions = nn.Parameter(torch.empty(config.max_bytes + 1, config.width))
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.num_heads) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def prepare(
        self,
        captions: Sequence[str | None],
        labels: Sequence[int] | None = None,
        dropped: Sequence[Sequence[bool]] = (),
        known: Sequence[Mapping[str, tuple[Tensor, Tensor | None]]] = (),
    ) -> TokenInput:
        """Bytes behind a begin token, padded to (B, max_bytes + 1); the null caption is the begin token alone."""
        del labels, dropped, known
        ids = torch.full((len(captions), self.max_bytes + 1), self.PADDING)
        ids[:, 0] = self.BEGIN
        num_cut = 0
        for row, caption in zip(ids, captions, strict=True):
            text = (caption or "").encode()
            num_cut += len(text) > self.max_bytes
            text = text[: self.max_bytes]
            row[1 : len(text) + 1] = torch.tensor(list(text), dtype=torch.long)
        return TokenInput(ids, ids != self.PADDING, num_cut)

    def forward(self, text: TokenInput) -> Condition:
        x_BLT = self.embedding(text.ids_BL) + self.positions[: text.ids_BL.shape[1]]
        for block in self.blocks:
            x_BLT = block(x_BLT, text.mask_BL)
        x_BLT = self.norm(x_BLT)
        weights_BL1 = text.mask_BL[..., None].to(x_BLT.dtype)
        pooled_BT = (x_BLT * weights_BL1).sum(1) / weights_BL1.sum(1)
        return Condition(x_BLT, pooled_BT, text.mask_BL)


class ClassEncoder(TextEncoder):
    """Class labels: one learned vector a class, as the only token and as the pooled text; one more for no class.

    `labels_only`: no vectors, for a denoiser that has its own.
    """

    def __init__(self, config: ClassLabelConfig, *, labels_only: bool = False) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.token_width = self.pooled_width = config.width
        self.embedding = None if labels_only else nn.Embedding(config.num_classes + 1, config.width)

    def init_weights(self) -> None:
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=0.02)

    def prepare(
        self,
        captions: Sequence[str | None],
        labels: Sequence[int] | None = None,
        dropped: Sequence[Sequence[bool]] = (),
        known: Sequence[Mapping[str, tuple[Tensor, Tensor | None]]] = (),
    ) -> TokenInput:
        """Labels of the samples; where no labels are given, as for prompts, a caption is the class's number."""
        del dropped, known
        chosen: list[int] = []
        for i, caption in enumerate(captions):
            if caption is None:
                chosen.append(self.num_classes)
                continue
            label = labels[i] if labels is not None else int(caption) if caption.strip().isdigit() else -1
            if not 0 <= label < self.num_classes:
                given = f"label {label}" if labels is not None else f"prompt {caption!r}"
                mend = "take a dataset with labels, or text.kind: bytes for captions"
                if label >= self.num_classes:
                    mend = "set it to the number of the dataset's classes"
                elif labels is None:
                    mend = "give the class's number"
                raise UserError(f"task.text.num_classes: {given} is no class of 0..{self.num_classes - 1}; {mend}")
            chosen.append(label)
        ids = torch.tensor(chosen)[:, None]
        return TokenInput(ids, torch.ones_like(ids, dtype=torch.bool))

    def forward(self, text: TokenInput) -> Condition:
        if self.embedding is None:
            return Condition(text.ids_BL.new_zeros(len(text.ids_BL), 0, 0), labels_B=text.ids_BL[:, 0])
        tokens_B1T = self.embedding(text.ids_BL)
        # no mask: it would rule out flash attention
        return Condition(tokens_B1T, tokens_B1T[:, 0], labels_B=text.ids_BL[:, 0])


def build_text_encoder(
    config: TextConfig, device: torch.device | None = None, *, labels_only: bool = False
) -> TextEncoder:
    """The encoder of a config. Trainable ones are made where torch's default device is, without weights; frozen ones are
    read from their files onto `device`, by default the CPU. `labels_only`: the denoiser has vectors of its own for classes.

    Raises:
        UserError: a frozen encoder's files are missing, damaged, or not what the config declares.
    """
    if isinstance(config, ByteTextConfig):
        return ByteEncoder(config)
    if isinstance(config, ClassLabelConfig):
        return ClassEncoder(config, labels_only=labels_only)
    from trainer.models.frozen_text import FrozenText  # imports transformers, which takes seconds

    return FrozenText(config, device or torch.device("cpu"))
