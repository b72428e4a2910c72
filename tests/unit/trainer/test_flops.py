"""Counted operations: against formulas by hand, and against what a whole step runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny
from tests.unit.trainer.test_latent_diffusion import batch
from trainer import metric_names
from trainer.efficiency import Efficiency
from trainer.exporter import Exporter
from trainer.flops import FORMULAS, PARTS, Flops, StepFlops, meta_twin
from trainer.parallel.apply import apply_activation_checkpointing
from trainer.parallel.world import World
from trainer.peak_flops import from_table, peak_of
from trainer.stage_times import Stages
from trainer.step_plan import StepPlanner
from trainer.tasks.latent_diffusion import LatentDiffusionTask

CPU = torch.device("cpu")
B, I, H, O = 5, 7, 11, 3
BY_HAND = 2 * B * I * H + 2 * B * H * O + 2 * B * H * O + 2 * B * H * O + 2 * B * I * H
"""Two products forward; of the last layer both backward, of the first one alone, as its input asks for no gradient."""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, H), nn.Sequential(nn.SiLU(), nn.Linear(H, O)))


def counted(flops: StepFlops, module: nn.Module, *inputs: Tensor, micro_batches: int = 1) -> dict[str, float]:
    flops.attach()
    flops.begin_step("kind", another_loss=False)
    with flops.counting(Stages(CPU), micro_batches):
        module(*inputs).sum().backward()
    assert flops.counts[flops.kind].trouble is None
    return dict(flops.counts[flops.kind].parts)


def test_a_step_is_counted_as_by_hand_with_recomputation_and_micro_batches() -> None:
    plain, recomputed = net(), net()
    assert counted(StepFlops(plain), plain, torch.zeros(B, I)) == {"model": BY_HAND}
    flops = StepFlops(recomputed)
    apply_activation_checkpointing([recomputed[1]], "full")
    assert counted(flops, recomputed, torch.zeros(B, I), micro_batches=3) == {"model": 3 * BY_HAND}


def test_a_twin_holds_no_values_and_shares_none() -> None:
    module = net()
    twin = meta_twin(module)
    assert [p.shape for p in twin.parameters()] == [p.shape for p in module.parameters()]
    assert all(p.device.type == "meta" for p in twin.parameters())
    assert all(p.device.type == "cpu" for p in module.parameters())


def test_parts_within_one_another_are_counted_once() -> None:
    module, other = net(), nn.Linear(I, H)
    flops, stages = StepFlops(module), Stages(CPU)
    flops.begin_step(another_loss=False)
    x = torch.zeros(B, I)
    with flops.counting(stages, 1), torch.no_grad(), stages("perceptual_loss", "perceptual_loss"):
        other(x)
        with stages("encode", "encoder"):
            other(x), other(x)
    one = 2 * B * I * H
    assert flops.counts[flops.kind].parts == {"perceptual_loss": one, "encoder": 2 * one}


def test_a_whole_step_of_latent_diffusion_runs_what_was_counted() -> None:
    """Of one step with LPL: the sum of the parts is what ran, forward and backward, autograd's own way."""
    run = tiny()
    plan = StepPlanner(run, dict.fromkeys(run.data.datasets, (100,))).plan(15)
    assert plan.phase.perceptual
    task = LatentDiffusionTask(run, CPU)
    with Flops() as ran:
        task.forward_backward(batch(0, 6), plan, scale=1.0)

    flops, stages = StepFlops(task.module), Stages(CPU)
    flops.attach()
    task.stages = stages
    flops.begin_step(0, another_loss=False)
    with flops.counting(stages, 1):
        task.forward_backward(batch(0, 6), plan, scale=1.0)
    parts = flops.counts[flops.kind].parts
    assert set(parts) == {"model", "encoder", "perceptual_loss"}
    # on meta attention is spelled out, and its backward pass has the scores; the fused one makes them again
    assert sum(parts.values()) == pytest.approx(ran.total, rel=1e-3)

    # torch counts no attention of a CPU but where it is spelled out
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs, torch.no_grad():
        task.codec.encode(torch.zeros(6, 3, 64, 64))
    assert parts["encoder"] == theirs.get_total_flops()
    with flops.counting(stages, 1):
        task.forward_backward(batch(0, 6), plan, scale=1.0)
    assert len(flops.counts) == 1


