"""Jobs of a real SLURM whose checkpoints are struck: killed within saves, damaged on the disk, no room for the next."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import faulty_saves
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    job_record,
    logs,
    records_by_attempt,
    restart_reasons,
    submit,
    wait_for_end,
    wait_for_restarts,
    wait_for_steps,
)
from tests.tiny import TINY
from trainer.config import CODE_ROOT

LONGER = (
    "phases.low_resolution.steps=20", "phases.full_resolution.steps=10", "phases.perceptual.steps=10",
    "checkpoint.keep_last=4", "data.num_workers=0",
)  # fmt: skip
STEPS = 40
END_S = 360.0
LEFT = {
    "half a shard": {"shard-00000.safetensors", "shard-00001.safetensors.tmp"},
    "before the manifest": {"shard-00000.safetensors", "shard-00001.safetensors", "index.json"},
    "half a COMMIT": {
        "shard-00000.safetensors", "shard-00001.safetensors", "index.json", "manifest.json", "COMMIT.tmp",
    },
}  # fmt: skip
"""What a kill leaves of a checkpoint."""


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    job_id = submit(cluster, run_dir, overrides=[*TINY, *LONGER])
    wait_for_end(cluster, job_id, run_dir, timeout_s=END_S)
    assert [len(attempt) for attempt in records_by_attempt(run_dir)] == [STEPS]
    return run_dir


def trace(run_dir: Path) -> list[list[tuple[int, dict[str, float], float]]]:
    """What each start computed."""
    return [[(r["step"], r["loss"], r["gradient_norm"]) for r in attempt] for attempt in records_by_attempt(run_dir)]


def weights(run_dir: Path) -> dict[str, bytes]:
    """All that the last checkpoint holds: weights, average and moments, a file a rank."""
    [last] = (run_dir / "checkpoints").glob(f"step-{STEPS:08d}-*")
    assert (last / "COMMIT").exists()
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def assert_equal(run_dir: Path, undisturbed: Path) -> None:
    """Every step of every start, and the end, bit for bit."""
    [expected] = trace(undisturbed)
    by_step = {step: (step, *rest) for step, *rest in expected}
    for attempt in trace(run_dir):
        assert attempt == [by_step[step] for step, *_ in attempt]
    assert trace(run_dir)[-1][-1] == expected[-1]
    assert len(weights(undisturbed)) == 2
    assert weights(run_dir) == weights(undisturbed)


def hold(cluster: SlurmCluster) -> str:
    """A job that waits; what is submitted behind it waits too, until it is cancelled."""
    return cluster.run("sbatch", "--parsable", "--hold", "--nodes=1", "--output=/dev/null", "--wrap=true")


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """By step, those with COMMIT."""
    found = (run_dir / "checkpoints").glob("step-*/COMMIT")
    return {int(path.parent.name.split("-")[1]): path.parent for path in found}


def of_start(run_dir: Path, start: int) -> str:
    """What rank 0 said in it."""
    return (run_dir / "logs/rank-0.log").read_text().split(f", restart {start}, on ")[1].partition("\n==== ")[0]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 0x04
    path.write_bytes(data)


@pytest.mark.timeout(1800)
def test_killed_within_saves_and_then_damaged(cluster: SlurmCluster, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    waits_for = hold(cluster)
    job_id = submit(
        cluster, run_dir, "--include", str(CODE_ROOT / "tests/faulty_saves.py"), "--after", f"any:{waits_for}",
        overrides=[*TINY, *LONGER],
    )  # fmt: skip
    kills: list[dict[str, Any]] = [
        {"start": 0, "rank": 1, "step": 10, "stage": "half a shard"},
        {"start": 1, "rank": 0, "step": 15, "stage": "before the manifest"},
        {"start": 2, "rank": 0, "step": 20, "stage": "half a COMMIT"},
    ]
    faulty_saves.plan(run_dir / "code", tmp_path / "kills.json", kills)
    cluster.run("scancel", waits_for)

    # what each kill leaves: nothing that is taken for a checkpoint, and no mark on it either
    for start, kill in enumerate(kills):
        wait_for_restarts(cluster, job_id, run_dir, start + 1, timeout_s=END_S)
        assert max(checkpoints(run_dir)) == kill["step"] - 5
        [half] = (run_dir / "checkpoints").glob(f"step-{kill['step']:08d}-*")
        left = {path.name.rpartition("/")[2] for path in half.iterdir()}
        assert left == LEFT[kill["stage"]]
        cluster.start_now(job_id)
    restarts = job_record(run_dir)["restarts"]
    assert [(entry["reason"], entry["code"], entry["rank"]) for entry in restarts] == [
        ("crash", -signal.SIGKILL, kill["rank"]) for kill in kills
    ]

    # stopped, it saves; while it waits, its three newest checkpoints are struck
    wait_for_steps(cluster, job_id, run_dir, 8, attempt=3)
    cluster.run("scancel", "--signal=TERM", job_id)
    wait_for_restarts(cluster, job_id, run_dir, 4, timeout_s=END_S)
    before = checkpoints(run_dir)
    *_, whole, third, second, newest = sorted(before)
    assert newest == records_by_attempt(run_dir)[3][-1]["step"], "saved at the very step"
    flip_a_bit(before[newest] / "shard-00001.safetensors")
    os.truncate(before[second] / "shard-00000.safetensors", 1000)
    (before[third] / "shard-00001.safetensors").unlink()
    cluster.start_now(job_id)
    wait_for_steps(cluster, job_id, run_dir, 1, attempt=4)
    [target] = json.loads((run_dir / "metrics_targets.json").read_text())["targets"][:1]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=20) as answer:
        assert 'loupe_checkpoint_failures_total{operation="restore"} 3.0' in answer.read().decode()
    marks = {
        step: json.loads((path / "SET-ASIDE.json").read_text())["reason"]
        for step, path in before.items()
        if (path / "SET-ASIDE.json").exists()
    }
    assert set(marks) == {newest, second, third}
    said = of_start(run_dir, 4)
    for step, words in ((newest, "checksum does not match"), (second, "bytes"), (third, "missing")):
        assert words in marks[step]
        assert f"WARNING: checkpoint {before[step]} does not verify and is set aside ({marks[step]})" in said
    wait_for_end(cluster, job_id, run_dir, timeout_s=END_S)

    assert f"resumed from {before[whole]}: step {whole} of {STEPS}" in said
    first_steps = [attempt[0]["step"] for attempt in records_by_attempt(run_dir)]
    assert first_steps == [1, 6, 11, 16, whole + 1]
    assert "set aside" not in "".join(of_start(run_dir, start) for start in range(4))
    assert [entry["reason"] for entry in job_record(run_dir)["restarts"]] == ["crash"] * 3 + ["preempted"]
    assert_equal(run_dir, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 MiB: a start asks for 64."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], check=True, timeout=20)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=20)


def stopped_with_93(cluster: SlurmCluster, job_id: str, run_dir: Path) -> str:
    """Wait for it; the reason in the run's record."""
    assert cluster.wait_for(job_id, "FAILED", "COMPLETED", "CANCELLED", timeout_s=END_S) == "FAILED", logs(run_dir)
    assert cluster.field(job_id, "ExitCode") == "93:0", logs(run_dir)
    ended = job_record(run_dir)["ended"]
    assert ended["code"] == 93
    return str(ended["why"])


