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
    ratios = [line for line in lines if line.startswith("ours over the diffusers loop, ")]
    assert [line.split(", ")[1].partition(":")[0] for line in ratios] == ["full captions", "its own captions"]
    starts = ("diffusers loop, ", "ours, ")
    rows = {line[:33].strip(): [float(word) for word in line[33:].replace(" - ", " ").split()]
            for line in lines if line.startswith(starts)}  # fmt: skip
    assert len(rows) == 4
    assert all(value > 0 for row in rows.values() for value in row)
    flops = {name: row[2] for name, row in rows.items()}
    assert flops["ours, full captions"] == pytest.approx(flops["diffusers loop, full captions"], rel=0.05), (
        "equal arithmetic"
    )
    assert flops["diffusers loop, its own captions"] == flops["diffusers loop, full captions"], "padding is computed"
    assert flops["ours, its own captions"] < 0.97 * flops["ours, full captions"]
    memory = {name: row[4] for name, row in rows.items()}
    assert memory["ours, its own captions"] < memory["ours, full captions"] < memory["diffusers loop, full captions"]


def test_aspect_buckets_take_turns() -> None:
    command = [sys.executable, "-m", "ops.bench.step", "--resolution", "32", "--batch-size", "2", "--repeats", "1",
               "--buckets", "--stored-latents"]  # fmt: skip
    done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    (described,) = [line for line in done.stdout.splitlines() if line.startswith("demo, ")]
    assert "32x32" in described
    assert described.count("x") >= 5
