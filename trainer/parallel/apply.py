"""Sharding, from outside the model. One `apply_*` each; `parallelize` holds their order."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from trainer.parallel.world import World


def parallelize(module: nn.Module, units: Iterable[nn.Module], world: World) -> None:
    """Make `module` ready to train on all ranks; `units` are gathered and freed one at a time during a pass.

    Every rank must hold the same weights: initialise from the run's seed before this.
    """
    module.to(world.device)
    apply_fsdp(module, units, world)


def apply_fsdp(module: nn.Module, units: Iterable[nn.Module], world: World) -> None:
    """FSDP2: float32 parameters sharded over all ranks. bf16 is the autocast's business, so master weights stay float32."""
    for unit in units:
        fully_shard(unit, mesh=world.mesh)
    fully_shard(module, mesh=world.mesh)


def reshard(module: nn.Module) -> None:
    """Free what a forward pass without backward has left gathered: FSDP2 keeps the root's parameters, and the next pass
    would compute with those instead of the shards, which may have changed since."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Off during all but the last micro-batch: gradients are reduced once a step."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(enabled)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, float32 on CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
