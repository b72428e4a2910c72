"""How two sets of features cover each other, by the distances of each to its nearest neighbours; in blocks, so that memory
does not grow with the number of pairs.

Shapes: features of N real and M generated images, (N, D) and (M, D).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array, check_pair

BLOCK = 2048
"""Rows and columns of a block: 32 MiB in float64, some five of them at a time."""
TIE = 1e-11
"""Squared distances closer than this, relative to the squared lengths of both rows, are equal: rounding makes them about 1e-15,
and copies of an image should count alike whatever the order or the block is."""


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


@dataclass(frozen=True)
class Neighbourhoods:
    """Row by row what the four metrics are means of; what an interval is drawn from."""

    precise_M: NDArray[np.bool_]
    """A generated image is in the ball of a real one."""
    recalled_N: NDArray[np.bool_]
    """A real image is in the ball of a generated one."""
    density_M: Array
    """Real images whose ball a generated one is in, over k."""
    covered_N: NDArray[np.bool_]
    """The ball of a real image has a generated one in it."""

    @property
    def precision(self) -> float:
        return float(self.precise_M.mean())

    @property
    def recall(self) -> float:
        return float(self.recalled_N.mean())

    @property
    def density(self) -> float:
        return float(self.density_M.mean())

    @property
    def coverage(self) -> float:
        return float(self.covered_N.mean())


def precision_recall(
    real_ND: NDArray[np.floating], fake_MD: NDArray[np.floating], *, k: int = 3, block: int = BLOCK
) -> PrecisionRecall:
    """Share of generated images inside the real ones' manifold, and of real ones inside the generated ones' (Kynkaanniemi et
    al. 2019, eq. 2 and 3): in the closed ball around any image of a set that reaches to its k-th nearest neighbour in that set,
    itself not counted.

    Raises:
        UserError: not more than k images in a set, NaN, or other numbers of features.
    """
    real, fake = _prepared(real_ND, fake_MD, k)
    around_real, around_fake = _radii(real, (k,), block)[0], _radii(fake, (k,), block)[0]
    found = _compare(real, fake, around_real, around_fake, around_real, k, block)
    return PrecisionRecall(found.precision, found.recall)


def density_coverage(
    real_ND: NDArray[np.floating], fake_MD: NDArray[np.floating], *, k: int = 5, block: int = BLOCK
) -> DensityCoverage:
    """Mean over generated images of the number of real ones whose ball each is in, over k; and share of real images whose ball
    has a generated one in it (Naeem et al. 2020, eq. 3 and 4). Balls are open and reach to the k-th nearest real neighbour,
    as in their package prdc.

    Raises:
        UserError: not more than k real images, NaN, or other numbers of features.
    """
    real, fake = _prepared(real_ND, fake_MD, k, fake_at_least=1)
    found = _compare(real, fake, None, None, _radii(real, (k,), block)[0], k, block)
    return DensityCoverage(found.density, found.coverage)


def neighbourhoods(
    real_ND: NDArray[np.floating],
    fake_MD: NDArray[np.floating],
    *,
    k: int = 3,
    density_k: int = 5,
    block: int = BLOCK,
) -> Neighbourhoods:
    """All four, row by row, in three passes over pairs, where `precision_recall` and `density_coverage` make five.

    Args:
        k: of precision and recall.
        density_k: of density and coverage.

    Raises:
        UserError: as theirs.
    """
    real, fake = _prepared(real_ND, fake_MD, max(k, density_k), fake_at_least=k + 1)
    if k < 1 or density_k < 1:
        raise UserError(f"k: {min(k, density_k)}; take 1 or more")
    around_real, of_density = _radii(real, (k, density_k), block)
    return _compare(real, fake, around_real, _radii(fake, (k,), block)[0], of_density, density_k, block)


def _prepared(
    real_ND: NDArray[np.floating], fake_MD: NDArray[np.floating], k: int, fake_at_least: int | None = None
) -> tuple[Array, Array]:
    """In float64, less the real mean: squared lengths that are not much larger than squared distances keep their digits."""
    if k < 1:
        raise UserError(f"k: {k}; take 1 or more")
    check_pair("real", real_ND, "generated", fake_MD)
    for name, rows, least in (("real", real_ND, k + 1), ("generated", fake_MD, fake_at_least or k + 1)):
        if len(rows) < least:
            raise UserError(f"{name}: {len(rows)} images; {least - 1} neighbours of each need {least} at least")
    real, fake = np.array(real_ND, dtype=np.float64), np.array(fake_MD, dtype=np.float64)
    centre_D = real.mean(0)
    real -= centre_D
    fake -= centre_D
    return real, fake


def _tiles(rows: Array, block: int) -> Iterator[tuple[slice, Array, Array]]:
    """Slices, their rows, and the rows' squared lengths."""
    assert block > 0, block
    for first in range(0, len(rows), block):
        tile = rows[first : first + block]
        yield slice(first, first + len(tile)), tile, np.einsum("nd,nd->n", tile, tile)


