"""What runs in a Kubernetes pod: `loupe pod`, the container's command. Starts the pod's ranks and ends as they end. No torch.

Kubernetes asks by SIGTERM and kills after terminationGracePeriodSeconds. The ranks get the signal at once, agree on a step,
save, and end with 75; the pod ends with the same, and its job's failure policy starts all pods again (`launch.pods.manifests`).
The container has one process that nobody else waits for, so what ranks say is told on its output as well, line by line.

Before its ranks start, each pod checks its node. A pod cannot keep the next one from that node: its record names it.
"""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from data.deadlines import call_within
from launch.environment import Place, port_of_name
from launch.job import signal_name, trainer_command
from launch.log_tails import tails_kept
from launch.pods.heartbeat import Heartbeat
from launch.pods.manifests import ATTEMPT_ENV, CONFIG_ENV, NODE_ENV
from launch.pods.records import PodJob, attempt_name, claim, judge, write_end, write_start
from launch.pods.waits import FailureWatch, wait_for_main, wait_until_free
from launch.ranks import (
    CRASH_GRACE_S,
    Ends,
    Outcome,
    decide,
    end_job,
    last_line,
    log_path,
    outcome_of,
    signal_rank,
    start_rank,
    wait_for_ranks,
)
from trainer.config import CODE_ROOT, RunConfig
from trainer.config_text import from_yaml, to_yaml
from trainer.discovery import after_the_ranks
from trainer.errors import ExitCode, UserError, one_line
from trainer.run_folder import CONFIG, RunFolder

