"""Training times: densities against their closed forms, and draws that are spread evenly over ranks."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from trainer.config import ParadigmConfig
from trainer.diffusion import schedules
from trainer.diffusion.paradigms import Paradigm, build_paradigm
from trainer.rng import spread_uniform, uniform

DENSITIES = [
    *((kind, density) for kind in ("ddpm_eps", "ddpm_v", "flow") for density in ("uniform", "logit_normal")),
    ("flow", "mode"),
    ("flow", "cosmap"),
]


def build(kind, density=None, **options) -> Paradigm:
    return build_paradigm(ParadigmConfig(kind=kind, timestep_density=density, **options), resolution=512)


def grid(n: int = 200_001) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)[:-1]


# ------------------------------------------------------------------------------------------------------------ densities


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


CLOSED_CDFS = [
    ("uniform", {}, lambda t: t),
    ("logit_normal", {}, lambda t: normal_cdf(torch.logit(t))),
    ("logit_normal", {"logit_mean": -0.6, "logit_std": 1.4}, lambda t: normal_cdf((torch.logit(t) + 0.6) / 1.4)),
    ("cosmap", {}, lambda t: 2 / math.pi * torch.atan(t / (1 - t))),
]


@pytest.mark.parametrize(("density", "options", "cdf"), CLOSED_CDFS)
def test_flow_times_have_the_closed_distribution(density: str, options: dict[str, float], cdf) -> None:
    """Quantiles: u is the share of times up to t(u)."""
    u = grid(10_001)[1:]
    torch.testing.assert_close(cdf(build("flow", density, **options).sample_t(u)), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v"])
@pytest.mark.parametrize(("density", "options", "cdf"), CLOSED_CDFS[:3])
def test_ddpm_indices_have_the_same_distribution_in_bins(kind: str, density: str, options, cdf) -> None:
    t = build(kind, density, **options).sample_t(grid() + 2.5e-6)
    assert t.dtype == torch.int64
    share = torch.bincount(t, minlength=1000) / len(t)
    expected = cdf(torch.linspace(0, 1, 1001, dtype=torch.float64)).diff()
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=1.1 / len(t))


def test_cosmap_times_have_the_published_density() -> None:
    t = build("flow", "cosmap").sample_t(grid())
    counts, middle = torch.histc(t, 50, 0, 1), (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    pdf = 2 / (math.pi - 2 * math.pi * middle + 2 * math.pi * middle**2)
    torch.testing.assert_close(counts / len(t) * 50, pdf, rtol=2e-3, atol=0.0)


def test_cosmap_is_the_published_map_and_the_cosine_schedule() -> None:
    u = grid(1001)[1:]
    t = build("flow", "cosmap").sample_t(u)
    torch.testing.assert_close(t, 1 - 1 / (torch.tan(math.pi / 2 * u) + 1), rtol=1e-12, atol=1e-15)
    cosine_level = torch.sin(math.pi / 2 * u) / torch.cos(math.pi / 2 * u)
    torch.testing.assert_close(t / (1 - t), cosine_level, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 1.0, 1.29, 1.6])
def test_mode_times_have_the_density_of_the_inverse_slope(scale: float) -> None:
    u = grid()
    t = build("flow", "mode", mode_scale=scale).sample_t(u)
    assert t.min() >= 0.0
    assert t[0] == 1.0
    assert (t.diff() < 0).all()
    # pi(t) = 1/|f'(u)| at t = f(u), by its change of the distribution over a small interval
    for at in (0.1, 0.3, 0.5, 0.7, 0.9):
        slope = -1.0 - scale * (1.0 - math.pi / 2 * math.sin(math.pi * at))
        middle = schedules.mode_time(torch.tensor(at, dtype=torch.float64), scale).item()
        width = 5e-3 * abs(slope)
        share = ((t > middle - width / 2) & (t < middle + width / 2)).double().mean().item()
        assert share / width == pytest.approx(1 / abs(slope), rel=5e-3)


def test_mode_sampling_prefers_the_middle_and_has_heavy_tails() -> None:
    t = build("flow", "mode").sample_t(grid())
    share = lambda low, high: ((t > low) & (t <= high)).double().mean().item()  # noqa: E731
    assert share(0.45, 0.55) > 0.2
    assert share(0.0, 0.05) == pytest.approx(share(0.95, 1.0), abs=1e-4)
    assert share(0.0, 0.05) > 0.02  # logit-normal: 0.0016


@pytest.mark.parametrize("scale", [-1.1, 1.76, 3.0])
def test_mode_scales_that_fold_time_are_refused(scale: float) -> None:
    with pytest.raises(ValidationError, match=r"mode_scale\n.*(greater|less) than or equal to (-1|1\.7519)"):
        build("flow", "mode", mode_scale=scale)


@pytest.mark.parametrize(("kind", "density"), DENSITIES)
def test_every_density_is_monotone_in_u(kind: str, density: str) -> None:
    """So evenly spread u give evenly spread times, and a bound on the noise level is an interval of u."""
    steps = build(kind, density).sample_t(grid()).diff()
    falls = density == "mode"
    assert (steps <= 0).all() if falls else (steps >= 0).all()
    assert (steps != 0).sum() >= (999 if density == "uniform" else 500)


@pytest.mark.parametrize(("kind", "own"), [("ddpm_eps", "uniform"), ("ddpm_v", "uniform"), ("flow", "mode")])
def test_absent_is_the_paradigms_own(kind: str, own: str) -> None:
    u = grid(1001)
    assert torch.equal(build(kind).sample_t(u), build(kind, own).sample_t(u))
    assert not torch.equal(build(kind).sample_t(u), build(kind, "logit_normal").sample_t(u))


@pytest.mark.parametrize("density", ["mode", "cosmap"])
@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v"])
def test_densities_of_flow_are_refused_for_ddpm(kind: str, density: str) -> None:
    mend = rf"timestep_density: {density} is for flow; {kind} takes uniform or logit_normal"
    with pytest.raises(ValueError, match=mend):
        build(kind, density)


@given(st.integers(0, 2**24 - 1))
@example(855638)  # float32 times 1000 rounds up to 51
@example(2**24 - 1)
def test_ddpm_times_are_uniform_indices_for_every_float32(numerator: int) -> None:
    t = build("ddpm_eps").sample_t(torch.tensor([numerator / 2**24], dtype=torch.float32))
    assert t.dtype == torch.int64
    assert t.item() == numerator * 1000 // 2**24


@given(st.floats(0, 1, exclude_max=True, width=32))
@example(0.0)
@example(1 - 2**-24)
def test_times_stay_within_their_range(u: float) -> None:
    for kind, density in DENSITIES:
        t = build(kind, density).sample_t(torch.tensor([u], dtype=torch.float32))
        assert t.dtype == (torch.float32 if kind == "flow" else torch.int64)
        assert 0 <= t.item() <= (1 if kind == "flow" else 999)


def test_a_density_that_rounds_to_1_is_the_last_index() -> None:
    u = torch.tensor([0.0, 1e-9, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert build("ddpm_v", "logit_normal", logit_mean=60.0).sample_t(u).tolist() == [0, 999, 999, 999]


# ------------------------------------------------------------------------------------------------ draws, evenly spread

GOLDEN = round(Fraction(math.isqrt(5 * 4**80) - 2**80, 2) / 2**16)
"""(sqrt(5) - 1) / 2 in units of 2**-64, from the root in 80 bits."""


def star_discrepancy(u: Tensor) -> float:
    """Largest difference between the share of points below x and x, over x; also Kolmogorov and Smirnov's statistic."""
    u, n = u.sort().values, len(u)
    upto = torch.arange(1, n + 1, dtype=torch.float64) / n
    return torch.maximum(upto - u, u - upto + 1 / n).max().item()


