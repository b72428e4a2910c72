"""Frozen text encoders, one or several, as one condition: who is given which caption, how their outputs are joined, and
which states are kept for the next time.

B batch, L tokens, T width of the joined tokens, P of the joined pooled text. U captions to encode, K captions whose
states are known.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trainer.config import EncoderConfig, FrozenTextConfig
from trainer.models.condition import Condition
from trainer.models.frozen_encoder import FrozenEncoder, load_encoder
from trainer.models.text_encoders import TextEncoder, trimmed_length

CPU = torch.device("cpu")


@dataclass(frozen=True)
class States:
    """What an encoder gives for one caption, on the host: token states without padding that is zero, and pooled."""

    tokens_LT: Tensor
    pooled_P: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.tokens_LT.nbytes + (0 if self.pooled_P is None else self.pooled_P.nbytes)


class StateCache:
    """States by encoder and caption in host memory; the least recently used make room."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.hits = self.misses = 0
        """Of distinct captions in a batch, summed over batches and encoders."""
        self._states: OrderedDict[tuple[int, str], States] = OrderedDict()

    def get(self, encoder: int, caption: str) -> States | None:
        states = self._states.get((encoder, caption))
        if states is None:
            self.misses += 1
            return None
        self.hits += 1
        self._states.move_to_end((encoder, caption))
        return states

    def put(self, encoder: int, caption: str, states: States) -> None:
        if states.num_bytes > self.max_bytes:
            return
        if (old := self._states.pop((encoder, caption), None)) is not None:
            self.num_bytes -= old.num_bytes
        self._states[encoder, caption] = states
        self.num_bytes += states.num_bytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._states.popitem(last=False)[1].num_bytes


@dataclass(frozen=True)
class EncoderInput:
    """What one encoder is given for a batch. Captions that repeat are encoded once."""

    captions: tuple[str, ...]
    """Those to encode."""
    ids_UL: Tensor
    mask_UL: Tensor
    known_KLT: Tensor
    known_KP: Tensor | None
    row_B: Tensor
    """Where a sample's states lie in those encoded, then those known, then a row of zeros."""
    mask_BL: Tensor
    lengths: tuple[int, ...]
    """Tokens worth keeping of each caption to encode."""
    num_given: int
    """Places of the states that the denoiser is given; those behind are padding."""

    def to(self, device: torch.device) -> "EncoderInput":
        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.numel():  # from pageable memory a large copy waits for the device
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return replace(
            self, ids_UL=move(self.ids_UL), mask_UL=move(self.mask_UL), known_KLT=move(self.known_KLT),
            known_KP=None if self.known_KP is None else move(self.known_KP), row_B=move(self.row_B),
            mask_BL=move(self.mask_BL),
        )  # fmt: skip


@dataclass(frozen=True)
class FrozenInput:
    """One input for each encoder."""

    encoders: tuple[EncoderInput, ...]
    num_cut: int = 0
    """Samples whose caption was longer than an encoder that sees it takes."""

    def to(self, device: torch.device) -> "FrozenInput":
        return FrozenInput(tuple(encoder.to(device) for encoder in self.encoders), self.num_cut)

    def trimmed(self) -> "FrozenInput":
        """Captions are encoded at their full length all the same, as the encoders were trained."""
        lengths = [replace(encoder, num_given=trimmed_length(encoder.mask_BL)) for encoder in self.encoders]
        return FrozenInput(tuple(lengths), self.num_cut)


