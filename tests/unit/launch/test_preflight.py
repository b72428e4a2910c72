"""The check before a job's ranks start, what follows from it, and how a requeued job leaves nodes out; without SLURM."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import DelayedSubmission

from launch.console import PlainDisplay
from launch.doctor.checks import Finding
from launch.doctor.preflight import Verdict, bad_nodes, judge, log_check, may_leave_out, preflight
from launch.job import JobSpec, record_job, update_job
from launch.local import run_local
from launch.ranks import Outcome, decide, last_line, log_path, outcome_of
from launch.slurm_job import task as slurm_task
from launch.slurm_job.nodes import chain_lines, check_node, leave_out, requeue_lines, too_many
from launch.slurm_job.options import SlurmOptions
from launch.slurm_job.queue import _hand_over
from launch.slurm_job.script import Job
from launch.slurm_job.task import SlurmTask, end_of_batch, report_exit
from launch.slurm_job.torchrun import TorchrunTask
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import ExitCode
from trainer.run_folder import CONFIG, RunFolder


@pytest.fixture
def config() -> RunConfig:
    return tiny()


@pytest.fixture
def run_dir(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of SLURM job 12 that has just been submitted."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "RUNNING")
    root = tmp_path / "run"
    root.mkdir()
    (root / CONFIG).write_text(to_yaml(config))
    record_job(RunFolder(str(root)), JobSpec("demo", str(root), "slurm", code_dir="/code"), job_id="12")
    return str(root)


def check(run_dir: str, restart: int, node: str) -> Verdict:
    return preflight(run_dir, run_dir, attempt=f"12.{restart}", node=node, ranks=1, cpu=True)


# ------------------------------------------------------------------------------------------------------- the judgement


def finding(blame: str, status: str = "failed") -> Finding:
    return Finding("a check", status, "its figure", "mend it", blame)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([finding("nobody", "ok"), finding("node", "warning")], None),
        ([finding("nobody")], None),  # the trainer tries longer
        ([finding("run")], 93),
        ([finding("run"), finding("node")], 71),  # what a broken node says about the run need not be so
    ],
)
def test_who_is_to_blame_decides(findings: list[Finding], code: int | None) -> None:
    verdict = judge(findings, "n1")
    assert verdict.code == code
    assert (code == 71) == verdict.why.startswith("n1 is not fit to start on: a check: its figure (mend it)")


def test_a_sound_machine_goes_on_and_leaves_a_record(run_dir: str) -> None:
    assert check(run_dir, 0, "n1").code is None
    record = json.loads(Path(run_dir, "doctor/12.0-n1.json").read_text())
    assert (record["node"], record["code"]) == ("n1", None)
    assert {"packages", "run folder", "clock", "dataset emoji", "frozen networks"} <= {
        f["name"] for f in record["findings"]
    }
    assert record["seconds"] < 20
    assert not list(Path(run_dir).glob(".doctor-*")), "what was written to be read back is gone"


def test_a_node_without_its_scratch_disk_is_bad(run_dir: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    verdict = check(run_dir, 0, "n1")
    assert verdict.code == ExitCode.BAD_NODE
    assert f"no folder {tmp_path}/scratch" in verdict.why
    monkeypatch.delenv("TMPDIR")
    assert check(run_dir, 0, "n2").code is None
    assert list(bad_nodes(run_dir, "12.0")) == ["n1"]
    assert bad_nodes(run_dir, "12.1") == {}


def test_a_dataset_that_is_not_there_stops_the_job_and_blames_no_node(run_dir: str, tmp_path: Path) -> None:
    Path(run_dir, CONFIG).write_text(to_yaml(tiny(f"data.datasets.emoji.url={tmp_path}/none")))
    verdict = check(run_dir, 0, "n1")
    assert verdict.code == ExitCode.STOP
    assert "data.datasets.emoji.url" in verdict.why
    assert bad_nodes(run_dir, "12.0") == {}


def test_what_the_run_began_with_may_be_gone(run_dir: str, tmp_path: Path) -> None:
    Path(run_dir, CONFIG).write_text(to_yaml(tiny(f"init_from={{url: {tmp_path}/gone}}")))
    assert check(run_dir, 0, "n1").code is None


def test_the_log_ends_with_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank-0.log"
    log_check(log, "n1", judge([finding("nobody", "ok")], "n1"))
    assert not log.exists(), "nothing to tell"
    log_check(log, "n1", judge([finding("node")], "n1"))
    assert last_line(log) == "error: n1 is not fit to start on: a check: its figure (mend it)"


# ------------------------------------------------------------------------------------------------- what follows from it


def test_a_bad_node_is_heard_over_the_ranks_that_were_stopped_for_it() -> None:
    outcome = outcome_of({0: -15, 1: 71, 2: -15}, first=0, world_size=3, stop_requested=True)
    assert (outcome.kind, outcome.code, outcome.rank) == ("crash", 71, 1)
    assert outcome_of({0: 93, 1: 71}, first=0, world_size=2, stop_requested=False).kind == "stop"


def test_bad_nodes_use_the_budget_and_say_nothing_about_progress(run_dir: str) -> None:
    folder, bad = RunFolder(run_dir), Outcome("crash", int(ExitCode.BAD_NODE), 0)
    for _ in range(5):
        assert decide(folder, bad, preempted=False, max_restarts=5, log=Path(run_dir, "log")).restart
    assert {entry["reason"] for entry in folder.read_json("job.json")["restarts"]} == {"bad node"}
    assert not decide(folder, bad, preempted=False, max_restarts=5, log=Path(run_dir, "log")).restart


def fail(run_dir: str, node: str, restart: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """A start that fails on `node`, up to the end of the batch script; its code."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("SLURMD_NODENAME", node)
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    environment = SimpleNamespace(node=0, raw_job_id="12", job_id="12")
    code = check_node(run_dir, run_dir, environment, restart=restart, rank=0, ranks=1, cpu=True)  # type: ignore[arg-type]
    assert code == ExitCode.BAD_NODE
    report_exit(run_dir, 0, code, stop_requested=False)
    report_exit(run_dir, 1, -15, stop_requested=True)
    return end_of_batch(run_dir, run_dir, world_size=2, max_restarts=5, srun_code=137)


