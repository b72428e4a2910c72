"""Exponential moving average of the weights: float32, sharded as the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.tensors import locals_of


class EMA:
    """ema <- ema + (1 - decay) (weights - ema), for the trainable parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())
        self.average: dict[str, Tensor] = {
            name: parameter.detach().clone().float() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, decay: float, skip: Tensor) -> None:
        """`skip` is 1.0 on the device where this step's update was skipped: then nothing moves, and the host needn't know."""
        average = locals_of(self.average.values())
        difference = torch._foreach_sub(locals_of(self._parameters.values()), average)
        torch._foreach_mul_(difference, (1.0 - decay) * (1.0 - skip))
        torch._foreach_add_(average, difference)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within, the module computes with the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        weights, average = locals_of(self._parameters.values()), locals_of(self.average.values())
        kept = [w.clone() for w in weights]
        torch._foreach_copy_(weights, average)
        torch._foreach_copy_(average, kept)
