"""What touches a stage's folder from outside of its workers: only while nobody works there, and whole."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from data.stages import leases
from data.stages.receipts import pass_folder
from data.stages.runner import FINISH
from data.stages.store import StageStore
from trainer.errors import UserError

TREE_DEADLINE_S = 3600.0


def check_idle(store: StageStore, passes: Sequence[str]) -> None:
    """
    Raises:
        UserError: a worker holds an item.
    """
    for folder in [*(f"{pass_folder(name)}/leases" for name in passes), FINISH]:
        for item, generation in leases.held(store.names(folder)).items():
            found = leases.holder(store, folder, item, generation)
            if found is not None and (left := found.deadline - time.time()) > 0:
                raise UserError(
                    f"{store.url}: {found.worker} works there; stop the workers, or wait until they have ended (a lease ends "
                    f"in {left:.0f} s)"
                )


def remove_tree(store: StageStore, name: str) -> None:
    """A file, or a folder with all in it: an attempt that hung and was left behind may delete beside this one, so that what
    was listed has gone."""
    path = store.path(name)

    def remove() -> None:
        store.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            if store.is_local and os.path.isdir(path):
                shutil.rmtree(path, onerror=_skip_missing)
            elif store.is_local:
                os.unlink(path)
            else:
                store.fs.rm(path, recursive=True)
        store.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            if left := store.fs.ls(path, detail=False):
                raise OSError(f"{len(left)} are left")

    store.ask(remove, name, TREE_DEADLINE_S, "deleted")


def _skip_missing(
    _function: Callable[..., Any], _path: str, error: tuple[type[BaseException], BaseException, TracebackType]
) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
