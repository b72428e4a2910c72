"""The process that data workers are forked from. No torch: it is started before the trainer imports that, and imports what
workers need at the same time."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to a whole job; the trainer acts on them, and needs its workers until it has saved."""


def start_forkserver() -> None:
    """Start it, unless it runs.

    Forking the trainer itself is unsafe once it has threads, and a fresh interpreter for each worker would import
    torch each time. Signals are blocked while it starts, and stay so in it: it must outlive a SIGTERM to the job. So must
    Python's tracker of semaphores outlive SLURM's SIGUSR2, of which it knows nothing by itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.worker_imports"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
        # again: the start of the tracker has unblocked some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
