"""What a dataset or a stage's output holds, in numbers that add up: histograms of fixed bins, and counts by name.

Of bounded size whatever is counted, so that parts of any number of samples are counted anywhere and joined.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import UserError

STATS = "stats.json"
MAX_STATS_BYTES = 16 << 20

SIDES = (0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
"""Of the shorter side in pixels: where each bin begins."""
WORDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Of a caption."""
SIZES_KIB = (0, 4, 16, 64, 128, 256, 512, 1024, 4096, 16384)
"""Of an image file."""
SHAPES = (0.0, 1 / 3, 1 / 2, 2 / 3, 4 / 5, 5 / 4, 3 / 2, 2.0, 3.0)
"""Width / height."""

MAX_NAMES = 2000
"""Licences or classes that are counted by name; the others are counted together."""
OTHERS = "(others)"
NOT_GIVEN = "(not given)"
MAX_NAME_CHARACTERS = 200
EXAMPLES = 3
MAX_EXAMPLE_CHARACTERS = 300

Number = Annotated[int, Field(ge=0)]


def _bins(edges: Sequence[float]) -> Any:
    return Field(default_factory=lambda: [0] * len(edges), min_length=len(edges), max_length=len(edges))


class CaptionStats(BaseModel):
    """Captions of one kind."""

    model_config = ConfigDict(extra="forbid")

    samples: Number = 0
    """That have at least one."""
    texts: Number = 0
    words: list[Number] = _bins(WORDS)
    examples: list[tuple[int, str, str]] = Field(default=[], max_length=EXAMPLES)
    """(hash of the key, key, caption): of the keys with the smallest hashes, which is a fair draw and the same however the
    samples are parted."""


class Statistics(BaseModel):
    model_config = ConfigDict(extra="forbid")

    samples: Number = 0
    image_bytes: Number = 0
    short_sides: list[Number] = _bins(SIDES)
    shapes: list[Number] = _bins(SHAPES)
    sizes_kib: list[Number] = _bins(SIZES_KIB)
    formats: dict[str, Number] = {}
    licences: dict[str, Number] = {}
    classes: dict[str, Number] = {}
    captions: dict[str, CaptionStats] = {}
    of: Number | None = None
    """Samples of the whole, where these are some drawn from it."""

    def add(
        self,
        *,
        key: str,
        width: int,
        height: int,
        num_bytes: int,
        kind: str,
        captions: Mapping[str, Sequence[str]],
        licence: str | None = None,
        class_name: str | None = None,
    ) -> None:
        """One sample; `kind`: the format of its image."""
        self.samples += 1
        self.image_bytes += num_bytes
        self.short_sides[_bin(SIDES, min(width, height))] += 1
        self.shapes[_bin(SHAPES, width / height)] += 1
        self.sizes_kib[_bin(SIZES_KIB, num_bytes / 1024)] += 1
        _count(self.formats, kind)
        _count(self.licences, licence or NOT_GIVEN)
        if class_name is not None:
            _count(self.classes, class_name)
        digest = 0
        for of_kind, texts in captions.items():
            if not texts:
                continue
            stats = self.captions.setdefault(of_kind, CaptionStats())
            stats.samples += 1
            stats.texts += len(texts)
            for text in texts:
                stats.words[_bin(WORDS, len(text.split()))] += 1
            digest = digest or xxhash.xxh3_64_intdigest(key)
            if len(stats.examples) < EXAMPLES or digest < stats.examples[-1][0]:
                _keep(stats, [(digest, key[:MAX_NAME_CHARACTERS], texts[0][:MAX_EXAMPLE_CHARACTERS])])

    def join(self, other: "Statistics") -> None:
        self.samples += other.samples
        self.image_bytes += other.image_bytes
        for mine, theirs in (
            (self.short_sides, other.short_sides),
            (self.shapes, other.shapes),
            (self.sizes_kib, other.sizes_kib),
        ):
            _add(mine, theirs)
        for counts, more in (
            (self.formats, other.formats),
            (self.licences, other.licences),
            (self.classes, other.classes),
        ):
            for name, number in more.items():
                _count(counts, name, number)
        for kind, theirs_of_kind in other.captions.items():
            stats = self.captions.setdefault(kind, CaptionStats())
            stats.samples += theirs_of_kind.samples
            stats.texts += theirs_of_kind.texts
            _add(stats.words, theirs_of_kind.words)
            _keep(stats, theirs_of_kind.examples)

    @property
    def known_licences(self) -> dict[str, int]:
        """By falling number; empty where no sample names one."""
        known = dict(sorted(self.licences.items(), key=lambda item: (-item[1], item[0])))
        return {} if set(known) <= {NOT_GIVEN} else known


def parse_statistics(data: bytes | str, *, source: str) -> Statistics:
    """
    Raises:
        UserError: `source` is no such file.
    """
    try:
        return Statistics.model_validate_json(data)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{source}: {field}: {first['msg']}; delete the file, it can be made again") from None


def bin_names(edges: Sequence[float]) -> list[str]:
    """`64-127` and so on, for a histogram's axis."""
    names = []
    for i, edge in enumerate(edges):
        if i + 1 == len(edges):
            names.append(f"{_edge(edge)}+")
        elif isinstance(edge, int) and edges[i + 1] == edge + 1:
            names.append(_edge(edge))
        elif isinstance(edge, int):
            names.append(f"{_edge(edge)}-{_edge(edges[i + 1] - 1)}")
        else:
            names.append(f"{_edge(edge)}-{_edge(edges[i + 1])}")
    return names


def median(edges: Sequence[float], counts: Sequence[int]) -> str:
    """The bin that the middle one of the counted lies in."""
    total, seen = sum(counts), 0
    for name, count in zip(bin_names(edges), counts, strict=True):
        seen += count
        if total and seen * 2 >= total:
            return name
    return "-"


def shares(counts: Iterable[int]) -> list[float]:
    """Of their sum; of nothing, 0."""
    numbers = list(counts)
    total = sum(numbers)
    return [number / total if total else 0.0 for number in numbers]


def _edge(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def _bin(edges: Sequence[float], value: float) -> int:
    assert math.isfinite(value)
    return bisect.bisect_right(edges, value) - 1


def _add(mine: list[int], theirs: Sequence[int]) -> None:
    for i, number in enumerate(theirs):
        mine[i] += number


def _count(counts: dict[str, int], name: str, number: int = 1) -> None:
    name = name[:MAX_NAME_CHARACTERS]
    if name not in counts and len(counts) >= MAX_NAMES:
        name = OTHERS
    counts[name] = counts.get(name, 0) + number


def _keep(stats: CaptionStats, examples: Iterable[tuple[int, str, str]]) -> None:
    stats.examples = sorted({*stats.examples, *examples})[:EXAMPLES]
