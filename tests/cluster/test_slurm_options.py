"""What a job of a real SLURM is asked for besides nodes: arrays, chains, torchrun, containers, requeueing by exit code.

The containers' runtimes do not install here: small scripts stand for them, which read their command lines as they do.
"""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    START_S,
    job_record,
    logs,
    refused,
    steps_by_attempt,
    submit,
    wait_for_end,
    wait_for_steps,
)
from trainer.config import CODE_ROOT

SHORT = (
    "--set", "phases.full_resolution.steps=1", "--set", "phases.perceptual.steps=1", "--set", "checkpoint.every_steps=100",
)  # fmt: skip
APPTAINER = """#!/bin/bash
echo "$@" >> "$FAKE_LOG"
[ "$1" = exec ] || exit 2
shift
while [[ "$1" == --* ]]; do
  case "$1" in
  --bind)
    for mount in ${2//,/ }; do
      [ -e "${mount%%:*}" ] || { echo "mount source ${mount%%:*} does not exist" >&2; exit 255; }
    done
    shift 2 ;;
  --pwd) cd "$2" || exit 255; shift 2 ;;
  *) echo "unknown flag: $1" >&2; exit 2 ;;
  esac
done
image=$1; shift
PATH="$image/bin:$PATH" exec "$@"
"""
SRUN = """#!/bin/bash
[ "$1" = --help ] && { /usr/bin/srun --help; echo "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"; exit; }
words=()
for word in "$@"; do
  case "$word" in
  --container-image=*) PATH="${word#*=}/bin:$PATH" ;;
  --container-*) echo "$word" >> "$FAKE_LOG" ;;
  *) words+=("$word") ;;
  esac
done
exec /usr/bin/srun "${words[@]}"
"""


@pytest.fixture(scope="module")
def plain_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm"), more="RequeueExit=75") as cluster:
        yield cluster


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with both runtimes for the PATH, and an image: a folder whose `bin/python` is this one."""
    programs = {"bin/apptainer": APPTAINER, "bin-pyxis/srun": SRUN}
    programs["image/bin/python"] = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in programs.items():
        path = tmp_path / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "fake"


def with_path(cluster: SlurmCluster, *folders: Path, alone: bool = False, **more: str) -> SlurmCluster:
    """The cluster as commands see it with `folders` first in their PATH; SLURM passes it on to jobs."""
    path = ":".join([*map(str, folders), *([] if alone else [cluster.environment["PATH"]])])
    return replace(cluster, environment={**cluster.environment, "PATH": path, **more})


def test_an_array_of_runs_each_in_its_folder_in_containers(
    plain_cluster: SlurmCluster, fake: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    cluster = with_path(plain_cluster, fake / "bin", FAKE_LOG=str(log))
    run_dir = tmp_path / "r"
    few = ("--set", "phases.low_resolution.steps=2", *SHORT)
    first = submit(
        cluster, run_dir, *few, "--nodes", "1", "--seeds", "2", "--at-once", "1",
        "--container", str(fake / "image"), "--container-runtime", "apptainer", "--env", "GREETING=good day",
    )  # fmt: skip
    assert first.endswith("_0")
    for i in range(2):
        own = tmp_path / f"r-seed-{i}"
        job_id = first.removesuffix("_0") + f"_{i}"
        state = cluster.wait_for(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout_s=START_S)
        assert state == "COMPLETED", logs(own) + log.read_text()
        assert f"seed: {i}\n" in (own / "config.yaml").read_text()
        assert steps_by_attempt(own) == [[1, 2, 3, 4]]
        assert (job_record(own)["job_id"], job_record(own)["ended"]["code"]) == (job_id, 0)
        assert f"job {job_id}: done" in (own / "slurm" / f"{job_id}_0_log.out").read_text()
    times = [json.loads((tmp_path / f"r-seed-{i}/attempts/0000.json").read_text())["time"] for i in range(2)]
    ended = [job_record(tmp_path / f"r-seed-{i}")["ended"]["time"] for i in range(2)]
    assert times[1] > ended[0], "one at a time"
    calls = log.read_text()
    assert "GREETING=good day" in calls
    assert calls.count("-m submitit.core._submit") == calls.count("-m launch.slurm_job.task") == 2
    assert calls.count(" -c ") == 1, "the image was looked into before anything was queued"


def test_any_command_runs_in_a_container_with_a_copy_of_the_code(
    plain_cluster: SlurmCluster, fake: Path, tmp_path: Path
) -> None:
    cluster = with_path(plain_cluster, fake / "bin", FAKE_LOG=str(tmp_path / "calls"), PYTHONPATH=str(CODE_ROOT))
    code = "import launch, os; print(launch.__file__, os.getcwd(), os.environ['SLURMD_NODENAME'])"

    def queue(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "launch.cli", "job", "--time", "5", *words, "--", "python", "-c", code]
        return subprocess.run(
            command, env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )

    in_container = ("--container", str(fake / "image"), "--container-runtime", "apptainer", "--exclude", "n1")
    said = queue("--partition", "nowhere", *in_container)
    assert said.returncode == 2
    assert said.stderr == "error: --partition nowhere: not on this cluster, which has high, low\n"
    assert not (tmp_path / "runs").exists(), "nothing is written for a job that is not taken"
    said = queue("--name", "where", *in_container)
    assert said.returncode == 0, said.stderr
    job_id = said.stdout.split()[1].rstrip(":")
    log = tmp_path / f"where-{job_id}_0.log"
    state = cluster.wait_for(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout_s=START_S)
    assert state == "COMPLETED", log.read_text()
    (copy,) = (tmp_path / "runs/.code").iterdir()
    assert copy.name.startswith("where-")
    assert log.read_text().split() == [f"{copy}/launch/__init__.py", str(tmp_path), "n2"]
    assert f"--bind {tmp_path}:{tmp_path},{copy}:{copy} --pwd {tmp_path}" in (tmp_path / "calls").read_text()


def without_scontrol(tmp_path: Path) -> Path:
    """A folder with links to all programs but one."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for place in ("/usr/bin", "/usr/sbin"):
        for program in os.scandir(place):
            if program.name != "scontrol" and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program.path)
    return folder


