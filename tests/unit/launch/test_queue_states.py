"""Whose job a run folder is, by what SLURM's commands say: here programs that say it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.job import JobSpec, live_job, record_job, update_job
from launch.queue_states import OVER, cluster_name, slurm_state
from launch.runs.read import read_facts
from launch.runs.state import state_of
from launch.slurm_job.queue import test_only as ask_sbatch
from tests.run_folders import make_run
from trainer.errors import UserError
from trainer.run_folder import RunFolder

Says = Callable[..., None]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Says]:
    """Have SLURM's commands say this of one job, 7."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def write(state: str, *, name: str = "demo", cluster: str = "here") -> None:
        both = {"%T|%j": f"{state}|{name}", "%i|%T|%S|%R|%j": f"7|{state}|N/A|n1|{name}"}
        cases = "\n".join(f"*'{form}'*) echo '{said}' ;;" for form, said in both.items())
        for program, script in (
            ("squeue", f'case "$*" in\n{cases}\nesac\n'),
            ("scontrol", f"echo 'Configuration data'; echo 'ClusterName             = {cluster}'\n"),
        ):
            (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{script}")
            (tmp_path / "bin" / program).chmod(0o755)
        cluster_name.cache_clear()

    yield write
    cluster_name.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = make_run(str(tmp_path / "r"), cluster="slurm")
    spec = JobSpec("demo", folder.url, "slurm", code_dir=f"{folder.url}/code")
    record_job(folder, spec, job_id="7", job_name="demo", slurm_cluster="here")
    return folder


@pytest.mark.parametrize("state", sorted(OVER))
def test_a_job_that_is_over_has_no_folder(says: Says, folder: RunFolder, state: str) -> None:
    says(state)
    assert slurm_state("7") is None
    assert live_job(folder) is None


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUE_HOLD"])
def test_a_job_that_may_go_on_keeps_it(says: Says, folder: RunFolder, state: str) -> None:
    says(state)
    assert live_job(folder) == f"SLURM job 7 ({state})"


def test_a_number_that_another_job_has_by_now_does_not_hold_the_folder(says: Says, folder: RunFolder) -> None:
    says("RUNNING", name="another")
    assert live_job(folder) is None
    facts = read_facts(folder)
    assert facts is not None
    assert state_of(facts).detail == "SLURM job 7 is called another here: another cluster's?"


def test_a_job_of_another_cluster_is_not_taken_for_gone(says: Says, folder: RunFolder) -> None:
    says("CANCELLED", cluster="there")
    with pytest.raises(
        UserError, match="SLURM job 7 of cluster here has it, which cannot be asked from here, cluster there"
    ):
        live_job(folder)
    facts = read_facts(folder)
    assert facts is not None
    assert state_of(facts).detail == "SLURM job 7 of cluster here, which is not asked from here"
    update_job(folder, ended={"code": 143, "why": "cancelled", "time": 1.0})
    assert live_job(folder) is None, "it has said itself that it has ended"


def test_records_of_earlier_versions_are_asked_for_by_number_alone(says: Says, folder: RunFolder) -> None:
    job = folder.read_json("job.json")
    folder.write_text("job.json", json.dumps({k: v for k, v in job.items() if k not in ("job_name", "slurm_cluster")}))
    says("RUNNING", name="another", cluster="there")
    assert live_job(folder) == "SLURM job 7 (RUNNING)"


def test_a_controller_that_hangs_ends_the_submission(
    says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setattr("launch.slurm_job.queue.SBATCH_S", 0.2)
    with pytest.raises(UserError, match="sbatch: no answer in 0 s"):
        ask_sbatch("#!/bin/sh\n")
