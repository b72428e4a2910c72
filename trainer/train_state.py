"""What a checkpoint holds as tensors: model, average, optimizer, by name."""

from torch import Tensor, nn
from torch.optim import AdamW

from trainer import optim
from trainer.ema import EMA


def tensors(module: nn.Module, ema: EMA, optimizer: AdamW) -> dict[str, Tensor]:
    """The run's own tensors, to be written or read into in place: `model.*`, `ema.*`, `optim.*`."""
    return {
        **{f"model.{name}": tensor for name, tensor in module.state_dict().items()},
        **{f"ema.{name}": tensor for name, tensor in ema.average.items()},
        **{f"optim.{name}": tensor for name, tensor in optim.state_tensors(module, optimizer).items()},
    }
