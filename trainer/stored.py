"""Whether stored columns are what the run itself would compute. Before the first step, on every rank."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from data.demands import check_column
from data.encode.columns import LatentsColumn, TextColumn, parse_latents, parse_text
from data.encode.stored import Stored
from data.reader import Dataset
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.models.autoencoders import Codec
from trainer.precompute import codec_revision, encoder_revision
from trainer.step_plan import StepPlanner
from trainer.tasks.base import Task

_SHOWN = 12
"""Digits of a revision."""


def stored_columns(config: RunConfig, datasets: Mapping[str, Dataset], task: Task, planner: StepPlanner) -> Stored:
    """What the loader takes from columns, as `data.latents` and `data.text_states` say.

    Args:
        task: with its frozen networks.

    Raises:
        UserError: naming the field and both sides: a column that is missing, or not what the run would compute.
    """
    latents: dict[str, dict[int, tuple[str, LatentsColumn]]] = {}
    if config.data.latents:
        codec = getattr(task, "codec", None)
        assert isinstance(codec, Codec)
        latents = {name: _latents_of(config, dataset) for name, dataset in datasets.items()}
        _check_alike(latents)
        revision = codec_revision(codec)
        for name, columns in latents.items():
            for resolution, (column_name, column) in columns.items():
                what = f"data.latents: column {column_name!r} of dataset {name}"
                _check_codec(config, codec, revision, what, column)
                _check_shapes(planner.shapes(resolution), what, column)
    text: dict[str, Sequence[tuple[str, TextColumn] | None]] = {}
    if config.data.text_states:
        encoders = getattr(getattr(task, "text", None), "encoders", None)
        assert isinstance(encoders, nn.ModuleList)
        revisions = [encoder_revision(encoder) for encoder in encoders]
        text = {name: _text_of(config, dataset, revisions) for name, dataset in datasets.items()}
    return Stored(latents, text)


def _described(field: str, column: str, dataset: Dataset) -> tuple[object, str]:
    """What dataset.json says of a column, and how to call it."""
    check_column(field, column, dataset.name, dataset.info)
    return dataset.info.columns[column], f"{field}: column {column!r} of dataset {dataset.name}"


def _latents_of(config: RunConfig, dataset: Dataset) -> dict[int, tuple[str, LatentsColumn]]:
    """Resolution -> column, for all phases that draw from the dataset."""
    field, found = "data.latents", dict[int, tuple[str, LatentsColumn]]()
    there = [name for name in config.data.latents if name in dataset.info.columns]
    for name in there or config.data.latents:
        tree, where = _described(field, name, dataset)
        column = parse_latents(tree, where=where)
        if column.resolution in found:
            raise UserError(
                f"{where} is of {column.resolution} px, as {found[column.resolution][0]!r} is; name one of them"
            )
        if bool(column.buckets) != config.data.buckets:
            crops = "aspect buckets" if column.buckets else "square crops"
            raise UserError(
                f"{where} is of {crops}; set data.buckets={str(bool(column.buckets)).lower()}, or encode again"
            )
        found[column.resolution] = (name, column)
    for phase in config.phases:
        if phase.resolution not in found and dataset.name in (phase.data_mix or {dataset.name}):
            have = ", ".join(f"{px} px" for px in found)
            raise UserError(f"{field}: phase {phase.name} is of {phase.resolution} px, the columns of dataset {dataset.name} "
                            f"of {have}; encode at {phase.resolution} px too, and name both columns")  # fmt: skip
    return found


def _check_alike(latents: Mapping[str, Mapping[int, tuple[str, LatentsColumn]]]) -> None:
    """Rows of one batch come from several datasets, and stand in one tensor."""
    (first, columns), *others = latents.items()
    for name, theirs in others:
        for resolution in columns.keys() & theirs.keys():
            ours, other = columns[resolution][1], theirs[resolution][1]
            for field in (f for f in LatentsColumn.model_fields if f not in ("codec", "codec_class", "decode")):
                if getattr(ours, field) != getattr(other, field):
                    raise UserError(
                        f"data.latents: {field} is {getattr(ours, field)} in dataset {first} and {getattr(other, field)} in "
                        f"dataset {name}, at {resolution} px; encode both alike"
                    )


def _check_codec(config: RunConfig, codec: Codec, revision: str, what: str, column: LatentsColumn) -> None:
    assert config.task.kind in ("latent_diffusion", "latent_network")
    url = config.task.codec.url
    there, here = (
        (column.channels, column.downsampling, column.revision),
        (codec.latent_channels, codec.downsampling, revision),
    )
    if there != here:
        words = [
            f"{kind}, {channels} channels, f{downsampling}, weights {digest[:_SHOWN]}"
            for kind, (channels, downsampling, digest) in (
                (column.codec_class, there),
                (type(codec.vae).__name__, here),
            )
        ]
        raise UserError(f"{what} was encoded by {column.codec} ({words[0]}), and task.codec.url is {url} "
                        f"({words[1]}); set it to the autoencoder that encoded, or encode again")  # fmt: skip


def _check_shapes(shapes: Mapping[str, tuple[int, int]], what: str, column: LatentsColumn) -> None:
    """Of the aspect buckets that the run draws from."""
    for bucket, (height, width) in shapes.items():
        there = column.buckets.get(bucket)
        if there != (height, width):
            of = f"{there[1]} x {there[0]} px" if there else "not there"
            raise UserError(f"{what}: bucket {bucket} is {of}, and {width} x {height} px in this run; encode with the "
                            "--buckets of the build and the --patch of the run's denoiser")  # fmt: skip


def _text_of(config: RunConfig, dataset: Dataset, revisions: Iterable[str]) -> list[tuple[str, TextColumn] | None]:
    """For each of the run's encoders its column, if any is named."""
    field = "data.text_states"
    assert config.task.kind == "latent_diffusion"
    assert config.task.text.kind == "frozen"
    encoders = list(zip(config.task.text.encoders, revisions, strict=True))
    found: list[tuple[str, TextColumn] | None] = [None] * len(encoders)
    for name in config.data.text_states:
        tree, where = _described(field, name, dataset)
        column = parse_text(tree, where=where)
        for i, (encoder, revision) in enumerate(encoders):
            ours = {**encoder.model_dump(), "revision": revision}
            if all(getattr(column, key) == ours[key] for key in _SAME) and found[i] is None:
                found[i] = (name, column)
                break
        else:
            there = ", ".join(f"{key} {_short(getattr(column, key))}" for key in _SAME)
            here = "; ".join(
                ", ".join(f"{key} {_short({**encoder.model_dump(), 'revision': revision}[key])}" for key in _SAME)
                for encoder, revision in encoders
            )
            raise UserError(f"{where} is of {column.encoder} ({there}), and task.text.encoders are {here}; leave it out, or "
                            "encode with the run's encoder")  # fmt: skip
    return found


_SAME = ("family", "revision", "width", "pooled_width", "max_tokens", "hidden_state", "padding")
"""What states follow from."""


def _short(value: object) -> object:
    return value[:_SHOWN] if isinstance(value, str) else value
