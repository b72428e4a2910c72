"""What a run asks of its datasets that their dataset.json alone can answer: for the trainer before its first step, and for
the launchers before there is a job. Neither reads a shard."""

from collections.abc import Iterable, Mapping

from data.schema import DatasetInfo
from trainer.errors import UserError

_SAME_ASPECT = 1e-3
"""Relative difference within which two datasets mean the same by a bucket's name."""


def check_caption_kinds(weights: Mapping[str, float], name: str, info: DatasetInfo) -> None:
    """
    Raises:
        UserError: the dataset has captions of none of the kinds that `data.caption_weights` names.
    """
    if weights and not set(weights) & set(info.caption_kinds):
        raise UserError(
            f"data.caption_weights: dataset {name} has captions of none of the kinds {', '.join(weights)}; it has "
            f"{', '.join(info.caption_kinds) or 'no captions'}"
        )


def unknown_kinds(weights: Mapping[str, float], infos: Mapping[str, DatasetInfo]) -> list[str]:
    """A warning for each kind of captions that no dataset has: mistyped, most likely."""
    known = {kind for info in infos.values() for kind in info.caption_kinds}
    return [
        f"data.caption_weights: no dataset has captions of the kind {kind}; there are {', '.join(sorted(known)) or 'none'}"
        for kind in weights
        if kind not in known
    ]


def check_labelled(name: str, url: str, info: DatasetInfo) -> None:
    """
    Raises:
        UserError: the dataset's classes are not known without reading it, and `class_balanced` is on.
    """
    if info.labels is None:
        raise UserError(
            f"data.datasets.{name}.class_balanced: {url} has no file of labels; build it again with `loupe data build` from a "
            "source with classes, or set it to false"
        )


def check_classes(field: str, num_classes: int, name: str, info: DatasetInfo) -> None:
    """
    Args:
        field: of the config, that says how many classes there are.

    Raises:
        UserError: the dataset has more.
    """
    if info.class_names and len(info.class_names) > num_classes:
        raise UserError(
            f"{field}: {num_classes}, but dataset {name} has {len(info.class_names)} classes; set it to {len(info.class_names)}"
        )


def check_buckets(datasets: Mapping[str, tuple[str, DatasetInfo]]) -> None:
    """
    Args:
        datasets: url and dataset.json by name.

    Raises:
        UserError: one has no aspect buckets, or two mean different shapes by one name.
    """
    seen: dict[str, tuple[float, str]] = {}
    for name, (url, info) in datasets.items():
        if not info.buckets:
            raise UserError(
                f"data.buckets: dataset {name} at {url} has no aspect buckets; build it again with "
                "`loupe data build --buckets default`, or set data.buckets=false"
            )
        for bucket in info.buckets:
            aspect, where = seen.setdefault(bucket.name, (bucket.aspect, name))
            if abs(bucket.aspect / aspect - 1.0) > _SAME_ASPECT:
                raise UserError(
                    f"data.buckets: {bucket.name} has the aspect {bucket.aspect:.4g} in dataset {name} and {aspect:.4g} in "
                    f"{where}; build one of them again with the other's buckets"
                )


def small_buckets(samples: Mapping[str, int], largest: int) -> list[str]:
    """A warning for each bucket that holds no whole batch: a batch takes all its images from one, so some stand in it twice.

    Args:
        samples: by bucket, of all datasets.
        largest: batch size of the phases.
    """
    return [
        f"data.buckets: bucket {bucket} has fewer images ({count}) than a batch ({largest}): its batches repeat some"
        for bucket, count in samples.items()
        if 0 < count < largest
    ]


def check_column(field: str, column: str, name: str, info: DatasetInfo) -> None:
    """
    Raises:
        UserError: the dataset has no such column.
    """
    if column not in info.columns:
        raise UserError(
            f"{field}: dataset {name} has no column {column!r} (it has {', '.join(info.columns) or 'none'}); encode with "
            "`loupe data encode`, and give its output to `loupe data build --columns`"
        )


def check_latents(
    columns: Iterable[str], resolutions: Mapping[str, int], name: str, info: DatasetInfo, *, buckets: bool
) -> None:
    """
    Args:
        columns: of `data.latents`.
        resolutions: of the phases that draw from the dataset, by their names.
        buckets: `data.buckets`.

    Raises:
        UserError: there are no latents of a phase's resolution, or they are of other crops.
    """
    field = "data.latents"
    there = [column for column in columns if column in info.columns]
    for column in there or columns:
        check_column(field, column, name, info)
    found = {}
    for column in there:
        tree = info.columns[column]
        if bool(tree.get("buckets")) != buckets:
            crops, mend = ("square crops", "false") if buckets else ("aspect buckets", "true")
            raise UserError(
                f"{field}: column {column!r} of dataset {name} is of {crops}; set data.buckets={mend}, or encode again"
            )
        found[tree.get("resolution")] = column
    for phase, resolution in resolutions.items():
        if resolution not in found:
            have = ", ".join(f"{px} px" for px in found)
            raise UserError(
                f"{field}: phase {phase} is of {resolution} px, the columns of dataset {name} of {have}; encode at "
                f"{resolution} px too, and name both columns"
            )
