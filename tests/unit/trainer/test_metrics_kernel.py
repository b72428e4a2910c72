"""KID and CMMD against scikit-learn's kernels, CLIPScore against its definitions; blocks change nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from trainer.errors import UserError
from trainer.evaluate.metrics.clip_score import clip_score, clip_score_100, clip_scores, cosines
from trainer.evaluate.metrics.kernel import cmmd, kernel_distance, kernel_distance_of_subsets


def features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(n, d)) + 0.4 * seed, 0.0).astype(np.float32)


def unbiased(a: np.ndarray, b: np.ndarray) -> float:
    """As torch-fidelity's mmd2 (metric_kid.py), of scikit-learn's kernel of degree 3, gamma 1/D and coef0 1."""
    aa, bb, ab = (polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_kernel_distance_is_scikit_learns_whatever_the_block(block: int) -> None:
    a, b = features(61, 24, 1), features(50, 24, 2)
    expected = unbiased(a.astype(float), b.astype(float))
    assert expected > 0.01
    assert kernel_distance(a, b, block=block) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(b, a, block=block) == pytest.approx(expected, rel=1e-9)


def test_subsets_are_torch_fidelitys() -> None:
    """kid_features_to_metric of torch-fidelity 0.4: RandomState(2020), a choice of the first, then of the second set."""
    a, b = features(90, 16, 1).astype(float), features(80, 16, 2).astype(float)
    rng, values = np.random.RandomState(2020), []
    for _ in range(12):
        x, y = a[rng.choice(90, 30, replace=False)], b[rng.choice(80, 30, replace=False)]
        values.append(unbiased(x, y))
    mean, deviation = kernel_distance_of_subsets(a, b, subsets=12, size=30)
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert deviation == pytest.approx(np.std(values), rel=1e-9)
    assert kernel_distance_of_subsets(a, b, subsets=12, size=30, seed=1)[0] != mean
    with pytest.raises(UserError, match="first set: features of 90 images, and this metric needs 1000"):
        kernel_distance_of_subsets(a, b)
    with pytest.raises(UserError, match="size, subsets: 1"):
        kernel_distance_of_subsets(a, b, size=1)


def test_kernel_distance_of_one_distribution_is_0_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [kernel_distance(rng.normal(size=(30, 4)), rng.normal(size=(20, 4))) for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
    assert min(values) < 0, "an unbiased estimate of 0"
    same = np.full((5, 3), 2.0)
    assert kernel_distance(same, same) == 0


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_cmmd_is_google_researchs(block: int) -> None:
    """cmmd/distance.py: 1000 (mean k_xx + mean k_yy - 2 mean k_xy) with exp(-|x - y|^2 / 200), of unit rows."""
    a, b = features(40, 32, 1), features(55, 32, 2)
    x, y = (z.astype(float) / np.linalg.norm(z.astype(float), axis=1, keepdims=True) for z in (a, b))
    kernels = (rbf_kernel(u, v, gamma=1 / 200).mean() for u, v in ((x, x), (y, y), (x, y)))
    aa, bb, ab = kernels
    expected = 1000 * (aa + bb - 2 * ab)
    assert cmmd(a, b, block=block) == pytest.approx(expected, rel=1e-6)
    assert cmmd(3 * a, y, block=block) == pytest.approx(expected, rel=1e-6), "lengths do not count"


def test_cmmd_of_points_in_closed_form() -> None:
    east, north = np.tile([1.0, 0.0], (3, 1)), np.tile([0.0, 1.0], (4, 1))
    assert cmmd(east, north) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), rel=1e-9)
    assert cmmd(east, east) == 0
    near = np.array([[1.0, 3e-7]])
    # kernels of 1 - 9e-14 / 200: as means of numbers near 1, no two digits would be left
    assert cmmd(east, near) == pytest.approx(1000 * 2 * 9e-14 / 200, rel=5e-3, abs=0)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(2, 9), m=st.integers(2, 9), d=st.integers(1, 5), block=st.integers(1, 10)
)
def test_kernel_metrics_do_not_depend_on_order_or_block(seed: int, n: int, m: int, d: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)) + 0.1, rng.normal(size=(m, d)) + 0.1
    shuffled = rng.permutation(a)
    assert kernel_distance(shuffled, b, block=block) == pytest.approx(unbiased(a, b), rel=1e-9, abs=1e-9)
    assert cmmd(shuffled, b, block=block) == pytest.approx(cmmd(b, a), rel=1e-9, abs=1e-9)
    assert cmmd(shuffled, a, block=block) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- CLIPScore


def test_clip_scores_by_their_definitions() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(30, 12)) + 0.2, rng.normal(size=(30, 12)) + 0.2
    cos = np.array([1 - cosine(x, y) for x, y in zip(image, text, strict=True)])
    assert (cos < 0).any()
    assert cosines(image, text) == pytest.approx(cos, rel=1e-9)
    assert clip_scores(5 * image, text) == pytest.approx(2.5 * np.maximum(cos, 0), rel=1e-9)
    # Hessel et al. clamp each pair, torchmetrics the mean
    assert clip_score(image, text) == pytest.approx(2.5 * np.maximum(cos, 0).mean(), rel=1e-9)
    assert clip_score_100(image, text) == pytest.approx(max(100 * cos.mean(), 0), rel=1e-9)
    assert clip_score(image, -image) == 0
    assert clip_score_100(image, -image) == 0
    assert clip_score(image, image) == pytest.approx(2.5)
    assert clip_score_100(image, 3 * image) == pytest.approx(100)


def test_clip_score_of_bad_input() -> None:
    image = np.ones((3, 4))
    with pytest.raises(UserError, match="3 and 2; give one prompt an image"):
        clip_score(image, image[:2])
    with pytest.raises(UserError, match="prompts: the embedding of row 1 is zero"):
        clip_score(image, image * np.array([[1], [0], [1]]))
    with pytest.raises(UserError, match="4 and 3 features"):
        clip_score(image, image[:, :3])
    with pytest.raises(UserError, match="first set: the embedding of row 0 is zero"):
        cmmd(0 * image, image)
    with pytest.raises(UserError, match="images: NaN or infinite features in row 0 and 2 more"):
        clip_score(image * np.inf, image)