def _radii(rows_ND: Array, ks: tuple[int, ...], block: int) -> list[Array]:
    """Squared distance of each row to its k-th nearest other row, for each k. Distances are symmetric: half of the blocks are
    computed, and used for their rows and for their columns."""
    most = max(ks)
    nearest = np.full((len(rows_ND), most), np.inf)
    for i, (here, x, x_squares) in enumerate(_tiles(rows_ND, block)):
        for there, y, y_squares in list(_tiles(rows_ND[i * block :], block)):
            there = slice(there.start + i * block, there.stop + i * block)
            squared = x @ y.T
            squared *= -2.0
            squared += x_squares[:, None]
            squared += y_squares
            if here == there:
                np.fill_diagonal(squared, np.inf)
            else:
                _keep_nearest(nearest[there], squared.T)
            _keep_nearest(nearest[here], squared)
    nearest.sort(1)
    # a sum of rounded terms may fall below 0 for copies
    return [np.maximum(nearest[:, k - 1], 0.0) for k in ks]


def _keep_nearest(nearest_NK: Array, squared_NM: Array) -> None:
    most = nearest_NK.shape[1]
    if squared_NM.shape[1] > most:
        squared_NM = np.partition(squared_NM, most - 1, axis=1)[:, :most]
    both = np.concatenate([nearest_NK, squared_NM], axis=1)
    nearest_NK[:] = np.partition(both, most - 1, axis=1)[:, :most]


def _compare(
    real: Array,
    fake: Array,
    around_real_N: Array | None,
    around_fake_M: Array | None,
    of_density_N: Array,
    density_k: int,
    block: int,
) -> Neighbourhoods:
    """One pass over pairs. Without radii of precision and recall, these stay False."""
    precise, recalled = np.zeros(len(fake), dtype=bool), np.zeros(len(real), dtype=bool)
    inside, covered = np.zeros(len(fake), dtype=np.int64), np.zeros(len(real), dtype=bool)
    for there, y, y_squares in _tiles(fake, block):
        for here, x, x_squares in _tiles(real, block):
            squared = x @ y.T
            squared *= -2.0
            lengths = x_squares[:, None] + y_squares
            squared += lengths
            lengths *= TIE
            squared += lengths
            within = squared < of_density_N[here, None]
            inside[there] += within.sum(0)
            covered[here] |= within.any(1)
            if around_real_N is not None and around_fake_M is not None:
                lengths *= 2.0
                squared -= lengths
                precise[there] |= (squared <= around_real_N[here, None]).any(0)
                recalled[here] |= (squared <= around_fake_M[there]).any(1)
    return Neighbourhoods(precise, recalled, inside / density_k, covered)


def squared_distances(a_NCHW: NDArray[np.floating], b_MCHW: NDArray[np.floating]) -> Array:
    """Mean squared difference an element, of each of a from each of b: (N, M), whole."""
    a = np.asarray(a_NCHW, dtype=np.float64).reshape(len(a_NCHW), -1)
    b = np.asarray(b_MCHW, dtype=np.float64).reshape(len(b_MCHW), -1)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2.0 * a @ b.T
    return np.maximum(squared, 0.0) / a.shape[1]