def test_torchrun_on_two_nodes_is_requeued_by_its_exit_code(plain_cluster: SlurmCluster, tmp_path: Path) -> None:
    cluster = with_path(plain_cluster, without_scontrol(tmp_path), alone=True)
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--launcher", "torchrun", "--set", "phases.low_resolution.steps=120", *SHORT)
    wait_for_steps(plain_cluster, job_id, run_dir, 3)
    plain_cluster.run("scancel", "--signal=USR2", job_id)
    end = time.monotonic() + 60
    while plain_cluster.field(job_id, "Restarts") != "1":
        assert time.monotonic() < end, logs(run_dir)
        time.sleep(0.2)
    assert "RequeueExit=75" in logs(run_dir)
    plain_cluster.start_now(job_id)
    wait_for_end(plain_cluster, job_id, run_dir)
    first, second = steps_by_attempt(run_dir)
    assert [*first, *second] == list(range(1, 123)), "every step once"
    record = job_record(run_dir)
    assert [entry["reason"] for entry in record["restarts"]] == ["preempted"]
    assert 0 < record["stop_s"] < 60
    attempt = json.loads((run_dir / "attempts/0001.json").read_text())
    assert attempt["world_size"] == 2
    assert "rank 1 of 2" in logs(run_dir)


def test_a_chain_goes_on_where_a_job_is_not_requeued_and_ends_with_the_run(
    plain_cluster: SlurmCluster, fake: Path, tmp_path: Path
) -> None:
    cluster = with_path(plain_cluster, fake / "bin-pyxis", FAKE_LOG=str(tmp_path / "calls"))
    run_dir = tmp_path / "r"
    first = submit(
        cluster, run_dir, "--nodes", "1", "--chain", "2", "--set", "phases.low_resolution.steps=120", *SHORT,
        "--container", str(fake / "image"),
    )  # fmt: skip
    jobs = job_record(run_dir)["chain"]
    assert jobs == [str(int(first) + i) for i in range(3)]
    wait_for_steps(cluster, first, run_dir, 3)
    assert f"in use by SLURM job {first}" in refused(cluster, run_dir, "--nodes", "1")
    assert cluster.state(jobs[1]) == "PENDING"
    cluster.run("scancel", "--signal=TERM", first)
    assert cluster.wait_for(first, "FAILED", "PENDING", "COMPLETED", timeout_s=60) == "FAILED", logs(run_dir)
    wait_for_end(cluster, jobs[1], run_dir)
    wait_for_end(cluster, jobs[2], run_dir)
    first_steps, second_steps = steps_by_attempt(run_dir)
    assert [*first_steps, *second_steps] == list(range(1, 123)), "every step once, and nothing in the third job"
    record = job_record(run_dir)
    assert (record["job_id"], record["ended"]["code"]) == (jobs[1], 0)
    assert f"job {jobs[2]}: the run has ended before it" in logs(run_dir)
    assert "--container-workdir=" in (tmp_path / "calls").read_text()


def test_what_this_slurm_cannot_do_is_said_before_anything_is_written(
    plain_cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "r"
    for arguments, said in (
        (("--container", "ubuntu"), "srun has no --container-image here"),
        (
            ("--cpus-per-task", "64"),
            "--cpus-per-task: 64 cores for 1 rank(s) of a node, and no node of this cluster has more than",
        ),
        (("--time", "2"), "--time: 120 s are no longer than the warning"),
        (("--partition", "nowhere"), "--partition nowhere: not on this cluster, which has high, low"),
        (("--partition", "low,nowhere"), "--partition nowhere: not on this cluster"),
        (("--nodes", "4"), "--nodes 4: this cluster has 2; give fewer"),
        (("--constraint", "h100"), "sbatch: Invalid feature specification"),
        (("--time", "2-0"), "--time: 2880 minutes, and partition low lets a job run for 60"),
    ):
        error = refused(plain_cluster, run_dir, *arguments)
        assert error.startswith("error: ")
        assert said in error
        assert not run_dir.exists()
