"""How far a figure may be off because another draw of images would give another one."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    """Of the interval that holds the true value with the stated confidence."""
    high: float

    @classmethod
    def of_normal(cls, value: float, standard_error: float, confidence: float) -> "Estimate":
        reach = normal_quantile(confidence) * standard_error
        return cls(value, value - reach, value + reach)


def check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence: {confidence}; give a share between 0 and 1, such as 0.95")


def normal_quantile(confidence: float) -> float:
    """Standard errors on either side of the mean that hold `confidence` of a normal distribution."""
    check_confidence(confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def bootstrap(
    function: Callable[..., float],
    *arrays: NDArray[Any],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    paired: bool = True,
    normal: bool = False,
) -> Estimate:
    """Percentile interval of `function(*arrays)` when rows are drawn again with replacement (Efron 1979; Efron and
    Tibshirani 1993, chapter 13).

    Right for means of rows, and what is smooth in them. Not for distances between sets, FID above all: a resample holds
    copies, so it has less spread than the set it is drawn from, and its distance is too large; `frechet_estimate` gives
    that one's interval.

    Args:
        paired: row i of all arrays belongs together (an image and its caption): one draw for all of them. If not, each
            array is drawn by itself.
        normal: as many standard errors of the resamples on either side instead, of what resampling biases: an absolute
            difference, to which the noise of a resample adds, would lie below its percentiles.

    Raises:
        UserError: no rows, or arrays that should be paired and differ in length.
    """
    _check(arrays, resamples, paired)
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(0, len(arrays[0]), len(arrays[0]))
        values[i] = function(*(a[rows if paired or k == 0 else _rows(rng, a)] for k, a in enumerate(arrays)))
    value = float(function(*arrays))
    if normal:
        return Estimate.of_normal(value, float(values.std(ddof=1)) if resamples > 1 else 0.0, confidence)
    return _percentiles(value, values, confidence)


def bootstrap_difference(
    function: Callable[..., float],
    a: tuple[NDArray[Any], ...],
    b: tuple[NDArray[Any], ...],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Interval of `function(*a) - function(*b)` of two models whose row i has the same prompt and noise: the same rows are
    drawn of both, so what prompts have in common cancels. Two models differ where the interval leaves 0 out.

    Raises:
        UserError: no rows, or arrays that differ in length.
    """

    def difference(*both: NDArray[Any]) -> float:
        return function(*both[: len(a)]) - function(*both[len(a) :])

    return bootstrap(difference, *a, *b, resamples=resamples, confidence=confidence, seed=seed)


def mean(rows: NDArray[Any]) -> float:
    """The commonest `function` of a bootstrap."""
    return float(np.mean(rows, dtype=np.float64))


def _check(arrays: tuple[NDArray[Any], ...], resamples: int, paired: bool) -> None:
    lengths = [len(array) for array in arrays]
    if not lengths or 0 in lengths:
        raise UserError(f"bootstrap: arrays of {lengths} rows; each needs one at least")
    if paired and len(set(lengths)) > 1:
        raise UserError(f"bootstrap: paired arrays of {lengths} rows; row i of all of them has to belong together")
    if resamples < 1:
        raise UserError(f"bootstrap: {resamples} resamples; take 100 or more")


def _rows(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[np.int64]:
    return rng.integers(0, len(array), len(array))


def _percentiles(value: float, values: Array, confidence: float) -> Estimate:
    check_confidence(confidence)
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(value, float(low), float(high))
