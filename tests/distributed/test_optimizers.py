"""Optimizers on one rank and two: the plain formulas, refused updates, and their state in a checkpoint."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from trainer import optim
from trainer.config import OptimConfig, ParallelConfig
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World
from trainer.tensors import full

VARIANTS = {
    "fused": OptimConfig(weight_decay=0.1),
    "foreach": OptimConfig(weight_decay=0.1, implementation="foreach"),
    "muon": OptimConfig(weight_decay=0.1, kind="muon"),
    "no_decay": OptimConfig(weight_decay=0.1, decay_groups=()),
}
RATE = 1e-2
MAX_NORM = 0.1
"""Below the norm of each step's gradients."""


def module_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.Flatten())


def backward(module: nn.Module, step: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    module(x).square().mean().backward()


def train(world: World, names: Sequence[str] = tuple(VARIANTS)) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in names:
        config = VARIANTS[name]
        module = module_of()
        parallelize(module, [module[0]], world, ParallelConfig())
        optimizer = optim.build_optimizer(module, config)
        ratio = optim.UpdateRatio(module)
        norms: list[float] = []
        for step, skip in enumerate((0.0, 1.0, 0.0)):
            before = [full(p.detach()).clone() for p in module.parameters()]
            backward(module, step)
            norm = optim.gradient_norm(module)
            norms.append(norm.item())
            with ratio.measured(step == 2):
                optim.step(optimizer, RATE, torch.tensor(skip), optim.clip_divisor(norm, MAX_NORM))
            after = [full(p.detach()).clone() for p in module.parameters()]
            if skip:
                out[f"{name}_kept"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
        whole = torch.cat([b.flatten() for b in before])
        out[f"{name}_ratio"] = (ratio.take(), (moved.norm() / whole.norm()).item())
        out[name] = after
        out[f"{name}_norms"] = norms
        out[f"{name}_state"] = sorted(optim.state_tensors(module, optimizer))
    return out


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [*run_ranks(1, train), *run_ranks(2, train)]


@pytest.fixture(scope="module")
def copies() -> list[dict[str, Any]]:
    """Two copies of the model, each over two ranks."""
    return run_ranks(4, train, ("fused", "foreach"), replicas=2)


def plain(name: str) -> tuple[list[torch.Tensor], list[float]]:
    """The same updates by torch's own clipping and unfused optimizers on a plain module, the skipped step left out; and the
    gradients' norms."""
    module, config = module_of(), VARIANTS[name]
    matrix, bias, kernel, kernel_bias = module.parameters()
    decay = 0.1 if config.decay_groups else 0.0
    rest = [{"params": [bias, kernel_bias], "weight_decay": 0.0}, {"params": [kernel], "weight_decay": decay}]
    if config.kind == "muon":
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([matrix], lr=RATE, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        ]
    else:
        optimizers = []
        rest.append({"params": [matrix], "weight_decay": decay})
    optimizers.append(torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.95), foreach=False, fused=False))
    norms = []
    for step in (0, 2):
        backward(module, step)
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM).item())
        assert norms[-1] > 1.5 * MAX_NORM
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in module.parameters()], norms


@pytest.mark.parametrize("name", VARIANTS)
def test_updates_are_those_of_the_plain_optimizer(results, name) -> None:
    # Muon orthogonalises in bf16, and a sharded product adds in another order
    tolerance = 2e-3 if name == "muon" else 1e-6
    weights, norms = plain(name)
    for rank in results:
        assert rank[f"{name}_norms"][::2] == pytest.approx(norms, rel=1e-5 if name != "muon" else 1e-2)
        for got, want in zip(rank[name], weights, strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["fused", "foreach"])
def test_copies_of_the_model_count_once_in_the_norm(copies, name) -> None:
    weights, norms = plain(name)
    for rank in copies:
        assert rank[f"{name}_norms"][::2] == pytest.approx(norms, rel=1e-5)
        for got, want in zip(rank[name], weights, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_refused_update_changes_nothing(results, name) -> None:
    assert all(rank[f"{name}_kept"] for rank in results)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_update_ratio_is_the_norm_of_the_move_over_that_of_the_weights(results, name) -> None:
    for rank in results:
        measured, expected = rank[f"{name}_ratio"]
        assert measured == pytest.approx(expected, rel=1e-5)
        assert 1e-4 < measured < 1


def test_state_is_there_before_the_first_step_and_named_by_parameter(results) -> None:
    muon = results[0]["muon_state"]
    assert "0.weight.momentum_buffer" in muon
    assert {"3.weight.exp_avg", "3.weight.exp_avg_sq", "3.weight.step", "0.bias.step"} <= set(muon)
    assert "0.weight.exp_avg" not in muon
