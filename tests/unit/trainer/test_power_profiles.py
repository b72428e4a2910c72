"""Power-function averages: what an update makes of the steps before, and averages made of others, against profiles that are
integrated numerically."""

import math

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.power_profiles import WIDEST, combine, exponent, inner, share, width_of, width_of_decay

FINE = (np.arange(400_000) + 0.5) / 400_000
"""Times over a run of length 1, at the middles of equal intervals."""


def profile(step: float, width: float) -> np.ndarray:
    """Density over FINE, from its definition."""
    gamma = exponent(width)
    return np.where(step >= FINE, (gamma + 1) * FINE**gamma / step ** (gamma + 1), 0.0)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_papers_widths(width: float, gamma: float) -> None:
    assert exponent(width) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width_is_the_profiles_deviation(width: float) -> None:
    density = profile(1.0, width) / len(FINE)
    mean = (density * FINE).sum()
    assert density.sum() == pytest.approx(1.0, abs=1e-5)
    assert math.sqrt((density * (FINE - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)
    assert width_of(exponent(width)) == pytest.approx(width, rel=1e-12)


@pytest.mark.parametrize("width", [0.0, -0.1, WIDEST, 0.5, math.nan])
def test_widths_that_no_profile_has(width: float) -> None:
    with pytest.raises(UserError, match="sigma_rel"):
        exponent(width)


def test_updates_weigh_each_step_by_its_part_of_the_profile() -> None:
    steps, width = 50, 0.08
    weight_S = np.zeros(steps)
    for done in range(1, steps + 1):
        part = share(exponent(width), done)
        weight_S *= 1 - part
        weight_S[done - 1] += part
    expected = [part.sum() / len(FINE) for part in np.array_split(profile(1.0, width), steps)]
    np.testing.assert_allclose(weight_S, expected, atol=2e-5)
    assert share(exponent(width), 1) == 1.0, "the first step's weights replace the fresh ones"


@pytest.mark.parametrize("first", [(1.0, 0.05), (0.4, 0.1), (0.9, 0.2)])
@pytest.mark.parametrize("second", [(1.0, 0.1), (0.4, 0.05), (0.7, 0.15)])
def test_products_of_profiles(first: tuple[float, float], second: tuple[float, float]) -> None:
    (t_a, width_a), (t_b, width_b) = first, second
    found = inner(np.float64(t_a), np.float64(exponent(width_a)), np.float64(t_b), np.float64(exponent(width_b)))
    assert float(found) == pytest.approx((profile(t_a, width_a) * profile(t_b, width_b)).mean(), rel=2e-4)


def grid(snapshots: int, widths: tuple[float, ...]) -> tuple[list[int], list[float]]:
    steps = [(i + 1) * 1000 for i in range(snapshots)]
    return steps * len(widths), [width for width in widths for _ in steps]


@pytest.mark.parametrize("width", [0.04, 0.07, 0.15])
def test_weights_are_the_least_squares_solution(width: float) -> None:
    steps, widths = grid(10, (0.05, 0.10))
    found = combine(steps, widths, 10_000, width)
    columns = np.stack([profile(step / 10_000, kept) for step, kept in zip(steps, widths, strict=True)], axis=1)
    wanted = profile(1.0, width)
    solved = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    np.testing.assert_allclose(found.weights_N, solved / solved.sum(), atol=2e-3)
    off = np.linalg.norm(columns @ found.weights_N - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(off, rel=1e-2)
    assert found.weights_N.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("snapshots", "bound"), [(8, 0.014), (32, 1e-3), (128, 7e-5)])
def test_other_widths_come_near_with_the_number_of_snapshots(snapshots: int, bound: float) -> None:
    steps, widths = grid(snapshots, (0.05, 0.10))
    for width in (0.06, 0.07, 0.08, 0.09):
        found = combine(steps, widths, steps[-1], width)
        assert bound / 10 < found.error < bound
        assert found.amplification < 1.1, "rounding of what is stored does not grow"
    assert combine(steps, widths, steps[-1], 0.02).error > 10 * bound, "far from both there is less to go by"


def test_what_is_stored_comes_back_alone() -> None:
    steps, widths = grid(16, (0.05, 0.10))
    found = combine(steps, widths, steps[7], 0.10)
    expected = np.zeros(32)
    expected[16 + 7] = 1.0
    np.testing.assert_allclose(found.weights_N, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "steps"), [(0.9999, 100_000), (0.999, 3000), (0.98, 60), (0.5, 10_000), (0.9999, 20)]
)
def test_width_of_an_exponential_average(decay: float, steps: int) -> None:
    age = np.linspace(0, steps, 2_000_001)
    density = decay**age
    density /= density.sum()
    deviation = math.sqrt((density * (age - (density * age).sum()) ** 2).sum()) / steps
    assert width_of_decay(decay, steps) == pytest.approx(deviation, rel=1e-3)
