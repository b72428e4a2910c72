"""Long curves with few points: extremes are kept, and a mean that is smooth. No torch."""

from itertools import pairwise

import numpy as np

MAX_POINTS = 2000
SMOOTH_SHARE = 40
"""A smooth curve is the mean over this part of the records of a phase."""
LEAST_TO_SMOOTH = 30


def extremes(y: np.ndarray, max_points: int = MAX_POINTS) -> np.ndarray:
    """Rows (at most `max_points`) of `y` that draw it: the first and last, and of each bucket the least and the greatest."""
    if len(y) <= max_points:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), max(1, (max_points - 2) // 2) + 1).astype(np.int64)
    kept = {0, len(y) - 1}
    for begin, end in pairwise(edges.tolist()):
        kept |= {int(begin + y[begin:end].argmin()), int(begin + y[begin:end].argmax())}
    return np.array(sorted(kept), dtype=np.int64)


def bucket_means(values: np.ndarray, max_points: int) -> np.ndarray:
    """(rows, ...) to (at most `max_points`, ...): means of neighbours; a value that is NaN is left out of its mean."""
    if len(values) <= max_points:
        return values
    edges = np.linspace(0, len(values), max_points + 1).astype(np.int64)[:-1]
    known = np.isfinite(values)
    sums, counts = (
        np.add.reduceat(part, edges, axis=0) for part in (np.where(known, values, 0.0), known.astype(float))
    )
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def smooth(y: np.ndarray, groups: np.ndarray) -> np.ndarray | None:
    """The mean of `y` in a window around each row, which ends where a group, a phase, does; None of too few rows."""
    if len(y) < LEAST_TO_SMOOTH:
        return None
    result = np.empty_like(y)
    bounds = np.flatnonzero(np.diff(groups)) + 1
    for begin, end in zip([0, *bounds], [*bounds, len(y)], strict=True):
        part = y[begin:end]
        half = max(2, len(part) // SMOOTH_SHARE)
        sums = np.concatenate([[0.0], np.cumsum(part)])
        rows = np.arange(len(part))
        low, high = np.maximum(0, rows - half), np.minimum(len(part), rows + half + 1)
        result[begin:end] = (sums[high] - sums[low]) / (high - low)
    return result
