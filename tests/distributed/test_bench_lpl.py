"""The benchmark of the latent perceptual loss, as it is called, at sizes of seconds; and what it measures against."""

import subprocess
import sys

import pytest
import torch

from ops.bench.lpl import Flops, flops_of, fullest_ranks, part_runs
from ops.bench.lpl_step import largest_that_fits
from ops.bench.lpl_variants import OURS, PLAIN, PUBLIC
from ops.bench.recipes import CUT_WIDTHS
from trainer.config import CODE_ROOT
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.models.published_codecs import PUBLISHED

pytestmark = pytest.mark.long

NARROW = {"block_out_channels": CUT_WIDTHS, "norm_num_groups": 4, "layers_per_block": 1}


def test_it_runs_and_prints_every_table() -> None:
    command = [sys.executable, "-m", "ops.bench.lpl", "--cut", "--device", "cpu", "--repeats", "1", "--steps", "20",
               "--resolution", "32", "--batch-size", "4"]  # fmt: skip
    done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith(("gated samples of", "the loss alone", "the step"))]
    assert len(heads) == 3, done.stdout
    part = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in lines[heads[1] + 2 : heads[2] - 1]}
    step = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in lines[heads[2] + 2 :]}
    assert list(part)[:2] == [PLAIN, PUBLIC]
    assert next(iter(step)) == "without"
    assert all(value > 0 for row in part.values() for value in (row[0], row[2], row[4]))
    assert all(value > 0 for row in step.values() for value in row)
    assert part[OURS][2] < part[PLAIN][2] == 1.0  # FLOPs
    assert part[OURS][5] < part[PLAIN][5] == 1.0  # memory
    assert step["ours"][3] < step["without"][3] == 1.0


def test_variants_compute_the_same_loss() -> None:
    """On maps of 64 pixels a side, where some pixels are outliers; the fifth map apart, and the public script's another."""
    torch.manual_seed(0)
    runs = part_runs(Codec(PUBLISHED["sdxl"](**NARROW)), 64, 6, 2, torch.device("cpu"))
    found = {name: run() for name, run in runs.items()}
    exact = list(runs)[2:]
    want_B, want_gradient = found["+ four maps"]
    assert (want_B > 0).tolist() == (found[PLAIN][0] > 0).tolist() == (found[PUBLIC][0] > 0).tolist()
    assert 0 < (want_B > 0).sum() < len(want_B)
    torch.testing.assert_close(found["gated samples alone"][0], found[PLAIN][0], rtol=1e-5, atol=0.0)
    for name in exact[1:]:
        loss_B, gradient = found[name]
        torch.testing.assert_close(loss_B, want_B, rtol=1e-4, atol=0.0)
        assert (gradient - want_gradient).norm() / want_gradient.norm() < 1e-4, name


def test_flops_are_counted_as_torch_counts_them() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3, requires_grad=True)
    with Flops() as counted:
        torch.nn.functional.conv2d(x, weight, padding=1).sum().backward()
    assert counted.total == 2 * (2 * 2 * 64 * 5 * 3 * 9)


def test_low_discrepancy_times_even_out_the_ranks() -> None:
    assert fullest_ranks(50, spread=True).mean() < 1.08
    assert fullest_ranks(50, spread=False).mean() > 1.25


@pytest.mark.parametrize("capacity", [0, 1, 5, 31, 32, 33, 100, 1000])
def test_the_largest_batch_is_found(capacity: int) -> None:
    found = largest_that_fits(lambda n: n <= capacity, 32)
    assert found <= capacity <= found + max(1, found // 16)


@torch.no_grad()
def test_flops_of_the_published_decoder() -> None:
    """At 512 px, without memory: 2.51 TFLOP as it is, and 1.57 for the first four maps by phase convolutions."""
    with torch.device("meta"):
        codec = Codec(PUBLISHED["sdxl"]())
        decoder, latents = FrozenDecoder(codec, 4), torch.empty(1, 4, 64, 64)
    assert flops_of(lambda: codec.decode_features(latents)) == pytest.approx(2.51e12, rel=2e-3)
    assert flops_of(lambda: decoder(latents)) == pytest.approx(1.57e12, rel=2e-3)
