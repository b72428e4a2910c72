"""Whether a run's datasets have what its config asks of them, by their dataset.json and, of buckets, their index. No torch."""

from collections import Counter
from collections.abc import Mapping

from data import demands
from data.schema import (
    DATASET,
    INDEX,
    MAX_DATASET_BYTES,
    MAX_INDEX_BYTES,
    DatasetInfo,
    parse_dataset,
    parse_index,
)
from data.storage import Storage, StorageError
from data.wds import index_folder
from trainer.config import DatasetConfig, RunConfig, resolve_url
from trainer.errors import UserError

_DEADLINE_S = 15.0


def check_datasets(config: RunConfig) -> list[str]:
    """Warnings to print.

    Raises:
        UserError: a dataset has no buckets, captions, labels or columns as the config asks for; names the field.
    """
    infos: dict[str, DatasetInfo] = {}
    warnings = []
    for name, dataset in config.data.datasets.items():
        found = _read(f"data.datasets.{name}.url", dataset)
        if isinstance(found, str):
            warnings.append(found)
        else:
            infos[name] = found
    return [*warnings, *_check(config, infos)]


def _read(field: str, dataset: DatasetConfig) -> DatasetInfo | str:
    """Its description; or why storage does not show it here, where a job may well see it."""
    storage = Storage(index_folder(resolve_url(dataset.url)))
    try:
        data = storage.read(DATASET, max_bytes=MAX_DATASET_BYTES, deadline_s=_DEADLINE_S)
    except FileNotFoundError:
        raise UserError(
            f"{field}: no {DATASET} in {storage.url}; give a dataset that `loupe data build` or `loupe data index` has written"
        ) from None
    except (StorageError, UserError) as e:
        if storage.is_local:
            raise
        return f"{field}: cannot be read from here, so whether it has what the run asks for is not known yet ({e})"
    return parse_dataset(data, source=f"{storage.url}/{DATASET}")


def _check(config: RunConfig, infos: Mapping[str, DatasetInfo]) -> list[str]:
    data = config.data
    urls = {name: dataset.url for name, dataset in data.datasets.items()}
    field, num_classes = _classes_of(config)
    for name, info in infos.items():
        demands.check_caption_kinds(data.caption_weights, name, info)
        if data.datasets[name].class_balanced:
            demands.check_labelled(name, urls[name], info)
        if num_classes:
            demands.check_classes(field, num_classes, name, info)
        if data.latents:
            phases = {p.name: p.resolution for p in config.phases if name in (p.data_mix or {name})}
            demands.check_latents(data.latents, phases, name, info, buckets=data.buckets)
        for column in data.text_states:
            demands.check_column("data.text_states", column, name, info)
    if data.buckets:
        demands.check_buckets({name: (urls[name], info) for name, info in infos.items()})
    if len(infos) < len(urls):
        return []
    return [
        *demands.unknown_kinds(data.caption_weights, infos),
        *(_small_buckets(config, infos) if data.buckets else ()),
    ]


def _small_buckets(config: RunConfig, infos: Mapping[str, DatasetInfo]) -> list[str]:
    """By the shards that the indexes list."""
    samples: Counter[str] = Counter()
    for name, info in infos.items():
        storage = Storage(resolve_url(config.data.datasets[name].url))
        try:
            index = storage.read(INDEX, max_bytes=MAX_INDEX_BYTES, deadline_s=_DEADLINE_S)
        except (FileNotFoundError, StorageError) as e:
            return [
                f"data.datasets.{name}.url: its {INDEX} cannot be read, so whether buckets hold a batch is not known ({e})"
            ]
        shards = parse_index(index, source=f"{storage.url}/{INDEX}")
        for bucket in info.buckets:
            of_bucket = shards[bucket.first_shard : bucket.first_shard + bucket.num_shards]
            samples[bucket.name] += sum(shard.num_samples for shard in of_bucket)
    return demands.small_buckets(samples, max(phase.batch_size for phase in config.phases))


def _classes_of(config: RunConfig) -> tuple[str, int | None]:
    task = config.task
    if task.kind == "latent_network":
        return "task.num_classes", task.num_classes
    if task.kind == "latent_diffusion" and task.text.kind == "classes":
        return "task.text.num_classes", task.text.num_classes
    return "", None
