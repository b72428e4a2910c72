"""The goodput ledger: by a clock of our own, over kills, hangs, rework and restores, the states add up to the wall time."""

import json
import math
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.activity import Activity
from trainer.config import WatchdogConfig
from trainer.exporter import Exporter
from trainer.goodput import (
    Ledger,
    StartRecord,
    Traces,
    gap_until,
    goodput_by_start,
    idle_times,
    in_words,
    name_of,
    newest_record,
    no_seconds,
    ratio,
    read_goodput,
)
from trainer.goodput_keeper import GoodputKeeper
from trainer.metric_names import GOODPUT_STATES
from trainer.run_counters import Goodput
from trainer.run_folder import RunFolder
from trainer.watchdog import Watchdog

T0 = 1_790_000_000.25


@dataclass
class Clock:
    at: float = T0

    def __call__(self) -> float:
        return self.at

    def pass_by(self, seconds: float) -> None:
        self.at += seconds


def ledger_of(clock: Clock, age_s: float = 0.0) -> Ledger:
    return Ledger(age_s, clock=clock, wall=clock)


def record_of(start: int = 0, **changes: Any) -> StartRecord:
    zeros = no_seconds()
    return StartRecord(**{
        "start": start, "first": T0, "begin_s": 0.0, "before": zeros, "idle_s": 0.0, "gap": zeros, "seconds": zeros, **changes,
    })  # fmt: skip


def told(seconds: dict[str, float]) -> dict[str, Any]:
    """Those that are not 0."""
    return {state: pytest.approx(value) for state, value in seconds.items() if value}


def test_a_step_by_its_words() -> None:
    """Seconds by hand: 6 of start-up, 2 of restoring, a first step of 4 s of which 3 compiled, another that repeats, a save."""
    clock = Clock()
    ledger = ledger_of(clock, age_s=3)
    ledger.reached = 12
    compiled = [0.0]
    activity = Activity(Watchdog(None, None), ledger, torch.device("cpu"), lambda: compiled[0])
    clock.pass_by(2)
    activity.doing("restoring", "restore")
    clock.pass_by(2)
    activity.starting_workers()
    clock.pass_by(1)
    activity.loaded()
    for step, (wait_s, step_s) in enumerate([(0, 4), (0.5, 2), (0.25, 1)], start=10):
        if step > 10:
            activity.loading()
            clock.pass_by(wait_s)
            activity.loaded()
        activity.stepping(step, 0, (8, 3, 32, 32))
        clock.pass_by(step_s)
        compiled[0] += 3 if step == 10 else 0
        activity.stepped(step + 1, step_s)
        if step == 11:
            activity.doing("saving", "checkpoint")
            clock.pass_by(0.5)
            activity.in_step("agreeing")
            clock.pass_by(0.125)
    activity.doing("drawing samples", "other")
    clock.pass_by(7)
    seconds, state = ledger.now()
    assert told(seconds) == {
        "init": 6, "restore": 2, "compile": 3, "rework": 1 + 2 + 0.125, "productive": 1, "data": 0.75, "checkpoint": 0.5,
        "other": 7,
    }  # fmt: skip
    assert state == "other"
    assert math.fsum(seconds.values()) == pytest.approx(clock.at - ledger.begin, abs=1e-6)
    assert ledger.reached == 13


def test_only_the_first_step_of_a_kind_compiles_and_without_the_compiler_none() -> None:
    clock, asked = Clock(), []

    def compile_seconds() -> float:
        asked.append(1)
        return 0.0

    for compiler in (compile_seconds, None):
        ledger = ledger_of(clock)
        activity = Activity(Watchdog(None, None), ledger, torch.device("cpu"), compiler)
        for step, kind in enumerate(["small", "small", "large", "small"]):
            activity.stepping(step, 0, kind)
            clock.pass_by(1)
            activity.stepped(step + 1, 1)
        assert told(ledger.now()[0]) == {"productive": 4}, "what the compiler did not take is the step's"
    assert len(asked) == 2 * 2


def test_a_wait_that_the_device_has_not_noticed_is_none() -> None:
    clock = Clock()
    ledger = ledger_of(clock)
    activity = Activity(Watchdog(None, None), ledger, torch.device("cpu"))
    for step, busy in enumerate([False, True]):
        activity._work.goes_on = lambda busy=busy: busy  # type: ignore[method-assign, misc]
        activity.loading()
        clock.pass_by(2)
        activity.stepping(step, 0)
        clock.pass_by(1)
        activity.stepped(step + 1, 1)
    assert told(ledger.now()[0]) == {"data": 2, "productive": 4}


