"""Precision, recall, density and coverage: time and memory of ours, in blocks, and of the package prdc, which holds matrices
of all pairs, side by side; then of ours alone at the size of a paper.

    OMP_NUM_THREADS=1 python -m ops.bench.neighbours [--rows 8000] [--repeats 3] [--full-rows 50000] [--features 2048]

Every measurement is a process of its own, in turns. Time is the processor's, of all threads; memory is the most that the
process held, less what it held with both sets of float32 features and nothing else done.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import numpy as np
from numpy.typing import NDArray

from trainer.evaluate.metrics.neighbours import BLOCK, neighbourhoods

GIB = 1 << 30
K = 5
LIMIT_GIB = 8.0
"""What 50,000 x 50,000 features have to fit in."""

Features = NDArray[np.float32]
Four = tuple[float, float, float, float]


@dataclass(frozen=True)
class Measured:
    figures: Four
    """Precision, recall, density, coverage."""
    cpu_s: float
    wall_s: float
    work_bytes: int
    """Beyond the inputs."""
    peak_bytes: int
    """Of the whole process."""


def ours(real_ND: Features, fake_MD: Features, block: int) -> Four:
    found = neighbourhoods(real_ND, fake_MD, k=K, density_k=K, block=block)
    return found.precision, found.recall, found.density, found.coverage


def plain(real_ND: Features, fake_MD: Features, block: int) -> Four:
    from prdc import compute_prdc

    with redirect_stdout(StringIO()):
        found = compute_prdc(real_ND, fake_MD, nearest_k=K)
    return tuple(float(found[name]) for name in ("precision", "recall", "density", "coverage"))  # type: ignore[return-value]


WAYS: dict[str, Callable[[Features, Features, int], Four]] = {"ours": ours, "plain": plain}


def features(rows: int, width: int, seed: int, scale: float) -> Features:
    """Spread over some 20 dimensions, as a network's are: all four metrics lie between their ends."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(0).standard_normal((20, width), dtype=np.float32)
    out = rng.standard_normal((rows, width), dtype=np.float32)
    out *= 0.05
    for first in range(0, rows, 4096):
        part = out[first : first + 4096]
        part += scale * rng.standard_normal((len(part), 20), dtype=np.float32) @ mix
    return out


def measure(way: str, rows: int, width: int, block: int) -> Measured:
    real, fake = features(rows, width, 1, 1.0), features(rows, width, 2, 0.9)
    # a small one first: imports and buffers of libraries are no work on pairs
    WAYS[way](real[:64], fake[:64], block)
    before = peak()
    cpu, wall = time.process_time(), time.perf_counter()
    figures = WAYS[way](real, fake, block)
    return Measured(figures, time.process_time() - cpu, time.perf_counter() - wall, peak() - before, peak())


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(way: str, rows: int, width: int, block: int) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, way, rows, width, block).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000, help="of each set, where the two ways are compared; 0: not")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full-rows", type=int, default=50_000, help="of each set, for ours alone; 0: not")
    parser.add_argument("--block", type=int, default=BLOCK)
    options = parser.parse_args()

    if options.rows:
        found: dict[str, list[Measured]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way, measured in found.items():  # in turns, so that noise of the machine falls on both alike
                measured.append(alone(way, options.rows, options.features, options.block))
        seconds = {way: statistics.median(m.cpu_s for m in measured) for way, measured in found.items()}
        memory = {way: max(m.work_bytes for m in measured) for way, measured in found.items()}
        print(f"{options.rows} x {options.rows} features of {options.features}, {options.repeats} rounds")
        for way in WAYS:
            print(
                f"{way:6s} {seconds[way]:8.2f} s of processor  x {seconds[way] / seconds['plain']:.2f}"
                f"  {memory[way] / GIB:6.2f} GiB beside the features  x {memory[way] / memory['plain']:.2f}"
            )
        pairs = zip(found["ours"][0].figures, found["plain"][0].figures, strict=True)
        print(f"precision, recall, density, coverage {found['ours'][0].figures}")
        print(f"largest difference of a figure {max(abs(a - b) / abs(b) for a, b in pairs):.1e} of it")
    if options.full_rows:
        full = alone("ours", options.full_rows, options.features, options.block)
        print(
            f"{options.full_rows} x {options.full_rows} features of {options.features}, ours: {full.cpu_s:.0f} s of processor, "
            f"{full.wall_s:.0f} s, {full.peak_bytes / GIB:.2f} GiB in all ({full.work_bytes / GIB:.2f} beside the features), "
            f"{'within' if full.peak_bytes < LIMIT_GIB * GIB else 'OVER'} {LIMIT_GIB:g} GiB"
        )
        print(f"precision, recall, density, coverage {full.figures}")


if __name__ == "__main__":
    main()
