"""Each alert fires by its real cause, in real runs that real servers watch, and reaches Alertmanager's webhook.

The rules are those of ops/prometheus but for their times, which `ops.prometheus.render.shortened` divides: an alert that waits
for 45 minutes waits for 45 seconds. What a healthy run must not do is tests/ops/test_real_run.py's, with the times as they are.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.dcgm import dcgm
from tests.ops.live_run import ONE_PHASE, live_run
from tests.ops.watch import Watch, minutes_as_fifteen_seconds, minutes_as_seconds, minutes_as_six_seconds
from trainer.errors import ExitCode

__all__ = ["minutes_as_fifteen_seconds", "minutes_as_seconds", "minutes_as_six_seconds"]
pytestmark = [pytest.mark.ops, pytest.mark.slow_ops]
NO_WATCHDOG = "watchdog=null"
WATCHDOG = "watchdog={factor: 10, min_s: 5, first_step_s: 90, between_steps_s: 90}"
SPIKES = "optim.spikes={sigma: 6, window_steps: 20, roll_back_after: 4, max_roll_backs: 100}"


def test_a_rank_that_is_stuck_and_one_that_does_not_answer(minutes_as_seconds: Watch) -> None:
    """Stopped before its first step, then in the middle of the run; then rank 0 too; then the run is cancelled."""
    watch = minutes_as_seconds
    with live_run(watch.folder, "stuck", ONE_PHASE, NO_WATCHDOG, "checkpoint.every_steps=10") as run:
        run.strike(rank_1="sleep")
        watch.await_alerts("Watchdog", "LoupeSlowStart", run=run)
        run.strike()
        run.await_step(12)
        os.kill(run.pids()[1], signal.SIGSTOP)
        # rank 0 waits for it, and saves no more
        watch.await_alerts("LoupeTargetDown", "LoupeNoProgress", "LoupeCheckpointOld", run=run)
        os.kill(run.pids()[0], signal.SIGSTOP)
        watch.await_alerts("LoupeRunDown", run=run)
    watch.await_alerts("LoupeRunGone")


def test_starts_that_end_again_and_again(minutes_as_fifteen_seconds: Watch) -> None:
    """Killed three times before there is a first checkpoint, and twice after it."""
    watch = minutes_as_fifteen_seconds
    with live_run(watch.folder, "again", ONE_PHASE, "checkpoint.every_steps=100", max_restarts=6) as run:

        def kill_start(number: int) -> None:
            metrics = Path(run.folder.url) / f"metrics/{number:04d}.jsonl"
            run.until(lambda: metrics.exists() and metrics.read_text(), f"a step of start {number}")
            os.kill(run.pids()[number % 2], signal.SIGKILL)

        watch.prometheus.until(lambda: watch.prometheus.query("run:loupe_restarts:total == 0"), "a scrape of the first")
        for number in range(3):
            kill_start(number)
        watch.await_alerts("LoupeNoNewerCheckpoint", run=run)
        run.until(lambda: list((Path(run.folder.url) / "checkpoints").glob("*/COMMIT")), "a checkpoint")
        for number in (3, 4):
            kill_start(number)
        watch.await_alerts("LoupeRestartStorm", "LoupeRestartBudget", run=run)


def test_a_hang_that_the_watchdog_ends(minutes_as_seconds: Watch) -> None:
    watch = minutes_as_seconds
    with live_run(watch.folder, "hung", ONE_PHASE, WATCHDOG, "checkpoint.every_steps=4") as run:
        run.await_step(8)
        run.strike(rank_1="sleep")
        run.until(lambda: run.folder.names("hangs"), "a hang")
        run.strike()
        watch.await_alerts("LoupeHang", run=run)


def test_losses_that_are_none(minutes_as_seconds: Watch) -> None:
    watch = minutes_as_seconds
    with live_run(watch.folder, "nan", ONE_PHASE, SPIKES, "checkpoint.every_steps=5") as run:
        run.await_step(25)
        run.strike(rank_1="nan")
        run.until(lambda: "skipped: non-finite" in run.log(), "a step that is refused")
        run.strike()
        watch.await_alerts("LoupeLossNotFinite", run=run)
        run.strike(rank_0="wild", rank_1="wild")
        watch.await_alerts("LoupeStepsRefused", "LoupeRollBack", run=run)


def test_a_run_that_leaves_its_range_and_slows_down(minutes_as_seconds: Watch) -> None:
    """Healthy for as long as the alerts look back; then images that are none; then a rank that is slow."""
    watch = minutes_as_seconds
    with live_run(watch.folder, "range", ONE_PHASE, "metrics.straggler_steps=5", "checkpoint.every_steps=50") as run:
        run.await_step(5)
        # an hour's worth, and five minutes'
        time.sleep(70)
        assert not watch.prometheus.query('ALERTS{alertname=~"LoupeLossSpike|LoupeGradientSpike|LoupeStraggler"}')
        run.strike(rank_0="wild", rank_1="wild")
        watch.await_alerts("LoupeLossSpike", "LoupeGradientSpike", run=run)
        run.strike()
        time.sleep(75)
        run.strike(rank_1="slow")
        watch.await_alerts("LoupeStraggler", "LoupeMfuDrop", run=run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(minutes_as_six_seconds: Watch, small_disk: Path) -> None:
    """It stops the run at once, for good, so that nobody sees the failure counted: it is told of as a run that is gone. Its
    next start knows of it."""
    watch = minutes_as_six_seconds
    settings = (ONE_PHASE, "checkpoint.every_steps=10")
    with live_run(watch.folder, "full", *settings) as run:
        (Path(run.folder.url) / "checkpoints").symlink_to(small_disk)
        run.await_step(12)
        watch.prometheus.until(lambda: watch.prometheus.query("run:loupe_checkpoint_failures:total"), "a scrape")
        theirs = small_disk / "theirs"
        theirs.write_bytes(bytes(shutil.disk_usage(small_disk).free - (100 << 10)))
        run.until(lambda: run.process.poll() is not None, "its end")
        assert run.process.returncode == ExitCode.STOP, run.log()
        assert "storage is full" in run.log()
    theirs.unlink()
    with live_run(watch.folder, "full", *settings) as run:
        watch.await_alerts("LoupeCheckpointFailing", run=run)


def test_a_damaged_checkpoint(minutes_as_seconds: Watch) -> None:
    watch = minutes_as_seconds
    with live_run(watch.folder, "damaged", ONE_PHASE, "checkpoint.every_steps=5") as run:
        checkpoints = Path(run.folder.url) / "checkpoints"
        run.until(lambda: len(list(checkpoints.glob("*/COMMIT"))) >= 2, "two checkpoints")
        for file in sorted(checkpoints.glob("*/COMMIT"))[-1].parent.glob("*.safetensors"):
            with open(file, "r+b") as out:
                out.seek(-1, os.SEEK_END)
                out.write(b"\xff")
        os.kill(run.pids()[0], signal.SIGKILL)
        watch.await_alerts("LoupeCheckpointDamaged", run=run)


def test_gpus(minutes_as_seconds: Watch) -> None:
    """By a written exposition (tests/ops/dcgm_exposition.txt): nothing here breaks a GPU."""
    watch = minutes_as_seconds
    with dcgm() as exporter:
        (watch.folder / "dcgm" / "n1.json").write_text(json.dumps([{"targets": [f"127.0.0.1:{exporter.port}"]}]))
        watch.prometheus.until(lambda: watch.prometheus.query("DCGM_FI_DEV_GPU_TEMP"), "a scrape")
        # for longer than an XID is looked back for
        time.sleep(65)
        assert watch.prometheus.firing() == {"Watchdog"}
        exporter.say("DCGM_FI_DEV_XID_ERRORS", 0, 79)
        exporter.say("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", 1, 2)
        exporter.say("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", 1, 0x40)
        watch.await_alerts("LoupeGpuXid", "LoupeGpuEcc", "LoupeGpuThrottled", within_s=60)
        gpus = {(alert["labels"]["alertname"], alert["labels"]["gpu"]) for body in watch.alertmanager.received
                for alert in body["alerts"] if "gpu" in alert["labels"]}  # fmt: skip
        assert gpus == {("LoupeGpuXid", "0"), ("LoupeGpuEcc", "1"), ("LoupeGpuThrottled", "1")}