def test_the_watchdog_hears_the_same_words(tmp_path: Path) -> None:
    with Watchdog(WatchdogConfig(min_s=1, first_step_s=100), RunFolder(str(tmp_path))) as watchdog:
        activity = Activity(watchdog, ledger_of(Clock()), torch.device("cpu"))
        activity.starting_workers()
        assert (watchdog._now.doing, watchdog._now.limit_s) == ("waiting for data", 100)
        activity.stepping(0, 0)
        assert watchdog._now.doing == "computing a step"
        activity.doing("saving", "checkpoint")
        assert watchdog._now.doing == "saving"


# ------------------------------------------------------------------------------------------- between two starts' records


PRODUCTIVE = {**no_seconds(), "init": 10.0, "productive": 90.0}


@pytest.mark.parametrize(
    ("traces", "changes", "expected", "idle_s"),
    [
        (Traces(), {}, {"down": 50}, 0),
        (Traces(seen_s=107), {}, {"productive": 7, "down": 43}, 0),
        (Traces(seen_s=99), {}, {"down": 50}, 0),
        (Traces(seen_s=107), {"ended": True}, {"down": 50}, 0),
        # the ledger's last word before the hang began, and amid it
        (Traces(hang=(104, 134)), {}, {"productive": 4, "hang": 30, "down": 16}, 0),
        (Traces(hang=(80, 110)), {}, {"productive": -20, "hang": 30, "down": 40}, 0),
        (Traces(hang=(80, 95)), {}, {"productive": -20, "hang": 20, "down": 50}, 0),
        (Traces(hang=(104, 500)), {}, {"productive": 4, "hang": 46}, 0),
        (Traces(hang=(400, 500)), {}, {"productive": 50}, 0),
        (Traces(hang=(-500, 110)), {}, {"productive": -90, "hang": 100, "down": 40}, 0),
        # between a job's end and the next submission
        (Traces(idle=((110, 140),)), {}, {"down": 20}, 30),
        (Traces(idle=((90, 120), (145, 900))), {}, {"down": 25}, 25),
        (Traces(seen_s=115, idle=((110, 120),)), {}, {"productive": 15, "down": 30}, 5),
    ],
)
def test_what_lies_between_two_starts(
    traces: Traces, changes: dict[str, Any], expected: dict[str, float], idle_s: float
) -> None:
    last = record_of(seconds=PRODUCTIVE, state="productive", **changes)
    gap, idle = gap_until(last, 150.0, traces)
    assert {state: value for state, value in gap.items() if value} == pytest.approx(expected)
    assert idle == pytest.approx(idle_s)
    assert math.fsum(gap.values()) + idle == pytest.approx(50.0, abs=1e-9)


def test_idle_is_between_the_end_of_a_job_and_the_next_submission() -> None:
    job = {
        "submitted_at": 500, "ended": None,
        "earlier": [{"submitted_at": 0, "ended": {"time": 100}}, {"submitted_at": 90, "ended": {"time": 300}}, "no job"],
    }  # fmt: skip
    assert list(idle_times(job)) == [(300.0, 500.0)], "a chain's next job is submitted before the first ends"
    assert list(idle_times({"earlier": 3})) == []


# --------------------------------------------------------------------------------------------------- over several starts


