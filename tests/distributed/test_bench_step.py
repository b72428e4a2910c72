"""The step against the diffusers loop, as it is called, at sizes of seconds: the two compute the same."""

import subprocess
import sys

import pytest

from trainer.config import CODE_ROOT

pytestmark = pytest.mark.long


def test_both_loops_compute_the_same_and_are_compared() -> None:
    command = [sys.executable, "-m", "ops.bench.step", "--resolution", "32", "--batch-size", "4", "--repeats", "1"]
    done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    losses = [line for line in lines if line.startswith("loss: ")]
    assert len(losses) == 3
    assert len(set(losses)) == 3, "weights move"
    assert lines[4].startswith("ours over the diffusers loop: ")
    rows = {line[:16].strip(): [float(word) for word in line[16:].replace(" - ", " ").split()] for line in lines[-2:]}
    assert list(rows) == ["diffusers loop", "ours"]
    assert all(value > 0 for row in rows.values() for value in row)
    assert rows["ours"][2] == pytest.approx(rows["diffusers loop"][2], rel=0.05), "equal arithmetic"
