"""Alerts about data by their real cause: storage that is slow or refuses, data workers that die, stages that fail; and about
records that other places do not take."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.faulty_proxy import Fault, Proxy
from tests.ops.live_run import ONE_PHASE, live_run
from tests.ops.stages import waiting_stage
from tests.ops.watch import Watch, minutes_as_seconds, minutes_as_six_seconds
from tests.s3_server import BUCKET, faulty_s3
from tests.small_stages import image, write_tar
from trainer.config import CODE_ROOT
from trainer.discovery import TARGETS

__all__ = ["minutes_as_seconds", "minutes_as_six_seconds"]
pytestmark = [pytest.mark.ops, pytest.mark.slow_ops]
EMOJI = CODE_ROOT / "data/assets/emoji_64"


@pytest.fixture
def storage() -> Iterator[Proxy]:
    """The demo's images on S3, behind a proxy that spoils answers."""
    with faulty_s3() as proxy:
        fs = s3fs.S3FileSystem()
        for file in EMOJI.iterdir():
            fs.put_file(str(file), f"{BUCKET}/emoji/{file.name}")
        yield proxy


def test_storage_that_is_slow_and_then_refuses(minutes_as_seconds: Watch, storage: Proxy) -> None:
    """Each sample is fetched for itself, so storage is asked all the time."""
    watch = minutes_as_seconds
    remote = f"data.datasets={{emoji: {{url: 's3://{BUCKET}/emoji', max_samples: 96, fetch: ranges}}}}"
    with live_run(watch.folder, "slow", ONE_PHASE, remote, "data.num_workers=1", "data.prefetch_steps=2") as run:
        run.await_step(5)
        storage.faults.append(Fault("late", amount=0.5))
        watch.await_alerts("LoupeDataWait", run=run)
        storage.faults.clear()
        # every other time, so that what is tried again gets there
        storage.faults.append(Fault("503", every=2))
        watch.await_alerts("LoupeStorageErrors", run=run)
        storage.faults.clear()


def test_data_workers_that_die(minutes_as_six_seconds: Watch) -> None:
    watch = minutes_as_six_seconds
    with live_run(watch.folder, "workers", ONE_PHASE, "data.num_workers=1", "checkpoint.every_steps=5") as run:
        run.await_step(6)
        # a scrape with none
        watch.prometheus.until(lambda: watch.prometheus.query("run:loupe_data_worker_deaths:total == 0"), "a scrape")
        for start in range(2):
            run.until((Path(run.folder.url) / f"metrics/{start:04d}.jsonl").exists, f"start {start}")
            workers = run.until(lambda: run.pids().get(1) and run.workers(1), "a worker")
            os.kill(workers[0], signal.SIGKILL)
        watch.await_alerts("LoupeDataWorkers", run=run)


def test_a_discovery_folder_and_a_sink_that_take_nothing(minutes_as_six_seconds: Watch) -> None:
    """Found by hand, as the folder cannot be written to; TensorBoard's disk is full."""
    watch = minutes_as_six_seconds
    blocked = watch.folder / "blocked"
    blocked.write_text("a file, not a folder")
    with live_run(watch.folder, "blocked-run", ONE_PHASE, f"metrics.discovery_dir={blocked}/targets",
                  "metrics.sinks=[tensorboard]") as run:  # fmt: skip
        run.until(lambda: run.folder.exists(TARGETS), "targets")
        rank_0 = run.folder.read_json(TARGETS)["targets"][:1]
        groups = [{"targets": rank_0, "labels": {"run": run.run, "job_id": "1", "node": "n", "rank": "0"}}]
        (watch.folder / "discovery" / "by-hand.json").write_text(json.dumps(groups))
        watch.await_alerts("LoupeDiscoveryFailing", run=run)
        assert run.records()[-1]["step"] > 0, "it trains on"


def test_a_stage_that_fails_and_gets_no_further(minutes_as_seconds: Watch, tmp_path: Path) -> None:
    """Its detector is broken, and who holds the item that is left does not answer any more."""
    with waiting_stage(tmp_path, minutes_as_seconds.folder / "discovery", detector="tests.ops.stages:broken"):
        minutes_as_seconds.await_alerts("LoupeDataStageFailing", "LoupeDataStageStalled")


def test_a_stage_whose_workers_die(minutes_as_seconds: Watch, tmp_path: Path) -> None:
    watch = minutes_as_seconds
    write_tar(tmp_path / "raw/a.tar", [image(i) for i in range(6)])
    with open(tmp_path / "stage.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "data", "ingest", f"{tmp_path}/raw/a.tar", f"{tmp_path}/ingested",
             "--workers", "1", "--min-side", "16", "--discovery-dir", f"{watch.folder}/discovery"],
            stdout=log, stderr=log, cwd=CODE_ROOT, start_new_session=True,
        )  # fmt: skip
    stopped: list[int] = []

    def stop_next_worker() -> bool:
        """Before it has begun to work: its imports take longer than a look."""
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in map(int, path.read_text().split()):
            with contextlib.suppress(OSError):
                if pid not in stopped and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
                    return True
        return False

    try:
        watch.prometheus.until(stop_next_worker, "a worker")
        watch.prometheus.until(lambda: watch.prometheus.query("loupe_data_stage_worker_deaths_total == 0"), "a scrape")
        for _ in range(4):
            os.kill(stopped[-1], signal.SIGKILL)
            watch.prometheus.until(stop_next_worker, "another worker")
        watch.await_alerts("LoupeDataStageWorkers")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
