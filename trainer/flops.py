"""What a step has to compute, counted, and what the device could: the two sides of the MFU.

Counted are the operations of matrix products, convolutions and attention, by torch's formulas, that the step asks for: each
once, however the run is laid out. Recomputation (`parallel.activation_checkpointing`) is not in it.

- The trained module, forward and backward, on a twin of it on the meta device, with the shapes of the step's own arguments. The
  step itself runs under no counter: the compiler skips for good what is once called under a dispatch mode, and numbers must not
  depend on whether something is counted.
- Encoder, frozen text encoders, and losses that take their gradient within their forward pass (`trainer.losses.injection`, and
  stage 1's with its discriminator): as they run in the first step of each shape.
"""

import copy
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainer.errors import one_line
from trainer.stage_times import Stages

PARTS = ("model", "encoder", "text", "perceptual_loss", "discriminator")
_ATEN = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # what attention is called on a CPU, of which torch has no formula
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class Flops(TorchDispatchMode):
    """torch's formulas for each operation that runs. Its own `FlopCounterMode` follows modules as well, by hooks that do not
    go with `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


# -------------------------------------------------------------------------------------------------------- a module's twin


def meta_twin(module: nn.Module) -> nn.Module:
    """The same module without values, float32: it takes no memory and knows all sizes. To be taken before anything shards,
    recomputes or compiles the module."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        twin = torch.empty_like(parameter, device="meta", dtype=_dtype(parameter))
        memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta", dtype=_dtype(buffer))
    return copy.deepcopy(module, memo)


def _dtype(tensor: Tensor) -> torch.dtype:
    # no autocast sees meta tensors, so of several precisions one is made; the count is the same
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _without_values(value: Any) -> Any:
    """An argument with its tensors on the meta device."""
    if isinstance(value, Tensor):
        out = torch.empty(value.shape, device="meta", dtype=_dtype(value))
        return out.requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_without_values(item) for item in value)
    if isinstance(value, dict):
        return {name: _without_values(item) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            field.name: _without_values(getattr(value, field.name))
            for field in fields(value)
            if isinstance(getattr(value, field.name), Tensor)
        }
        return replace(value, **changed)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wants_gradient: bool


def flops_of_call(twin: nn.Module, call: Call) -> int:
    """Of a call of the module: its forward pass, and its backward pass where it has one."""
    with Flops() as counted, torch.set_grad_enabled(call.wants_gradient):
        out = twin(*call.args, **call.kwargs)
        ends = [tensor for tensor in _tensors(out) if tensor.requires_grad]
        if call.wants_gradient and ends:
            given = [*_tensors(call.args), *_tensors(list(call.kwargs.values()))]
            leaves = [tensor for tensor in (*given, *twin.parameters()) if tensor.requires_grad]
            torch.autograd.grad([end.sum() for end in ends], leaves, allow_unused=True)
    return counted.total


# ----------------------------------------------------------------------------------------------------------- a step's count


@dataclass(frozen=True)
class Count:
    """Of one rank's step."""

    parts: Mapping[str, float]
    seconds: float
    """What counting took."""
    trouble: str | None = None
    """Why something is not in it."""


class StepFlops:
    """Counts a step of each kind once, at the first one. Make it before the modules are sharded; `attach` after."""

    def __init__(self, trained: nn.Module | None = None, frozen_sharded: Sequence[nn.Module] = ()) -> None:
        """
        Args:
            trained: None: nothing is counted.
            frozen_sharded: which a loss calls, and no counter may see either.
        """
        self.enabled = trained is not None
        self.kind: Hashable = None
        """Of the step that is being made."""
        self._era = 0
        self._modules = {"model": trained} if trained is not None else {}
        self._modules |= {f"frozen {i}": module for i, module in enumerate(frozen_sharded)}
        self._twins: dict[str, nn.Module] = {}
        self._trouble: str | None = None
        self.counts: dict[Hashable, Count] = {}
        self._calls: list[tuple[str, Call]] = []
        self._running: dict[str, float] | None = None
        self._within: list[str] = []
        begun = time.perf_counter()
        try:
            self._twins = {name: meta_twin(module) for name, module in self._modules.items()}
        except Exception as e:  # whatever a module holds that cannot be copied: the run needs no count
            self._trouble = one_line(e)
        self._twin_s = time.perf_counter() - begun

    def attach(self) -> None:
        """Listen to the modules' calls."""
        for name, module in self._modules.items():
            # in front of sharding's own hooks, which change what the module is given
            module.register_forward_pre_hook(self._listener(name), prepend=True, with_kwargs=True)

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running is not None:
                call = Call(_without_values(args), _without_values(kwargs), torch.is_grad_enabled())
                self._calls.append((name, call))

        return listen

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within is counted as it runs."""
        if self._running is None or (name == "perceptual_loss" and len(self._modules) > 1):
            # such a loss calls sharded modules, and they are counted by their twins
            yield
            return
        self._within.append(name)
        with Flops() as counted:
            yield
        self._within.pop()
        self._running[name] = self._running.get(name, 0.0) + counted.total
        if self._within:
            # the outer counter has seen it too
            outer = self._within[-1]
            self._running[outer] = self._running.get(outer, 0.0) - counted.total

    def begin_step(self, *kind: Hashable, another_loss: bool) -> None:
        """`kind`: steps with the same one have as much to compute, until a step begins with another loss; but for captions,
        where the padding behind the longest is left out."""
        self._era += another_loss
        self.kind = (self._era, *kind)

    def counting(self, stages: Stages, num_micro_batches: int) -> AbstractContextManager[None]:
        """Around a micro-batch of the step: the first one of a new kind is counted, and stands for all of its step."""
        return (
            self._counting(stages, num_micro_batches)
            if self.enabled and self.kind not in self.counts
            else nullcontext()
        )

    @contextmanager
    def _counting(self, stages: Stages, num_micro_batches: int) -> Iterator[None]:
        self._running, stages.counting = {}, self
        self._calls.clear()
        try:
            yield
            parts, begun = self._running, time.perf_counter()
        finally:
            self._running = stages.counting = None
        trouble = self._trouble
        try:
            for name, call in self._calls if not trouble else ():
                part = "model" if name == "model" else "perceptual_loss"
                parts[part] = parts.get(part, 0.0) + flops_of_call(self._twins[name], call)
        except Exception as e:  # an operation that knows no meta device: the run needs no count
            trouble = one_line(e)
        self._calls.clear()
        whole = {name: value * num_micro_batches for name, value in parts.items() if value}
        seconds = time.perf_counter() - begun + (0.0 if self.counts else self._twin_s)
        self.counts[self.kind] = Count(whole, seconds, trouble)
