"""The supervisor of a job on this machine: starts the ranks, shows progress, restarts as a cluster would. No torch."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launch.console import Display, Follower, where_things_are
from launch.environment import Place
from launch.folder_lock import locked
from launch.job import JobSpec, make_work_dir, process_start, record_job, signal_name, trainer_command
from launch.log_tails import tails_kept
from launch.ranks import (
    CRASH_GRACE_S,
    Outcome,
    end_job,
    kill_ranks,
    last_line,
    log_path,
    outcome_of,
    signal_rank,
    start_rank,
    wait_for_ranks,
)
from launch.slurm_job.unrecorded import decide_or_note, within_limit
from trainer.config import RunConfig
from trainer.discovery import after_the_ranks
from trainer.errors import ExitCode, one_line
from trainer.run_folder import RunFolder

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Each means: save and stop. SIGUSR2 is the warning before a time limit, where a cluster runs the supervisor."""
MAX_BACKOFF_S = 60.0


def run_local(
    spec: JobSpec, config: RunConfig, folder: RunFolder, display: Display, prepare: Callable[[], object]
) -> int:
    """Supervise the job until it ends for good; returns the exit code of the command.

    `prepare` fills the run folder, once it is this process's alone.
    """
    make_work_dir(spec, folder)
    with locked(spec.work_dir, folder.url):
        prepare()
        record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
        if spec.preflight and (code := _unfit(spec, folder, display)) is not None:
            return code
        with tails_kept(spec.run_dir, [log_path(spec.work_dir, rank) for rank in range(spec.world_size)]):
            return Supervisor(spec, config, folder, display).run()


def _unfit(spec: JobSpec, folder: RunFolder, display: Display) -> int | None:
    """Check this machine, once a submission; the code to end with where it is not fit."""
    from launch.doctor.preflight import log_check, preflight

    node = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())[:100] or "here"
    verdict = preflight(spec.run_dir, spec.work_dir, attempt="local", node=node, ranks=spec.world_size, cpu=spec.cpu)
    for line in verdict.lines():
        display.note(f"check before the start: {line}")
    log_check(log_path(spec.work_dir, 0), node, verdict)
    if verdict.code is None:
        return None
    end_job(folder, int(verdict.code), verdict.why)
    display.note(f"the run has not started: {verdict.why}")
    display.close()
    return int(verdict.code)


