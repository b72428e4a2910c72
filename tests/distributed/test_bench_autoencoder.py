"""The benchmark of stage 1's step: the way it measures against gives the same gradients, and its table is whole."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from trainer.config import CODE_ROOT
from trainer.parallel.world import World

pytestmark = pytest.mark.long


def both_ways(world: World) -> dict[str, Any]:
    from ops.bench.autoencoder import Steps, cut, difference
    from trainer.recipes import load

    steps = Steps(cut(load("autoencoder_kl_f8")), 32, 2, world.device)
    ours, theirs = steps.ours(), steps.theirs()
    return {
        "off": difference(ours, theirs),
        "again": difference(steps.ours(), ours),
        "weight": ours.weight.item(),
        "before": steps.ours(plays=False).discriminator.numel(),
        "unfrozen": all(p.requires_grad for p in steps.discriminator.parameters()),
    }


def test_same_gradients_as_with_two_passes_and_two_calls_of_autograd() -> None:
    (found,) = run_ranks(1, both_ways)
    assert max(found["off"].values()) < 5e-6, found["off"]
    assert max(found["again"].values()) < 1e-5, "a step of rate 0 has moved weights"
    assert found["weight"] > 0
    assert found["before"] == 0, "before its start the discriminator has no gradient"
    assert found["unfrozen"]


def test_its_table() -> None:
    command = [sys.executable, "-m", "ops.bench.autoencoder", "--cut", "--device", "cpu", "--repeats", "1"]
    done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in done.stdout.splitlines()[3:8]}
    assert list(rows)[:2] == ["as latent-diffusion", "ours"]
    flops = [row[1] for row in rows.values()]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] == 1.0 > flops[1]
    assert all(torch.tensor(row).gt(0).all() for row in rows.values())
