"""Shared memory between a data worker and its trainer, used again and again.

Of memory that is shared anew for each batch, every page is made, zeroed and freed: a quarter of the time that decoding takes.
So a worker keeps its slots; the trainer copies a batch out of its slot and gives the slot back with a later task.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotRef:
    """A worker's slot, as its trainer names it when it gives it back."""

    worker: int
    number: int


class Slots:
    """A worker's. A slot that is never given back is never used again, and another takes its place."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._slots: dict[int, Tensor] = {}
        self._free: list[int] = []
        self._next = 0

    def take(self, shape: tuple[int, ...]) -> tuple[SlotRef, Tensor]:
        """Memory for uint8 of this shape, of nobody else until it is given back."""
        size = math.prod(shape)
        fitting = [number for number in self._free if self._slots[number].numel() >= size]
        if fitting:
            number = fitting[-1]
            self._free.remove(number)
        else:
            for small in self._free:
                del self._slots[small]
            self._free.clear()
            number, self._next = self._next, self._next + 1
            storage = torch.UntypedStorage._new_shared(size)
            self._slots[number] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        return SlotRef(self._worker, number), self._slots[number][:size].view(shape)

    def give_back(self, slots: tuple[SlotRef, ...]) -> None:
        """Those of other workers are none of ours."""
        for slot in slots:
            if slot.worker == self._worker and slot.number in self._slots and slot.number not in self._free:
                self._free.append(slot.number)
