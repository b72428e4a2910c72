"""Worker processes of a stage: killed at random, and still every sample is published exactly once; here and on S3."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.stages.store import SUMMARY, StageStore
from data.stages.workers import run_workers
from tests.counting_stage import CountingStage, expected, published, worked_at
from tests.s3_server import BUCKET, s3_server
from trainer.errors import UserError

PROGRAM = """
import sys
from data.stages.runner import Worker
from data.stages.store import StageStore
from tests.counting_stage import CountingStage
if __name__ == "__main__":
    url, items, samples, part, seconds, log = sys.argv[1:]
    stage = CountingStage(int(items), int(samples), int(part), float(seconds), log=log)
    Worker(stage, StageStore(url), lease_s=1.0).run()
"""
KILLS, WORKERS = 50, 8


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.mark.parametrize(
    "where", [pytest.param("folder", marks=pytest.mark.slow), pytest.param("s3", marks=pytest.mark.long)]
)
def test_eight_workers_killed_fifty_times(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Independent processes, as on many machines: no parent that could know."""
    environment = request.getfixturevalue("s3") if where == "s3" else {}
    url = f"s3://{BUCKET}/chaos" if where == "s3" else str(tmp_path / "out")
    log = tmp_path / "log"
    log.touch()
    stage = CountingStage(items=40, samples=30, part=10, seconds=0.1)
    arguments = [str(v) for v in (url, stage.items, stage.samples, stage.part, stage.seconds, log)]
    rng = random.Random(0)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env={**os.environ, **environment})

    workers = [start() for _ in range(WORKERS)]
    kills = 0
    deadline = time.monotonic() + 240
    while kills < KILLS:
        assert time.monotonic() < deadline, f"{kills} kills, {len(worked_at(log))} samples"
        time.sleep(rng.uniform(0.02, 0.2))
        victim = rng.randrange(WORKERS)
        assert workers[victim].poll() is None, f"ended after {kills} kills: too little work for the test"
        # one that works already: a worker that dies while Python starts shows nothing
        if any(line.endswith(f" {workers[victim].pid}") for line in log.read_text().splitlines()):
            workers[victim].kill()
            workers[victim].wait()
            workers[victim] = start()
            kills += 1
    for process in workers:
        assert process.wait(timeout=deadline - time.monotonic()) == 0
    store = StageStore(url)
    assert published(store) == expected(stage)
    assert store.read_json(SUMMARY)["counts"]["count"] == {"read": 1200, "kept": 1200}
    worked = Counter(worked_at(log))
    assert len(worked) == 1200
    assert sum(worked.values()) > 1200, "no kill has cost anything: the test has not tested"


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    stage = CountingStage(items=4, samples=30, part=10, seconds=0.03, log=str(log))

    def kill_one() -> None:
        while not log.read_text():
            time.sleep(0.05)
        os.kill(int(log.read_text().split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert run_workers(stage, str(tmp_path / "out"), workers=2, lease_s=1.0, tick_s=0.1) == []
    killer.join()
    assert published(StageStore(str(tmp_path / "out"))) == expected(stage)
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 3


def test_a_workers_error_of_the_user_reaches_the_command(tmp_path: Path) -> None:
    run_workers(CountingStage(), str(tmp_path / "out"), workers=1, tick_s=0.1)
    with pytest.raises(UserError, match="begun with samples = 10, now it is 9"):
        run_workers(CountingStage(samples=9), str(tmp_path / "out"), workers=2, tick_s=0.1)


def test_hundreds_of_failures_come_through(tmp_path: Path) -> None:
    """More than a pipe holds."""
    stage = CountingStage(items=300, fails="all", fails_for_user=True)
    lines = run_workers(stage, str(tmp_path / "out"), workers=2, tick_s=0.1)
    assert len(lines) == 300
    assert sum(map(len, lines)) > 1 << 16
