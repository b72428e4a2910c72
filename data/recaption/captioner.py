"""Captions with Florence-2, by transformers' own `generate`, in an order in which little is computed in vain.

B: images or captions; R: values of an image's row; L: tokens of a caption so far; S: the encoder's tokens; D: their width.

How long a caption becomes is known when it is written. A fixed batch therefore goes on until its longest caption ends, most of
its rows long finished. Here `generate` goes up to a length, rows that have ended leave, and those that have not wait for
captions of later images that have come as far: all are as long then, so their caches can be joined. Batches stay full to the
end, which is what sorting by length is for.

Images are encoded once for all prompts. Images of an encoding and captions of a decoding are two numbers, because a step of
decoding costs a GPU the same for 16 rows as for 128.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.recaption.images import InputFormat, input_format
from data.recaption.model import check_new_tokens, load, max_new_tokens

LENGTHS = (16, 32, 64, 128, 256, 512)
"""In new tokens: where captions that have not ended are batched anew."""
MAX_PENDING = 6
"""Decoding batches of captions under way; beyond it batches are run before they are full."""


@dataclass(frozen=True)
class Decoding:
    """What decides which caption is written, and how fast."""

    beams: int = 1
    """1: greedy."""
    max_new_tokens: int = 256
    batch_images: int = 1
    """Of an encoding. On a CPU one by one is fastest: larger batches leave its caches."""
    batch_captions: int = 32
    """Of a decoding."""
    compiled: bool = False
    """A static cache, and on CUDA a compiled step. Batches are fixed then."""
    regroup: bool = True
    """Batch captions by how far they have come. With beams or compiled steps they are not."""


@dataclass(frozen=True)
class Caption:
    image: int
    """Number of the image, in the order in which they came."""
    prompt: int
    text: str
    """As the tokenizer gives it."""
    ended: bool
    """By the model, rather than at the limit."""
    tokens: int
    """New ones, its end included."""


@dataclass
class _Rows:
    """Captions of one prompt that are equally long."""

    owners: list[int]
    tokens_BL: Tensor
    states_BSD: Tensor
    """The encoder's."""
    cache: Any = None
    """EncoderDecoderCache of all tokens but the last."""

    def __len__(self) -> int:
        return len(self.owners)


@dataclass
class Work:
    """What decoding has done, to judge batches by."""

    steps: int = 0
    rows: int = 0
    """Rows times steps that were computed."""
    useful: int = 0
    """Of those, rows that had not ended."""


