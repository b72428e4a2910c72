"""Optimizers on one rank and two: the plain formulas, refused updates, and their state in a checkpoint."""

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


def module_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.Flatten())


def backward(module: nn.Module, step: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    module(x).square().mean().backward()


def train(world: World) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, config in VARIANTS.items():
        module = module_of()
        parallelize(module, [module[0]], world, ParallelConfig())
        optimizer = optim.build_optimizer(module, config)
        ratio = optim.UpdateRatio(module)
        for step, skip in enumerate((0.0, 1.0, 0.0)):
            before = [full(p.detach()).clone() for p in module.parameters()]
            backward(module, step)
            with ratio.measured(step == 2):
                optim.step(optimizer, RATE, torch.tensor(skip))
            after = [full(p.detach()).clone() for p in module.parameters()]
            if skip:
                out[f"{name}_kept"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
        whole = torch.cat([b.flatten() for b in before])
        out[f"{name}_ratio"] = (ratio.take(), (moved.norm() / whole.norm()).item())
        out[name] = after
        out[f"{name}_state"] = sorted(optim.state_tensors(module, optimizer))
    return out


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [*run_ranks(1, train), *run_ranks(2, train)]


def plain(name: str) -> list[torch.Tensor]:
    """The same updates by torch's own unfused optimizers on a plain module, the skipped step left out."""
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
    for step in (0, 2):
        backward(module, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("name", VARIANTS)
def test_updates_are_those_of_the_plain_optimizer(results, name) -> None:
    # Muon orthogonalises in bf16, and a sharded product adds in another order
    tolerance = 2e-3 if name == "muon" else 1e-6
    for rank in results:
        for got, want in zip(rank[name], plain(name), strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


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
