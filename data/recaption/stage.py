"""The stage `recaption`: samples in, captions out, in sidecars. Images and their own captions stay as they are."""

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from data.images import ImageError
from data.recaption.captioner import Caption, Captioner, Decoding
from data.recaption.images import Resize, prepared
from data.recaption.model import ModelFiles
from data.recaption.text import EMPTY, clean, flaw
from data.stages.runner import Part, Pass, Stage, Work
from data.stages.samples import Samples, Shard, open_samples, parts_by_shard, pass_by_shard, read_shard
from data.stages.store import Json
from trainer.urls import public_url

CAPTIONS = pa.schema([("key", pa.string()), ("kind", pa.string()), ("caption", pa.string())])
_AHEAD = 8
"""Images, at least, and three encodings' that are decoded before the model asks for them."""


@dataclass
class Recaption(Stage):
    name: ClassVar[str] = "recaption"
    version: ClassVar[int] = 2

    url: str
    """Output of `ingest` or `faces`."""
    model: ModelFiles
    prompts: dict[str, str]
    """By the kind of captions that they give."""
    device: str = "cpu"
    """`cpu` or `cuda`; workers go round a machine's GPUs."""
    dtype: str = "float32"
    decoding: Decoding = field(default_factory=Decoding)
    resize: Resize = "fast"
    drop_flawed: bool = False
    """Leave out captions that repeat themselves or did not end; empty ones always are."""
    threads: int = 1
    """Of a worker, for decoding images; on a CPU also for the model."""

    def __post_init__(self) -> None:
        self._captioner: Captioner | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captioner": None}

    @cached_property
    def samples(self) -> Samples:
        return open_samples(self.url)

    def settings(self) -> dict[str, Json]:
        return {
            "input": public_url(self.url),
            "made_of": list(self.samples.ids),
            "model": self.model.name,
            "revision": self.model.revision,
            "prompts": self.prompts,
            "dtype": self.dtype,
            "beams": self.decoding.beams,
            "max_new_tokens": self.decoding.max_new_tokens,
            "resize": self.resize,
            "drop_flawed": self.drop_flawed,
        }

    def passes(self) -> Sequence[Pass]:
        return [pass_by_shard("recaption", lambda: self.samples, self._parts)]

    def open(self) -> None:
        cv2.setNumThreads(1)
        if self.device == "cpu":
            torch.set_num_threads(self.threads)
        self._captioner = Captioner(
            self.model.folder, list(self.prompts.values()), device=_device(self.device), dtype=self.dtype,
            decoding=self.decoding,
        )  # fmt: skip

    def _parts(self, work: Work) -> Iterator[Part]:
        """One for each shard, which has no more samples than a part may."""
        return parts_by_shard(self.samples, "recaption", work, lambda shard: self._of_shard(shard, work))

    def _of_shard(self, shard: Shard, work: Work) -> tuple[dict[str, Path], Counter[str]]:
        assert self._captioner is not None
        counts: Counter[str] = Counter()
        keys: list[str] = []
        images = self._images(shard, work, keys, counts)
        made: list[tuple[int, int, str]] = []
        for caption in self._captioner.captions(images):
            work.advance(0)
            if (text := self._kept(caption, counts)) is not None:
                made.append((caption.image, caption.prompt, text))
        kinds = list(self.prompts)
        made.sort()  # they came as they ended
        counts["kept"] = len({image for image, *_ in made})
        counts["captions"] = len(made)
        rows = {
            "key": [keys[image] for image, *_ in made],
            "kind": [kinds[prompt] for _, prompt, _ in made],
            "caption": [text for *_, text in made],
        }
        return {"captions": self._write(work.scratch, rows)}, counts

    def _images(self, shard: Shard, work: Work, keys: list[str], counts: Counter[str]) -> Iterator[NDArray[np.uint8]]:
        """The shard's images as the model takes them; their keys are appended to `keys` as they come."""
        assert self._captioner is not None
        files = ((row.key, data) for row, data in read_shard(self.samples, shard, work))
        ahead = max(_AHEAD, 3 * self.decoding.batch_images)
        for key, image_HWC in prepared(files, self._captioner.form, self.resize, threads=self.threads, ahead=ahead):
            counts["read"] += 1
            work.advance()
            if isinstance(image_HWC, ImageError):
                counts[f"rejected/{image_HWC.reason}"] += 1
                continue
            keys.append(key)
            yield image_HWC

    def _kept(self, caption: Caption, counts: Counter[str]) -> str | None:
        text = clean(caption.text)
        wrong = flaw(text, ended=caption.ended)
        counts["tokens"] += caption.tokens
        if wrong:
            counts[f"captions/{wrong}"] += 1
        return None if wrong == EMPTY or (wrong and self.drop_flawed) else text

    def _write(self, folder: Path, rows: dict[str, list[str]]) -> Path:
        import transformers

        path = folder / "captions.parquet"
        about = {"loupe.recaption": json.dumps(self.settings()), "transformers": transformers.__version__}
        pq.write_table(pa.table(rows, schema=CAPTIONS.with_metadata(about)), path, compression="zstd")
        return path


def _device(device: str) -> str:
    """Of this worker: the machine's GPUs in turn, by the number that multiprocessing gave the process."""
    if device != "cuda" or torch.cuda.device_count() < 2:
        return device
    number = multiprocessing.current_process().name.rpartition("-")[2]
    return f"cuda:{(int(number) - 1) % torch.cuda.device_count() if number.isdigit() else 0}"
