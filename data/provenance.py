"""Where samples came from: the stages behind an output, their settings and counts, and the licence files that travel along.

What a stage wrote about itself is read, not believed: bounded, checked, and without what looks like a credential.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data.stages.store import STAGE, SUMMARY, StageStore, read_stage
from data.storage import LIST_DEADLINE_S, Storage
from trainer.errors import UserError
from trainer.urls import SECRET, public_url

NOTICES = "notices"
"""Folder of a stage's output with licence files."""
MAX_NOTICES = 200
MAX_NOTICE_BYTES = 1 << 20
_MAX_DEPTH = 16
_SOURCES = ("source", "sources", "samples", "input")
"""Settings that name what a stage has read."""
_REJECTED = ("rejected/", "duplicate/", "dropped/")
_NOTICE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,120}")


@dataclass(frozen=True)
class Record:
    """One stage that has taken part."""

    stage: str
    settings: Mapping[str, Any]
    """Without credentials."""
    counts: Mapping[str, Mapping[str, int]]
    """By pass."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else its summary says."""


def trace(url: str) -> list[Record]:
    """The stages behind the output at `url`, itself included, oldest first. What is no longer there is left out.

    Raises:
        UserError: no stage's output.
        StorageError: storage fails.
    """
    return _trace(url, _MAX_DEPTH, set())


def _trace(url: str, depth: int, seen: set[str]) -> list[Record]:
    seen.add(url)
    record = read_record(url)
    before: list[Record] = []
    for source in _sources(record.settings):
        if depth and source not in seen and is_stage(source):
            before += _trace(source, depth - 1, seen)
    return [*before, record]


def read_record(url: str) -> Record:
    """Of the stage whose output is at `url`."""
    store = StageStore(url)
    stage = read_stage(store)
    summary = store.read_json(SUMMARY) if store.exists(SUMMARY) else {}
    facts = {name: value for name, value in summary.items() if name not in ("stage", "counts", "time")}
    settings = stage["settings"] if isinstance(stage["settings"], dict) else {}
    return Record(
        str(stage["stage"]), _without_secrets(settings), _counts(summary.get("counts")), _without_secrets(facts)
    )


def is_stage(url: str) -> bool:
    """Whether a stage's output is at `url`, as far as can be told."""
    try:
        return StageStore(url).exists(STAGE)
    except UserError:  # of no file system that we know: no stage has written there
        return False


def rejected(records: Sequence[Record]) -> dict[str, int]:
    """What all stages together have left out, by reason."""
    total: Counter[str] = Counter()
    for record in records:
        for counts in record.counts.values():
            for name, number in counts.items():
                if name.startswith(_REJECTED):
                    prefix, _, reason = name.partition("/")
                    total[reason if prefix == "rejected" else name.replace("/", "_")] += number
    return dict(sorted(total.items()))


def read_notices(url: str) -> dict[str, bytes]:
    """Licence files of the output at `url` and of all behind it, by names fit for a dataset's folder.

    Raises:
        UserError: too many, or one is too large.
    """
    found: dict[str, bytes] = {}
    _read_notices(url, _MAX_DEPTH, set(), found)
    return dict(sorted(found.items()))


def _read_notices(url: str, depth: int, seen: set[str], found: dict[str, bytes]) -> None:
    seen.add(url)
    store = StageStore(url)
    for name in _files_below(store, NOTICES):
        content = store.read(f"{NOTICES}/{name}", max_bytes=MAX_NOTICE_BYTES)
        if content in found.values():
            continue
        flat = name.replace("/", "-")
        plain = flat if _NOTICE_NAME.fullmatch(flat) else f"NOTICE-{len(found)}"
        stem, number = plain, 2
        while plain in found:
            plain, number = f"{number}-{stem}", number + 1
        found[plain] = content
        if len(found) > MAX_NOTICES:
            raise UserError(f"{store.url}/{NOTICES}: more than {MAX_NOTICES} different files; join them into fewer")
    for source in _sources(read_stage(store)["settings"]):
        if depth and source not in seen and is_stage(source):
            _read_notices(source, depth - 1, seen, found)


def _files_below(store: Storage, folder: str) -> list[str]:
    def look() -> list[str]:
        store.fs.invalidate_cache()
        try:
            return list(store.fs.find(store.path(folder)))
        except FileNotFoundError:
            return []

    paths = store.ask(look, folder, LIST_DEADLINE_S, "listed")
    root = PurePosixPath(store.path(folder))
    return sorted(str(PurePosixPath(path).relative_to(root)) for path in paths)


def _sources(settings: Any) -> list[str]:
    found: list[str] = []
    for name in _SOURCES:
        value = settings.get(name) if isinstance(settings, dict | Mapping) else None
        found += [value] if isinstance(value, str) else [v for v in value or [] if isinstance(v, str)]
    return found


def _counts(tree: Any) -> dict[str, dict[str, int]]:
    if not isinstance(tree, dict):
        return {}
    return {
        str(name): {str(reason): int(number) for reason, number in counts.items() if isinstance(number, int)}
        for name, counts in tree.items()
        if isinstance(counts, dict)
    }


def _without_secrets(tree: Any) -> Any:
    """Stages write none; this is the second lock."""
    if isinstance(tree, dict):
        return {
            str(name): "(hidden)" if SECRET.search(str(name)) and isinstance(value, str) else _without_secrets(value)
            for name, value in tree.items()
        }
    if isinstance(tree, list):
        return [_without_secrets(value) for value in tree]
    return _public_text(tree) if isinstance(tree, str) else tree


def _public_text(text: str) -> str:
    try:
        return public_url(text)
    except UserError:  # no URL, though it looks like one: nobody knows where a password would stand
        return "(hidden)"
