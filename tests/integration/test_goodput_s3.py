"""The goodput ledger of a run on S3, over starts that end in each way."""

import math
import time

import pytest

from launch.runs.numbers import seconds_by_state
from launch.runs.read import read_facts
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from tests.tiny import tiny
from trainer.goodput import Ledger, newest_record, read_goodput
from trainer.goodput_keeper import GoodputKeeper
from trainer.run_folder import RunFolder


def start(folder: RunFolder, number: int) -> GoodputKeeper:
    folder.start_attempt({"time": time.time()})
    keeper = GoodputKeeper(Ledger(age_s=1.5), write_s=0.1)
    keeper.open(folder, number)
    keeper.ledger.enter("productive")
    keeper.ledger.reached += 5
    return keeper


def test_starts_on_s3_follow_one_another(s3: str) -> None:
    folder = RunFolder(f"{s3}/runs/ledger")
    folder.claim(tiny())
    with start(folder, 0):
        time.sleep(0.5)
    ended = newest_record(folder)
    assert ended is not None
    assert (ended.ended, ended.step) == (True, 5)
    time.sleep(2)
    # one that only writes while it lives, and hangs at its end
    second = start(folder, 1)
    time.sleep(1)
    second._write = lambda ended: None  # type: ignore[misc, method-assign]
    second._closing = True
    second._thread.join()
    hung_at = time.time() + 8
    folder.write_json("hangs/0001.json", {"time": hung_at, "silent_s": 7.5})
    last = newest_record(folder)
    assert last is not None
    assert (last.start, last.step) == (1, 10)
    assert last.gap["down"] == pytest.approx(last.begin_s - ended.end_s)
    until = hung_at + 12
    totals = read_goodput(folder, until=until)
    assert math.fsum(totals.values()) == pytest.approx(until - last.first, abs=1e-6)
    assert totals["hang"] == pytest.approx(7.5, abs=1e-3)
    facts = read_facts(folder)
    assert facts is not None
    assert facts.damage == []
    assert seconds_by_state(facts, now=until + 60, alive=True)["down"] == pytest.approx(totals["down"] + 60, abs=1e-3)
