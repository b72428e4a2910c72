"""Ranks that hang, each in its way, in one real run of two ranks under the launcher's supervisor: each start ends within the
limit, says where it was stuck, and the run goes on to its end."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from launch.console import PlainDisplay
from launch.job import JobSpec, process_start, record_job
from launch.local import Supervisor
from launch.ranks import log_path
from tests.tiny import tiny
from trainer.config import CODE_ROOT
from trainer.config_text import to_yaml
from trainer.run_folder import CONFIG, RunFolder

pytestmark = pytest.mark.slow

LIMIT_S = 15.0
CONFIGURED = tiny(
    f"watchdog={{factor: 10, min_s: {LIMIT_S}, first_step_s: 90, between_steps_s: 90}}",
    "data.num_workers=0",
    "checkpoint.asynchronous=false",
    "checkpoint.every_steps=4",
    "phases=[{name: only, steps: 16, resolution: 32, batch_size: 8, learning_rate: 1e-4}]",
)
FAULTS = "0:6:1:sleep,1:10:1:stopped,2:13:1:slow,2:14:0:slow"
"""The last two are no hangs: a step of a second, now of one rank and now of the other."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[str], list[float]]:
    run_dir = tmp_path_factory.mktemp("hangs") / "run"
    run_dir.mkdir()
    (run_dir / CONFIG).write_text(to_yaml(CONFIGURED))
    folder = RunFolder(str(run_dir))
    spec = JobSpec("demo", str(run_dir), "local", gpus_per_node=2, cpu=True, code_dir=str(CODE_ROOT))
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    notes: list[str] = []
    times: list[float] = []

    def note(text: str) -> None:
        notes.append(text)
        times.append(time.time())

    command = [sys.executable, "-m", "tests.faulty_rank", "--config", f"{run_dir}/{CONFIG}", "--run-dir", str(run_dir),
               "--faults", FAULTS, "--slow-saves", f"2:{LIMIT_S + 1}"]  # fmt: skip
    supervisor = Supervisor(
        spec, CONFIGURED, folder, PlainDisplay(note), command=command, backoff_s=0.01, crash_grace_s=2
    )
    return supervisor.run(), run_dir, notes, times


def test_the_run_goes_on_after_each_hang(job: tuple[int, Path, list[str], list[float]]) -> None:
    code, run_dir, notes, _ = job
    assert code == 0, "\n".join(notes) + log_path(str(run_dir), 0).read_text()[-4000:]
    record = json.loads((run_dir / "job.json").read_text())
    assert [entry["reason"] for entry in record["restarts"]] == ["hang"] * 2
    assert [r["step"] for r in RunFolder(str(run_dir)).metrics()] == list(range(1, 17))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["restarts"] == 2, "neither long saves nor slow steps nor a long end were taken for hangs"


def test_each_hang_ends_soon_and_says_what_and_where(job: tuple[int, Path, list[str], list[float]]) -> None:
    _, run_dir, notes, times = job
    ends = [i for i, note in enumerate(notes) if "starting again" in note]
    folder = RunFolder(str(run_dir))
    for start, (i, done) in enumerate(zip(ends, (6, 10), strict=True)):
        assert "error: hang: " in notes[i], notes[i]
        assert f"without a step after step {done}," in notes[i]
        assert ("no answer from rank 1" in notes[i]) == (start == 1)
        assert f"stacks in {run_dir}/stacks" in notes[i]
        last_step = max(j for j, note in enumerate(notes[:i]) if note.startswith("step "))
        # a save, the limit, the answers that do not come, the launcher's patience with a rank that cannot end
        assert times[i] - times[last_step] < folder.read_json(f"hangs/{start:04d}.json")["limit_s"] + 120


def test_stacks_name_the_stuck_line(job: tuple[int, Path, list[str], list[float]]) -> None:
    _, run_dir, _, _ = job
    names = RunFolder(str(run_dir)).names("stacks")
    assert names == ["0000-rank-0.txt", "0000-rank-1.txt", "0001-rank-0.txt"]
    text = {name: (run_dir / "stacks" / name).read_text() for name in names}
    assert "while computing a step" in text["0000-rank-1.txt"]
    assert "tests/faulty_rank.py" in text["0000-rank-1.txt"]
    assert "in sleep_for_ever" in text["0000-rank-1.txt"]
    assert "sleep_for_ever" not in text["0000-rank-0.txt"]
    assert "Thread MainThread (most recent call first):" in text["0000-rank-0.txt"]


def test_hangs_are_counted_over_starts(job: tuple[int, Path, list[str], list[float]]) -> None:
    _, run_dir, _, _ = job
    folder = RunFolder(str(run_dir))
    assert folder.names("hangs") == ["0000.json", "0001.json"]
    stopped = folder.read_json("hangs/0001.json")
    assert (stopped["rank"], stopped["unanswered"], stopped["step"]) == (0, [1], 10)
    assert stopped["silent_s"] > stopped["limit_s"] >= LIMIT_S
