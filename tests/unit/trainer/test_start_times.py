"""Where the time of a start goes: laps, the process's own age, and what the record and the metrics get of them."""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny import tiny
from trainer import start_times
from trainer.config import CODE_ROOT
from trainer.errors import ExitCode
from trainer.metric_names import START_SECONDS
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder
from trainer.start_times import PARTS, StartTimes, in_words, process_age_s

if TYPE_CHECKING:
    from trainer.parallel.world import World


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(start_times.time, "monotonic", lambda: self.now)


def test_laps_add_up_and_nothing_counts_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    start = StartTimes(age_s=2.0)
    ends = []
    start.on_end = lambda: ends.append(dict(start.seconds))
    for part, seconds in (("import", 1.0), ("data", 0.25), ("model", 4.0), ("data", 0.5), ("first_step", 8.0)):
        clock.now += seconds
        (start.end if part == "first_step" else start.lap)(part)
    clock.now += 100
    start.lap("data")
    start.end("first_step")
    assert ends == [{"import": 3.0, "data": 0.75, "model": 4.0, "first_step": 8.0}]
    assert start.seconds == ends[0]


def test_compiling_is_taken_out_of_the_first_step_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    start = StartTimes()
    clock.now += 8
    start.end("first_step")
    start.split("compile", of="first_step", seconds=0.0)
    assert start.seconds == {"first_step": 8.0}
    start.split("compile", of="first_step", seconds=6.5)
    assert list(start.seconds.items()) == [("compile", 6.5), ("first_step", 1.5)]
    start.split("compile", of="first_step", seconds=99.0)
    assert start.seconds == {"compile": 8.0, "first_step": 0.0}
    assert in_words({"import": 6.12, "ranks": 0.01, "first_step": 2.0}) == "8.1 s (import 6.1, first_step 2.0)"
    assert all(part in START_SECONDS.help for part in PARTS)


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.5); from trainer.start_times import process_age_s; print(process_age_s())"
    began = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=CODE_ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert 0.5 <= float(said.stdout) <= time.monotonic() - began + 0.02
    assert process_age_s() > 0


def test_a_run_records_its_start_once_and_exports_it(
    alone: "World", tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.run
    from trainer.run import Run
    from trainer.watchdog import Watchdog

    config = tiny("phases.low_resolution.steps=2", "phases.full_resolution.steps=1", "phases.perceptual.steps=1")
    folder = RunFolder(str(tmp_path / "r"))
    # by another run of this process; it is no part of this start
    monkeypatch.setattr(trainer.run, "compile_seconds", lambda: 5.0)
    began = time.monotonic()
    run = Run(config, folder, alone, StopRequest(), Watchdog(None, None), StartTimes(age_s=1.0))
    assert run.train() is ExitCode.DONE
    took = time.monotonic() - began
    record = folder.read_json("attempts/0000.json")
    seconds = record["start_seconds"]
    assert record["world_size"] == 1, "what was recorded at the beginning stays"
    assert set(seconds) == {"data", "model", "restore", "first_batch", "first_step"}
    assert 1.0 < sum(seconds.values()) < took + 1.0, "it ends with the first of several steps"
    target = folder.read_json("metrics_targets.json")["targets"][0]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=60) as response:
        text = response.read().decode()
    assert f'loupe_start_seconds{{part="model"}} {run.start.seconds["model"]}' in text
    assert capsys.readouterr().out.count("first step ") == 1