@pytest.mark.timeout(1200)
def test_a_full_disk_stops_the_run_until_there_is_room(
    cluster: SlurmCluster, undisturbed: Path, small_disk: Path
) -> None:
    """On one node with two ranks: a disk that all nodes see is full for all of them."""
    run_dir, ballast = small_disk / "run", small_disk / "ballast"

    def start() -> str:
        options = ("--gpus-per-node", "2", "--code-dir", str(small_disk.parent / "code"))
        return submit(cluster, run_dir, *options, nodes=1, overrides=[*TINY, *LONGER])

    job_id = start()
    wait_for_steps(cluster, job_id, run_dir, 6)
    end = time.monotonic() + END_S
    while not checkpoints(run_dir):
        assert time.monotonic() < end, logs(run_dir)
        time.sleep(0.05)
    with open(ballast, "wb") as file:  # room for records, not for a checkpoint
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - (1 << 20))
    why = stopped_with_93(cluster, job_id, run_dir)
    if restart_reasons(run_dir):  # a line of metrics has met the disk's end first: the start after that finds it full
        assert (restart_reasons(run_dir), "disk of the run" in why) == (["crash"], True), why
    else:
        assert "storage is full; free space there or keep fewer checkpoints" in why
    whole = checkpoints(run_dir)
    last = records_by_attempt(run_dir)[0][-1]["step"]
    assert max(whole) <= last < STEPS

    assert "disk of the run" in stopped_with_93(cluster, start(), run_dir)
    assert len(records_by_attempt(run_dir)) == 1, "nothing started on a full disk"

    ballast.unlink()
    job_id = start()
    wait_for_end(cluster, job_id, run_dir, timeout_s=END_S)
    assert [attempt[0]["step"] for attempt in records_by_attempt(run_dir)] == [1, max(whole) + 1]
    assert_equal(run_dir, undisturbed)
