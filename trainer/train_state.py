"""What a checkpoint holds as tensors: model, average, optimizer, by name."""

from torch import Tensor

from trainer import optim
from trainer.ema import EMA
from trainer.optim import Optimizer
from trainer.spikes import SpikeGuard
from trainer.tasks.base import Task


def tensors(task: Task, ema: EMA, optimizer: Optimizer, spikes: SpikeGuard | None = None) -> dict[str, Tensor]:
    """The run's own tensors, to be written or read into in place: `model.*`, `ema.*`, `optim.*`, `task.*`, `spikes.*`, and
    `profile.WIDTH.*` of the power-function averages."""
    module = task.module
    return {
        **{f"model.{name}": tensor for name, tensor in module.state_dict().items()},
        **{f"ema.{name}": tensor for name, tensor in ema.average.items()},
        **profiles(ema),
        **{f"optim.{name}": tensor for name, tensor in optim.state_tensors(module, optimizer).items()},
        **{f"task.{name}": tensor for name, tensor in task.state_tensors().items()},
        **{f"spikes.{name}": tensor for name, tensor in (spikes.state_tensors() if spikes else {}).items()},
    }


def profiles(ema: EMA) -> dict[str, Tensor]:
    """The power-function averages alone."""
    return {
        f"{profile_prefix(width)}{name}": tensor
        for width, of_profile in ema.profiles.items()
        for name, tensor in of_profile.items()
    }


def profile_prefix(width: float) -> str:
    """Of its tensors' names: `profile.0.05.`."""
    return f"profile.{width!r}."
