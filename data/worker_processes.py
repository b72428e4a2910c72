"""The processes that prepare batches: how they begin, and that they end with their trainer."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.process import BaseProcess

import cv2
import torch

from data.forkserver import SIGNALS


def become_worker(_worker_id: int, environment: dict[str, str]) -> None:
    """Runs first in each worker. The fork server's environment is as old as that; where storage is may be known since."""
    _die_with_trainer()
    os.environ.clear()
    os.environ.update(environment)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # 0 is OpenCV's word for none but the caller's


def _die_with_trainer() -> None:
    """Also when it is killed. The fork server alone is no sign: it lives as long as any of its workers."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch the trainer", daemon=True).start()
    if sys.platform == "linux":  # should the fork server be killed, nobody could end or replace its workers
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        if ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def kill(workers: list[BaseProcess]) -> None:
    """SIGKILL, since workers ignore SIGTERM."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join()


def cause_of(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hints = {"SIGKILL": "; out of memory?", "SIGBUS": "; /dev/shm full? Give the container more shared memory"}
        return f"by {name}{hints.get(name, '')}"
    return f"exit code {exit_code}"
