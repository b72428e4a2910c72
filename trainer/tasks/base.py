"""What the trainer asks of a task. The trainer knows when; a task knows what a step is."""

from abc import ABC, abstractmethod
from collections.abc import Collection

from torch import Tensor, nn

from data.batches import Batch
from trainer.config import PhaseConfig
from trainer.stage_times import NO_STAGES, NoStages
from trainer.step_plan import StepPlan


class Task(ABC):
    module: nn.Module
    """All that is trained, under one root."""
    captions_cut: int = 0
    """Captions so far that were longer than the text encoder takes."""
    stages: NoStages = NO_STAGES
    """Where `forward_backward` marks the stages of `metric_names.STAGES`; a trainer gives its own."""

    @abstractmethod
    def sharding_units(self) -> list[nn.Module]:
        """Submodules of `module` that are gathered one at a time."""

    def frozen_sharded(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Modules that are not trained and sharded all the same, each with its units."""
        return []

    @abstractmethod
    def check(self) -> list[str]:
        """Refuse a config that cannot work in some phase, before the first step; returns warnings to print.

        Raises:
            UserError: naming the field.
        """

    def check_side(self, phase: PhaseConfig, side_px: int) -> None:  # noqa: B027
        """Refuse images whose shorter side is this, beside what `check` and the config refuse of squares.

        Raises:
            UserError: naming the field.
        """

    def after_warm_start(self, loaded: Collection[str]) -> None:  # noqa: B027
        """Refuse weights of `init_from` that leave fresh what must not be; begin what goes with those that are there. On all
        ranks. `loaded`: names of the module's tensors.

        Raises:
            UserError: naming the field.
        """

    def begins_another_loss(self, plan: StepPlan) -> bool:
        """Whether within a phase the loss has another range from this step on, so that none before is its measure."""
        return False

    def begin_step(self, plan: StepPlan) -> None:  # noqa: B027
        """Before the first of a step's micro-batches."""

    @abstractmethod
    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        """Gradients of `scale` times the batch's summed loss, added to the parameters'.

        Returns each loss term, detached, one value a sample; `loss` is the weighted whole. The names are the same on every
        rank and in every micro-batch of a step.
        """

    def noise_levels(self) -> tuple[Tensor, Tensor] | None:
        """Of the step's samples, given once: (share of the diffusion's time, 0 without noise; denoising loss), each (B,)
        on the device; None where nothing is denoised."""
        return None

    def own_gradient_norm(self, plan: StepPlan) -> Tensor | None:
        """After a step's last micro-batch: the global norm of the gradients that the task steps with itself in `end_step`,
        reduced over ranks here; None where there are none. A step where it is not finite is refused as a whole."""
        return None

    def end_step(self, plan: StepPlan, keep: Tensor) -> None:  # noqa: B027
        """After the optimizer's step and before the average's, on all ranks. `keep`: 1.0 where the step counts, 0.0 where it
        was refused, on the device."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the module, written and read in place; equal on all ranks, or sharded."""
        return {}
