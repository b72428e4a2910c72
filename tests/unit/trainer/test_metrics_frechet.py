"""FID, its interval and FID-infinity: against scipy's square roots, closed forms and simulation."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.evaluate.metrics.feature_statistics import FeatureStatistics, Moments
from trainer.evaluate.metrics.frechet import (
    frechet_bias,
    frechet_distance,
    frechet_distance_of,
    frechet_estimate,
    frechet_infinity,
)

ENDLESS = 10**12


def features(n: int, d: int, seed: int) -> np.ndarray:
    """float32, above 0 and correlated, as a network's are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return np.maximum(rng.normal(size=(n, d)) @ mix * (1 + 0.1 * seed) + 0.1 * seed + 0.3, 0.0).astype(np.float32)


def of(features_ND: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.of_features(features_ND)


def gaussian(mean: np.ndarray, root: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(mean, root.T @ root, ENDLESS)


# ------------------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 24), (700, 900, 192)])
def test_equals_pytorch_fid_and_torch_fidelity(n: int, m: int, d: int) -> None:
    """Their formulae, computed here: the trace of scipy's sqrtm of the product (pytorch-fid), the sum of the roots of its
    eigenvalues (torch-fidelity 0.4, metric_fid.py)."""
    a, b = features(n, d, 1), features(m, d, 2)
    (mu_a, c_a), (mu_b, c_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a.astype(float), b.astype(float)))
    base = np.square(mu_a - mu_b).sum() + np.trace(c_a) + np.trace(c_b)
    by_root = base - 2 * np.trace(scipy.linalg.sqrtm(c_a @ c_b)).real
    by_values = base - 2 * np.sqrt(np.linalg.eigvals(c_a @ c_b).astype(complex)).real.sum()
    assert by_root > 0.1
    for found in (frechet_distance(a, b), frechet_distance_of(of(a), of(b))):
        assert found == pytest.approx(by_root, rel=1e-6)
        assert found == pytest.approx(by_values, rel=1e-6)


def test_of_commuting_covariances_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    mean_a, mean_b = rng.normal(size=(2, 30))
    sd_a, sd_b = rng.uniform(0.1, 3, size=(2, 30))
    a, b = gaussian(mean_a, sd_a[:, None] * basis.T), gaussian(mean_b, sd_b[:, None] * basis.T)
    expected = np.square(mean_a - mean_b).sum() + np.square(sd_a - sd_b).sum()
    assert frechet_distance_of(a, b) == pytest.approx(expected, rel=1e-9)


def test_with_fewer_images_than_features_it_is_still_the_formula() -> None:
    """Where covariances are singular: eigenvalues that are noise of 1e-16 would have roots of 1e-8, one for each dimension."""
    a, b = features(40, 200, 1), features(30, 200, 2)
    exact = frechet_distance(a, b)
    assert frechet_distance_of(of(a), of(b), allow_few=True) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance_of(of(a), of(a), allow_few=True) == pytest.approx(0, abs=1e-9 * exact)


# ----------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 99), max_size=5),
    offset=st.sampled_from([0.0, 1e6]),
    order=st.randoms(use_true_random=False),
)
def test_statistics_do_not_depend_on_batches_order_or_merging(cuts: list[int], offset: float, order) -> None:  # type: ignore[no-untyped-def]
    rows = np.random.default_rng(1).normal(size=(100, 7)) + offset
    edges = sorted({0, 100, *cuts})
    batches = [rows[i:j] for i, j in pairwise(edges)]
    order.shuffle(batches)
    parts = [Moments(), Moments(), Moments()]
    for i, batch in enumerate(batches):
        parts[i % 3].add(batch)
    whole = Moments()
    for part in parts:
        whole.merge(part)
    found = whole.statistics()
    assert found.count == 100
    assert found.mean_D == pytest.approx(rows.mean(0), rel=1e-12)
    # raw sums of squares would have lost all digits of a spread of 1 around 1e6
    assert found.covariance_DD == pytest.approx(np.cov(rows - offset, rowvar=False), rel=1e-6, abs=1e-9)
    assert (found.covariance_DD == found.covariance_DD.T).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 12), shift=st.floats(-5, 5))
def test_is_symmetric_zero_of_equal_sets_and_moves_with_the_mean(seed: int, d: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(40, d)) * rng.uniform(0.1, 2, d), rng.normal(size=(30, d)) + rng.normal(size=d)
    scale = np.trace(np.atleast_2d(np.cov(a.T))) + np.trace(np.atleast_2d(np.cov(b.T))) + 1
    found = frechet_distance_of(of(a), of(b))
    assert found == pytest.approx(frechet_distance_of(of(b), of(a)), abs=1e-9 * scale)
    assert found > -1e-9 * scale
    assert frechet_distance_of(of(a), of(a[::-1])) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance_of(of(a), of(a + shift)) == pytest.approx(d * shift**2, abs=1e-7 * scale)


