"""Where the time of a real run of two ranks goes that is killed and hangs, under the launcher's supervisor."""

import json
import math
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
from trainer.goodput import StartRecord, goodput_by_start, newest_record, read_goodput, read_record
from trainer.run_folder import CONFIG, RunFolder

pytestmark = pytest.mark.slow

LIMIT_S = 15.0
STEPS = 13
CONFIGURED = tiny(
    f"watchdog={{factor: 10, min_s: {LIMIT_S}, first_step_s: 90, between_steps_s: 90}}",
    "data.num_workers=0",
    "checkpoint.every_steps=4",
    f"phases=[{{name: only, steps: {STEPS}, resolution: 32, batch_size: 8, learning_rate: 1e-4}}]",
)
FAULTS = "0:6:0:killed,1:10:1:sleep"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, float, float]:
    """(exit code, run folder, Unix times of the launcher's begin and end)."""
    run_dir = tmp_path_factory.mktemp("goodput") / "run"
    run_dir.mkdir()
    (run_dir / CONFIG).write_text(to_yaml(CONFIGURED))
    folder = RunFolder(str(run_dir))
    spec = JobSpec("demo", str(run_dir), "local", gpus_per_node=2, cpu=True, code_dir=str(CODE_ROOT))
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    command = [sys.executable, "-m", "tests.faulty_rank", "--config", f"{run_dir}/{CONFIG}", "--run-dir", str(run_dir),
               "--faults", FAULTS]  # fmt: skip
    supervisor = Supervisor(
        spec, CONFIGURED, folder, PlainDisplay(lambda text: None), command=command, backoff_s=0.01, crash_grace_s=2
    )
    begin = time.time()
    return supervisor.run(), run_dir, begin, time.time()


def records(run_dir: Path) -> list[StartRecord]:
    found = [read_record(RunFolder(str(run_dir)), start) for start in range(3)]
    assert all(found), found
    return found  # type: ignore[return-value]


def test_the_states_add_up_to_the_time_of_the_run(job: tuple[int, Path, float, float]) -> None:
    code, run_dir, begin, end = job
    assert code == 0, log_path(str(run_dir), 0).read_text()[-4000:]
    folder = RunFolder(str(run_dir))
    reasons = [entry["reason"] for entry in folder.read_json("job.json")["restarts"]]
    assert reasons == ["crash", "hang"]
    last = newest_record(folder)
    assert last is not None
    assert last.ended
    totals = read_goodput(folder)
    assert math.fsum(totals.values()) == pytest.approx(last.end_s, abs=1e-6)
    # all but what the launcher takes before and after
    # a process knows its begin to a hundredth of a second
    assert begin - 0.05 <= last.first < begin + 30
    assert end - 60 < last.first + last.end_s < end
    starts = goodput_by_start(folder)
    assert [start.start for start in starts] == [0, 1, 2]
    assert math.fsum(math.fsum(start.seconds.values()) for start in starts) == pytest.approx(last.end_s, abs=1e-6)


def test_a_kill_loses_little_and_is_no_work(job: tuple[int, Path, float, float]) -> None:
    _, run_dir, _, _ = job
    first, second, _ = records(run_dir)
    assert not first.ended
    killed_at = json.loads((run_dir / "metrics/0000.jsonl").read_text().splitlines()[-1])["time"]
    began = second.first + second.begin_s
    # what its metrics still tell of is what it did when it last wrote, all after that is down
    assert second.gap["down"] == pytest.approx(began - max(killed_at, first.first + first.end_s), abs=0.01)
    assert second.gap["down"] > 0


def test_a_hang_is_a_hang(job: tuple[int, Path, float, float]) -> None:
    _, run_dir, _, _ = job
    _, _, third = records(run_dir)
    hang = RunFolder(str(run_dir)).read_json("hangs/0001.json")
    assert hang["silent_s"] > LIMIT_S
    # and until the ranks have told each other and ended
    assert hang["silent_s"] - 0.01 < third.gap["hang"] < hang["silent_s"] + 120
    assert third.gap["down"] > 0


def test_steps_done_again_are_rework(job: tuple[int, Path, float, float]) -> None:
    """Killed after step 6 and back to 4; hung after step 10 and back to 8. Its metrics know how long each step took."""
    _, run_dir, _, _ = job
    lines = [
        [json.loads(line) for line in (run_dir / f"metrics/{start:04d}.jsonl").read_text().splitlines()]
        for start in range(3)
    ]
    steps = [[record["step"] for record in of_start if "step" in record] for of_start in lines]
    assert steps == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9, 10], [9, 10, 11, 12, 13]]
    for record in records(run_dir)[1:]:
        assert 0 < record.seconds["rework"] < record.seconds["rework"] + record.seconds["productive"]
    # a step's time is what passed in its metrics' clock less the wait; of the last start none is cut off
    of_last = [entry["train_seconds"] for entry in lines[2] if "step" in entry]
    last = records(run_dir)[2]
    computed = last.seconds["rework"] + last.seconds["productive"] + last.seconds["data"]
    assert computed == pytest.approx(of_last[-1] - 8 / 8 * _seconds_at(lines[1], 8), abs=1.5)
    assert last.seconds["restore"] > 0
    assert last.seconds["init"] > 1, "imports"


def _seconds_at(of_start: list[dict[str, float]], step: int) -> float:
    return next(entry["train_seconds"] for entry in of_start if entry.get("step") == step)


def test_counters_go_on(job: tuple[int, Path, float, float]) -> None:
    _, run_dir, _, _ = job
    last = records(run_dir)[2]
    steps = STEPS + 2 + 2
    assert last.counters["loupe_steps_total"] == [((), steps)]
    assert last.counters["loupe_images_total"] == [((), 8 * steps)]
    assert last.step == STEPS
