"""What a run's datasets give its plan, and whether they can give it. Before the first step, on every rank."""

from collections.abc import Mapping
from itertools import chain

from data.epochs import ClassRows
from data.reader import Dataset
from data.schema import Bucket
from trainer.config import RunConfig, check_shape
from trainer.errors import UserError
from trainer.step_plan import StepPlanner
from trainer.tasks.base import Task

_SAME_ASPECT = 1e-3
"""Relative difference within which two datasets mean the same by a bucket's name."""


def plan_stream(config: RunConfig, datasets: Mapping[str, Dataset], task: Task) -> tuple[StepPlanner, list[str]]:
    """The plan of all steps, and warnings to print.

    Raises:
        UserError: a dataset has no buckets, classes or captions as the config asks for, or its buckets' images do not fit
            the task.
    """
    for name, dataset in datasets.items():
        _check_captions(config, name, dataset)
    classes, warnings = _classes(config, datasets)
    buckets = _buckets(datasets) if config.data.buckets else None
    sizes = {name: dataset.shard_sizes for name, dataset in datasets.items()}
    planner = StepPlanner(config, sizes, buckets=buckets, classes=classes)
    if buckets is not None:
        _check_shapes(config, planner, task)
        warnings += _small_buckets(config, datasets, buckets)
    return planner, warnings


def _check_captions(config: RunConfig, name: str, dataset: Dataset) -> None:
    weights, kinds = config.data.caption_weights, dataset.info.caption_kinds
    if weights and not set(weights) & set(kinds):
        raise UserError(
            f"data.caption_weights: dataset {name} has captions of none of the kinds {', '.join(weights)}; it has "
            f"{', '.join(kinds) or 'no captions'}"
        )


def _classes(config: RunConfig, datasets: Mapping[str, Dataset]) -> tuple[dict[str, ClassRows], list[str]]:
    classes: dict[str, ClassRows] = {}
    warnings = []
    for name, dataset in datasets.items():
        if not config.data.datasets[name].class_balanced:
            continue
        field = f"data.datasets.{name}.class_balanced"
        if dataset.info.labels is None:
            raise UserError(
                f"{field}: {dataset.url} has no file of labels; build it again with `loupe data build` from a source with "
                "classes, or set it to false"
            )
        classes[name] = found = ClassRows(dataset.read_labels())
        if not len(found.labels):
            raise UserError(f"{field}: no sample of {dataset.url} has a label; set it to false")
        if found.num_unlabelled:
            warnings.append(f"{field}: {found.num_unlabelled} samples without a label are never drawn")
    return classes, warnings


def _buckets(datasets: Mapping[str, Dataset]) -> dict[str, tuple[Bucket, ...]]:
    seen: dict[str, tuple[float, str]] = {}
    for name, dataset in datasets.items():
        if not dataset.info.buckets:
            raise UserError(
                f"data.buckets: dataset {name} at {dataset.url} has no aspect buckets; build it again with "
                "`loupe data build --buckets default`, or set data.buckets=false"
            )
        for bucket in dataset.info.buckets:
            aspect, where = seen.setdefault(bucket.name, (bucket.aspect, name))
            if abs(bucket.aspect / aspect - 1.0) > _SAME_ASPECT:
                raise UserError(
                    f"data.buckets: {bucket.name} has the aspect {bucket.aspect:.4g} in dataset {name} and {aspect:.4g} in "
                    f"{where}; build one of them again with the other's buckets"
                )
    return {name: dataset.info.buckets for name, dataset in datasets.items()}


def _check_shapes(config: RunConfig, planner: StepPlanner, task: Task) -> None:
    for i, phase in enumerate(config.phases):
        for bucket, shape in planner.shapes(phase.resolution).items():
            check_shape(config, i, bucket, shape)
            try:
                task.check_side(phase, min(shape))
            except UserError as e:
                raise UserError(
                    f"data.buckets: images of bucket {bucket} are {shape[1]} x {shape[0]} px. {e}"
                ) from None


def _small_buckets(
    config: RunConfig, datasets: Mapping[str, Dataset], buckets: Mapping[str, tuple[Bucket, ...]]
) -> list[str]:
    """A batch takes all its images from one bucket: where that has fewer, some stand in it twice."""
    samples: dict[str, int] = {}
    for name, bucket in chain.from_iterable(((n, b) for b in of_dataset) for n, of_dataset in buckets.items()):
        sizes = datasets[name].shard_sizes[bucket.first_shard : bucket.first_shard + bucket.num_shards]
        samples[bucket.name] = samples.get(bucket.name, 0) + sum(sizes)
    largest = max(phase.batch_size for phase in config.phases)
    return [
        f"data.buckets: bucket {bucket} has fewer images ({count}) than a batch ({largest}): its batches repeat some"
        for bucket, count in samples.items()
        if 0 < count < largest
    ]
