"""What a run's datasets give its plan, and whether they can give it. Before the first step, on every rank."""

from collections.abc import Mapping
from itertools import chain

from data.demands import check_buckets, check_caption_kinds, check_labelled, small_buckets, unknown_kinds
from data.epochs import ClassRows
from data.reader import Dataset
from data.schema import Bucket
from trainer.config import RunConfig, check_shape
from trainer.errors import UserError
from trainer.step_plan import StepPlanner
from trainer.tasks.base import Task


def plan_stream(config: RunConfig, datasets: Mapping[str, Dataset], task: Task) -> tuple[StepPlanner, list[str]]:
    """The plan of all steps, and warnings to print.

    Raises:
        UserError: a dataset has no buckets, classes or captions as the config asks for, or its buckets' images do not fit
            the task.
    """
    for name, dataset in datasets.items():
        check_caption_kinds(config.data.caption_weights, name, dataset.info)
    classes, warnings = _classes(config, datasets)
    warnings += unknown_kinds(config.data.caption_weights, {name: dataset.info for name, dataset in datasets.items()})
    buckets = None
    if config.data.buckets:
        check_buckets({name: (dataset.url, dataset.info) for name, dataset in datasets.items()})
        buckets = {name: dataset.info.buckets for name, dataset in datasets.items()}
    sizes = {name: dataset.shard_sizes for name, dataset in datasets.items()}
    planner = StepPlanner(config, sizes, buckets=buckets, classes=classes)
    if buckets is not None:
        _check_shapes(config, planner, task)
        warnings += _small_buckets(config, datasets, buckets)
    return planner, warnings


def _classes(config: RunConfig, datasets: Mapping[str, Dataset]) -> tuple[dict[str, ClassRows], list[str]]:
    classes: dict[str, ClassRows] = {}
    warnings = []
    for name, dataset in datasets.items():
        if not config.data.datasets[name].class_balanced:
            continue
        field = f"data.datasets.{name}.class_balanced"
        check_labelled(name, dataset.url, dataset.info)
        classes[name] = found = ClassRows(dataset.read_labels())
        if not len(found.labels):
            raise UserError(f"{field}: no sample of {dataset.url} has a label; set it to false")
        if found.num_unlabelled:
            warnings.append(f"{field}: {found.num_unlabelled} samples without a label are never drawn")
    return classes, warnings


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
    samples: dict[str, int] = {}
    for name, bucket in chain.from_iterable(((n, b) for b in of_dataset) for n, of_dataset in buckets.items()):
        sizes = datasets[name].shard_sizes[bucket.first_shard : bucket.first_shard + bucket.num_shards]
        samples[bucket.name] = samples.get(bucket.name, 0) + sum(sizes)
    return small_buckets(samples, max(phase.batch_size for phase in config.phases))
