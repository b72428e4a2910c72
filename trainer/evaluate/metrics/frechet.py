"""The Frechet distance between Gaussians that are fitted to features; FID where the features are its Inception's.

Shapes: features (N, D), (M, D).
"""

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.bootstrap import Estimate, check_confidence
from trainer.evaluate.metrics.checks import Array, check_features, check_pair
from trainer.evaluate.metrics.feature_statistics import FeatureStatistics

SMALLEST_OF_INFINITY = 5000
"""Images of the first of Chong and Forsyth's subsets, where there are 50,000."""


def frechet_distance(a_ND: NDArray[np.floating], b_MD: NDArray[np.floating]) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (Heusel et al. 2017, eq. 6).

    With X, Y the centred sets over sqrt(n - 1), C_a = X'X and C_b = Y'Y, the trace of (C_a C_b)^(1/2) is the sum of the
    singular values of X Y', which is N x M: no matrix of D x D, no square root of a singular matrix, and never complex.
    It takes any number of images; with few it is far too large (`frechet_bias`).

    Raises:
        UserError: fewer than two rows, NaN, or other numbers of features.
    """
    check_pair("first set", a_ND, "second set", b_MD, at_least=2)
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    mean = a.mean(0) - b.mean(0)
    x = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    y = (b - b.mean(0)) / np.sqrt(len(b) - 1)
    if a.shape[1] < min(len(a), len(b)):  # the same singular values, from triangular factors of D x D
        x, y = np.linalg.qr(x, mode="r"), np.linalg.qr(y, mode="r")
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(mean @ mean + np.square(x).sum() + np.square(y).sum() - 2.0 * cross)


def frechet_distance_of(a: FeatureStatistics, b: FeatureStatistics, *, allow_few: bool = False) -> float:
    """The same distance, of means and covariances: FID as pytorch-fid and torch-fidelity compute it.

    The trace of (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2), which is real and defined whatever
    the rank is.

    Raises:
        UserError: other numbers of features; or a set has not more images than features, unless `allow_few`.
    """
    check_counts(a, b, allow_few=allow_few)
    return _distance(a, b, _root(a), _root(b))


def frechet_estimate(
    fake_ND: NDArray[np.floating], real: FeatureStatistics, *, confidence: float = 0.95, allow_few: bool = False
) -> Estimate:
    """The distance and its interval over draws of the generated images, of the real ones as they are.

    By the influence of each image (the delta method; Efron and Tibshirani 1993, section 21.3): with T the optimal map from
    the generated Gaussian to the real one, an image x moves the distance by
    2 (mu_f - mu_r).(x - mu_f) + (x - mu_f)'(1 - T)(x - mu_f), less its mean, over N. One decomposition, where a bootstrap
    would take a thousand, and without the bootstrap's error: resamples hold copies, and their distance is too large. The
    interval says how far another draw of as many images would be off, not the bias that all draws of N share.

    Raises:
        UserError: as `frechet_distance_of`.
    """
    fake = FeatureStatistics.of_features(fake_ND, name="generated")
    check_counts(fake, real, allow_few=allow_few)
    value = _distance(fake, real, _root(fake), _root(real))
    return Estimate.of_normal(value, _standard_error(fake_ND, fake, real), confidence)


def frechet_infinity(
    fake_ND: NDArray[np.floating],
    real: FeatureStatistics,
    *,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    allow_few: bool = False,
) -> Estimate:
    """What the distance would be of endlessly many generated images (Chong and Forsyth 2020, section 4.1): the intercept of a
    least squares line through the distances of random subsets of N images, N at `points` regular steps from `smallest` to
    all, over 1/N. The bias of the real set stays.

    The interval holds both errors: of the line, from its residuals, and of the draw of images, which all subsets share and
    the line does not see (`frechet_estimate`).

    Args:
        smallest: images of the smallest subset; absent: 5000 as theirs, or a tenth of all where there are fewer than
            50,000, but more than the number of features.
        allow_few: subsets may have no more images than features; the line is a poor model there.

    Raises:
        UserError: fewer than three points, too few images for them, or as `frechet_distance_of`.
    """
    check_confidence(confidence)
    check_features("generated", fake_ND, at_least=2)
    rows = np.asarray(fake_ND)
    count, d = rows.shape
    floor = 2 if allow_few else d + 1
    first = smallest if smallest is not None else max(min(SMALLEST_OF_INFINITY, count // 10), floor)
    if points < 3:
        raise UserError(f"points: {points}; a line and its error need three")
    if first < floor or count < first + points:
        raise UserError(
            f"smallest: subsets of {first} to {count} generated images of {d} features; each needs more than {floor - 1} "
            f"images, and sizes have to differ; take more images"
        )
    whole = FeatureStatistics.of_features(rows, name="generated")
    check_counts(whole, real, allow_few=allow_few)
    rng, root = np.random.default_rng(seed), _root(real)
    sizes = np.linspace(first, count, points).astype(int)
    distances = np.empty(points)
    for i, size in enumerate(sizes):
        subset = FeatureStatistics.of_features(rows[np.sort(rng.permutation(count)[:size])])
        distances[i] = _distance(subset, real, _root(subset), root)
    x = 1.0 / sizes - np.mean(1.0 / sizes)
    slope = x @ distances / (x @ x)
    value = distances.mean() - slope * np.mean(1.0 / sizes)
    residuals = distances - distances.mean() - slope * x
    of_line = np.sqrt(residuals @ residuals / (points - 2) * (1.0 / points + np.mean(1.0 / sizes) ** 2 / (x @ x)))
    error = np.hypot(of_line, _standard_error(rows, whole, real))
    return Estimate.of_normal(float(value), float(error), confidence)


def frechet_bias(statistics: FeatureStatistics) -> float:
    """How large the distance of `count` images from the very distribution that they were drawn from is, on average, to first
    order in 1/count, of Gaussian features with these eigenvalues l of the covariance:
    sum l / n + sum over i, j of l_i l_j (1 + [i = j]) / (l_i + l_j) / (2 (n - 1)).

    The mean's error is the first term; the second is that of the covariance, E d^2(C, C + E) = sum E_ij^2 / (2 (l_i + l_j)),
    with the variances of a Wishart matrix in E. With two samples the biases add. Below some four times D images it
    is an order of magnitude, no more.
    """
    n = statistics.count
    values = np.maximum(np.linalg.eigvalsh(statistics.covariance_DD), 0.0)
    values = values[values > 0]
    pairs = np.outer(values, values) / np.add.outer(values, values)
    return float(values.sum() / n + (pairs.sum() + np.trace(pairs)) / (2 * (n - 1)))


def check_counts(*sets: FeatureStatistics, allow_few: bool = False) -> None:
    """
    Raises:
        UserError: other numbers of features; or a set has not more images than features, unless `allow_few`.
    """
    d = {s.dimensions for s in sets}
    if len(d) > 1:
        raise UserError(
            f"statistics of {' and '.join(map(str, sorted(d)))} features; take all from one network and layer"
        )
    for s in sets:
        if s.count <= s.dimensions and not allow_few:
            raise UserError(
                f"{s.count} images of {s.dimensions} features: singular covariances, so the distance is too large, by about "
                f"{frechet_bias(s):.3g} or more (it falls as 1/images); take more than {s.dimensions}, or allow few"
            )


def _root(s: FeatureStatistics) -> Array:
    """C^(1/2), symmetric. Eigenvalues that only rounding makes positive are left out: n images have a rank of n - 1."""
    values, vectors = np.linalg.eigh(s.covariance_DD)
    values[: max(s.dimensions - (s.count - 1), 0)] = 0.0
    out: Array = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return out


def _distance(a: FeatureStatistics, b: FeatureStatistics, root_a: Array, root_b: Array) -> float:
    mean = a.mean_D - b.mean_D
    cross = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    return float(mean @ mean + np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2.0 * cross)


def _standard_error(fake_ND: NDArray[np.floating], fake: FeatureStatistics, real: FeatureStatistics) -> float:
    """Of the distance, over draws of the generated images."""
    # T = C_f^(-1/2) (C_f^(1/2) C_r C_f^(1/2))^(1/2) C_f^(-1/2); where C_f has no spread, no image moves T
    values, vectors = np.linalg.eigh(fake.covariance_DD)
    kept = values > values[-1] * 1e-10
    kept[: max(fake.dimensions - (fake.count - 1), 0)] = False
    values, vectors = np.sqrt(values[kept]), vectors[:, kept]
    inner = (vectors * values).T @ real.covariance_DD @ (vectors * values)
    inner_values, inner_vectors = np.linalg.eigh(inner)
    half = (vectors / values) @ (inner_vectors * np.sqrt(np.sqrt(np.maximum(inner_values, 0.0))))
    shift_D = 2.0 * (fake.mean_D - real.mean_D)
    influences = []
    for first in range(0, len(fake_ND), 4096):
        centred = np.asarray(fake_ND[first : first + 4096], dtype=np.float64) - fake.mean_D
        influences.append(centred @ shift_D + np.square(centred).sum(1) - np.square(centred @ half).sum(1))
    return float(np.concatenate(influences).std(ddof=1) / np.sqrt(fake.count))
