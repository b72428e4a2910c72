"""Which samples a perceptual loss counts for, and what share of them that is."""

import math

import pytest
import torch

from trainer.config import ParadigmConfig, PhasePerceptualConfig
from trainer.diffusion.paradigms import build_paradigm
from trainer.losses.gate import gate_share, inside, scaled_tau, threshold


def test_tau_scales_with_resolution_over_its_reference() -> None:
    assert scaled_tau(3.0, 256, 512) == 1.5
    assert scaled_tau(3.0, 1024, 512) == 6.0
    assert scaled_tau(3.0, 64, None) == 3.0
    paradigm = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=64)
    bound = threshold(PhasePerceptualConfig(), paradigm, 64, 512)
    assert inside(torch.tensor([0.374, 0.375, 0.376, math.nan]), bound).tolist() == [0, 1]
    assert threshold(PhasePerceptualConfig(tau=None), paradigm, 64, 512) == math.inf


@pytest.mark.parametrize(
    ("kind", "percent_at"),
    [
        ("ddpm_eps", {1: 35, 2: 56, 3: 67, 4: 75, 5: 80, 6: 84, 10: 93}),
        ("ddpm_v", {3: 63, 6: 77}),
        ("flow", {3: 87, 6: 93}),
    ],
)
def test_gate_share(kind, percent_at: dict[int, int]) -> None:
    paradigm = build_paradigm(ParadigmConfig(kind=kind), resolution=512)
    shares = {tau: 100 * gate_share(paradigm, tau) for tau in percent_at}
    assert {tau: math.floor(share + 0.5) for tau, share in shares.items()} == percent_at


def test_gate_share_below_the_smallest_noise_level_is_zero() -> None:
    assert gate_share(build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=512), 0.02) == 0.0


@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v", "flow"])
@pytest.mark.parametrize("max_time", [1.0, 200.0, 1000.0])
def test_a_bound_on_time_lets_through_the_times_below_it(kind, max_time: float) -> None:
    paradigm = build_paradigm(ParadigmConfig(kind=kind), resolution=512)
    bound = threshold(PhasePerceptualConfig(tau=None, max_time=max_time), paradigm, 512, 512)
    t_B = paradigm.sample_t((torch.arange(5000, dtype=torch.float64) + 0.3) / 5000)
    below = (paradigm.model_time(t_B) < max_time).nonzero().flatten()
    assert torch.equal(inside(paradigm.noise_level(t_B), bound), below)
