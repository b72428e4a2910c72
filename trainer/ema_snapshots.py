"""Snapshots of the power-function averages, in the run folder's ema/ and in the checkpoints' format. What they are for:
`trainer.posthoc_ema`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer import train_state
from trainer.checkpoint import retention
from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import EMAConfig
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.parallel.world import World
from trainer.reports import Reports
from trainer.tensors import locals_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Snapshots:
    """Every call but `due` and `failed` is a collective.

    Each step that is due has one, of the steps that stand: the trainer waits for a snapshot before it saves a checkpoint of
    a later step, and what a start or a roll back does again is removed and written again.
    """

    def __init__(
        self, manager: CheckpointManager, world: World, config: EMAConfig, total_steps: int, ema: EMA, module: nn.Module,
        reports: Reports,
    ) -> None:  # fmt: skip
        assert config.snapshot_steps
        self._manager, self._world, self._total_steps = manager, world, total_steps
        self._every_steps, self._dtype = config.snapshot_steps, DTYPES[config.snapshot_dtype]
        self._ema, self._module, self._reports = ema, module, reports
        self._ranks = Ranks(world.host_group)
        self.step = -1
        """Of the one that was begun last."""

    def due(self, step: int) -> bool:
        """After `step` steps."""
        return step > 0 and (step % self._every_steps == 0 or step == self._total_steps)

    def go_on_from(self, step: int, images: int) -> None:
        """After `step` steps the run begins, or goes on from a checkpoint: later snapshots are of steps that do not stand. The
        one of this very step, if it is missing, is written now.

        Raises, on every rank: as `save`, and what storage says.
        """
        try:
            self._manager.finish()
        except (UserError, CheckpointError) as e:
            # of a step after this one: a checkpoint waits for the snapshots before it
            self._reports.print(f"WARNING: the snapshot of step {self.step} failed, and is made again ({e})")
        self.step = -1
        there = self._ranks.on_rank_0(lambda: self._remove_later(step))
        if self.due(step) and step not in there:
            self.save(step, images)

    def _remove_later(self, step: int) -> list[int]:
        """Steps of those that stay. One that someone holds while reading it is set aside, and removed by a start after that."""
        folder, what = self._manager.folder, "a snapshot of steps that are done again"
        entries = folder.entries()
        for entry in entries:
            if entry.holds:
                if entry.step > step and entry.committed:
                    retention.set_aside(folder, entry.name, what)
            elif entry.step > step or entry.set_aside:
                retention.remove(folder, what, entry.name)
        return [entry.step for entry in entries if entry.committed and entry.step <= step]

    def save(self, step: int, images: int) -> None:
        """Until everything has been copied; it is written in the background. Waits for the one before.

        Raises, on every rank: what the one before raised.
        """
        widths = list(self._ema.profiles)
        self._manager.begin_save(
            self._tensors(step), step=step, images_seen=images,
            state={"profiles": widths, "total_steps": self._total_steps},
        )  # fmt: skip
        self.step = step

    def _tensors(self, step: int) -> Mapping[str, Tensor]:
        averages = train_state.profiles(self._ema)
        rounded = {name: tensor.detach().to(self._dtype) for name, tensor in averages.items()}
        finite = torch.stack([part.isfinite().all() for part in locals_of(rounded.values())]).all().item()
        if self._world.any(not finite):
            dtype = str(self._dtype).removeprefix("torch.")
            self._reports.note(
                f"WARNING: the averages of step {step} have values that {dtype} cannot hold, and their snapshot is in float32; "
                "set ema.snapshot_dtype=bfloat16"
            )
            rounded = averages
        return {**rounded, **{f"model.{name}": tensor for name, tensor in buffers_of(self._module).items()}}

    def finish(self) -> None:
        """Wait for the one in the background.

        Raises, on every rank: what it raised.
        """
        self._manager.finish()

    @property
    def failed(self) -> bool:
        """The one in the background has, on this rank."""
        return self._manager.failed

    def settle(self, timeout_s: float) -> None:
        """Before a process ends with an error."""
        self._manager.settle(timeout_s)


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module beside its parameters, which no average is of."""
    parameters = {name for name, _ in module.named_parameters()}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}
