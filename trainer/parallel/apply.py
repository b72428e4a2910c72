"""Sharding, recomputation and compilation, from outside the model. One `apply_*` each; `parallelize` holds their order.

None of them renames a parameter, so a checkpoint fits every layout.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trainer.config import ParallelConfig
from trainer.parallel.world import World

aten = torch.ops.aten
KEPT_OPERATIONS: list[Any] = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""What `selective` keeps: nearly all of a block's arithmetic. What it recomputes (norms, modulation, activations) is
cheap to compute, and with the inputs of the kept ones most of its memory."""

COMPILED_VARIANTS = 64
"""Times that one piece of code may be compiled. Blocks alike share theirs; what makes new ones is finite: another kind of
block, the second image size (from then on sizes are symbols), training or sampling. torch stops at 8, for good."""


def parallelize(
    module: nn.Module, units: Iterable[nn.Module], world: World, config: ParallelConfig | None = None
) -> None:
    """Make `module` ready to train on all ranks; `units`, its blocks, are recomputed, compiled, gathered and freed one at a
    time.

    Every rank must hold the same weights: initialise from the run's seed before this.
    """
    config, units = config or ParallelConfig(), list(units)
    module.to(world.device)
    # The compiler sees what is recomputed and plans memory with it; it sees nothing of sharding, whose hooks stay outside.
    apply_activation_checkpointing(units, config.activation_checkpointing)
    if config.compile:
        apply_compile(units)
    if world.size > 1 or config.shard_one_rank:
        apply_fsdp(
            module, units, world, reshard_after_forward=config.reshard_after_forward and not config.keep_gathered
        )


def apply_activation_checkpointing(units: Sequence[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Recompute in the backward pass (Chen et al. 2016): each unit as a whole, or all of it but `KEPT_OPERATIONS`."""
    if mode == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
    options = {"context_fn": contexts} if mode == "selective" else {}
    for unit in units:
        unit.forward = _recomputed(unit.forward, options)  # torch's wrapper module would rename parameters


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return recomputed


def apply_compile(units: Sequence[nn.Module]) -> None:
    """Block by block: blocks alike are compiled once, and collectives stay between them."""
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    for unit in units:
        unit.compile()


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far, forward and backward passes."""
    # it costs seconds to import, and where nothing has imported it nothing has compiled
    compiler: Any = sys.modules.get("torch._dynamo.utils")
    return float(compiler.calculate_time_spent()["total_wall_time"]) if compiler else 0.0


def apply_fsdp(module: nn.Module, units: Sequence[nn.Module], world: World, *, reshard_after_forward: bool) -> None:
    """FSDP2: float32 parameters sharded over `world.mesh`. bf16 is the autocast's business: master weights stay float32."""
    for unit in units:
        fully_shard(unit, mesh=world.mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=world.mesh)  # the root's own parameters stay gathered: backward needs them at once


def begin_micro_batch(module: nn.Module, *, last: bool, keep_gathered: bool) -> None:
    """Before each micro-batch of a step: gradients are reduced after the last alone, and with `keep_gathered` parameters
    stay gathered until then."""
    if not isinstance(module, FSDPModule):  # of one rank
        return
    module.set_requires_gradient_sync(last)
    if keep_gathered:
        module.set_reshard_after_backward(last)


def reshard(module: nn.Module) -> None:
    """Free what a forward pass without backward has left gathered: FSDP2 keeps the root's parameters, and the next pass
    would compute with those instead of the shards, which may have changed since."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, float32 on CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