class Life:
    """Starts of a run by a fake clock, ended in all ways, and how long each state really took."""

    def __init__(self, folder: RunFolder, seed: int) -> None:
        self.folder, self.clock, self.random = folder, Clock(), random.Random(seed)
        self.true = no_seconds()
        self.idle = self.unwritten = 0.0
        self.attempt = 0
        self.step = self.saved = self.reached = 0

    def spend(self, ledger: Ledger | None, state: str, seconds: float) -> None:
        if ledger:
            ledger.enter(state)
        self.clock.pass_by(seconds)
        self.true[state] += seconds

    def start(self, how: str) -> None:
        before = self.clock.at
        self.clock.pass_by(age := self.random.uniform(1, 9))
        self.true["init"] += age
        ledger = ledger_of(self.clock, age_s=age)
        assert ledger.begin == pytest.approx(before)
        keeper = GoodputKeeper(ledger)
        # as the thread does, when the test says so
        keeper._thread.start = lambda: None  # type: ignore[method-assign]
        keeper.open(self.folder, self.attempt)
        assert ledger.reached == self.reached
        self.spend(ledger, "restore", self.random.uniform(0, 2))
        self.step = self.saved
        metrics = self.folder.metrics_writer(self.attempt)
        for _ in range(self.random.randint(3, 9)):
            self.spend(ledger, "data", self.random.uniform(0, 1))
            self.spend(ledger, "rework" if self.step < ledger.reached else "productive", self.random.uniform(0, 3))
            self.step += 1
            ledger.reached = self.reached = max(self.reached, self.step)
            metrics.write({"time": self.clock.at, "step": self.step})
            if self.random.random() < 0.4:
                self.spend(ledger, "checkpoint", self.random.uniform(0, 2))
                self.saved = self.step
        metrics.close()
        keeper._write(ended=how == "stop")
        if how == "kill":
            # after its last word: the metrics know that it lived, not what it did
            self.spend(ledger, "productive", 0.5)
            self.reached = max(self.reached, self.step)
            writer = self.folder.metrics_writer(self.attempt)
            writer.write({"time": self.clock.at, "step": self.step})
            writer.close()
            self.unwritten += 0.5
        if how == "hang":
            hung = self.random.uniform(5, 60)
            ledger.enter("data")
            self.clock.pass_by(hung / 2)
            keeper._write(ended=False)
            self.clock.pass_by(hung / 2)
            self.true["hang"] += hung
            self.folder.write_json(f"hangs/{self.attempt:04d}.json", {"time": self.clock.at, "silent_s": hung})
        self.attempt += 1

    def be_down(self, how: str) -> None:
        self.true["down"] += (seconds := self.random.uniform(0.5, 400))
        self.clock.pass_by(seconds)
        if how == "stop":
            job = self.folder.read_json("job.json") if self.folder.exists("job.json") else {"earlier": []}
            ended = {"ended": {"time": self.clock.at}, "submitted_at": job.get("submitted_at", T0)}
            self.clock.pass_by(idle := self.random.uniform(10, 9000))
            self.idle += idle
            self.folder.write_json("job.json", {"submitted_at": self.clock.at, "earlier": [*job["earlier"], ended]})


@pytest.mark.parametrize("seed", range(4))
def test_states_add_up_to_the_wall_time(tmp_path: Path, seed: int) -> None:
    life = Life(RunFolder(str(tmp_path / "r")), seed)
    how = "stop"
    for _ in range(25):
        life.start(how := life.random.choice(["kill", "hang", "stop"]))
        life.be_down(how)
    life.start("stop")
    totals = read_goodput(life.folder)
    assert math.fsum(totals.values()) == pytest.approx(life.clock.at - T0 - life.idle, abs=1e-6)
    assert list(totals) == list(GOODPUT_STATES)
    # a kill's last half second is taken for what it did when it last wrote
    exact = {state: pytest.approx(value, abs=life.unwritten + 1e-4) for state, value in life.true.items()}
    assert totals == exact
    assert totals["hang"] == pytest.approx(life.true["hang"], abs=1e-4)
    assert totals["down"] == pytest.approx(life.true["down"], abs=1e-4)
    starts = goodput_by_start(life.folder)
    assert len(starts) == 26
    assert math.fsum(math.fsum(s.seconds.values()) for s in starts) == pytest.approx(
        math.fsum(totals.values()), abs=1e-6
    )


def test_the_time_until_now_of_a_run_that_waits(tmp_path: Path) -> None:
    life = Life(RunFolder(str(tmp_path / "r")), 1)
    life.start("stop")
    end = life.clock.at
    assert read_goodput(life.folder, until=end + 77)["down"] == pytest.approx(77, abs=1e-4)
    assert read_goodput(life.folder, until=end - 5) == read_goodput(life.folder)
    assert read_goodput(RunFolder(str(tmp_path / "none"))) == {}


