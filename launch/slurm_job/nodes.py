"""Which nodes a SLURM job starts on: each is checked before its ranks start, and the next start goes without those that
failed. No torch.

A running job's nodes cannot be changed, `scontrol update` refuses: the script requeues the job first and excludes the nodes
then. It has time for that: the requeue ends it by SIGTERM, which it ignores, and SIGKILL comes KillWait later. The later jobs
of a chain wait in the queue, and are given other nodes while this one still runs.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import submitit

from launch.doctor.preflight import bad_nodes, log_check, may_leave_out, preflight
from launch.environment import port_of_job
from launch.job import update_job
from launch.ranks import end_job, log_path
from trainer.errors import ExitCode
from trainer.run_folder import JOB, RunFolder

SINFO_S = 30.0
"""Longest wait for SLURM's list of nodes."""
BAD_NODES = "bad_nodes"
"""File beside the ranks' reports of a start: nodes to exclude from the next, with commas between."""
LATER = "later_jobs"
"""File beside it: the jobs of the chain that are still to come, with spaces between."""


def check_node(
    run_dir: str, work_dir: str, environment: submitit.JobEnvironment, *, restart: int, rank: int, ranks: int, cpu: bool
) -> int | None:
    """Check this node, for its first rank; the code to end with where nothing may start here, whose reason is in its log.

    Args:
        rank: the node's first, in whose log it is told.
        ranks: of the node.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    wanted = {}
    if environment.node == 0:
        wanted["the ranks' rendezvous"] = ("0.0.0.0", port_of_job(int(environment.raw_job_id), restart))
    verdict = preflight(
        run_dir,
        work_dir,
        attempt=f"{environment.job_id}.{restart}",
        node=node,
        ranks=ranks,
        cpu=cpu,
        wanted_ports=wanted,
    )
    for line in verdict.lines():
        print(f"check of {node}: {line}", flush=True)
    log_check(log_path(work_dir, rank), node, verdict)
    return None if verdict.code is None else int(verdict.code)


def too_many(folder: RunFolder, work_dir: str, attempt: str) -> str | None:
    """After a start that ended for its nodes: why the job does not go on without them; None where it does."""
    new = bad_nodes(work_dir, attempt)
    earlier = _left_out(folder)
    wanted = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    limit = may_leave_out(wanted)
    names = sorted({*earlier, *new})
    newest = next(iter(new.values()), "no record of the last check")
    left = _nodes_without(names)
    if left is not None and left < wanted:  # the job would wait for ever
        return (
            f"without the nodes that failed the check before the start ({', '.join(names)}) the partition has {left}, and the "
            f"job wants {wanted}; see {work_dir}/doctor, and submit with fewer --nodes or --no-preflight (the last: {newest})"
        )
    if len(names) <= limit:
        return None
    return (
        f"{len(names)} nodes failed the check before the start ({', '.join(names)}), and the job goes on by itself without "
        f"{limit} at most; see {work_dir}/doctor, and submit with --exclude or --no-preflight (the last: {newest})"
    )


def _nodes_without(names: Sequence[str]) -> int | None:
    """How many nodes the job's partition has beside these; None where SLURM is not asked from here, as in a container."""
    partition = os.environ.get("SLURM_JOB_PARTITION")
    if not partition or shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "--noheader", "--Node", "--format", "%N", "--partition", partition]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SINFO_S)
    except subprocess.TimeoutExpired:
        return None
    there = set(result.stdout.split())
    return len(there - set(names)) if result.returncode == 0 and there else None


def end_for_nodes(folder: RunFolder, why: str) -> int:
    end_job(folder, int(ExitCode.STOP), why)
    return int(ExitCode.STOP)


def leave_out(folder: RunFolder, work_dir: str, attempt: str, reports: Path, *, later: Sequence[str] = ()) -> list[str]:
    """Record the nodes that failed in this start, for `loupe runs` and, in `reports`, for the script; returns them.

    Args:
        later: jobs of the chain after this one.
    """
    new = bad_nodes(work_dir, attempt)
    update_job(folder, bad_nodes={**_left_out(folder), **new})
    names = sorted(name for name in new if re.fullmatch(r"[A-Za-z0-9._-]+", name))
    reports.mkdir(parents=True, exist_ok=True)
    (reports / LATER).write_text(" ".join(job_id for job_id in later if job_id.isdecimal()))
    (reports / BAD_NODES).write_text(",".join(names))
    return names


def _left_out(folder: RunFolder) -> dict[str, str]:
    found = folder.read_json(JOB).get("bad_nodes") if folder.exists(JOB) else None
    return found if isinstance(found, dict) else {}


def requeue_lines() -> list[str]:
    """Of the batch script, where job `$job` is to be queued again: without the nodes in the file beside `$decided`. What
    the job excluded before stays excluded. Ends the script when it is queued."""
    return [
        f"  {_READ_BAD}",
        "  trap '' TERM  # of the requeue: it must not end scontrol before it answers",
        '  if [ -n "$bad" ]; then  # only a job that waits can be given other nodes',
        *(f"    {line}" for line in _excluded("$job")),
        '    scontrol requeue "$job" && { scontrol update JobId="$job" ExcNodeList="${old:+$old,}$bad"; exit 0; }',
        "  fi",
        '  scontrol requeue "$job" && exit 0',
    ]


def chain_lines() -> list[str]:
    """Of the batch script, where the next job of a chain goes on: none of them starts on the nodes in the file."""
    return [
        f"  {_READ_BAD}",
        f'  later=$(cat "${{decided%/*}}/{LATER}" 2> /dev/null)',
        '  [ -n "$bad" ] && for next in $later; do',
        *(f"    {line}" for line in _excluded("$next")),
        '    scontrol update JobId="$next" ExcNodeList="${old:+$old,}$bad"',
        "  done",
    ]


_READ_BAD = f'bad=$(cat "${{decided%/*}}/{BAD_NODES}" 2> /dev/null)'


def _excluded(job: str) -> list[str]:
    """Sets `old`: what the job leaves out so far."""
    return [
        f'old=$(scontrol show job -o "{job}" | sed -n "s/.* ExcNodeList=\\([^ ]*\\).*/\\1/p")',
        '[ "$old" = "(null)" ] && old=',
    ]
