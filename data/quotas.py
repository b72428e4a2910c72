"""Who stands at each place of an endless row, so that everyone's count before any place is exact and found at once.

numpy only. Counts follow the shares to within one or two at every block's end for ever, however small a share is.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data import draws
from data.epochs import Cache

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 1024
"""Places that are shuffled together. Who has less than one in the largest is rare."""


class Quotas:
    """Shares of an endless row of places.

    The frequent stand in shuffled blocks. How many places of a block each has is the difference of exact counts at its
    two ends, so nothing drifts. The rare stand at even distances, from a drawn first place on.
    """

    def __init__(self, shares: Sequence[float], *, seed: int, purpose: str, coordinate: int) -> None:
        """
        Args:
            shares: above 0; what they are of is their sum.
            purpose, coordinate: of the random numbers; other ones give another order.
        """
        weights = np.array(shares, dtype=np.float64)
        assert (weights > 0).all()
        weights /= weights.sum()
        self._seed, self._purpose, self._coordinate = seed, purpose, coordinate
        self._size = len(weights)
        rare = weights * _LARGEST_BLOCK < 1.0
        rare[weights.argmax()] = False
        phases = draws.uniform(seed, f"{purpose}/rare", coordinate, count=self._size)
        self._rare: list[tuple[int, float, float]] = []
        """(who, share of the places that those before it leave, where in its first interval it begins)."""
        left = 1.0
        for who in np.flatnonzero(rare):
            self._rare.append((int(who), float(weights[who] / left), float(phases[who])))
            left -= float(weights[who])
        self._frequent = np.flatnonzero(~rare)
        self._shares = weights[self._frequent] / weights[self._frequent].sum()
        self._block = _SMALLEST_BLOCK
        while self._shares.min() * self._block < 1.0 and self._block < 2 * _LARGEST_BLOCK:
            self._block *= 2
        self._orders: Cache[NDArray[np.int64]] = Cache(4)

    def counts(self, places: int) -> NDArray[np.int64]:
        """How many of the first `places` each has."""
        counts = np.zeros(self._size, dtype=np.int64)
        for who, share, phase in self._rare:
            counts[who] = taken = int(share * places + phase)
            places -= taken
        block, slot = divmod(places, self._block)
        counts[self._frequent] = self._before(block)
        counts += np.bincount(self._order(block)[:slot], minlength=self._size)
        return counts

    def walk(self, place: int, end: int) -> Iterator[tuple[int, int]]:
        """(who, how many places it has before) for each place from `place` to `end - 1`."""
        if self._size == 1:
            yield from ((0, i) for i in range(place, end))
            return
        counts = self.counts(place).tolist()
        for i in range(place, end):
            who = self._who(i)
            yield who, counts[who]
            counts[who] += 1

    def _who(self, place: int) -> int:
        for who, share, phase in self._rare:
            taken = int(share * place + phase)
            if int(share * (place + 1) + phase) > taken:
                return who
            place -= taken
        block, slot = divmod(place, self._block)
        return int(self._order(block)[slot])

    def _before(self, block: int) -> NDArray[np.int64]:
        """Counts of the frequent before a block. They never fall: each has at least one place in a block on average."""
        return largest_remainder(self._shares, block * self._block)

    def _order(self, block: int) -> NDArray[np.int64]:
        """Who stands in each place of a block."""

        def shuffled() -> NDArray[np.int64]:
            in_order = np.repeat(self._frequent, self._before(block + 1) - self._before(block))
            return in_order[draws.permutation(self._seed, self._purpose, self._coordinate, block, length=self._block)]

        return self._orders.get(block, shuffled)


def largest_remainder(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to `total`, each within 1 of its share; ties go to the earlier one."""
    exact = shares * total
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")
    quotas[largest[: total - int(quotas.sum())]] += 1
    return quotas