class Captioner:
    """
    Args:
        folder: Florence-2 in transformers' own format.
        prompts: such as `<CAPTION>`.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], *, device: str, dtype: str, decoding: Decoding) -> None:
        """
        Raises:
            UserError: the model cannot be loaded, or the limits do not fit it.
        """
        self.decoding = decoding
        self.model, self.processor = load(folder, device, dtype)
        self.form: InputFormat = input_format(self.processor.image_processor)
        self.device = torch.device(device)
        self.work = Work()
        self.more_processors: list[Any] = []
        """Of logits, beside those that the model's generation config asks for."""
        check_new_tokens(decoding.max_new_tokens, max_new_tokens(self.model.config))
        self._prompts = [self._prompt(text) for text in prompts]
        if self.device.type == "cpu":
            # 1.25 to 1.7 times the speed, measured: its blocks change between image and tokens all the time, and in this
            # layout that is no copy. Not measured on a GPU.
            self.model.model.vision_tower.to(memory_format=torch.channels_last)
        # As long as an image's row: broadcasting over three channels is three times slower.
        self._mean_R = torch.tensor(self.form.mean, device=self.device).repeat(self.form.width)
        self._std_R = torch.tensor(self.form.std, device=self.device).repeat(self.form.width)
        self._configs = self._generation_configs()
        self._lengths = list(self._configs)
        """Of whole captions, the start token included."""
        self._waiting: dict[tuple[int, int], list[_Rows]] = defaultdict(list)
        """By prompt and number of the length that they go to next."""

    def captions(self, images: Iterable[NDArray[np.uint8]]) -> Iterator[Caption]:
        """A caption of each image for each prompt, in the order in which they end.

        Args:
            images: uint8 (height, width, 3) of `form`.
        """
        self._waiting.clear()
        first = 0
        for batch in _batches(images, self.decoding.batch_images):
            self._encode(batch, first)
            first += len(batch)
            yield from self._decode(drain=False)
        yield from self._decode(drain=True)

    # ---------------------------------------------------------------------------------------------------------- encoder

    def _prompt(self, text: str) -> Tensor:
        """The encoder's token ids, with places for the image: (S,)."""
        blank = Image.new("RGB", (32, 32))
        ids_1S = self.processor(text=[text], images=[blank], return_tensors="pt")["input_ids"]
        return ids_1S[0].to(self.device)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def pixels(self, batch: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Normalised: (B, 3, height, width), in the model's dtype."""
        images_BHWC = torch.from_numpy(np.stack(batch))
        if self.device.type == "cuda":
            images_BHWC = images_BHWC.pin_memory().to(self.device, non_blocking=True)
        # In this order it is bit for bit what the processor does.
        pixels_BHR = images_BHWC.flatten(2).float().div_(255).sub_(self._mean_R).div_(self._std_R)
        return pixels_BHR.view(images_BHWC.shape).permute(0, 3, 1, 2).to(self.model.dtype)

    @torch.inference_mode()
    def _encode(self, batch: Sequence[NDArray[np.uint8]], first: int) -> None:
        features_BSD = self.model.get_image_features(self.pixels(batch)).pooler_output
        owners = [first + i for i in range(len(batch))]
        start = self.model.generation_config.decoder_start_token_id
        for prompt, ids_S in enumerate(self._prompts):
            ids_BS = ids_S.expand(len(batch), -1)
            embedded_BSD = self.model.get_input_embeddings()(ids_BS)
            places_BSD = self.model.get_placeholder_mask(ids_BS, embedded_BSD, features_BSD)
            embedded_BSD = embedded_BSD.masked_scatter(places_BSD, features_BSD.to(embedded_BSD.dtype))
            # All prompts of a batch are equally long, so no mask is needed.
            states_BSD = self.model.get_encoder()(inputs_embeds=embedded_BSD).last_hidden_state
            tokens_BL = torch.full((len(batch), 1), start, dtype=torch.long, device=self.device)
            self._waiting[prompt, 0].append(_Rows(owners, tokens_BL, states_BSD))

    # ---------------------------------------------------------------------------------------------------------- decoder

    def _generation_configs(self) -> dict[int, Any]:
        """Length to a config of `generate` that goes up to it, from the model's own."""
        decoding, base = self.decoding, copy.deepcopy(self.model.generation_config)
        forced_eos, base.forced_eos_token_id = base.forced_eos_token_id, None
        base.do_sample, base.num_beams, base.num_return_sequences = False, decoding.beams, 1
        base.temperature = base.top_p = base.top_k = None
        base.max_new_tokens = base.min_new_tokens = base.max_length = None
        base.return_dict_in_generate = True
        if decoding.beams == 1:
            base.early_stopping, base.length_penalty = False, None
        if decoding.compiled:
            base.cache_implementation = "static"
        longest = decoding.max_new_tokens + 1
        lengths = [longest]
        # These look at where a call of `generate` began.
        resumable = base.exponential_decay_length_penalty is None
        if decoding.regroup and resumable and decoding.beams == 1 and not decoding.compiled:
            lengths = [length + 1 for length in LENGTHS if length < decoding.max_new_tokens] + [longest]
        configs = {}
        for length in lengths:
            config = copy.deepcopy(base)
            config.max_length = length
            if length == longest:
                config.forced_eos_token_id = forced_eos
            configs[length] = config
        # What is None in a config given to `generate` is filled from the model's, so that must not force an end either.
        self.model.generation_config = base
        return configs

    def _decode(self, *, drain: bool) -> Iterator[Caption]:
        while (ready := self._ready(drain)) is not None:
            yield from self._run(*ready)

    def _ready(self, drain: bool) -> tuple[int, int] | None:
        """The captions to go on with, by prompt and next length."""
        counts = {place: sum(map(len, rows)) for place, rows in self._waiting.items() if rows}
        size = self.decoding.batch_captions
        full = [place for place, count in counts.items() if count >= size]
        if full:  # those that have come furthest, to be rid of them
            return max(full, key=lambda place: place[1])
        if counts and sum(counts.values()) > MAX_PENDING * size:
            return max(counts, key=lambda place: counts[place])
        # Those that have come least far: what is left of them makes the next batch larger.
        return min(counts, key=lambda place: place[1]) if drain and counts else None

    @torch.inference_mode()
    def _run(self, prompt: int, number: int) -> list[Caption]:
        size = self.decoding.batch_captions
        rows = _joined(self._waiting.pop((prompt, number)))
        if len(rows) > size:
            self._waiting[prompt, number].append(_chosen(rows, torch.arange(size, len(rows), device=self.device)))
            rows = _chosen(rows, torch.arange(size, device=self.device))
        before = rows.tokens_BL.shape[1]
        self._generate(rows, self._lengths[number])
        ended_B, ends_B = self._ends(rows.tokens_BL)
        is_last = number + 1 == len(self._lengths)
        steps = rows.tokens_BL.shape[1] - before
        self.work.steps += steps
        self.work.rows += steps * len(rows)
        self.work.useful += sum(min(end - before + 1, steps) for end in ends_B)
        done = [i for i, ended in enumerate(ended_B) if ended or is_last]
        if len(done) < len(rows):
            rest = [i for i, ended in enumerate(ended_B) if not ended]
            index = torch.tensor(rest, device=self.device)
            self._waiting[prompt, number + 1].append(_chosen(rows, index))
        if not done:
            return []
        texts = self.processor.batch_decode(
            [rows.tokens_BL[i] for i in done], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        longest = self._lengths[-1]
        return [
            Caption(rows.owners[i], prompt, text, ended=ends_B[i] < longest - 1, tokens=ends_B[i])
            for i, text in zip(done, texts, strict=True)
        ]

    def _generate(self, rows: _Rows, length: int) -> None:
        """Up to `length` tokens, in place."""
        from transformers.modeling_outputs import BaseModelOutput

        tokens_BL, states_BSD = rows.tokens_BL, rows.states_BSD
        size = len(rows)
        if self.decoding.compiled and size < self.decoding.batch_captions:
            fill = torch.arange(self.decoding.batch_captions, device=self.device).clamp(max=size - 1)
            tokens_BL, states_BSD = tokens_BL[fill], states_BSD[fill]  # one shape, compiled once
        continued = {} if rows.cache is None else {"past_key_values": rows.cache}
        made = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_BSD),
            decoder_input_ids=tokens_BL,
            decoder_attention_mask=torch.ones_like(tokens_BL),
            generation_config=self._configs[length],
            logits_processor=self.more_processors,
            **continued,
        )
        rows.tokens_BL = made.sequences[:size]
        rows.cache = made.past_key_values if len(self._lengths) > 1 else None

    def _ends(self, tokens_BL: Tensor) -> tuple[list[bool], list[int]]:
        """Whether each caption has ended, and the place of its end; of those that have not, the last place."""
        eos = self.model.generation_config.eos_token_id
        is_end_BL = torch.isin(tokens_BL, torch.as_tensor(eos, device=tokens_BL.device))
        is_end_BL[:, 0] = False  # the start token is the same
        ended_B = is_end_BL.any(1)
        ends_B = torch.where(ended_B, is_end_BL.int().argmax(1), tokens_BL.shape[1] - 1)
        return ended_B.tolist(), ends_B.tolist()


