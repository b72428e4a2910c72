"""Values on their way from the device to the host, which goes on meanwhile."""

import torch
from torch import Tensor


class Readback:
    """Numbers that the device has been told to compute. Reading them waits for what was queued before this was made, and
    for nothing that was queued since: `item()` would wait for all of it."""

    def __init__(self, *values: Tensor) -> None:
        """`values`: of one element each or more; they are read as one list."""
        self._host = torch.cat([value.detach().double().reshape(-1) for value in values])
        self._arrived: torch.cuda.Event | None = None
        if self._host.is_cuda:
            pinned = torch.empty(self._host.shape, dtype=self._host.dtype, pin_memory=True)
            self._host = pinned.copy_(self._host, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._host.tolist()
        return values
