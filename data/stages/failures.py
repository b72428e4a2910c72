"""Why attempts at items failed: a small file for each, in the pass's folder `failed`."""

import time

from data.stages.store import StageStore
from data.storage import AccessDenied
from trainer.errors import UserError


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help. It can where access is denied: a policy may be wrong for a night."""
    return isinstance(error, UserError) and not isinstance(error, AccessDenied)


def record(
    store: StageStore, folder: str, item: str, attempt: str, worker: str, why: str, *, trace: str = "", times: int = 1
) -> None:
    """Of an attempt; `times` of several, where trying again cannot help."""
    about = {"item": item, "attempt": attempt, "worker": worker, "why": why, "trace": trace}
    for n in range(times):
        store.create_json(f"{folder}/failed/{item}.{attempt}{n}.json", {**about, "time": time.time()})


def listed(store: StageStore, folder: str) -> dict[str, list[str]]:
    """Item to the names of its failures."""
    found: dict[str, list[str]] = {}
    for file in store.names(f"{folder}/failed"):
        found.setdefault(item_of(file), []).append(file)
    return found


def item_of(file: str) -> str:
    return file.removesuffix(".json").rpartition(".")[0]


def reason(store: StageStore, folder: str, file: str) -> str:
    try:
        return str(store.read_json(f"{folder}/failed/{file}")["why"])
    except FileNotFoundError:
        return "its failures were forgotten meanwhile; run again"
