"""Loss spikes: a step whose loss or gradient norm leaves the range of those before it is refused on the device."""

import torch
from torch import Tensor

from trainer.config import SpikeConfig


class SpikeGuard:
    """Mean and deviation over the last accepted steps; every value lives on the device, the same on all ranks.

    The window is part of the checkpoint: a resumed run judges as an undisturbed one.
    """

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self._config = config
        n = config.window_steps
        self._window = torch.zeros(2, n, dtype=torch.float64, device=device)
        """Loss and gradient norm of the last accepted steps."""
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._spikes = torch.zeros(n, dtype=torch.float64, device=device)
        """1 at the steps, modulo the window, that were refused as spikes."""

    def state_tensors(self) -> dict[str, Tensor]:
        return {"window": self._window, "accepted": self._accepted, "spikes": self._spikes}

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """1.0 for a spike, else 0.0. Loss is the global batch's mean. What is not finite is no spike: another check
        refuses it."""
        value = torch.stack([loss, gradient_norm]).double()
        limit = self._window.mean(1) + self._config.sigma * self._window.std(1)
        full = self._accepted >= self._config.window_steps
        return ((value > limit).any() & value.isfinite().all() & full).float()

    def record(self, step: int, loss: Tensor, gradient_norm: Tensor, spike: Tensor, skip: Tensor) -> Tensor:
        """Take an accepted step into the window. Returns the spikes among the last `window_steps` steps, on the device."""
        n = self._config.window_steps
        value = torch.stack([loss, gradient_norm]).double()
        place = (self._accepted % n).expand(2, 1)
        self._window.scatter_(1, place, torch.where(skip > 0, self._window.gather(1, place), value[:, None]))
        self._accepted += (skip == 0).long()
        self._spikes[step % n] = spike.double()
        return self._spikes.sum()

    def begin_phase(self) -> None:
        """Another resolution or loss has another range: judge again once the window is full of steps since."""
        self._accepted.zero_()

    def forget_spikes(self) -> None:
        """After a roll back: the count begins anew, the range stays."""
        self._spikes.zero_()
