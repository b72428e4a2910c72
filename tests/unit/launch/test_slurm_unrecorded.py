"""The end of a start whose run folder does not answer: what is decided, how often, and that it is recorded later."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launch.cancellation import ask_to_cancel
from launch.job import JobSpec, record_job
from launch.slurm_job import task as slurm_task
from launch.slurm_job import unrecorded
from launch.slurm_job.reports import report_exit
from launch.slurm_job.task import has_nothing_to_do, main
from trainer.run_folder import RunFolder


class Storage:
    """How the memory file system behaves now."""

    def __init__(self) -> None:
        self.behaviour = "well"

    def meet(self) -> None:
        if self.behaviour == "hangs":
            time.sleep(600)
        if self.behaviour == "refuses":
            raise OSError(16, "Please reduce your request rate")


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    storage = Storage()
    for name in ("exists", "cat_file", "pipe_file", "ls"):

        def call(self: MemoryFileSystem, *args: Any, of: Any = getattr(MemoryFileSystem, name), **kwargs: Any) -> Any:
            storage.meet()
            return of(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, call)
    return storage


@pytest.fixture
def run_dir(tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "RUNNING")
    monkeypatch.setattr(unrecorded, "ANSWER_S", 0.5)
    run_dir = f"memory://{tmp_path}/run"
    record_job(RunFolder(run_dir), JobSpec("demo", run_dir, "slurm", code_dir=str(tmp_path / "code")), job_id="12")
    return run_dir


def ends(run_dir: str, work_dir: Path, monkeypatch: pytest.MonkeyPatch, restart: int, **codes: int) -> int:
    """A start of the job with these exit codes of its ranks; the decision."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    for rank, code in codes.items():
        report_exit(str(work_dir), int(rank[1:]), code, stop_requested=code == 75)
    code = main([run_dir, str(work_dir), "2", "5", "1"])
    assert (work_dir / f"slurm/exits/12.{restart}/decision").read_text() == f"{code}\n"
    return code


def history(run_dir: str) -> list[tuple[str, int, int]]:
    return [(e["reason"], e["code"], e["step"]) for e in RunFolder(run_dir).read_json("job.json")["restarts"]]


@pytest.mark.parametrize("behaviour", ["hangs", "refuses"])
def test_a_restart_that_storage_does_not_take_is_recorded_at_the_next_end(
    run_dir: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, behaviour: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    storage.behaviour = behaviour
    began = time.monotonic()
    assert ends(run_dir, tmp_path, monkeypatch, 0, r0=70, r1=70) == 75
    assert time.monotonic() - began < 300, "bounded"
    assert "the run folder does not answer" in capsys.readouterr().out
    storage.behaviour = "well"
    assert history(run_dir) == []
    assert ends(run_dir, tmp_path, monkeypatch, 1, r0=1, r1=-9) == 75
    assert history(run_dir) == [("hang", 70, -1), ("crash", 1, -1)]
    assert ends(run_dir, tmp_path, monkeypatch, 2, r0=1, r1=-9) == 75
    assert [reason for reason, *_ in history(run_dir)] == ["hang", "crash", "crash"], "once"


def test_storage_that_stays_away_ends_the_job_with_the_reason(
    run_dir: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.behaviour = "refuses"
    log = tmp_path / "logs/rank-0.log"
    log.parent.mkdir()
    log.write_text("OSError: no way to storage\n")
    assert [ends(run_dir, tmp_path, monkeypatch, n, r0=1) for n in range(4)] == [75, 75, 75, 93]
    said = capsys.readouterr().out.splitlines()[-1]
    for words in ("rank 0 ended with", "OSError: no way to storage", "does not answer (OSError: [Errno 16] Please reduce",
                  "as at the end of 3 starts before"):  # fmt: skip
        assert words in said


def test_only_ends_in_a_row_count_and_preemptions_do_not(
    run_dir: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.behaviour = "refuses"
    assert [ends(run_dir, tmp_path, monkeypatch, n, r0=1) for n in range(3)] == [75, 75, 75]
    assert ends(run_dir, tmp_path, monkeypatch, 3, r0=75, r1=75) == 75, "it has saved"
    assert ends(run_dir, tmp_path, monkeypatch, 4, r0=1) == 75
    storage.behaviour = "well"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    assert not has_nothing_to_do(run_dir, str(tmp_path), "12", 1)
    assert history(run_dir) == [], "one rank does it"
    assert not has_nothing_to_do(run_dir, str(tmp_path), "12", 0)
    assert [reason for reason, *_ in history(run_dir)] == ["crash"] * 3 + ["preempted", "crash"]


def test_the_budget_holds_where_only_the_beginnings_reach_the_run_folder(
    run_dir: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for restart in range(6):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        storage.behaviour = "well"
        has_nothing_to_do(run_dir, str(tmp_path), "12", 0)
        storage.behaviour = "refuses"
        assert ends(run_dir, tmp_path, monkeypatch, restart, r0=1) == (75 if restart < 5 else 93)
    assert "the budget of 5 restarts is spent" in capsys.readouterr().out


def test_what_is_certain_needs_no_record(
    run_dir: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.behaviour = "refuses"
    assert ends(run_dir, tmp_path, monkeypatch, 0, r0=0, r1=0) == 0
    assert ends(run_dir, tmp_path, monkeypatch, 1, r0=93, r1=1) == 93
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "COMPLETING")
    assert ends(run_dir, tmp_path, monkeypatch, 2, r0=1) == slurm_task.CANCELLED


@pytest.mark.parametrize(
    ("behaviour", "said"), [("hangs", "no answer in time"), ("refuses", "reduce your request rate")]
)
def test_a_start_without_its_run_folder_says_so_in_its_log(
    run_dir: str, tmp_path: Path, storage: Storage, behaviour: str, said: str
) -> None:
    storage.behaviour = behaviour
    with pytest.raises(OSError, match=said):
        has_nothing_to_do(run_dir, str(tmp_path), "12", 1)
    assert said in (tmp_path / "logs/rank-1.log").read_text().splitlines()[-1]
    assert json.loads((tmp_path / "slurm/exits/12.0/rank-1.json").read_text())["code"] == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [("{", "JSONDecodeError: "), ("[]", "UserError: "), ('{"job_id": "12"}', "KeyError: 'restarts'")],
)
def test_what_is_damaged_is_called_so_and_the_job_goes_on(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str, said: str
) -> None:  # fmt: skip
    RunFolder(run_dir).write_text("job.json", damage)
    assert [ends(run_dir, tmp_path, monkeypatch, n, r0=1) for n in range(4)] == [75, 75, 75, 93]
    out = capsys.readouterr().out
    assert "does not answer" not in out
    assert f"this end cannot be put into {run_dir}/job.json ({said}" in out


def test_a_run_that_is_to_end_ends_though_its_end_cannot_be_recorded(
    run_dir: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(run_dir)
    ask_to_cancel(folder, folder.read_json("job.json"))
    for name in ("pipe_file", "_open"):

        def refuse(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
            raise OSError(16, "Please reduce your request rate")

        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    assert ends(run_dir, tmp_path, monkeypatch, 0, r0=75, r1=75) == slurm_task.CANCELLED
    assert (
        "job 12: cancelled; rank 0 ended with code 75; the run folder does not answer (OSError"
        in capsys.readouterr().out
    )
    storage.behaviour = "hangs"
    assert ends(run_dir, tmp_path, monkeypatch, 0, r0=75, r1=75) == 75, "nobody can know"
