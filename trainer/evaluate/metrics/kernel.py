"""Distances between sets by the mean of a kernel over pairs, in blocks: memory does not grow with the number of pairs.

Shapes: features (N, D), (M, D).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array, check_pair
from trainer.evaluate.metrics.clip_score import unit_rows

BLOCK = 2048
"""Rows and columns of a block: 32 MiB in float64."""
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
Kernel = Callable[[Array, Array], Array]


def kernel_distance(a_ND: NDArray[np.floating], b_MD: NDArray[np.floating], *, block: int = BLOCK) -> float:
    """Squared maximum mean discrepancy of all rows, unbiased (Gretton et al. 2012, eq. 3), with the kernel (x.y / D + 1)^3
    (Binkowski et al. 2018, section 4): KID without subsets. It may be a little below 0.

    Raises:
        UserError: fewer than two rows, NaN, or other numbers of features.
    """
    check_pair("first set", a_ND, "second set", b_MD, at_least=2)
    a, b = np.asarray(a_ND), np.asarray(b_MD)
    n, m = len(a), len(b)
    within_a, diagonal_a = _sum_within(a, _cubic, block)
    within_b, diagonal_b = _sum_within(b, _cubic, block)
    within = (within_a - diagonal_a) / (n * (n - 1)) + (within_b - diagonal_b) / (m * (m - 1))
    return within - 2.0 * _sum_between(a, b, _cubic, block) / (n * m)


def kernel_distance_of_subsets(
    a_ND: NDArray[np.floating],
    b_MD: NDArray[np.floating],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and standard deviation of `kernel_distance` over random subsets, as torch-fidelity 0.4 draws them for its KID
    (`metric_kid.py`; of numpy's old generator, its default seed, without replacement within a subset).

    The standard deviation is that of one subset, not the error of the mean.

    Raises:
        UserError: fewer rows than `size`.
    """
    if size < 2 or subsets < 1:
        raise UserError(f"size, subsets: {size} and {subsets}; take 2 and 1 at least")
    check_pair("first set", a_ND, "second set", b_MD, at_least=size)
    a, b = np.asarray(a_ND), np.asarray(b_MD)
    draw = np.random.RandomState(seed)
    values = [
        kernel_distance(a[draw.choice(len(a), size, replace=False)], b[draw.choice(len(b), size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def cmmd(a_ND: NDArray[np.floating], b_MD: NDArray[np.floating], *, block: int = BLOCK) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, eq. 4): 1000 times the squared discrepancy with the kernel
    exp(-|x - y|^2 / (2 10^2)), of embeddings scaled to length 1. The biased estimate (Gretton et al. 2012, eq. 5), pairs of a
    row with itself included, as google-research's `cmmd/distance.py` computes it: 0 for equal sets, never below.

    Raises:
        UserError: NaN, zero rows, or other numbers of features.
    """
    check_pair("first set", a_ND, "second set", b_MD)
    a, b = unit_rows("first set", a_ND), unit_rows("second set", b_MD)
    within = _sum_within(a, _gaussian_less_one, block)[0] / len(a) ** 2
    within += _sum_within(b, _gaussian_less_one, block)[0] / len(b) ** 2
    return max(CMMD_SCALE * (within - 2.0 * _sum_between(a, b, _gaussian_less_one, block) / (len(a) * len(b))), 0.0)


def _cubic(x: Array, y: Array) -> Array:
    out: Array = (x @ y.T / x.shape[1] + 1.0) ** 3
    return out


def _gaussian_less_one(x: Array, y: Array) -> Array:
    """Of unit rows. All values are within 2 % of 1, and the ones cancel in the distance: without them it keeps its digits."""
    out: Array = np.expm1((x @ y.T - 1.0) / CMMD_SIGMA**2)
    return out


def _blocks(rows: NDArray[np.floating], block: int) -> Iterator[tuple[int, Array]]:
    assert block > 0, block
    for first in range(0, len(rows), block):
        yield first, np.asarray(rows[first : first + block], dtype=np.float64)


def _sum_between(a: NDArray[np.floating], b: NDArray[np.floating], kernel: Kernel, block: int) -> float:
    return float(sum(kernel(x, y).sum() for _, x in _blocks(a, block) for _, y in _blocks(b, block)))


def _sum_within(a: NDArray[np.floating], kernel: Kernel, block: int) -> tuple[float, float]:
    """Sum over all pairs, and over pairs of a row with itself. The kernel is symmetric: half of the blocks stand for all."""
    total = diagonal = 0.0
    for i, x in _blocks(a, block):
        own = kernel(x, x)
        total += float(own.sum())
        diagonal += float(np.trace(own))
        total += 2.0 * float(sum(kernel(x, y).sum() for _, y in _blocks(a[i + block :], block)))
    return total, diagonal