def test_a_start_whose_clock_is_behind_the_last_word_of_the_one_before(tmp_path: Path) -> None:
    """Machines' clocks differ; no state goes below 0, and the sum stays the time that the records tell."""
    folder = RunFolder(str(tmp_path / "r"))
    life = Life(folder, 3)
    life.start("stop")
    end_s = newest_record(folder).end_s  # type: ignore[union-attr]
    life.clock.at -= 4
    life.start("stop")
    second = newest_record(folder)
    assert second is not None
    assert second.begin_s == pytest.approx(end_s)
    assert min(second.totals().values()) >= 0
    assert math.fsum(second.totals().values()) == pytest.approx(second.end_s, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "[" * 100_000, '{"first": 1}', '{"first": "x"}', "null", "x" * (2 << 20),
        json.dumps({**record_of(1).to_json(), "before": {"init": 5.0}}),
        json.dumps({**record_of(1).to_json(), "state": "<script>"}),
        json.dumps({**record_of(1).to_json(), "counters": {"a": [[["x"], "y"]]}}),
        json.dumps({**record_of(1).to_json(), "seconds": {"init": float("inf")}}),
        json.dumps({**record_of(1).to_json(), "begin_s": -4.0}),
        json.dumps({**record_of(1).to_json(), "begin_s": 10**400}),
    ],
    ids=range(14),
)  # fmt: skip
def test_damaged_records_are_passed_over(tmp_path: Path, text: str) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    folder.write_json(name_of(0), record_of(0, seconds=PRODUCTIVE, step=7).to_json())
    folder.write_text(name_of(1), text)
    folder.write_text("goodput/notes.txt", "x")
    folder.write_text("hangs/0000.json", "{")
    folder.write_text("job.json", "[]")
    record = newest_record(folder)
    assert record is not None
    assert (record.start, record.step) == (0, 7)
    clock = Clock(T0 + 300)
    keeper = GoodputKeeper(ledger_of(clock))
    keeper._thread.start = lambda: None  # type: ignore[method-assign]
    keeper.open(folder, 2)
    assert read_goodput(folder)["down"] == pytest.approx(200, abs=1e-4)


def test_counters_and_goodput_reach_the_next_start(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    said: list[dict[str, float]] = []
    began = time.monotonic()
    with GoodputKeeper(Ledger(age_s=2.0), write_s=0.05) as keeper:
        assert keeper.open(folder, 0) == {}
        keeper.export(said.append, lambda: {"loupe_steps_total": [((), 40.0)], "x": [(("spike",), 2.0)]})
        keeper.ledger.enter("productive")
        entered = time.monotonic()
        end = entered + 120
        while newest_record(folder).state != "productive" and time.monotonic() < end:  # type: ignore[union-attr]
            time.sleep(0.02)
        keeper.ledger.enter("other")
    assert newest_record(folder).ended  # type: ignore[union-attr]
    assert said[-1] == read_goodput(folder)
    assert 2.0 <= said[-1]["init"] <= 2.0 + entered - began + 0.01
    assert said[-1]["productive"] > 0
    with GoodputKeeper(Ledger()) as keeper:
        assert keeper.open(folder, 1) == {"loupe_steps_total": [((), 40.0)], "x": [(("spike",), 2.0)]}
        assert keeper.totals()["productive"] == pytest.approx(said[-1]["productive"])


def test_storage_that_refuses_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    with GoodputKeeper(Ledger(), write_s=0.02) as keeper:
        keeper.open(folder, 0)
        good, refusals = folder.write_json, []

        def refuse(name: str, tree: object) -> None:
            refusals.append(name)
            raise OSError("no room")

        folder.write_json = refuse  # type: ignore[assignment]
        end = time.monotonic() + 120
        while len(refusals) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        folder.write_json = good  # type: ignore[method-assign]
    assert capsys.readouterr().out.count("WARNING: goodput/0000.json cannot be written (no room)") == 1
    assert newest_record(folder).ended  # type: ignore[union-attr]


def test_the_metric_never_goes_down() -> None:
    exporter = Exporter()
    goodput = Goodput(exporter)
    for seconds in ({"productive": 5.0, "compile": 0.0}, {"productive": 2.0, "compile": 4.0}, {"productive": 6.0}):
        goodput.tell(seconds)
    text = {s.labels["state"]: s.value for f in exporter.registry.collect() if f.name == "loupe_goodput_seconds"
            for s in f.samples if s.name.endswith("_total")}  # fmt: skip
    assert (text["productive"], text["compile"]) == (6.0, 4.0)
    assert set(text) == set(GOODPUT_STATES), "a state that has not been stands at 0"


def test_shares_in_words() -> None:
    seconds = {**no_seconds(), "productive": 81.0, "init": 18.8, "hang": 0.2}
    assert in_words(seconds) == "productive 81 %, init 19 %"
    assert ratio(seconds) == pytest.approx(0.81)
    assert ratio(no_seconds()) is None
    assert in_words(no_seconds()) == ""


def test_an_end_that_comes_during_a_write_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, began, go_on = RunFolder(str(tmp_path / "r")), threading.Event(), threading.Event()
    keeper = GoodputKeeper(Ledger(), write_s=0.01)
    keeper.open(folder, 0)
    write = folder.write_json

    def slow(name: str, tree: dict[str, object]) -> None:
        began.set()
        go_on.wait(10)
        write(name, tree)

    monkeypatch.setattr(folder, "write_json", slow)
    with keeper:
        assert began.wait(10)
        threading.Timer(0.2, go_on.set).start()
    assert folder.read_json("goodput/0000.json")["ended"] is True
