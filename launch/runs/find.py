"""Which runs are meant: roots with run folders below them, and names. At paths or any fsspec URL. No torch."""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from launch.runs.read import ended, in_parallel, read_all
from trainer.errors import KEYS_MEND, UserError, one_line, storage_errors
from trainer.run_folder import CONFIG, JOB, RunFolder
from trainer.run_names import ROOTS_VARIABLE, find_run, open_folder, roots_of

MAX_FOLDERS = 2000
"""Of one root that are looked at."""
DEPTH, MAX_DEPTH = 2, 6
"""Levels below a root: runs, and runs of a sweep or an experiment that has a folder of its own."""


def folders_in(root: str, *, depth: int = DEPTH) -> tuple[list[RunFolder], str | None]:
    """(folders below `root`, runs or not, in order of names; why there may be more). A run's own folders are not looked into.

    Args:
        depth: levels.

    Raises:
        UserError: it is not there, cannot be read, or holds too many folders.
    """
    found = level = _folders(root)
    for _ in range(depth - 1):
        if len(found) + len(level) > MAX_FOLDERS:  # each of them would be listed
            return found, _too_many(root)
        inner = in_parallel([partial(_inside, folder) for folder in level])
        late = [folder.url for folder, names in zip(level, inner, strict=True) if names is None]
        level = [RunFolder(f"{f.url}/{n}") for f, names in zip(level, inner, strict=True) for n in names or ()]
        if len(found) + len(level) > MAX_FOLDERS:
            return found, _too_many(root)
        found = found + level
        if late:
            return found, f"{late[0]}: not listed in time, so what is in there is not shown"
    return sorted(found, key=lambda folder: folder.url), None


def _too_many(root: str) -> str:
    return f"{root}: holds more than {MAX_FOLDERS} folders, so not all of its levels are read; name a smaller --root"


def _inside(folder: RunFolder) -> list[str]:
    """Names of the folders in one that is no run. What cannot be listed is the business of who reads the run."""
    try:
        entries = folder.fs.ls(folder.root, detail=True)
    except storage_errors(ValueError):
        return []
    if any(os.path.basename(entry["name"].rstrip("/")) in (CONFIG, JOB) for entry in entries):
        return []
    return _names_of_folders(entries)


def _names_of_folders(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted(os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")
    return [name for name in names if name and not name.startswith(".")]


def _folders(root: str) -> list[RunFolder]:
    above = open_folder(root)
    try:
        above.fs.invalidate_cache()
        entries = above.fs.ls(above.root, detail=True)
    except FileNotFoundError:
        raise UserError(
            f"{root}: no such folder; name the one that holds the runs with --root, or in {ROOTS_VARIABLE}"
        ) from None
    except storage_errors(ValueError) as e:
        mend = f"{KEYS_MEND}, or give another --root" if "://" in root else "give another --root"
        raise UserError(f"{root}: cannot be listed ({one_line(e)}); {mend}") from None
    names = _names_of_folders(entries)
    if len(names) > MAX_FOLDERS:
        raise UserError(f"{root}: holds {len(names)} folders, {MAX_FOLDERS} at most are read; name a smaller --root")
    return [RunFolder(f"{root}/{name}") for name in names]


def find_runs(names: Sequence[str], given_roots: Sequence[str] = ()) -> list[RunFolder]:
    """As `find_run`, of several; each once. A name with * ? [ ] stands for all runs of such names, that is paths below a root
    or beside what is before its last slash, that no job has ended.

    Raises:
        UserError: there is none of a name, or no such run.
    """
    found: dict[str, RunFolder] = {}
    for name in names:
        matching = [find_run(name, given_roots)] if not set(name) & set("*?[") else _matching(name, given_roots)
        found |= {folder.url: folder for folder in matching}
    return list(found.values())


def _matching(pattern: str, given_roots: Sequence[str]) -> list[RunFolder]:
    above, _, last = pattern.rpartition("/")
    if set(above) & set("*?["):
        raise UserError(f"{pattern}: a pattern may stand behind the last slash only; give more --root")
    whole = "://" in pattern or os.path.isabs(pattern) or os.path.isdir(above)
    roots = [above] if whole else [f"{root}/{above}".rstrip("/") for root in roots_of(given_roots)]
    folders = [folder for root in roots for folder in folders_in(root, depth=1)[0]]
    named = [folder for folder in folders if fnmatch.fnmatchcase(os.path.basename(folder.url), last)]
    runs = [facts for facts in read_all(named) if facts.job is not None and not ended(facts.job) and not facts.finished]
    if not runs:
        raise UserError(
            f"{pattern}: no run of such a name in {', '.join(roots)} that a job has; `loupe runs` lists them"
        )
    return [facts.folder for facts in runs]
