"""What pods leave in the run folder for the next start, and what is decided from it. No torch.

A pod knows its own ranks only, and none that is lost says a word. So each writes how it ended into
`pods/ATTEMPT/INDEX.json`, and the pod of rank 0 decides at the next start, from all of them, whether there may be one.
"""

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.job import earlier_jobs, update_job
from launch.pods.heartbeat import is_alive
from launch.ranks import Decision, Outcome, decide, outcome_of
from trainer.errors import ExitCode, UserError, one_line
from trainer.run_folder import CONFIG, JOB, RunFolder

FAILED = "failed.json"
"""Beside the records of an attempt: one of its pods has failed."""
MAX_ATTEMPT = 90
"""Letters; Volcano's is its group's name, that of the job and a UUID, and a version."""


@dataclass(frozen=True)
class PodJob:
    """What a pod is told of its job."""

    name: str
    nodes: int
    gpus_per_node: int
    cpu: bool
    max_restarts: int
    attempt: str
    """Another one at each start, the same for all pods of one."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def attempt_name(attempt: str) -> str:
    """As names of files and folders have it."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", attempt)[-MAX_ATTEMPT:]  # its end tells starts apart


def attempt_folder(attempt: str) -> str:
    return f"pods/{attempt_name(attempt)}"


def record_name(attempt: str, index: int) -> str:
    return f"{attempt_folder(attempt)}/{index:04d}.json"


def write_start(folder: RunFolder, job: PodJob, index: int, *, node: str) -> None:
    folder.write_json(record_name(job.attempt, index), {"started": time.time(), "ended": None, "node": node})


def write_end(
    folder: RunFolder, job: PodJob, index: int, *, node: str, codes: Mapping[int, int], last_lines: Mapping[int, str],
    asked_at: float | None, crashed_at: float | None,
) -> None:  # fmt: skip
    """
    Args:
        node: the machine that the pod was on.
        codes: exit codes by rank, of the ranks that ended by themselves.
        asked_at: Unix time of the signal that asked the pod to stop.
        crashed_at: of the first rank's end that was a crash.
    """
    if crashed_at or any(code in (ExitCode.STOP, ExitCode.USAGE) for code in codes.values()):
        folder.write_json(f"{attempt_folder(job.attempt)}/{FAILED}", {"pod": index, "time": time.time()})
    folder.write_json(record_name(job.attempt, index), {
        "ended": time.time(), "node": node, "asked_at": asked_at, "crashed_at": crashed_at,
        "codes": {str(rank): code for rank, code in codes.items()},
        "last_lines": {str(rank): line for rank, line in last_lines.items()},
    })  # fmt: skip


def a_pod_has_failed(folder: RunFolder, job: PodJob) -> bool:
    """In this attempt: its ranks wait for nobody any more, and the others wait in vain for them."""
    folder.fs.invalidate_cache()
    return folder.exists(f"{attempt_folder(job.attempt)}/{FAILED}")


# ------------------------------------------------------------------------------------------------ rank 0's pod, first


def claim(folder: RunFolder, job: PodJob, *, host: str) -> dict[str, Any]:
    """Make the run folder this job's; returns `job.json` as it was found for a job that goes on, else a new one.

    Raises:
        UserError: another job lives in it, or may.
    """
    try:
        found = folder.read_json(JOB) if folder.exists(JOB) else None
    except ValueError as e:
        raise UserError(
            f"{folder.url}/{JOB}: damaged ({one_line(e)}); remove it, the run goes on from its newest checkpoint"
        ) from None
    if found and not found.get("ended"):
        if found.get("cluster") != "kubernetes":
            raise UserError(f"{folder.url}: in use by a {found.get('cluster')} job ({found.get('job_id') or found.get('pid')} "
                            f"of {found.get('host')}); if that is gone, remove {folder.url}/{JOB}")  # fmt: skip
        if found.get("job") == job.name:
            return found
        if is_alive(folder):
            raise UserError(f"{folder.url}: in use by Kubernetes job {found.get('job')}; delete that one first, or take "
                            "another --run-dir")  # fmt: skip
    record = {
        "cluster": "kubernetes", "job": job.name, "job_id": job.name, "recipe": f"{folder.url}/{CONFIG}", "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node, "cpu": job.cpu, "max_restarts": job.max_restarts, "host": host,
        "submitted_at": time.time(), "attempt": None, "restarts": [], "ended": None,
        "earlier": earlier_jobs(folder),
    }  # fmt: skip
    folder.write_json(JOB, record)
    return record


