"""What a run's owner has the trainer do between steps, and what the device says of a step. Values only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.parallel.world import World
from trainer.progress import Progress
from trainer.readback import Readback

WHOLE_GRADIENT = "the gradient as a whole"
"""Where no image's loss is the cause."""


@dataclass
class Actions:
    """What to do between steps, when it is due; at the end of the run it is the caller's turn. Called on every rank."""

    at_intervals: Sequence[tuple[int, Callable[[int], None]]] = ()
    """Every so many steps, on the averaged weights, given the number of steps done. One that takes long calls
    `Stopping.go_on` between its passes."""
    on_warm_start: Callable[[dict[str, Any]], None] | None = None
    """Given the report of what was loaded, once in a run, before its first step."""
    on_worker_death: Callable[[str], None] | None = None
    """Given which data worker of this rank died, and of what, before the run ends in that error."""
    on_saved: Callable[[Progress, int], None] = lambda progress, step: None
    """Given where the run is, and the step of its newest checkpoint, when it has one more or has been restored from it."""
    name_of_shard: Callable[[str, int], str] = lambda dataset, shard: f"shard {shard} of {dataset}"
    """Given the dataset's name and the shard's number; for messages."""
    after_step: Callable[[int], None] = lambda step: None
    """At once after every step, `step` of them done, before it is reported or saved; in no step's time."""

    def due(self, step: int, total_steps: int) -> list[Callable[[int], None]]:
        """After `step` steps of all."""
        return [action for every, action in self.at_intervals if step % every == 0 and step < total_steps]


@dataclass(frozen=True)
class Verdict:
    """What the device has decided about a step; read by the host one step late."""

    step: int
    flags: Readback
    """skip, spike, recent spikes, gradient norm."""
    keys: list[str]
    loss_B: Tensor

    def bad_images(self, world: World) -> str:
        """The images of all ranks whose loss is not finite, in words. A collective."""
        finite_B = self.loss_B.isfinite().tolist()
        bad = [key for key, finite in zip(self.keys, finite_B, strict=True) if not finite]
        bad = [key for part in world.gather(bad) for key in part]
        return f"images {', '.join(bad[:8])}{' ...' if len(bad) > 8 else ''}" if bad else WHOLE_GRADIENT
