"""Loss spikes: what is refused, what moves the range, and what a checkpoint holds of it."""

import pytest
import torch

from trainer.config import SpikeConfig
from trainer.spikes import SpikeGuard

CONFIG = SpikeConfig(sigma=6, window_steps=16)


def feed(guard: SpikeGuard, values: list[tuple[float, float]], first: int = 0) -> tuple[list[bool], list[float]]:
    """Judged and recorded as the trainer does: (spike of each step, spikes counted after it)."""
    spikes, recent = [], []
    for step, (loss, norm) in enumerate(values, first):
        x, n = torch.tensor(loss, dtype=torch.float64), torch.tensor(norm)
        spike = guard.judge(x, n)
        skip = ((spike > 0) | ~(x.isfinite() & n.isfinite())).float()
        recent.append(guard.record(step, x, n, spike, skip).item())
        spikes.append(bool(spike))
    return spikes, recent


def calm(count: int, seed: int = 0) -> list[tuple[float, float]]:
    values = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)) * 0.1 + 1.0
    return [(loss, norm) for loss, norm in values.tolist()]


def test_nothing_is_a_spike_until_the_window_is_full() -> None:
    guard = SpikeGuard(CONFIG, torch.device("cpu"))
    spikes, _ = feed(guard, [*calm(15), (1e6, 1.0)])
    assert not any(spikes)


@pytest.mark.parametrize("value", [(9.0, 1.0), (1.0, 9.0)])
def test_a_loss_or_norm_far_beyond_the_range_is_refused_and_leaves_the_range_as_it_was(value) -> None:
    guard = SpikeGuard(CONFIG, torch.device("cpu"))
    spikes, recent = feed(guard, [*calm(16), value, value, value, *calm(14, seed=1)])
    assert spikes == [False] * 16 + [True] * 3 + [False] * 14
    assert recent[16:19] == [1, 2, 3]
    assert recent[-1] == 2  # the first of the three has left the last 16 steps
    assert guard.state_tensors()["window"].max() < 2


def test_the_limit_is_the_mean_and_deviations_of_the_window() -> None:
    window = torch.tensor(calm(16), dtype=torch.float64)
    limit = (window.mean(0) + 6 * window.std(0))[0].item()
    for loss, refused in ((limit - 1e-6, False), (limit + 1e-6, True)):
        guard = SpikeGuard(CONFIG, torch.device("cpu"))
        assert feed(guard, [*calm(16), (loss, 1.0)])[0][-1] is refused


def test_a_non_finite_step_is_no_spike_and_does_not_enter_the_window() -> None:
    guard = SpikeGuard(CONFIG, torch.device("cpu"))
    nan, inf = float("nan"), float("inf")
    spikes, _ = feed(guard, [*calm(16), (nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (9.0, inf)])
    assert not any(spikes)
    assert guard.state_tensors()["window"].isfinite().all()


def test_a_new_phase_has_a_range_of_its_own() -> None:
    guard = SpikeGuard(CONFIG, torch.device("cpu"))
    feed(guard, calm(16))
    guard.begin_phase()
    higher = [(loss + 50, norm) for loss, norm in calm(16)]
    spikes, _ = feed(guard, [*higher, (60.0, 1.0)], first=16)
    assert spikes == [False] * 16 + [True]


def test_a_restored_guard_judges_as_the_one_that_was_saved() -> None:
    values = [*calm(20), (9.0, 1.0), *calm(5, seed=2), (9.0, 1.0), (9.0, 1.0)]
    straight = feed(SpikeGuard(CONFIG, torch.device("cpu")), values)
    first, second = (SpikeGuard(CONFIG, torch.device("cpu")) for _ in range(2))
    before = feed(first, values[:22])
    for name, tensor in second.state_tensors().items():
        tensor.copy_(first.state_tensors()[name])  # as a restore does, in place
    after = feed(second, values[22:], first=22)
    assert straight == (before[0] + after[0], before[1] + after[1])
