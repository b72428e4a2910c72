"""Sharded optimizer step, EMA and agreement on two ranks of one process group (spawning costs seconds, so they share it)."""

import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from trainer import optim
from trainer.config import OptimConfig
from trainer.ema import EMA
from trainer.parallel.agreement import Agreement
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.tensors import full, local


def make(world: World) -> tuple[nn.Module, optim.Optimizer, EMA]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    parallelize(module, [module[0]], world)
    return module, optim.build_optimizer(module, OptimConfig(weight_decay=0.1)), EMA(module)


def backward(module: nn.Module, step: int, poison: bool = False) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    loss = module(x).square().mean()
    (loss * float("nan") if poison else loss).backward()


def snapshot(module: nn.Module, optimizer: optim.Optimizer, ema: EMA) -> list[torch.Tensor]:
    tensors = [*module.parameters(), *optim.state_tensors(module, optimizer).values(), *ema.average.values()]
    return [local(t.detach()).clone() for t in tensors]


def parts(world: World) -> dict[str, Any]:
    out: dict[str, Any] = {}
    module, optimizer, ema = make(world)
    keep, skip = torch.tensor(0.0), torch.tensor(1.0)

    def step(i: int, flag: torch.Tensor, poison: bool = False) -> torch.Tensor:
        backward(module, i, poison)
        norm = optim.gradient_norm(module)
        optim.step(optimizer, 1e-2, flag, optim.clip_divisor(norm, 1.0))
        ema.update(0.9, flag)
        return norm

    norms = [step(i, keep) for i in range(2)]
    out["norms"] = [n.item() for n in norms]
    before = snapshot(module, optimizer, ema)
    poisoned = step(2, skip, poison=True)
    out["poisoned_norm_finite"] = bool(poisoned.isfinite())
    out["skip_is_exact"] = all(torch.equal(a, b) for a, b in zip(before, snapshot(module, optimizer, ema), strict=True))
    step(3, keep)
    out["goes_on"] = not any(
        torch.equal(a, b) for a, b in zip(before[:4], snapshot(module, optimizer, ema)[:4], strict=True)
    )
    out["weights"] = [full(p.detach()).clone() for p in module.parameters()]
    out["average"] = [full(a).clone() for a in ema.average.values()]

    with ema.in_place_of_weights():
        out["swapped"] = all(
            torch.equal(full(p.detach()), a) for p, a in zip(module.parameters(), out["average"], strict=True)
        )
    out["swapped_back"] = all(
        torch.equal(full(p.detach()), w) for p, w in zip(module.parameters(), out["weights"], strict=True)
    )

    agreement, stop, agreed = Agreement(world.host_group), StopRequest(), []
    for i in range(5):
        if i == 2 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        agreed.append("stop" in agreement.poll(stop=stop.received is not None))
    agreement.close()
    out["agreed"] = agreed
    out["received"] = stop.received
    out["gathered"] = world.gather(world.rank * 10)
    out["broadcast"] = world.broadcast("main" if world.is_main else "other")
    return out


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(2, parts)


def reference() -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """The same updates written plainly in one process with torch's own unfused AdamW."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    matrices, vectors = ([p for p in module.parameters() if (p.dim() > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=False)
    average = [p.detach().clone() for p in module.parameters()]
    norms = []
    for i in (0, 1, 3):
        backward(module, i)
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, module.parameters(), strict=True)]
    return [p.detach() for p in module.parameters()], average, norms


def test_two_sharded_ranks_do_what_one_plain_process_does(results) -> None:
    weights, average, norms = reference()
    for rank in results:
        assert rank["norms"] == pytest.approx(norms[:2], rel=1e-5)
        for got, want in zip(rank["weights"] + rank["average"], weights + average, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_a_skipped_step_changes_nothing_and_the_next_goes_on(results) -> None:
    for rank in results:
        assert not rank["poisoned_norm_finite"]
        assert rank["skip_is_exact"]
        assert rank["goes_on"]


def test_ema_takes_the_weights_place_and_gives_it_back(results) -> None:
    assert all(rank["swapped"] and rank["swapped_back"] for rank in results)


def test_a_signal_on_one_rank_stops_all_at_the_same_step(results) -> None:
    assert [rank["received"] for rank in results] == [None, "SIGUSR2"]
    assert results[0]["agreed"] == results[1]["agreed"] == [False, False, False, True, True]


def test_host_values(results) -> None:
    assert [rank["gathered"] for rank in results] == [[0, 10]] * 2
    assert [rank["broadcast"] for rank in results] == ["main"] * 2
