"""Whether IN of a stage is what a stage before has written; and if not, what it is and what to do."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from data.schema import DATASET, INDEX
from data.source import METADATA, SUFFIXES
from data.stages.store import STAGE, SUMMARY, StageStore
from data.storage import LIST_DEADLINE_S
from data.wds import index_folder
from trainer.errors import UserError

if TYPE_CHECKING:
    from data.stages.samples import Samples

_RAW = (*SUFFIXES, ".tar", ".parquet", ".jsonl", ".ndjson", ".txt")


def check_samples(url: str) -> "Samples":
    """The samples at `url`, before a stage that would read them begins.

    Raises:
        UserError: nothing is there, something else, or no samples.
    """
    from data.stages.samples import open_samples

    check_stage(url, "IN")
    samples = open_samples(url)
    if nothing_kept(url):
        raise UserError(f"IN: {url} has no samples, all were left out; look at `loupe data stats {url}`")
    return samples


def nothing_kept(url: str) -> bool:
    """Whether a stage that is finished has put out nothing."""
    store = StageStore(url)
    if not store.exists(SUMMARY):
        return False
    return not any(counts.get("kept") for counts in store.read_json(SUMMARY)["counts"].values())


def check_stage(url: str, name: str) -> None:
    """
    Args:
        name: of the argument or option that gave `url`.

    Raises:
        UserError: no stage has written there.
    """
    store = StageStore(url)
    if store.exists(STAGE):
        return
    found = _entries(store)
    if found is None:
        raise UserError(f"{name}: {url}: no such folder; give the output of `loupe data ingest` or another stage")
    if {INDEX, DATASET} <= set(found):
        raise UserError(f"{name}: {url} is a dataset already; give the output of the stage that it was built from")
    if _holds_raw(store, found):
        raise UserError(
            f"{name}: {url} holds raw images or tars, no stage's output; run `loupe data ingest {url} OUT` first, and give OUT"
        )
    raise UserError(
        f"{name}: {url} is no stage's output (it has no {STAGE}); give the folder that `loupe data ingest` or another stage "
        "has written"
    )


def check_dataset(url: str) -> None:
    """
    Raises:
        UserError: at `url` is nothing, or images and tars that no command has made a dataset of.
    """
    store = StageStore(index_folder(url))
    found = _entries(store)
    if found is None:
        raise UserError(f"{url}: no such folder; give a dataset, or the output of a stage")
    if INDEX not in found and _holds_raw(store, found):
        raise UserError(
            f"{url}: holds raw images or tars, no dataset and no stage's output; `loupe data build {url} OUT` makes one of "
            f"a folder of images, `loupe data index {url}` of WebDataset tars"
        )


def _holds_raw(store: StageStore, found: Sequence[str]) -> bool:
    below = [
        f"{folder}/{name}"
        for folder in ("images", "train")
        if folder in found
        for name in _entries(store, folder) or ()
    ]
    return any(entry == METADATA or PurePosixPath(entry).suffix.lower() in _RAW for entry in [*found, *below])


def _entries(store: StageStore, folder: str = "") -> list[str] | None:
    """Names of what lies there; of a file its own; None where there is nothing."""
    path = f"{store.root}/{folder}".rstrip("/")

    def names() -> list[str] | None:
        store.fs.invalidate_cache()
        try:
            return [entry.rstrip("/").rpartition("/")[2] for entry in store.fs.ls(path, detail=False)]
        except FileNotFoundError:
            return None

    return store.ask(names, folder, LIST_DEADLINE_S, "listed")