def judge(folder: RunFolder, job: PodJob, found: Mapping[str, Any], work_dir: Path) -> Decision | None:
    """How the attempt before this one ended, and whether there may be another; None at the first. Recorded in `job.json`."""
    before = found.get("attempt")
    decision = None
    if before:
        nodes, gpus = int(found["nodes"]), int(found["gpus_per_node"])
        # A job that was suspended and goes on has the same attempt. Its other pods may have begun anew already.
        only_ended = before == job.attempt
        records = _records(folder, before, nodes, only_ended=only_ended)
        if 0 in records or not only_ended:
            decision = _decide(folder, job, records, nodes, gpus, work_dir)
    if decision is None or decision.restart:
        update_job(folder, attempt=job.attempt, nodes=job.nodes, gpus_per_node=job.gpus_per_node, cpu=job.cpu,
                   max_restarts=job.max_restarts)  # fmt: skip
    return decision


def _records(folder: RunFolder, attempt: str, nodes: int, *, only_ended: bool) -> dict[int, dict[str, Any]]:
    found = {}
    for index in range(nodes):
        name = record_name(attempt, index)
        record = _record(folder, name)
        if record["ended"] or not only_ended or index == 0:
            found[index] = record
    return found


def _record(folder: RunFolder, name: str) -> dict[str, Any]:
    """Of a pod that left none, or one that cannot be read, as of one that was lost."""
    try:
        record = folder.read_json(name) if folder.exists(name) else {}
    except ValueError as e:
        print(f"warning: {folder.url}/{name}: damaged ({one_line(e)}); its pod counts as lost", file=sys.stderr)
        record = {}
    whole = all(isinstance(record.get(key), dict) for key in ("codes", "last_lines"))
    return record if whole and record.get("ended") else {"ended": None}


def _decide(
    folder: RunFolder, job: PodJob, records: Mapping[int, Mapping[str, Any]], nodes: int, gpus: int, work_dir: Path
) -> Decision:
    ended = {index: record for index, record in records.items() if record["ended"]}
    codes = {int(rank): int(code) for record in ended.values() for rank, code in record["codes"].items()}
    asked = [record["asked_at"] for record in ended.values() if record["asked_at"]]
    crashed = {index: record["crashed_at"] for index, record in ended.items() if record["crashed_at"]}
    # a crash has the other pods deleted, which is no preemption
    preempted = bool(asked) and min(asked) < min(crashed.values(), default=float("inf"))
    first = 0
    if crashed:
        codes_there = ended[min(crashed, key=crashed.__getitem__)]["codes"]
        first = next(int(rank) for rank, code in codes_there.items() if code not in (0, int(ExitCode.REQUEUE)))
    outcome = outcome_of(codes, first=first, world_size=nodes * gpus, stop_requested=preempted)
    if not crashed and not codes:
        outcome = Outcome("lost", 137, 0)
    elif outcome.kind == "crash" and not crashed:
        # the others were told to stop and could not save: it is the lost pod's end
        lost = next((index for index in range(nodes) if index not in ended), outcome.rank // gpus)
        outcome = Outcome("lost", outcome.code, lost * gpus)
    line = next(
        (str(r["last_lines"][str(outcome.rank)]) for r in ended.values() if str(outcome.rank) in r["last_lines"]), ""
    )
    # `decide` reads a rank's last line from its log, which stayed with the pod that is gone
    log = work_dir / "pods" / f"rank-{outcome.rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"{line or 'its pod was lost without a word'}\n")
    bad = _bad_nodes(ended)
    if bad:
        known = folder.read_json(JOB).get("bad_nodes")
        update_job(folder, bad_nodes={**(known if isinstance(known, dict) else {}), **bad})
    decision = decide(folder, outcome, preempted=preempted, max_restarts=job.max_restarts, log=log)
    if not bad or outcome.code != ExitCode.BAD_NODE:
        return decision
    return replace(decision, why=f"{decision.why}; `kubectl cordon {' '.join(sorted(bad))}` keeps pods away from there")


def _bad_nodes(ended: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Nodes whose pods found them not fit, and why."""
    return {
        str(record.get("node") or f"of pod {index}"): str(record["last_lines"].get(rank, "")).removeprefix("error: ")
        for index, record in ended.items()
        for rank, code in record["codes"].items()
        if code == ExitCode.BAD_NODE
    }