def test_attention_is_counted_fused_or_not() -> None:
    q, k, v = (torch.zeros(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    with Flops() as forward:
        out = nn.functional.scaled_dot_product_attention(q, k, v)
    assert forward.total == 2 * 2 * (2 * 4 * 16 * 16 * 8)
    with Flops() as backward:
        out.sum().backward()
    # dV, dP, dQ, dK, and where fused the scores again
    assert backward.total in (4 * (2 * 2 * 4 * 16 * 16 * 8), 5 * (2 * 2 * 4 * 16 * 16 * 8))
    assert len(FORMULAS) > 20


class OnHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I, O)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out if float(out.detach().sum()) < 1e9 else out * 2


def test_what_cannot_be_counted_is_said_and_gives_no_mfu(alone: World) -> None:
    module, notes, exporter = OnHost(), [], Exporter()
    flops = StepFlops(module)
    flops.attach()
    flops.begin_step(another_loss=False)
    with flops.counting(Stages(CPU), 1):
        module(torch.zeros(B, I)).sum().backward()
    efficiency = Efficiency(alone, exporter, flops, 1e12, lambda text, **figures: notes.append(text))
    efficiency.count(flops.kind)
    assert efficiency.tell(1.0) == {}
    assert "no MFU" in notes[0]
    assert exporter.registry.get_sample_value("loupe_mfu_ratio") == 0


def test_an_interval_with_steps_that_are_not_counted_has_no_mfu(alone: World) -> None:
    """Its time is of all steps."""
    module, exporter = net(), Exporter()
    flops = StepFlops(module)
    counted(flops, module, torch.zeros(B, I))
    efficiency = Efficiency(alone, exporter, flops, 1e6, lambda text, **figures: None)
    efficiency.count(flops.kind)
    assert efficiency.tell(0.5)["mfu"] > 0
    efficiency._of_all["another"] = {}
    efficiency.count(flops.kind)
    efficiency.count("another")
    assert efficiency.tell(0.5) == {}
    assert exporter.registry.get_sample_value("loupe_mfu_ratio") == 0, "nor does the last one stay"
    assert exporter.registry.get_sample_value("loupe_flops_per_second") == 0


def test_mfu_is_of_the_interval_and_the_steps_in_it(alone: World) -> None:
    module, notes, exporter = net(), [], Exporter()
    flops = StepFlops(module)
    counted(flops, module, torch.zeros(B, I))
    efficiency = Efficiency(alone, exporter, flops, 1e6, lambda text, **figures: notes.append(figures))
    for _ in range(4):
        efficiency.count(flops.kind)
    assert efficiency.tell(0.5) == {"flops_per_s": 8 * BY_HAND, "mfu": pytest.approx(8 * BY_HAND / 1e6)}
    value = exporter.registry.get_sample_value
    assert value("loupe_mfu_ratio") == pytest.approx(8 * BY_HAND / 1e6)
    assert value("loupe_device_peak_flops", {"source": "config"}) == 1e6
    assert [value("loupe_step_flops", {"part": part}) for part in PARTS] == [BY_HAND, 0, 0, 0, 0]
    assert len(notes) == 1
    assert notes[0]["flops"]["parts"] == {"model": BY_HAND}
    assert metric_names.FLOPS.labels == ("part",)
    assert efficiency.tell(0.5) == {}


NAMES: Any = {
    "NVIDIA H100 80GB HBM3": 989.5e12, "NVIDIA H100 PCIe": 756.5e12, "NVIDIA H100 NVL": 835.5e12, "NVIDIA H200": 989.5e12,
    "NVIDIA GH200 480GB": 989.5e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA B200": 2.25e15, "NVIDIA L40S": 366.5e12,
    "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA GeForce GTX 1080": None, "AMD Instinct MI300X": 1307.4e12,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_its_name(name: str) -> None:
    assert from_table(name) == NAMES[name]


def test_an_unknown_device_is_measured_and_the_config_overrules() -> None:
    measured = peak_of(CPU)
    assert measured.source == "measured"
    assert 1e8 < measured.flops < 1e15
    assert peak_of(CPU, 5e12).flops == 5e12