def test_a_job_goes_on_without_two_nodes_and_not_without_three(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fail(run_dir, "n1", 0, monkeypatch) == 75
    assert Path(run_dir, "slurm/exits/12.0/bad_nodes").read_text() == "n1"
    assert "n1 is not fit" in last_line(log_path(run_dir, 0))
    assert fail(run_dir, "n7", 1, monkeypatch) == 75
    assert Path(run_dir, "slurm/exits/12.1/bad_nodes").read_text() == "n7"
    assert fail(run_dir, "n9", 2, monkeypatch) == 93
    job = RunFolder(run_dir).read_json("job.json")
    assert list(job["bad_nodes"]) == ["n1", "n7"]
    assert "3 nodes failed the check before the start (n1, n7, n9)" in job["ended"]["why"]


@pytest.mark.parametrize(("nodes", "limit"), [(1, 2), (20, 2), (21, 3), (100, 10)])
def test_a_tenth_of_the_nodes_may_be_left_out(nodes: int, limit: int) -> None:
    assert may_leave_out(nodes) == limit


def test_nodes_that_failed_at_once_are_left_out_at_once(run_dir: str, tmp_path: Path) -> None:
    for node in ("n3", "n1"):
        record = {"node": node, "code": 71, "why": "broken"}
        RunFolder(run_dir).write_json(f"doctor/12.0-{node}.json", record)
    assert too_many(RunFolder(run_dir), run_dir, "12.0") is None
    assert leave_out(RunFolder(run_dir), run_dir, "12.0", tmp_path / "reports") == ["n1", "n3"]
    assert (tmp_path / "reports/bad_nodes").read_text() == "n1,n3"


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("preflight", [True, False])
def test_the_switch_reaches_the_task(run_dir: str, config: RunConfig, launcher: str, preflight: bool) -> None:
    spec = JobSpec("demo", run_dir, "slurm", cpu=True, code_dir="/code", preflight=preflight,
                   slurm=SlurmOptions(launcher=launcher))  # fmt: skip
    Path(run_dir, "slurm").mkdir()
    _hand_over(Job(spec, config, RunFolder(run_dir)), "12")
    task = DelayedSubmission.load(Path(run_dir, "slurm/12_submitted.pkl")).function
    assert isinstance(task, TorchrunTask if launcher == "torchrun" else SlurmTask)
    assert task.preflight is preflight


SCONTROL = """#!/bin/bash
echo "$*" >> calls
case $1 in show) echo "JobId=12 JobName=a b ReqNodeList=(null) ExcNodeList=$OLD NumNodes=1 Comment=ExcNodeListing" ;; esac
[ "$1" != requeue ] || exit ${REQUEUE:-0}
"""


@pytest.mark.parametrize(
    ("bad", "old", "updated"),
    [("n3,n4", "n[1-2]", "n[1-2],n3,n4"), ("n3", "(null)", "n3"), (None, "n1", None)],
)
def test_the_script_requeues_first_and_keeps_what_was_excluded(
    tmp_path: Path, bad: str | None, old: str, updated: str | None
) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    if bad:
        (tmp_path / "bad_nodes").write_text(bad)
    script = "\n".join(["job=12", f"decided={tmp_path}/decision", *requeue_lines(), "echo not queued"])
    bash = shutil.which("bash")
    assert bash
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OLD": old}

    def run(**more: str) -> tuple[str, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        result = subprocess.run([bash, "-c", script], env={**environment, **more}, cwd=tmp_path, capture_output=True,
                                text=True, check=False)  # fmt: skip
        assert result.stderr == ""
        return result.stdout, (tmp_path / "calls").read_text().splitlines()

    said, calls = run()
    assert said == ""
    expected = ["requeue 12"] if updated is None else ["requeue 12", f"update JobId=12 ExcNodeList={updated}"]
    assert [call for call in calls if not call.startswith("show")] == expected
    assert run(REQUEUE="1")[0] == "not queued\n"


@pytest.mark.parametrize(("nodes", "left"), [("n1 n2 n2", 1), ("n1 n2 n3", 2), ("", None)])
def test_a_partition_must_have_enough_nodes_left(
    tmp_path: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch, nodes: str, left: int | None
) -> None:
    """The job wants two, and n1 has failed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert check(run_dir, 0, "n1").code == 71
    monkeypatch.setenv("SLURM_JOB_PARTITION", "low")
    sinfo = tmp_path / "bin/sinfo"
    sinfo.parent.mkdir()
    sinfo.write_text(f"#!/bin/sh\n[ $6 = low ] && printf '%s\\n' {nodes or '; exit 1'}\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sinfo.parent}:{os.environ['PATH']}")
    why = too_many(RunFolder(run_dir), run_dir, "12.0")
    assert (why is not None) == (left == 1)
    if why:
        assert "(n1) the partition has 1, and the job wants 2" in why


def test_later_jobs_of_a_chain_are_kept_from_the_nodes_that_failed(
    tmp_path: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the end of the batch script leaves for it, and what the script does with that."""
    update_job(RunFolder(run_dir), chain=["12", "13", "14", "15; rm -rf /"])
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    verdict = check(run_dir, 0, "n1")
    assert verdict.code == 71
    log_check(log_path(run_dir, 0), "n1", verdict)
    report_exit(run_dir, 0, 71, stop_requested=False)
    assert end_of_batch(run_dir, run_dir, 1, 5, 71) == 75
    assert "the next job of the chain goes on, without n1" in capsys.readouterr().out
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    bash = shutil.which("bash")
    assert bash
    script = "\n".join([f"decided={run_dir}/slurm/exits/12.0/decision", *chain_lines()])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OLD": "n[7-8]"}
    subprocess.run([bash, "-c", script], env=environment, cwd=tmp_path, check=True)
    calls = [call for call in (tmp_path / "calls").read_text().splitlines() if not call.startswith("show")]
    assert calls == [f"update JobId={job} ExcNodeList=n[7-8],n1" for job in (13, 14)]


# ---------------------------------------------------------------------------------------------------- on one's own machine


def test_a_local_run_does_not_start_on_a_machine_that_is_not_fit(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    run_dir = tmp_path / "run"
    spec = JobSpec("demo", str(run_dir), "local", cpu=True, code_dir=f"{run_dir}/code", preflight=True)
    notes: list[str] = []
    folder = RunFolder(str(run_dir))
    code = run_local(spec, config, folder, PlainDisplay(notes.append), lambda: folder.claim(config))
    assert code == ExitCode.BAD_NODE
    assert "the run has not started: " in notes[-1]
    assert f"no folder {tmp_path}/scratch" in notes[-1]
    assert folder.read_json("job.json")["ended"]["code"] == code
    assert not (run_dir / "attempts").exists()
