"""Power-function averages of weights, and averages of any width made of a few (Karras et al. 2024, "Analyzing and Improving the
Training Dynamics of Diffusion Models", sections 3.1, 3.2 and appendix C). No torch.

The average of width sigma_rel at time t weighs the weights of time tau <= t by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).
Times are steps done. Updated by `share` after each step, it weighs the weights after step s by the integral of p from s - 1
to s, exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trainer.errors import UserError

WIDEST = 1.0 / math.sqrt(12.0)
"""sigma_rel of the mean over all steps, gamma = 0."""


def exponent(width: float, field: str = "sigma_rel") -> float:
    """gamma of a width sigma_rel (Algorithm 2): the largest real root of g^3 + 7 g^2 + (16 - w^-2) g + 12 - w^-2.

    Args:
        field: what the user has given it by, for the message.

    Raises:
        UserError: not between 0 and that of the plain mean.
    """
    if not 0.0 < width < WIDEST:
        raise UserError(
            f"{field}: {width:g} is not between 0 and {WIDEST:.4f}, the plain mean's; 0.05 to 0.2 are usual"
        )
    t = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - t, 12.0 - t])
    return float(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots)].real.max())


def width_of(gamma: float) -> float:
    """sigma_rel of an exponent: the profile's standard deviation over its length (eq. 24)."""
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def share(gamma: float, steps: int) -> float:
    """1 - beta(t) with beta(t) = (1 - 1/t)^(gamma + 1): how far the average moves towards the weights after `steps` steps."""
    assert steps >= 1
    return 1.0 if steps == 1 else -math.expm1((gamma + 1.0) * math.log1p(-1.0 / steps))


def width_of_decay(decay: float, steps: int) -> float:
    """sigma_rel of an exponential average of so many steps: its profile's standard deviation over its length. For
    (1 - decay) steps well above 1 it is 1 / ((1 - decay) steps)."""
    rate = -math.log(decay) * steps
    if rate > 700.0:
        return 1.0 / rate
    variance = rate**-2 - math.exp(-rate) / math.expm1(-rate) ** 2 if rate > 1e-2 else 1.0 / 12.0 - rate**2 / 240.0
    return math.sqrt(variance)


# ------------------------------------------------------------------------------------------------- averages out of averages


def inner(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> np.ndarray:
    """Integral of the product of two profiles (Algorithm 3, `p_dot_p`); arguments broadcast."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(values, dtype=np.float64) for values in (t_a, gamma_a, t_b, gamma_b))
    ratio, latest = t_a / t_b, np.maximum(t_a, t_b)
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    return np.asarray((gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * latest))


@dataclass(frozen=True)
class Combination:
    """Of averages that are there, in place of one that is not."""

    weights_N: np.ndarray
    """Float64; they sum to 1."""
    error: float
    """Of the profile: L2 norm of the difference over that of the wanted one."""

    @property
    def amplification(self) -> float:
        """By which what is wrong with the stored averages at random, such as their rounding, comes through."""
        return float(np.sqrt(np.square(self.weights_N).sum()))


def combine(steps_N: Sequence[int], widths_N: Sequence[float], step: int, width: float) -> Combination:
    """The combination whose profile is nearest to that of `width` at `step`, by least squares (Algorithm 3, `solve_weights`).

    Args:
        steps_N, widths_N: of the averages that are there, none twice.
    """
    t, gamma = np.asarray(steps_N, dtype=np.float64), np.array([exponent(w) for w in widths_N])
    t_r, gamma_r = float(step), exponent(width)
    gram_NN = inner(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted_N = inner(t, gamma, t_r, gamma_r)
    # of unit norm: profiles of early snapshots are higher by orders of magnitude, which costs digits
    scale_N = np.sqrt(np.diag(gram_NN))
    solved = np.linalg.lstsq(gram_NN / np.outer(scale_N, scale_N), wanted_N / scale_N, rcond=1e-14)[0] / scale_N
    weights_N = solved / solved.sum()
    norm = float(inner(t_r, gamma_r, t_r, gamma_r))
    squared = float(weights_N @ gram_NN @ weights_N - 2 * weights_N @ wanted_N) + norm
    return Combination(weights_N, math.sqrt(max(squared, 0.0) / norm))