class FrozenText(TextEncoder):
    """Frozen encoders of transformers. Always in eval mode, without gradients; bf16 on a GPU, float32 on the CPU.

    Stands beside the trained module, not in it: there is nothing to shard, average or save. The joined states are
    float32. States from the cache are those the encoder gave, and differ from a new run's only by the rounding of
    another batch size. `prepare` and `forward` belong to one thread.
    """

    frozen = True

    def __init__(
        self, config: FrozenTextConfig, device: torch.device = CPU, *, field: str = "task.text",
        encoders: Sequence[FrozenEncoder] = (),
    ) -> None:  # fmt: skip
        """Load onto `device`.

        Args:
            encoders: those of the config, where they are there already.

        Raises:
            UserError: an encoder's files are missing, damaged, or not what the config declares.
        """
        super().__init__()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config = config
        self.token_width, self.pooled_width = config.width, config.pooled_width
        self.dropouts = tuple(encoder.dropout for encoder in config.encoders)
        self.encoders = nn.ModuleList(
            encoders
            or [
                load_encoder(encoder, f"{field}.encoders.{i}", dtype).to(device)
                for i, encoder in enumerate(config.encoders)
            ]
        )
        self.cache = StateCache(config.cache_mib << 20) if config.cache_mib else None
        self._on_the_way: list[_OnTheWay] = []
        self.eval()

    def init_weights(self) -> None:
        """Nothing: the weights are the files'."""

    def train(self, mode: bool = True) -> "FrozenText":
        """Stays in eval mode: a task that calls `train()` on all its modules must not wake a frozen one."""
        super().train(False)
        return self

    def prepare(
        self,
        captions: Sequence[str | None],
        labels: Sequence[int] | None = None,
        dropped: Sequence[Sequence[bool]] = (),
        known: Sequence[Mapping[str, tuple[Tensor, Tensor | None]]] = (),
    ) -> FrozenInput:
        """Tokens of what each encoder has to encode, and the states that are known already.

        Args:
            captions: None is the null condition for all encoders.
            dropped: `dropped[i][b]`: encoder i does not see caption b, and is given its null condition.
            known: `known[i]`: captions that encoder i need not encode, with the states that it gave for them.
        """
        del labels
        assert not dropped or len(dropped) == len(self.encoders), f"{len(dropped)} of {len(self.encoders)} encoders"
        self._keep_what_arrived()
        inputs, cut = [], set[int]()
        for i, encoder in enumerate(self._encoders()):
            given = _captions_of(encoder.config, captions, dropped[i] if dropped else [False] * len(captions))
            prepared, cut_here = self._prepare(i, encoder, given, known[i] if known else {})
            inputs.append(prepared)
            cut |= {b for b, caption in enumerate(given) if caption in cut_here}
        return FrozenInput(tuple(inputs), len(cut))

    @torch.no_grad()
    def forward(self, text: FrozenInput) -> Condition:
        """Groups of encoders beside each other in the channels, padded with zeros to one width, one after another along
        the tokens (SD3: CLIP-L and CLIP-G, then T5). A token is real where any encoder of its group has a real one."""
        states, pooled, masks = [], [], []
        encoders = iter(enumerate(zip(self._encoders(), text.encoders, strict=True)))
        for group in self.config.groups:
            members = [next(encoders) for _ in group]
            length = max(given.num_given for _, (_, given) in members)
            outputs = [self._encode(i, encoder, given, length) for i, (encoder, given) in members]
            states_BLT = torch.cat([tokens for tokens, _ in outputs], dim=-1)
            states.append(pad(states_BLT, (0, self.token_width - states_BLT.shape[-1])))
            pooled += [pooled_BP for _, pooled_BP in outputs if pooled_BP is not None]
            masks.append(torch.stack([given.mask_BL[:, :length] for _, (_, given) in members]).any(0))
        return Condition(
            torch.cat(states, dim=1), torch.cat(pooled, dim=-1) if pooled else None, torch.cat(masks, dim=1)
        )

    def _encoders(self) -> list[FrozenEncoder]:
        return [encoder for encoder in self.encoders if isinstance(encoder, FrozenEncoder)]

    def _prepare(
        self, i: int, encoder: FrozenEncoder, given: Sequence[str | None],
        stored: Mapping[str, tuple[Tensor, Tensor | None]],
    ) -> tuple[EncoderInput, set[str]]:  # fmt: skip
        """The input for what each sample is given, None being zeros; and the captions that were cut."""
        config = encoder.config
        captions = list(dict.fromkeys(caption for caption in given if caption is not None))
        states = [
            States(*stored[caption]) if caption in stored else self.cache.get(i, caption) if self.cache else None
            for caption in captions
        ]
        known = {caption: found for caption, found in zip(captions, states, strict=True) if found}
        unknown = tuple(caption for caption in captions if caption not in known)

        ordered = [*unknown, *known]
        num_tokens = config.max_tokens
        if ordered:
            tokens = encoder.tokenize(ordered)
            ids, mask, cut = tokens.ids_BL, tokens.mask_BL, tokens.cut
        else:
            ids, mask, cut = torch.zeros(0, num_tokens, dtype=torch.long), torch.zeros(0, num_tokens) > 0, ()
        dtype = next(encoder.parameters()).dtype
        known_KLT = torch.zeros(len(known), num_tokens, config.width, dtype=dtype)
        for row, found in zip(known_KLT, known.values(), strict=True):
            row[: len(found.tokens_LT)] = found.tokens_LT
        pools = [found.pooled_P.to(dtype) for found in known.values() if found.pooled_P is not None]

        row_of: dict[str | None, int] = {caption: row for row, caption in enumerate(ordered)}
        row_of[None] = len(ordered)
        row_B = torch.tensor([row_of[caption] for caption in given], dtype=torch.long)
        # Zeros keep one token, so that attention to the text alone has one to attend to.
        zeros_1L = torch.arange(num_tokens)[None] == 0
        kept_UL = mask[: len(unknown)] if encoder.zero_padding else torch.ones_like(mask[: len(unknown)])
        shown_ML = torch.cat([mask | (config.padding == "seen"), zeros_1L])
        prepared = EncoderInput(
            unknown, ids[: len(unknown)], mask[: len(unknown)], known_KLT, torch.stack(pools) if pools else None,
            row_B, shown_ML[row_B], tuple(kept_UL.sum(1).tolist()), num_tokens,
        )  # fmt: skip
        return prepared, {caption for caption, is_cut in zip(ordered, cut, strict=True) if is_cut}

    def _encode(self, i: int, encoder: FrozenEncoder, text: EncoderInput, length: int) -> tuple[Tensor, Tensor | None]:
        """States (B, length, T) and pooled output (B, P) of one encoder, float32."""
        rows = [text.known_KLT]
        pooled_rows = [] if text.known_KP is None else [text.known_KP]
        if text.captions:
            states_ULT, pooled_UP = encoder(text.ids_UL, text.mask_UL)
            rows.insert(0, states_ULT)
            pooled_rows = pooled_rows if pooled_UP is None else [pooled_UP, *pooled_rows]
            if self.cache:
                self._on_the_way.append(_OnTheWay(i, text, states_ULT, pooled_UP))
        rows.append(text.known_KLT.new_zeros(1, *text.known_KLT.shape[1:]))
        states_BLT = torch.cat([states[:, :length] for states in rows])[text.row_B].float()
        if encoder.config.pooled_width is None:
            return states_BLT, None
        pooled_rows.append(rows[-1].new_zeros(1, encoder.config.pooled_width))
        return states_BLT, torch.cat(pooled_rows)[text.row_B].float()

    def _keep_what_arrived(self) -> None:
        assert self.cache is not None or not self._on_the_way
        while self._on_the_way and self._on_the_way[0].arrived():
            assert self.cache is not None
            self._on_the_way.pop(0).put_into(self.cache)


