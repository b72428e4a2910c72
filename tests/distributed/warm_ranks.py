"""A process that has imported the trainer and forks the tests' ranks: importing takes longer than most of what they do.

python -m tests.distributed.warm_ranks    # reads a line, answers with a line

- `ranks FOLDER`: the call of `run_ranks` that lies there; answered when its ranks have ended.
- `train FOLDER`: `python -m trainer.train` as described there; answered at once by its process id.
- `poll PID`: the exit code of such a process, as `Popen.returncode` has it, or nothing while it runs.
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
    _die_with_parent()
    import trainer.run  # noqa: F401  # what the ranks would import

    assert threading.active_count() == 1, "threads do not survive a fork"
    for line in sys.stdin:
        kind, argument = line.strip().split(" ", 1)
        if kind == "poll":
            pid, status = os.waitpid(int(argument), os.WNOHANG)
            answer = str(os.waitstatus_to_exitcode(status)) if pid else ""
        else:
            folder = Path(argument)
            job = pickle.loads((folder / JOB).read_bytes())  # noqa: S301  # written by the test a moment ago
            child = os.fork()
            if child == 0:
                os.chdir(job["folder"])
                os.environ.clear()
                os.environ |= job["environment"]
                _lead(job, folder) if kind == "ranks" else _train(job)
            if kind == "ranks":
                os.waitpid(child, 0)
            answer = str(child)
        print(answer, flush=True, file=_ANSWERS)


def _lead(job: dict[str, Any], folder: Path) -> None:
    """One call of `run_ranks`, in a process of its own."""
    try:
        sys.path[:] = job["path"]
        import torch.multiprocessing as mp

        function, arguments = pickle.loads(job["call"])  # noqa: S301
        mp.start_processes(function, arguments, nprocs=job["world_size"], start_method="fork")
    except BaseException as e:
        (folder / ERROR).write_text(f"{e}\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _train(job: dict[str, Any]) -> None:
    """One rank, as a launcher starts it, but for what it has imported already."""
    _die_with_parent()
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from trainer.train import main

    sys.argv = ["trainer.train", *job["arguments"]]
    code = main(job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing of ours outlives the tests


if __name__ == "__main__":
    # the ranks' own output goes where the tests' goes
    _ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve()
