"""A run folder's lock: who submits to it, or supervises a run in it, has it alone. The kernel lets go of it whatever its
process dies of. No torch."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import UserError, one_line

LOCK = "job.lock"


@contextmanager
def locked(work_dir: str, url: str) -> Iterator[None]:
    """The run folder at `url` is this process's within.

    Args:
        work_dir: the job's, which is there.

    Raises:
        UserError: another process has it, or files cannot be locked there.
    """
    # NFS makes a lock of byte ranges of it, which wants the file to be open for writing
    with open(os.path.join(work_dir, LOCK), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{url}: another job has just taken it; take another --run-dir") from None
        except OSError as e:
            raise UserError(f"{work_dir}: files cannot be locked there ({one_line(e)}); take a folder on another disk, or have "
                            "this one mounted with locks (Lustre: -o flock)") from None  # fmt: skip
        yield


def is_locked(path: str) -> bool:
    """
    Raises:
        UserError: it cannot be told.
    """
    try:
        file = _opened(path)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as e:
        raise UserError(
            f"{path}: whether a job has the run cannot be told from here ({one_line(e)}); ask as who started it"
        ) from None
    finally:
        os.close(file)
    return False


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        raise
    except OSError:  # another user's run, or a disk that is read only: where locks are the kernel's own, this is enough
        return os.open(path, os.O_RDONLY)