def test_of_sets_without_spread() -> None:
    point, other = np.full((5, 3), 0.1), np.full((6, 3), 0.3)
    assert frechet_distance_of(of(point), of(other)) == pytest.approx(3 * 0.04)
    assert frechet_estimate(point, of(other)).value == pytest.approx(3 * 0.04)
    spread = np.random.default_rng(0).normal(size=(50, 3))
    spread[:, 1] = 2.0  # one dead feature
    assert frechet_distance_of(of(spread), of(point)) == pytest.approx(frechet_distance(spread, point))
    assert frechet_estimate(spread, of(point)).high > frechet_estimate(spread, of(point)).value


# ----------------------------------------------------------------------------------------------- error, bias and infinity


@pytest.fixture(scope="module")
def world() -> tuple[FeatureStatistics, FeatureStatistics, np.ndarray]:
    """Real and generated distributions, known, and the latter's root."""
    d = 16
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    root = np.exp(-np.arange(d) / 8)[:, None] * basis.T
    made_root = root @ np.diag(np.linspace(0.7, 1.3, d))
    return gaussian(np.zeros(d), root), gaussian(np.linspace(-0.3, 0.3, d), made_root), made_root


def test_interval_is_that_of_other_draws(world: tuple[FeatureStatistics, FeatureStatistics, np.ndarray]) -> None:
    real, made, root = world
    rng = np.random.default_rng(0)
    found = [frechet_estimate(rng.normal(size=(400, 16)) @ root + made.mean_D, real) for _ in range(150)]
    values = np.array([e.value for e in found])
    half_widths = np.array([(e.high - e.low) / 2 for e in found])
    # 150 draws know a standard deviation to 6 %
    assert half_widths.mean() / 1.959964 == pytest.approx(values.std(ddof=1), rel=0.2)
    inside = np.mean([e.low <= values.mean() <= e.high for e in found])
    assert 0.88 <= inside <= 0.99


def test_bias_is_that_of_draws(world: tuple[FeatureStatistics, FeatureStatistics, np.ndarray]) -> None:
    _, made, root = world
    rng = np.random.default_rng(0)
    drawn = [of(rng.normal(size=(200, 16)) @ root + made.mean_D) for _ in range(100)]
    measured = np.mean([frechet_distance_of(s, made) for s in drawn])
    assert np.mean([frechet_bias(s) for s in drawn]) == pytest.approx(measured, rel=0.1)


def test_bias_of_one_feature_in_closed_form() -> None:
    """sigma^2 / n of the mean, and E (s - sigma)^2 = 2 sigma^2 (1 - c4(n)) of the standard deviation."""
    n, variance = 300, 4.0
    c4 = np.sqrt(2 / (n - 1)) * np.exp(scipy.special.gammaln(n / 2) - scipy.special.gammaln((n - 1) / 2))
    expected = variance / n + 2 * variance * (1 - c4)
    assert frechet_bias(FeatureStatistics(np.zeros(1), np.full((1, 1), variance), n)) == pytest.approx(
        expected, rel=0.01
    )


def test_infinity_has_no_bias_and_its_interval_holds_the_truth(
    world: tuple[FeatureStatistics, FeatureStatistics, np.ndarray],
) -> None:
    real, made, root = world
    truth = frechet_distance_of(made, real)
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(300, 16)) @ root + made.mean_D for _ in range(200)]
    found = [frechet_infinity(fake, real, smallest=60, points=8, seed=i) for i, fake in enumerate(sets)]
    biased = np.mean([frechet_distance_of(of(fake), real) for fake in sets])
    error = np.std([e.value for e in found]) / np.sqrt(len(found))
    assert biased - truth > 4 * error, "else this test says nothing"
    assert np.mean([e.value for e in found]) == pytest.approx(truth, abs=3 * error)
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.85


def test_infinity_is_the_line_of_chong_and_forsyth() -> None:
    """Their score_infinity.py, with our draws: regular sizes, FID of a shuffle's first rows, least squares over 1/N."""
    fake, real = features(500, 12, 1), of(features(400, 12, 2))
    rng = np.random.default_rng(7)
    sizes = np.linspace(50, 500, 6).astype(int)
    distances = [frechet_distance_of(of(fake[rng.permutation(500)[:size]]), real) for size in sizes]
    line = scipy.stats.linregress(1 / sizes, distances)
    found = frechet_infinity(fake, real, points=6, seed=7)
    assert found.value == pytest.approx(line.intercept, rel=1e-9)
    of_draw = frechet_estimate(fake, real)
    errors = np.hypot((of_draw.high - of_draw.low) / 2 / 1.959964, line.intercept_stderr)
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * errors, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ files, bad input