@given(st.integers(0, 2**62), st.integers(0, 10**6))
@example(10**12, 3)
def test_draws_are_exact_at_any_position(position: int, step: int) -> None:
    """In integers of any size: position times golden, modulo 1."""
    first, u = spread_uniform(7, [0, position], step).double().tolist()
    away = (Fraction(u) - Fraction(first) - Fraction(position * GOLDEN, 2**64)) % 1
    assert min(away, 1 - away) < Fraction(1, 2**52)
    assert 0 <= u < 1


def test_the_multiplier_is_the_golden_ratio() -> None:
    """Else even draws would be evenly spread for no reason that holds at other sizes."""
    assert Fraction(GOLDEN, 2**64) == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-16)
    one, two = spread_uniform(7, [4, 5], 0).tolist()
    assert (two - one) % 1 == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-15)


@pytest.mark.parametrize("n", [2, 5, 25, 100, 1600, 20_000])
def test_neighbouring_positions_are_even_to_log_n_over_n(n: int) -> None:
    firsts = (0, 1, 777, 123_456_789, 10**12 - 7)
    worst = max(star_discrepancy(spread_uniform(1, range(a, a + n), step)) for step, a in enumerate(firsts))
    assert worst <= (1 + math.log(n)) / n
    if n >= 100:
        independent = star_discrepancy(uniform(1, range(n), "timestep"))
        assert independent > 2.5 * worst
        assert independent > 0.4 / math.sqrt(n)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 64), (4, 16), (8, 4), (2, 8)])
