"""Precision, recall, density and coverage against the package prdc, on ties and copies by counting, and whatever the block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc

from trainer.errors import UserError
from trainer.evaluate.metrics.neighbours import density_coverage, neighbourhoods, precision_recall


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.maximum(rng.normal(size=(n, d)), -0.2) * (1 + 0.2 * seed) + shift).astype(np.float32)


def by_counting(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """By the definitions, with distances of differences, which are exact for whole numbers: closed balls for precision and
    recall (Kynkaanniemi et al. 2019), open ones for density and coverage (prdc)."""

    def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.square(a[:, None].astype(float) - b[None]).sum(2)
        return out

    def radii(a: np.ndarray) -> np.ndarray:
        return np.array([sorted(np.delete(row, i))[k - 1] for i, row in enumerate(squares(a, a))])

    between, of_real, of_fake = squares(real, fake), radii(real), radii(fake)
    precision = (between <= of_real[:, None]).any(0).mean()
    recall = (between <= of_fake).any(1).mean()
    open_balls = between < of_real[:, None]
    return precision, recall, open_balls.sum(0).mean() / k, open_balls.any(1).mean()


@pytest.mark.parametrize(("n", "m", "d", "shift"), [(200, 150, 8, 0.0), (120, 180, 64, 0.1), (190, 80, 4, 100.0)])
@pytest.mark.parametrize("k", [3, 5])
def test_equals_prdc(n: int, m: int, d: int, shift: float, k: int, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = features(n, d, 0, shift), features(m, d, 1, shift)
    reference = compute_prdc(real.astype(float), fake.astype(float), nearest_k=k)
    expected = [float(reference[name]) for name in ("precision", "recall", "density", "coverage")]
    assert all(0 < value != 1 for value in expected), "else this test says little"
    assert [*precision_recall(real, fake, k=k), *density_coverage(real, fake, k=k)] == pytest.approx(
        expected, rel=1e-12
    )


def test_row_by_row_is_the_same_with_two_numbers_of_neighbours() -> None:
    real, fake = features(150, 6, 0), features(130, 6, 1)
    rows = neighbourhoods(real, fake, k=3, density_k=7, block=50)
    assert (rows.precision, rows.recall) == precision_recall(real, fake, k=3)
    assert (rows.density, rows.coverage) == density_coverage(real, fake, k=7)
    assert (rows.precise_M.shape, rows.recalled_N.shape, rows.density_M.shape, rows.covered_N.shape) == (
        (130,), (150,), (130,), (150,),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 30),
    m=st.integers(4, 30),
    d=st.integers(1, 4),
    k=st.integers(1, 3),
    block=st.integers(1, 40),
    offset=st.sampled_from([0.0, 1000.1]),
)
def test_ties_and_copies_count_by_the_definitions(
    seed: int, n: int, m: int, d: int, k: int, block: int, offset: float
) -> None:
    """Few whole numbers: many equal distances, many copies. An offset that is no fraction of 2 makes rounding differ."""
    rng = np.random.default_rng(seed)
    real, fake = rng.integers(0, 4, size=(n, d)), rng.integers(0, 5, size=(m, d))
    expected = by_counting(real, fake, k)
    found = neighbourhoods(
        rng.permutation(real) + offset, rng.permutation(fake) + offset, k=k, density_k=k, block=block
    )
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, rel=1e-12)


def test_of_equal_sets() -> None:
    real = features(60, 5, 0)
    found = neighbourhoods(real, real[::-1], block=16)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    # each open ball holds its centre and the k - 1 nearer ones
    assert found.density == pytest.approx(1.0)


def test_of_sets_far_apart() -> None:
    real = features(60, 5, 0)
    found = neighbourhoods(real, real + 1000, block=16)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_of_one_point() -> None:
    """Balls of radius 0: closed ones hold the point, open ones nothing."""
    point = np.full((9, 4), 0.1, dtype=np.float32)
    assert precision_recall(point, point) == (1, 1)
    assert density_coverage(point, point) == (0, 0)
    spread = features(30, 4, 0)
    found = neighbourhoods(spread, np.repeat(spread[:1], 9, axis=0))
    assert (found.precision, found.recall) == (1, pytest.approx(1 / 30)), (
        "a collapsed model is precise and recalls one image"
    )


def test_a_generated_image_may_stand_alone_for_density() -> None:
    real = np.arange(8.0)[:, None]
    assert density_coverage(real, np.array([[3.4]]), k=1) == (2.0, 0.25)


def test_bad_input() -> None:
    real = features(10, 4, 0)
    with pytest.raises(UserError, match="generated: 3 images; 3 neighbours of each need 4"):
        precision_recall(real, real[:3])
    with pytest.raises(UserError, match="real: 5 images; 5 neighbours of each need 6"):
        density_coverage(real[:5], real)
    with pytest.raises(UserError, match="real, generated: 4 and 3 features"):
        precision_recall(real, real[:, :3])
    with pytest.raises(UserError, match="generated: NaN"):
        density_coverage(real, np.where(real > real.max() - 1e-6, np.nan, real))
    with pytest.raises(UserError, match="k: 0"):
        precision_recall(real, real, k=0)
    with pytest.raises(UserError, match="k: 0"):
        neighbourhoods(real, real, density_k=0)