def test_a_file_gives_back_the_statistics(tmp_path: Path) -> None:
    statistics = of(features(50, 6, 1))
    path = tmp_path / "folder" / "real.npz"
    statistics.save(path)
    found = FeatureStatistics.load(path)
    assert found.count == 50
    assert (found.mean_D == statistics.mean_D).all()
    assert (found.covariance_DD == statistics.covariance_DD).all()
    assert frechet_distance_of(found, statistics) == pytest.approx(0, abs=1e-9)


def test_pytorch_fids_files_are_read_where_their_count_is_given() -> None:
    statistics = of(features(50, 6, 1))
    buffer = io.BytesIO()
    np.savez(buffer, mu=statistics.mean_D, sigma=statistics.covariance_DD)
    with pytest.raises(UserError, match=r"theirs\.npz: .*give their count"):
        FeatureStatistics.from_bytes(buffer.getvalue(), source="theirs.npz")
    found = FeatureStatistics.from_bytes(buffer.getvalue(), source="theirs.npz", count=50)
    assert frechet_distance_of(found, statistics) == pytest.approx(0, abs=1e-9)


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def vast() -> bytes:
    """A header that asks for 20 TB."""
    import zipfile

    buffer, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1_600_000, 1_600_000)}
    )
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mu.npy", npz_member(np.zeros(3)))
        archive.writestr("sigma.npy", header.getvalue())
    return buffer.getvalue()


def npz_member(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        npz(mu=np.zeros(3), sigma=np.eye(3), count=5)[:300],
        npz(mu=np.zeros(3), count=5),
        npz(mu=np.zeros(3), sigma=np.eye(4), count=5),
        npz(mu=np.zeros(0), sigma=np.eye(0), count=5),
        npz(mu=np.zeros(3), sigma=np.eye(3), count=1),
        npz(mu=np.array([0, np.nan, 0]), sigma=np.eye(3), count=5),
        npz(mu=np.zeros(3), sigma=-np.eye(3), count=5),
        npz(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [-0.5, 1.0]]), count=5),
        npz(mu=np.array([{}, {}], dtype=object), sigma=np.eye(2), count=5),
        vast(),
    ],
)
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"real\.npz: "):
        FeatureStatistics.load(path)
    with pytest.raises(UserError, match=r"none\.npz: No such file"):
        FeatureStatistics.load(tmp_path / "none.npz")


def test_too_few_images_are_refused_and_the_bias_is_said() -> None:
    few, enough = features(16, 16, 1), features(40, 16, 2)
    with pytest.raises(UserError, match=r"16 images of 16 features.*too large, by about [\d.]+ or more.*allow few"):
        frechet_distance_of(of(few), of(enough))
    with pytest.raises(UserError, match="16 images of 16 features"):
        frechet_estimate(few, of(enough))
    with pytest.raises(UserError, match="subsets of 17 to 16"):
        frechet_infinity(few, of(enough))
    with pytest.raises(UserError, match="16 images of 16 features"):
        frechet_infinity(enough, of(few))
    assert frechet_distance_of(of(few), of(enough), allow_few=True) > 0
    assert frechet_infinity(few, of(enough), allow_few=True, points=3).low < 100


def test_bad_input() -> None:
    good = features(40, 4, 1)
    with pytest.raises(UserError, match="4 and 5 features"):
        frechet_distance(good, features(40, 5, 1))
    with pytest.raises(UserError, match="statistics of 4 and 5 features"):
        frechet_distance_of(of(good), of(features(40, 5, 1)))
    moments = Moments("generated")
    moments.add(good)
    with pytest.raises(UserError, match="generated: 4 and 5 features"):
        moments.add(features(40, 5, 1))
    moments.add(good[:0])
    assert moments.count == 40
    with pytest.raises(UserError, match="two at least"):
        Moments("generated").statistics()
    with pytest.raises(UserError, match="generated: NaN or infinite features in row 2"):
        frechet_estimate(np.where(np.arange(40)[:, None] == 2, np.nan, good), of(good))
    with pytest.raises(UserError, match="points: 2"):
        frechet_infinity(good, of(good), points=2)
    with pytest.raises(UserError, match="subsets of 39 to 40"):
        frechet_infinity(good, of(good), smallest=39)
    with pytest.raises(UserError, match="confidence: 95"):
        frechet_infinity(good, of(good), confidence=95)