def test_draws_depend_on_neither_ranks_nor_micro_batches(world_size: int, micro_batch: int) -> None:
    whole = spread_uniform(3, range(6400, 6464), 100)
    per_rank = 64 // world_size
    parts = [
        spread_uniform(3, range(first, first + micro_batch), 100)
        for rank in range(world_size)
        for first in range(6400 + rank * per_rank, 6400 + (rank + 1) * per_rank, micro_batch)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_seed_and_step_each_shift_the_draws() -> None:
    base, other_seed, other_step = (spread_uniform(s, range(9), step) for s, step in ((0, 5), (1, 5), (0, 6)))
    for other in (other_seed, other_step):
        shifts = (other - base) % 1
        assert 1e-3 < shifts[0] < 1 - 1e-3
        torch.testing.assert_close(shifts, shifts[:1].expand(9), rtol=0, atol=1e-15)


def test_each_position_alone_is_uniform_over_steps() -> None:
    """Kolmogorov and Smirnov, at 1 %; and neighbouring steps are not correlated."""
    draws = torch.cat([spread_uniform(0, [17 + 1600 * step], step) for step in range(4000)])
    assert star_discrepancy(draws) < 1.63 / math.sqrt(4000)
    assert abs(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1]) < 3 / math.sqrt(4000)


RANKS, PER_RANK = 64, 25


def fullest_rank(u_B: Tensor, gated) -> int:
    return int(gated(u_B).view(RANKS, PER_RANK).sum(1).max())


def global_batch(step: int) -> range:
    return range(step * RANKS * PER_RANK, (step + 1) * RANKS * PER_RANK)


def test_the_fullest_rank_has_little_more_than_the_mean() -> None:
    """64 ranks of 25 images, 67 % inside LPL's gate, 16.75 a rank: the decoder runs on at most 18 of the fullest rank's,
    where independent draws have about 22."""
    gated = lambda u: u < 0.67  # noqa: E731
    spread = [fullest_rank(spread_uniform(0, global_batch(step), step), gated) for step in range(300)]
    independent = [fullest_rank(uniform(0, global_batch(step), "timestep"), gated) for step in range(20)]
    assert max(spread) <= 18
    assert sum(independent) / len(independent) == pytest.approx(22, abs=0.6)


def test_the_fullest_rank_by_the_gate_itself() -> None:
    """DDPM-eps at tau = 3: 67.4 %, where a rare shift gives some rank a 19th sample."""
    paradigm = build("ddpm_eps")
    gated = lambda u: paradigm.noise_level(paradigm.sample_t(u)) <= 3.0  # noqa: E731
    spread = torch.tensor([fullest_rank(spread_uniform(0, global_batch(step), step), gated) for step in range(300)])
    assert spread.max() <= 19
    assert (spread <= 18).double().mean() > 0.94
