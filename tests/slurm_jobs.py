"""Small runs of the demo as jobs of a test's own SLURM: submitted by our command, waited for, and read from the run folder."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.slurm_cluster import SlurmCluster
from tests.tiny import TINY
from trainer.config import CODE_ROOT

START_S = 300.0
"""Longest that a job may take from the queue to its first step; mostly the import of torch, on busy cores."""
LIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING")


def submit(
    cluster: SlurmCluster, run_dir: Path | str, *arguments: str, nodes: int = 2, overrides: Sequence[str] = TINY
) -> str:
    """Returns the job's id. `run_dir`: a path or a URL."""
    result = call(cluster, run_dir, *arguments, nodes=nodes, overrides=overrides)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[1].rstrip(":")


def refused(cluster: SlurmCluster, run_dir: Path, *arguments: str) -> str:
    """Submit what is not taken; returns what was said."""
    result = call(cluster, run_dir, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    return result.stderr


def call(
    cluster: SlurmCluster, run_dir: Path | str, *arguments: str, nodes: int = 2, overrides: Sequence[str] = TINY
) -> "subprocess.CompletedProcess[str]":
    folder = run_dir.parent if isinstance(run_dir, Path) else cluster.folder
    settings = [word for override in overrides for word in ("--set", override)]
    return subprocess.run(
        [
            sys.executable, str(CODE_ROOT / "launch/slurm.py"), "demo", "--cluster", "slurm", "--nodes", str(nodes), "--cpu",
            *settings, "--run-dir", str(run_dir), *arguments,
        ],
        env=cluster.environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Every step's record, attempts one after the other; steps that were done again stand in it twice."""
    return [record for attempt in records_by_attempt(run_dir) for record in attempt]


def records_by_attempt(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Of steps; what else is recorded, as that a rank is slow, is left out."""
    attempts = []
    for path in sorted((run_dir / "metrics").glob("*.jsonl")):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        attempts.append([record for record in found if "step" in record])
    return attempts


def steps_by_attempt(run_dir: Path) -> list[list[int]]:
    return [[record["step"] for record in attempt] for attempt in records_by_attempt(run_dir)]


def steps_in(lines: Iterable[str]) -> list[int]:
    """Of the records of metrics; notes stand between them."""
    return [record["step"] for record in map(json.loads, lines) if "step" in record]


def job_record(run_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_dir / "job.json").read_text())
    return record


def restart_reasons(run_dir: Path) -> list[str]:
    return [entry["reason"] for entry in job_record(run_dir)["restarts"]]


def logs(run_dir: Path) -> str:
    """The ends of what the job and its ranks said."""
    paths = [*sorted((run_dir / "slurm").glob("*.out")), *sorted((run_dir / "logs").glob("*"))]
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in paths)


def wait_for_steps(
    cluster: SlurmCluster, job_id: str, run_dir: Path, count: int, *, attempt: int | None = None
) -> None:
    """Until the newest start, or the one with this number, has done so many steps."""
    end = time.monotonic() + START_S
    while True:
        done = steps_by_attempt(run_dir)
        newest = len(done) - 1 if attempt is None else attempt
        if 0 <= newest < len(done) and len(done[newest]) >= count:
            return
        state = cluster.state(job_id)
        assert state in LIVE_STATES, f"job is {state}\n{logs(run_dir)}"
        assert time.monotonic() < end, logs(run_dir)
        time.sleep(0.1)


def wait_for_restarts(
    cluster: SlurmCluster, job_id: str, run_dir: Path, count: int, *, timeout_s: float = START_S
) -> None:
    """Until SLURM has queued the job again so many times."""
    end = time.monotonic() + timeout_s
    while int(cluster.field(job_id, "Restarts")) < count:
        state = cluster.state(job_id)
        assert state in LIVE_STATES, f"job is {state}\n{logs(run_dir)}"
        assert time.monotonic() < end, f"{logs(run_dir)}\n{cluster.logs()}"
        time.sleep(0.2)


def wait_for_end(cluster: SlurmCluster, job_id: str, run_dir: Path, *, timeout_s: float = START_S) -> None:
    state = cluster.wait_for(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout_s=timeout_s)
    assert state == "COMPLETED", logs(run_dir)
