"""The demo, small, through the launcher's own command on this machine: preempted, stopped, resumed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm_jobs import steps_by_attempt
from tests.tiny import TINY
from trainer.config import CODE_ROOT
from trainer.run_folder import RunFolder

SLURM_PY = str(CODE_ROOT / "launch/slurm.py")
SETTINGS = [word for override in TINY for word in ("--set", override)]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A folder to start from, with packages that have the names of ours."""
    for package in ("data", "trainer", "launch"):
        (tmp_path / "start" / package).mkdir(parents=True)
        (tmp_path / "start" / package / "__init__.py").write_text("raise SystemExit('the wrong one')")
    return tmp_path / "start"


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        SLURM_PY,
        "demo",
        "--cluster",
        "local",
        "--gpus-per-node",
        "2",
        "--cpu",
        *SETTINGS,
        *arguments,
    ]


def logs(run_dir: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted((run_dir / "logs").glob("*")))


@pytest.mark.long  # `make demo`, which CI runs, is stopped and resumed too
def test_a_rehearsed_preemption_loses_no_step(start: Path) -> None:
    run_dir = start / "runs/demo"
    result = subprocess.run(
        command("--rehearse-preemption", "7"), cwd=start, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr + logs(run_dir)
    first, second = steps_by_attempt(run_dir)
    assert 7 <= first[-1] < 20
    assert [*first, *second] == list(range(1, 21)), "every step once: saved where it stopped, resumed from there"
    assert "rehearsing a preemption" in result.stdout
    assert "step 20/20  perceptual" in result.stdout
    job = json.loads((run_dir / "job.json").read_text())
    assert [entry["reason"] for entry in job["restarts"]] == ["preempted"]
    assert job["ended"]["code"] == 0
    assert (run_dir / "code/SNAPSHOT.json").exists()


@pytest.mark.slow
def test_a_stopped_run_ends_with_75_and_the_same_command_goes_on(start: Path) -> None:
    run_dir = start / "runs/demo"
    launcher = subprocess.Popen(command(), cwd=start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 200

    def wait_for(there: Callable[[], object]) -> None:
        while not there():
            assert launcher.poll() is None, f"{launcher.communicate()[0]}{logs(run_dir)}"
            assert time.monotonic() < end, logs(run_dir)
            time.sleep(0.05)

    wait_for((run_dir / "logs/rank-0.log").exists)
    # while the ranks import: their twenty steps take no longer than this command does on a busy machine
    second = subprocess.run(command(), cwd=start, capture_output=True, text=True, check=False, timeout=300)
    assert second.returncode == 2
    assert f"in use by process {launcher.pid}" in second.stderr
    wait_for(lambda: any(steps_by_attempt(run_dir)))
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 75, output + logs(run_dir)
    stopped_at = steps_by_attempt(run_dir)[0][-1]
    result = subprocess.run(command(), cwd=start, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr + logs(run_dir)
    assert steps_by_attempt(run_dir)[1] == list(range(stopped_at + 1, 21))
    assert RunFolder(str(run_dir)).exists("summary.json")
