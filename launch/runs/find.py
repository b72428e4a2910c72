"""Which runs are meant: roots with run folders below them, and names. At paths or any fsspec URL. No torch."""

import os
from collections.abc import Sequence

from trainer.errors import UserError, one_line
from trainer.run_folder import CONFIG, RunFolder

ROOTS_VARIABLE = "LOUPE_RUNS"
DEFAULT_ROOT = "runs"
MAX_FOLDERS = 2000
"""Of one root that are looked at."""


def roots_of(given: Sequence[str]) -> list[str]:
    """Of the command line, else of LOUPE_RUNS (several: with spaces between), else ./runs."""
    return [root.rstrip("/") or "/" for root in given or os.environ.get(ROOTS_VARIABLE, "").split() or [DEFAULT_ROOT]]


def open_folder(url: str) -> RunFolder:
    """
    Raises:
        UserError: its file system is unknown.
    """
    try:
        return RunFolder(url)
    except (ValueError, ImportError, OSError) as e:
        raise UserError(f"{url}: {one_line(e)}") from None


def folders_in(root: str) -> list[RunFolder]:
    """The folders below `root`, runs or not, in order of names.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    above = open_folder(root)
    try:
        above.fs.invalidate_cache()
        entries = above.fs.ls(above.root, detail=True)
    except FileNotFoundError:
        raise UserError(
            f"{root}: no such folder; name the one that holds the runs with --root, or in {ROOTS_VARIABLE}"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(f"{root}: cannot be listed ({one_line(e)}); give another --root") from None
    names = sorted(os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")
    names = [name for name in names if name and not name.startswith(".")]
    if len(names) > MAX_FOLDERS:
        raise UserError(f"{root}: holds {len(names)} folders, {MAX_FOLDERS} at most are read; name a smaller --root")
    return [RunFolder(f"{root}/{name}") for name in names]


def find_run(name: str, given_roots: Sequence[str] = ()) -> RunFolder:
    """The run in folder `name`, a path or a URL; else the one of that name below a root.

    Raises:
        UserError: there is none, or two roots have one of that name.
    """
    if _is_run(name):
        return open_folder(name)
    roots = [] if "://" in name or os.path.isabs(name) else roots_of(given_roots)
    found = [f"{root}/{name}" for root in roots if _is_run(f"{root}/{name}")]
    if len(found) > 1:
        raise UserError(f"{name}: in {' and '.join(found)}; give the folder itself")
    if not found:
        also = f", and none of that name in {', '.join(roots)}" if roots else ""
        raise UserError(
            f"{name}: no run there (no {CONFIG}){also}; give a run folder such as runs/demo, or a name and --root"
        )
    return open_folder(found[0])


def _is_run(url: str) -> bool:
    try:
        return open_folder(url).exists(CONFIG)
    except OSError as e:
        raise UserError(f"{url}: cannot be read ({one_line(e)})") from None