END_S = 25.0
"""Of the grace period, for this process: to record the end, and to bring logs to storage."""
RECORD_S = LOGS_S = 10.0
"""Longest of each."""
RENDEZVOUS_S = 900.0
"""Until the name of rank 0's pod means something: its node may have yet to be started, and the image to be pulled."""
MAX_TOLD_BYTES = 4 << 20
"""Of a rank's log at a time."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(frozen=True)
class PodOptions:
    job: PodJob
    index: int
    """Of this pod; that of 0 has rank 0."""
    run_dir: str
    main_host: str
    grace_s: float
    scratch: Path
    """A folder of this pod alone."""
    node: str = "here"
    """The machine that the pod is on, as Kubernetes calls it."""
    preflight: bool = True
    """Check it before the ranks start."""

    @property
    def ranks(self) -> range:
        return range(self.index * self.job.gpus_per_node, (self.index + 1) * self.job.gpus_per_node)

    @property
    def work_dir(self) -> str:
        folder = RunFolder(self.run_dir)
        return folder.root if folder.is_local else str(self.scratch)


class Pod:
    """The ranks of one pod, from their start to their end."""

    def __init__(self, *, poll_s: float = 0.2) -> None:
        """Takes signals from now on."""
        self.asked_at: float | None = None
        """Unix time of the signal that asked for the end."""
        self._poll_s = poll_s
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._told: dict[int, int] = {}
        """Bytes of each rank's log that have been told."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked_at is None:
            self.asked_at = time.time()
            self._stop()

    def _was_asked(self) -> bool:
        return self.asked_at is not None

    def _stop(self) -> None:
        for process in self._processes.values():
            signal_rank(process, signal.SIGTERM)

    def run(self, options: PodOptions, config: RunConfig) -> int:
        folder, job = RunFolder(options.run_dir), options.job
        options.scratch.mkdir(parents=True, exist_ok=True)
        (options.scratch / CONFIG).write_text(to_yaml(config))
        if options.index:
            return self._attempt(options, config, folder)
        wait_until_free(folder, job, grace_s=options.grace_s, stopped=self._was_asked)
        if self.asked_at is not None:
            return int(ExitCode.REQUEUE)
        found = claim(folder, job, host=platform.node())
        with Heartbeat(folder, job.name, job.attempt):
            decision = judge(folder, job, found, options.scratch)
            if decision and not decision.restart:
                raise UserError(decision.why)
            if decision:
                _say(f"the start before: {decision.why}")
            return self._attempt(options, config, folder)

    def _attempt(self, options: PodOptions, config: RunConfig, folder: RunFolder) -> int:
        _record(
            f"start of pod {options.index}", lambda: write_start(folder, options.job, options.index, node=options.node)
        )
        logs = [log_path(options.work_dir, rank) for rank in options.ranks]
        started = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        # a pod's disk goes with it: each start has logs of its own
        with tails_kept(options.run_dir, logs, of_start=started, last_s=LOGS_S):
            ends = self._unfit(options, config, folder) or self._ran(options, config, folder)
            # within: the last upload of a log may wait for storage
            outcome = self._ended(options, folder, ends)
        return self._end(options, folder, outcome)

    def _unfit(self, options: PodOptions, config: RunConfig, folder: RunFolder) -> Ends | None:
        """Check this node; how the first rank ends, which has not started, where nothing may start here."""
        if not options.preflight:
            return None
        from launch.doctor.preflight import log_check, preflight

        job, first = options.job, options.ranks[0]
        ports = {"the ranks' rendezvous": ("0.0.0.0", port_of_name(job.name))} if options.index == 0 else {}
        verdict = preflight(
            options.run_dir, options.work_dir, attempt=f"{attempt_name(job.attempt)}-{options.index:04d}",
            node=options.node, ranks=job.gpus_per_node, cpu=job.cpu, wanted_ports=ports, config=config, records=folder,
        )  # fmt: skip
        log = log_path(options.work_dir, first)
        for line in verdict.lines():
            _say(f"check of {options.node}: {line}")
        log_check(log, options.node, verdict)
        return None if verdict.code is None else Ends({first: int(verdict.code)}, {first: time.time()})

    def _ran(self, options: PodOptions, config: RunConfig, folder: RunFolder) -> Ends:
        """Start the ranks and wait for their end."""
        job, ranks = options.job, options.ranks
        if options.index:
            timeout_s = options.grace_s + RENDEZVOUS_S
            wait_for_main(folder, job, timeout_s=timeout_s, stopped=self._was_asked)
        wait_for_host(options.main_host, self._was_asked)
        command = trainer_command(options.run_dir, str(options.scratch))
        for rank in ranks:
            place = Place(
                rank=rank, world_size=job.world_size, local_rank=rank - ranks[0], local_world_size=job.gpus_per_node,
                master_addr=options.main_host, master_port=port_of_name(job.name), code_dir=str(CODE_ROOT),
                work_dir=options.work_dir, use_gpus=not job.cpu, num_threads=config.parallel.num_threads,
                one_machine=job.nodes == 1,
            )  # fmt: skip
            log = log_path(options.work_dir, rank)
            self._told[rank] = log.stat().st_size if log.exists() else 0
            self._processes[rank] = start_rank(
                command, place, attempt=f"Kubernetes job {job.name}, pod {options.index}"
            )
        if self.asked_at is not None:
            self._stop()  # asked while they were being started
        watch = FailureWatch(folder, job)
        ends = wait_for_ranks(self._processes, give_up=self._look(options, watch), poll_s=self._poll_s)
        watch.finish()
        if ends.stuck:
            _say(f"rank(s) {', '.join(map(str, ends.stuck))} do not die of SIGKILL: a disk or a driver holds them")
        self._tell(options.work_dir, rest=True)
        if options.index == 0 and (trouble := after_the_ranks(config.metrics.discovery_dir, folder.url)):
            _say(trouble)
        return ends

    def _ended(self, options: PodOptions, folder: RunFolder, ends: Ends) -> Outcome:
        """How this pod's ranks ended; recorded."""
        job, ranks, codes = options.job, options.ranks, ends.codes
        asked = self.asked_at is not None
        crashed_at = min((ends.times[rank] for rank in codes if not _is_clean(codes[rank], asked=asked)), default=None)
        outcome = outcome_of(codes, first=ends.first, world_size=len(ranks), stop_requested=asked)
        if outcome.kind == "crash" and not codes.keys() >= set(ranks) and crashed_at is None:
            outcome = Outcome("requeue", int(ExitCode.REQUEUE), outcome.rank)  # ended by us: the reason is elsewhere
        last_lines = {rank: last_line(log_path(options.work_dir, rank)) for rank in ranks}
        _record(f"end of pod {options.index}", lambda: write_end(
            folder, job, options.index, node=options.node, codes=codes, last_lines=last_lines, asked_at=self.asked_at,
            crashed_at=crashed_at,
        ))  # fmt: skip
        return outcome

    def _end(self, options: PodOptions, folder: RunFolder, outcome: Outcome) -> int:
        """The pod's exit code; the run's end is recorded."""
        log = log_path(options.work_dir, outcome.rank)
        _say(f"rank {outcome.rank} ended with {signal_name(outcome.code)}: {last_line(log)}")
        if outcome.kind == "stop":
            _record("end of the run", lambda: decide(
                folder, outcome, preempted=False, max_restarts=options.job.max_restarts, log=log
            ))  # fmt: skip
            return int(ExitCode.STOP)
        if outcome.kind == "done":
            if options.index == 0:
                _record("end of the run", lambda: end_job(folder, 0, "done"))
            return 0
        code = outcome.code if outcome.code > 0 else 128 - outcome.code
        return 1 if code in (126, 127, 128) else code  # codes that would say that the image is not ours

    def _look(self, options: PodOptions, watch: FailureWatch) -> Callable[[], bool]:
        """What is done between two looks at the ranks, without asking storage; it returns whether there is nothing more to
        wait for."""
        deadline: float | None = None

        def look() -> bool:
            nonlocal deadline
            self._tell(options.work_dir)
            now = time.monotonic()
            if self.asked_at is None:
                return False
            if deadline is None and watch.seen:  # then a save waits for ranks that are gone
                deadline = now + CRASH_GRACE_S
            if time.time() > self.asked_at + options.grace_s - END_S:
                _say(f"not saved within --grace {options.grace_s:.0f} s: give more")
                return True
            return deadline is not None and now > deadline

        return look

    def _tell(self, work_dir: str, *, rest: bool = False) -> None:
        """What the ranks' logs have that is new, by whole lines; with `rest` also a last one that has no end."""
        for rank, told in self._told.items():
            with open(log_path(work_dir, rank), "rb") as file:
                file.seek(told)
                data = file.read(MAX_TOLD_BYTES)
            whole = len(data) if rest else data.rfind(b"\n") + 1
            self._told[rank] += whole
            for line in data[:whole].decode(errors="replace").splitlines():
                print(f"[rank {rank}] {line}", flush=True)


