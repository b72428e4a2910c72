"""Random numbers as a function of (seed, purpose, coordinates): Philox, a counter-based generator.

Only the generator's raw output is used. numpy keeps that stable between versions, which it does not promise of
`permutation` or `random`; a run resumed under another numpy must see the same samples.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def raw(seed: int, purpose: str, *coordinates: int, count: int) -> NDArray[np.uint64]:
    """`count` independent 64-bit numbers of up to three coordinates, each taken modulo 2^64."""
    # Philox counts up in the first word of its counter, so streams that differ in the others never meet.
    words = [c & 0xFFFF_FFFF_FFFF_FFFF for c in coordinates]
    counter = np.array([0, *words, *[0] * (3 - len(words))], dtype=np.uint64)
    numbers = np.random.Philox(key=_key(seed, purpose), counter=counter).random_raw(count)
    return np.asarray(numbers, dtype=np.uint64)


def uniform(seed: int, purpose: str, *coordinates: int, count: int = 1) -> NDArray[np.float64]:
    """`count` numbers in [0, 1)."""
    top_53_bits = raw(seed, purpose, *coordinates, count=count) >> np.uint64(11)
    return top_53_bits.astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: str, *coordinates: int, length: int) -> NDArray[np.int64]:
    """A permutation of 0 .. length-1."""
    numbers = raw(seed, purpose, *coordinates, count=length)
    # numpy's default sort takes a fraction of the stable one's time, and orders numbers that all differ alike
    order = np.argsort(numbers)
    in_order = numbers[order]
    if (in_order[1:] == in_order[:-1]).any():
        return np.argsort(numbers, kind="stable")
    return order


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