class _OnTheWay:
    """States that are being copied to the host, for the cache: nobody waits for them, the next `prepare` after their
    arrival takes them."""

    def __init__(self, encoder: int, text: EncoderInput, states_ULT: Tensor, pooled_UP: Tensor | None) -> None:
        self._encoder, self._captions, self._lengths = encoder, text.captions, text.lengths
        self._tokens_ULT = _to_host(states_ULT)
        self._pooled_UP = None if pooled_UP is None else _to_host(pooled_UP)
        self._event = torch.cuda.Event() if states_ULT.is_cuda else None
        if self._event is not None:
            self._event.record()

    def arrived(self) -> bool:
        return self._event is None or bool(self._event.query())

    def put_into(self, cache: StateCache) -> None:
        for row, (caption, length) in enumerate(zip(self._captions, self._lengths, strict=True)):
            pooled_P = None if self._pooled_UP is None else self._pooled_UP[row].clone()
            cache.put(self._encoder, caption, States(self._tokens_ULT[row, :length].clone(), pooled_P))


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _captions_of(encoder: EncoderConfig, captions: Sequence[str | None], dropped: Sequence[bool]) -> list[str | None]:
    """What an encoder is given for each sample: a caption, or None for zeros."""
    null = "" if encoder.null_text == "empty" else None
    return [null if drop or caption is None else caption for caption, drop in zip(captions, dropped, strict=True)]
