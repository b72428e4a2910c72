"""A run that is to end: a mark in its folder, which whoever decides about a restart reads. No torch.

The mark names the submission that it ends, so it need not be removed before the next one.
"""

import getpass
import os
import signal
import socket
import time
from typing import Any

from trainer.run_folder import JOB, RunFolder

CANCEL = "cancel.json"
CANCELLED = 128 + signal.SIGTERM
"""Exit code of a job that was cancelled."""


def ask_to_cancel(folder: RunFolder, job: dict[str, Any]) -> None:
    """Mark the submission that `job`, the record in job.json, is of."""
    folder.write_json(CANCEL, {
        "submitted_at": job.get("submitted_at"), "time": time.time(), "host": socket.gethostname(), "by": _user(),
    })  # fmt: skip


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def asked_to_cancel(folder: RunFolder) -> dict[str, Any] | None:
    """The mark, where it is of the submission that now has the folder."""
    if not folder.exists(CANCEL) or not folder.exists(JOB):
        return None
    mark = folder.read_json(CANCEL)
    submitted_at = folder.read_json(JOB).get("submitted_at")
    return mark if submitted_at is not None and mark.get("submitted_at") == submitted_at else None
