"""What the trainer asks of a task. The trainer knows when; a task knows what a step is."""

from typing import Protocol

from torch import Tensor, nn

from data.loader import Batch
from trainer.step_plan import StepPlan


class Task(Protocol):
    @property
    def module(self) -> nn.Module:
        """All that is trained, under one root."""

    @property
    def captions_cut(self) -> int:
        """Captions so far that were longer than the text encoder takes."""

    def sharding_units(self) -> list[nn.Module]:
        """Submodules that are gathered one at a time."""

    def check(self) -> list[str]:
        """Refuse a config that cannot work in some phase, before the first step; returns warnings to print.

        Raises:
            UserError: naming the field.
        """

    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        """Gradients of `scale` times the batch's summed loss, added to the parameters'.

        Returns each loss term, detached, one value a sample; `loss` is the weighted whole.
        """
