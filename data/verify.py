"""Check a whole dataset: every shard's hash, every count, every image."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from data.images import ImageError, read_image
from data.reader import open_dataset
from data.schema import Sample
from trainer.errors import UserError


@dataclass
class Report:
    num_samples: int
    num_shards: int
    num_bytes: int
    digest: str
    failures: list[str] = field(default_factory=list)


def verify(
    url: str, *, cache_dir: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Read every byte of a dataset. A damaged shard or image is a failure of the report; all of them are found.

    Args:
        cache_dir: for shards of a remote dataset; absent: a temporary folder, so that storage itself is read.
        progress: called with samples done and samples in all.

    Raises:
        UserError: it cannot be opened at all.
        StorageError: remote storage does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="loupe-verify-") if cache_dir is None else nullcontext(cache_dir) as cache:
        dataset = open_dataset(url, name=url, cache_dir=cache)
        report = Report(
            num_samples=dataset.num_samples,
            num_shards=len(dataset.shards),
            num_bytes=sum(shard.num_bytes for shard in dataset.shards),
            digest=dataset.digest,
        )
        keys: set[str] = set()
        first = 0
        for i, shard in enumerate(dataset.shards):
            try:
                path = dataset.verify_shard(i)
                with open(path, "rb") as file:
                    count = int.from_bytes(file.read(4), "little")
                if count != shard.num_samples:
                    raise UserError(f"{path}: holds {count} samples, the index says {shard.num_samples}")
                for index in range(first, first + shard.num_samples):
                    _verify_sample(dataset.read(index), dataset.class_names, keys, report.failures)
                    progress(index + 1, dataset.num_samples)
            except UserError as e:  # the next shard may be whole
                report.failures.append(str(e))
            first += shard.num_samples
    return report


def _verify_sample(sample: Sample, class_names: Sequence[str] | None, keys: set[str], failures: list[str]) -> None:
    if sample.key in keys:
        failures.append(f"{sample.key}: stands in the dataset twice")
    keys.add(sample.key)
    if class_names is not None and not -1 <= sample.label < len(class_names):
        failures.append(f"{sample.key}: label {sample.label} is none of the {len(class_names)} classes")
    try:
        read_image(sample.image)
    except ImageError as e:
        failures.append(f"{sample.key}: {e}")
