"""A run as a command names it, or one of its checkpoints: a folder, a URL, or a name below a root. No torch."""

import os
import re
from collections.abc import Sequence

from trainer.errors import KEYS_MEND, UserError, one_line, storage_errors
from trainer.run_folder import CHECKPOINTS, CONFIG, RunFolder

ROOTS_VARIABLE = "LOUPE_RUNS"
DEFAULT_ROOT = "runs"
_CHECKPOINT = re.compile(rf"(?P<run>.+)/{CHECKPOINTS}/(?P<name>step-\d{{8,18}}-[0-9a-f]{{8}})/*")
_CUT = re.compile(rf"(?P<run>.+)/{CHECKPOINTS}/(?P<name>step-[0-9a-f-]*)/*")
"""Without its token, or with a part of it."""
_SHOWN = 4


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


def run_or_checkpoint(name: str, roots: Sequence[str] = ()) -> str:
    """URL of a run, by its folder, its URL or its name below a root; or of the checkpoint `RUN/checkpoints/step-...`, whose
    name may be cut where one alone begins so.

    Raises:
        UserError: there is no such run, or no or more than one checkpoint of that name.
    """
    if match := _CHECKPOINT.fullmatch(name):
        return f"{find_run(match['run'], roots).url}/{CHECKPOINTS}/{match['name']}"
    if (match := _CUT.fullmatch(name)) is None:
        return find_run(name, roots).url
    run = find_run(match["run"], roots)
    return f"{run.url}/{CHECKPOINTS}/{_whole_name(name, run, match['name'])}"


def _whole_name(asked: str, run: RunFolder, begin: str) -> str:
    try:
        there = [name for name in run.names(CHECKPOINTS) if _CHECKPOINT.fullmatch(f"./{CHECKPOINTS}/{name}")]
    except storage_errors() as e:
        raise UserError(f"{asked}: cannot be read ({one_line(e)})" + f"; {KEYS_MEND}" * ("://" in run.url)) from None
    found = [name for name in there if name.startswith(begin)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{asked}: {_listed(found)} begin so; give one whole")
    raise UserError(
        f"{asked}: no checkpoint begins so; {f'there are {_listed(there)}' if there else 'the run has none'}"
    )


def _listed(names: Sequence[str]) -> str:
    """The newest last."""
    more = f"{len(names) - _SHOWN} more, " if len(names) > _SHOWN else ""
    return more + ", ".join(names[-_SHOWN:])


def _is_run(url: str) -> bool:
    try:
        return open_folder(url).exists(CONFIG)
    except storage_errors() as e:
        raise UserError(f"{url}: cannot be read ({one_line(e)})" + f"; {KEYS_MEND}" * ("://" in url)) from None