def _joined(parts: list[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    owners = [owner for part in parts for owner in part.owners]
    if first.cache is not None:
        for layers in zip(*(_layers(part.cache) for part in parts), strict=True):
            layers[0].keys = torch.cat([layer.keys for layer in layers])
            layers[0].values = torch.cat([layer.values for layer in layers])
    tokens_BL = torch.cat([part.tokens_BL for part in parts])
    return _Rows(owners, tokens_BL, torch.cat([part.states_BSD for part in parts]), first.cache)


def _layers(cache: Any) -> list[Any]:
    return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]


def _chosen(rows: _Rows, index_B: Tensor) -> _Rows:
    """Some of them, in a cache of their own."""
    cache = rows.cache
    if cache is not None:
        cache = copy.copy(cache)
        for name in ("self_attention_cache", "cross_attention_cache"):
            part = copy.copy(getattr(cache, name))
            part.layers = [copy.copy(layer) for layer in part.layers]
            setattr(cache, name, part)
        cache.batch_select_indices(index_B)
    owners = [rows.owners[i] for i in index_B.tolist()]
    return _Rows(owners, rows.tokens_BL[index_B], rows.states_BSD[index_B], cache)


def _batches(images: Iterable[NDArray[np.uint8]], size: int) -> Iterator[list[NDArray[np.uint8]]]:
    batch: list[NDArray[np.uint8]] = []
    for image_HWC in images:
        batch.append(image_HWC)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
