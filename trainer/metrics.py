"""What one rank measures: means of losses, peak memory, laps.

Values live on the device until they are due: recording a step costs no host synchronisation.
"""

import resource
import sys
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

NOISE_BINS = 8
"""Of equal width in diffusion time."""


def reduce_together(*tensors: Tensor) -> list[Tensor]:
    """Sums over all ranks, float64, by one collective."""
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class LossMeter:
    """Mean of each loss term over the samples of an interval, over all ranks. Skipped steps are left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], skip: Tensor) -> None:
        """`terms`: detached, one value a sample. `skip`: 1.0 on the device for a step that does not count."""
        skipped = skip > 0
        for name, values_B in terms.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(2, dtype=torch.float64, device=self._device)
            count = values_B.new_full((), values_B.numel(), dtype=torch.float64)
            sample = torch.stack([values_B.sum(dtype=torch.float64), count])
            self._sums[name] += sample.masked_fill_(skipped, 0.0)

    def take(self) -> dict[str, float]:
        """The means, and start over. A collective: every rank must have recorded the same terms. Waits for the device."""
        return self.means(*reduce_together(self.totals())) if self._sums else {}

    def totals(self) -> Tensor:
        """This rank's sums and counts (terms, 2)."""
        if not self._sums:
            return torch.zeros(0, 2, dtype=torch.float64, device=self._device)
        return torch.stack([self._sums[name] for name in sorted(self._sums)])

    def means(self, totals: Tensor) -> dict[str, float]:
        """From all ranks' `totals`, and start over. Waits for the device."""
        names = sorted(self._sums)
        self.clear()
        return {name: total / count for name, (total, count) in zip(names, totals.tolist(), strict=True) if count}

    def clear(self) -> None:
        self._sums.clear()


class NoiseMeter:
    """Mean denoising loss of an interval by noise level. Skipped steps are left out."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(NOISE_BINS, 2, dtype=torch.float64, device=device)

    def add(self, time_B: Tensor, loss_B: Tensor, skip: Tensor) -> None:
        """`time_B`: in [0, 1], a share of the diffusion's time. All on the device."""
        bins_B = (time_B * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        values = torch.stack([loss_B.double(), torch.ones_like(loss_B, dtype=torch.float64)], dim=1)
        # of a skipped step the loss may be no number, and 0 times such is none either
        self._sums.index_add_(0, bins_B, torch.where(skip > 0, torch.zeros_like(values), values))

    def totals(self) -> Tensor:
        """This rank's sums and counts (bins, 2)."""
        return self._sums

    def means(self, totals: Tensor) -> dict[str, float]:
        """From all ranks' `totals`, by bin, and start over; a bin without samples is not there. Waits for the device."""
        self.clear()
        return {str(i): total / count for i, (total, count) in enumerate(totals.tolist()) if count}

    def clear(self) -> None:
        self._sums = torch.zeros_like(self._sums)


class OfRanks:
    """Figures that each rank has one of: what all of them need is the lowest, the mean and the highest."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank, self._size, self._device = rank, size, device

    def totals(self, *figures: float) -> Tensor:
        """(ranks, figures), zeros but for this rank's row: summed over ranks it is everybody's."""
        table = torch.zeros(self._size, len(figures), dtype=torch.float64)
        table[self._rank] = torch.tensor(figures, dtype=torch.float64)
        return table.to(self._device)

    @staticmethod
    def statistics(totals: Tensor) -> list[dict[str, float]]:
        """min, mean and max of each figure, from all ranks' `totals`. Waits for the device."""
        low, mean, high = totals.amin(0).tolist(), totals.mean(0).tolist(), totals.amax(0).tolist()
        return [{"min": a, "mean": b, "max": c} for a, b, c in zip(low, mean, high, strict=True)]


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
