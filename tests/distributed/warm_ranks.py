"""A process that has imported the trainer and forks the tests' ranks: importing takes longer than most of what they do.

python -m tests.distributed.warm_ranks    # reads a folder's path a line, answers a line when its ranks have ended
"""

import ctypes
import os
import pickle
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

JOB, ERROR = "job", "error"


def _serve() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing of ours outlives the tests
    import trainer.run  # noqa: F401  # what the ranks would import

    assert threading.active_count() == 1, "threads do not survive a fork"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _lead(Path(line.strip()))
        os.waitpid(child, 0)
        print("ended", flush=True, file=_ANSWERS)


def _lead(folder: Path) -> None:
    """One call of `run_ranks`, in a process of its own."""
    try:
        job: dict[str, Any] = pickle.loads((folder / JOB).read_bytes())  # noqa: S301  # written by the test a moment ago
        sys.path[:] = job["path"]
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ |= job["environment"]
        import torch.multiprocessing as mp

        function, arguments = pickle.loads(job["call"])  # noqa: S301
        mp.start_processes(function, arguments, nprocs=job["world_size"], start_method="fork")
    except BaseException as e:
        (folder / ERROR).write_text(f"{e}\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    # the ranks' own output goes where the tests' goes
    _ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve()
