"""The processes that prepare batches: how they start, and that they end with their trainer."""

import ctypes
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from multiprocessing.process import BaseProcess

import cv2
import torch

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to a whole job; the trainer acts on them, and needs its workers until it has saved."""


def start_forkserver() -> None:
    """Start the process that workers are forked from.

    Forking the trainer itself is unsafe once it has threads, and a fresh interpreter for each worker would import
    torch each time. Signals are blocked while it starts, and stay so in it: it must outlive a SIGTERM to the job. So must
    Python's tracker of semaphores outlive SLURM's SIGUSR2, of which it knows nothing by itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
        # again: the start of the tracker has unblocked some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become_worker(_worker_id: int, environment: dict[str, str]) -> None:
    """Runs first in each worker. The fork server's environment is as old as that; where storage is may be known since."""
    _die_with_trainer()
    os.environ.clear()
    os.environ.update(environment)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
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