def _is_clean(code: int, *, asked: bool) -> bool:
    if asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return True  # before the trainer could listen
    return code in (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.STOP, ExitCode.USAGE)


def _say(text: str) -> None:
    print(f"loupe pod: {text}", flush=True)


def _record(what: str, write: Callable[[], object]) -> None:
    """Into the run folder, if it takes it: the exit code tells the cluster what to do, and the next start takes a pod that
    left no word for one that was lost."""
    try:
        call_within(write, time.monotonic() + RECORD_S, what)
    except Exception as e:  # whatever a storage client raises
        _say(f"warning: {what}: not recorded in the run folder ({one_line(e)})")


def wait_for_host(host: str, stopped: Callable[[], bool], *, timeout_s: float = RENDEZVOUS_S) -> None:
    """Until the name has an address. It gets one when its pod runs, wherever the cluster's DNS has it by then.

    Raises:
        TimeoutError: it has none.
    """
    deadline = time.monotonic() + timeout_s
    while not stopped():
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{host}: the pod of rank 0 has no address after {timeout_s:.0f} s ({e}); does it run, and is the "
                    "job's headless service there?"
                ) from None
        time.sleep(1.0)


def node_name() -> str:
    """Of this pod's node, as a file's name may hold it; of a pod that is not told, the pod's own."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", os.environ.get(NODE_ENV) or platform.node())[:100] or "here"


def options_from(
    job: str, run_dir: str, nodes: int, gpus_per_node: int, cpu: bool, max_restarts: int, grace_s: float,
    main_host_env: str, index: int | None, attempt: str | None, no_preflight: bool,
) -> PodOptions:  # fmt: skip
    """Raises UserError where the pod lacks what its kind of job should have given it."""
    if index is None or not 0 <= index < nodes:
        raise UserError(
            f"--index {index}: which of the {nodes} pods this is; an Indexed Job says it in JOB_COMPLETION_INDEX"
        )
    main_host = "127.0.0.1" if nodes == 1 else os.environ.get(main_host_env, "")
    if not main_host:
        raise UserError(f"{main_host_env}: not set, so this pod would be a world of its own; Volcano's svc plugin sets "
                        "it, or the JobSet's manifest")  # fmt: skip
    if not attempt or not attempt.strip("."):
        raise UserError(f"{ATTEMPT_ENV}: not set; pods tell starts apart by it, take the manifest as it was rendered")
    if "," in main_host:
        raise UserError(f"{main_host_env}: {main_host} are several hosts; rank 0 has one")
    return PodOptions(
        PodJob(job, nodes, gpus_per_node, cpu, max_restarts, attempt), index, run_dir, main_host, grace_s,
        Path(tempfile.gettempdir()) / "loupe", node_name(), not no_preflight,
    )  # fmt: skip


@click.command(hidden=True)
@click.option("--job", required=True, help="Name of the job, the same at each start.")
@click.option("--run-dir", required=True, help="The run folder: a URL, or a path that all pods see.")
@click.option("--nodes", type=int, required=True, help="Pods.")
@click.option("--gpus-per-node", type=int, required=True, help="Ranks in this pod.")
@click.option("--cpu", is_flag=True, help="Ranks without GPUs.")
@click.option("--max-restarts", type=int, required=True, help="Crashes that are answered by a restart.")
@click.option("--grace", "grace_s", type=float, required=True, help="Seconds from SIGTERM to SIGKILL.")
@click.option("--main-host-env", required=True, help="Variable with the host of the pod of rank 0.")
@click.option("--index", type=int, envvar="JOB_COMPLETION_INDEX", help="Which of the pods this is.")
@click.option("--no-preflight", is_flag=True, help="Start without the check of the node.")
@click.option("--attempt", envvar=ATTEMPT_ENV, help="Another text at each start, the same for all pods.")
def pod(**arguments: object) -> int:
    """Run the ranks of one pod. The config is in LOUPE_CONFIG. Ends with 0 done, 75 start me again, 71 not on this
    node, 93 do not."""
    this = Pod()  # before anything slow: to process 1 of a container, a signal that nobody takes is as good as none
    try:
        options = options_from(**arguments)  # type: ignore[arg-type]
        text = os.environ.get(CONFIG_ENV)
        if text is None:
            raise UserError(f"{CONFIG_ENV}: not set; it holds the run's config in the manifest as it was rendered")
        return this.run(options, from_yaml(text, source=CONFIG_ENV))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return int(ExitCode.STOP)
