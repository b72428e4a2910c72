"""What a build would find, before it begins: samples by aspect bucket, from the heads of some images or the indexes of some
shards. Nothing is decoded."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from data import draws
from data.buckets import nearest
from data.images import ImageError
from data.measure import image_size
from data.source import Source
from data.stages.samples import Samples, shard_rows

IMAGES, SHARDS = 2000, 50
"""Looked at, at most."""
_HEAD_BYTES = 1 << 20
"""Of an image file: more than what stands before its size."""


@dataclass(frozen=True)
class Survey:
    samples: int
    """That may come into the dataset. Of a folder: images with captions; of a stage: what was kept, copies included."""
    images: int = 0
    captioned: int = 0
    """Of a folder's images, and ..."""
    captions: int = 0
    """... how many texts those have."""
    by_bucket: Mapping[str, int] = field(default_factory=dict)
    """Of all samples, in the order of the aspects; estimated where not all were looked at."""
    exact: bool = True
    """All were looked at."""


def survey_folder(
    source: Source, aspects: Mapping[str, float], *, max_samples: int | None = None, seed: int = 0
) -> Survey:
    """
    Args:
        max_samples: where the build stops.
    """
    captioned = [entry for entry in source.entries if entry.captions and entry.path is not None]
    chosen = list(range(len(captioned)))
    if len(captioned) > IMAGES:
        chosen = sorted(draws.permutation(seed, "survey", length=len(captioned))[:IMAGES].tolist())
    sizes = []
    for i in chosen if aspects else ():
        path = captioned[i].path
        assert path is not None
        try:
            with open(path, "rb") as file:
                sizes.append(image_size(file.read(_HEAD_BYTES)))
        except (ImageError, OSError):  # the build counts it by reason
            continue
    total = min(len(captioned), max_samples or len(captioned))
    return Survey(
        total,
        len(source.entries),
        len(captioned),
        sum(len(entry.captions) for entry in captioned),
        _scaled(sizes, aspects, total / max(len(chosen), 1)),
        total == len(chosen),
    )


def survey_stage(samples: Samples, aspects: Mapping[str, float], *, seed: int = 0) -> Survey:
    """
    Raises:
        UserError: an index is damaged or gone.
        StorageError: storage does not answer.
    """
    shards = [(shard.name, shard.counts.get("kept", 0)) for shard in samples.each_shard()]
    chosen = sorted(draws.permutation(seed, "survey", length=len(shards))[:SHARDS].tolist()) if shards else []
    sizes = []
    with TemporaryDirectory(prefix="loupe-survey-") as scratch:
        for i in chosen if aspects else ():
            sizes += [
                (row.width, row.height) for row in shard_rows(samples, samples.shard(shards[i][0]), Path(scratch))
            ]
    kept = [number for _, number in shards]
    looked_at = sum(kept[i] for i in chosen)
    return Survey(
        sum(kept),
        by_bucket=_scaled(sizes, aspects, sum(kept) / max(looked_at, 1)),
        exact=len(chosen) == len(shards),
    )


def _scaled(sizes: Iterable[tuple[int, int]], aspects: Mapping[str, float], factor: float) -> dict[str, int]:
    counts = Counter(nearest(width, height, aspects) for width, height in sizes)
    return {name: round(counts[name] * factor) for name in aspects}