class Supervisor:
    """One job on this machine.

    Args:
        command: what each rank runs; the trainer, unless a test says otherwise.
        backoff_s: pause before the first restart after a crash; doubles with each that brings no newer step.
        crash_grace_s: how long the others may live after one rank has crashed.
    """

    def __init__(
        self,
        spec: JobSpec,
        config: RunConfig,
        folder: RunFolder,
        display: Display,
        *,
        command: Sequence[str] | None = None,
        backoff_s: float = 1.0,
        crash_grace_s: float = CRASH_GRACE_S,
        poll_s: float = 0.2,
    ) -> None:
        self._spec, self._config, self._folder, self._display = spec, config, folder, display
        self._command = command or trainer_command(spec.run_dir, spec.work_dir)
        self._backoff_s, self._crash_grace_s, self._poll_s = backoff_s, crash_grace_s, poll_s
        self._stop: int | None = None
        """The signal that asked this process to stop."""
        self._kill = False
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._rehearsed = False
        self._follower = Follower(folder, display, from_now=True)

    def run(self) -> int:
        handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            return self._run()
        finally:
            self._note_stuck(kill_ranks(self._processes))
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._display.close()

    def _run(self) -> int:
        crashes = attempt = reached = 0
        while True:
            self._display.note(f"{self._spec.run_dir}: {self._spec.world_size} process(es), "
                               f"logs in {log_path(self._spec.work_dir, 0).parent}")  # fmt: skip
            outcome = self._attempt(attempt)
            log = log_path(self._spec.work_dir, outcome.rank)
            if self._stop is not None and outcome.kind != "done":
                return self._stopped(outcome, log)
            decision = decide_or_note(
                self._folder, self._reports(attempt), outcome, preempted=self._rehearsed, log=log,
                max_restarts=self._spec.max_restarts,
            )  # fmt: skip
            if not decision.restart:
                self._display.note("done" if decision.code == 0 else f"the run has stopped: {decision.why}")
                self._say_where()
                return decision.code
            if self._follower.step > reached:
                # it got on since the last crash, so this is another one: a long run does not pay for all it has seen
                reached, crashes = self._follower.step, 0
            crashes += outcome.kind == "crash"
            pause_s = min(self._backoff_s * 2 ** (crashes - 1), MAX_BACKOFF_S) if outcome.kind == "crash" else 0.0
            self._display.note(f"{decision.why}; starting again" + (f" in {pause_s:.0f} s" if pause_s else ""))
            self._sleep(pause_s)
            if self._stop is not None:
                return self._stopped(outcome, log)
            attempt += 1

    def _stopped(self, outcome: Outcome, log: Path) -> int:
        """The user, or a cluster around us, has asked for the end: no restart."""
        assert self._stop is not None
        name = signal.Signals(self._stop).name
        if self._kill:
            code, why = (
                128 + self._stop,
                "killed before it had saved; the same command goes on from the newest checkpoint",
            )
        elif outcome.kind == "requeue":
            code, why = int(ExitCode.REQUEUE), f"stopped after saving ({name}); the same command goes on from here"
        else:
            code = outcome.code if outcome.code > 0 else 128 - outcome.code
            why = (
                f"rank {outcome.rank} ended with {signal_name(outcome.code)} while stopping ({name}): {last_line(log)}"
            )
        try:
            within_limit(lambda: end_job(self._folder, code, why), "to record the end")
        except Exception as e:  # each storage client has errors of its own; the ranks have saved, or not, all the same
            self._display.note(f"WARNING: the end is not recorded ({one_line(e)})")
        self._display.note(why)
        self._say_where()
        return code

    def _reports(self, attempt: int) -> Path:
        """Where the end of a start is noted which the run folder does not take."""
        return Path(self._spec.work_dir, "local", f"{os.getpid()}-{process_start(os.getpid())}.{attempt}")

    def _note_stuck(self, ranks: Sequence[int]) -> None:
        if ranks:
            self._display.note(f"WARNING: rank(s) {', '.join(map(str, ranks))} do not die of SIGKILL: a disk or a driver holds "
                               "them; they are left behind")  # fmt: skip

    def _say_where(self) -> None:
        for text in where_things_are(self._folder):
            self._display.note(text)

    # ----------------------------------------------------------------------------------------------------- one attempt

    def _attempt(self, attempt: int) -> Outcome:
        """Start all ranks, wait for their end; returns what it says."""
        world_size = self._spec.world_size
        port = free_port()
        self._rehearsed = False
        self._processes = {}
        for rank in range(world_size):
            place = Place(
                rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size,
                master_addr="127.0.0.1", master_port=port, code_dir=self._spec.code_dir, work_dir=self._spec.work_dir,
                use_gpus=not self._spec.cpu, num_threads=self._config.parallel.num_threads, one_machine=True,
            )  # fmt: skip
            self._processes[rank] = start_rank(self._command, place, attempt=f"start {attempt}")
        if self._stop is not None:
            self._pass_on(signal.SIGTERM)  # asked while they were being started
        said = False

        def look() -> bool:
            """Show what is new; whether the ranks are to be killed."""
            nonlocal said
            if not self._kill:
                self._follower.poll()
                self._rehearse(attempt)
            if self._stop is not None and not said:
                said = True
                self._display.note("stopping: the ranks save first; Ctrl-C again kills them")
            return self._kill

        ends = wait_for_ranks(self._processes, give_up=look, crash_grace_s=self._crash_grace_s, poll_s=self._poll_s)
        self._processes = {}
        if trouble := after_the_ranks(self._config.metrics.discovery_dir, self._folder.url):
            self._display.note(f"WARNING: {trouble}")
        self._note_stuck(ends.stuck)
        self._follower.poll()
        return outcome_of(ends.codes, first=ends.first, world_size=world_size, stop_requested=self._stop is not None)

    def _rehearse(self, attempt: int) -> None:
        at = self._spec.rehearse_preemption
        if at is not None and attempt == 0 and not self._rehearsed and self._follower.step >= at:
            self._rehearsed = True
            self._display.note(f"rehearsing a preemption at step {self._follower.step}: SIGTERM to all ranks")
            self._pass_on(signal.SIGTERM)

    # --------------------------------------------------------------------------------------------------------- signals

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None and number == signal.SIGINT:
            self._kill = True
            return
        if self._stop is None:
            self._stop = number
            # Notes are written by the loop: a handler that interrupts a write must not write itself.
            self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for process in self._processes.values():
            signal_rank(process, number)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._stop is None and time.monotonic() < end:
            time.sleep(min(0.1, seconds))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
