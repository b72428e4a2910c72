"""The optimizer: its update that the device may refuse, the gradients' norm, how far an update moves, and its state as
named tensors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import OptimConfig
from trainer.models.parameter_groups import parameter_groups
from trainer.tensors import local, locals_of


@dataclass(frozen=True)
class Optimizer:
    parts: tuple[torch.optim.Optimizer, ...]
    """AdamW, or Muon for some parameters and AdamW for the others."""
    reads_flag: bool
    """The kernels read the flag of a refused update on the device; otherwise the host waits for it."""


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for matrices; decay by named groups."""
    adamw: list[dict[str, object]] = []
    muon: list[dict[str, object]] = []
    for group, named in parameter_groups(module).items():
        decay = config.weight_decay if group in config.decay_groups else 0.0
        is_muon = config.kind == "muon" and group == "matrices"
        orthogonal = [p for p in named.values() if is_muon and p.dim() == 2]  # torch's Muon takes no convolutions
        others = [p for p in named.values() if not (is_muon and p.dim() == 2)]
        if orthogonal:
            muon.append({"params": orthogonal, "weight_decay": decay, "name": group})
        if others:
            adamw.append({"params": others, "weight_decay": decay, "name": group})
    fused = config.implementation == "fused"
    parts: list[torch.optim.Optimizer] = []
    if adamw:
        parts.append(
            torch.optim.AdamW(adamw, lr=0.0, betas=config.betas, eps=config.eps, fused=fused, foreach=not fused)
        )
    if muon:
        parts.append(torch.optim.Muon(muon, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    for part in parts:
        _make_state(part, fused)
    return Optimizer(tuple(parts), reads_flag=fused and not muon)


def _make_state(part: torch.optim.Optimizer, fused: bool) -> None:
    """torch makes its zeros at the first step; made now, a checkpoint can be read into them."""
    for parameter in (p for group in part.param_groups for p in group["params"]):
        if isinstance(part, torch.optim.Muon):
            part.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            continue
        part.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def squared_gradient_norm(module: nn.Module) -> Tensor:
    """This rank's share: those of all ranks add up to the square of the global norm. float64, on the device."""
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.grad is not None:
            by_copies.setdefault(_copies(parameter.grad), []).append(local(parameter.grad))
    squares = [_sum_of_squares(gradients) / copies for copies, gradients in by_copies.items()]
    return torch.stack(squares).sum()


def _copies(tensor: Tensor) -> int:
    """Ranks that hold the same part."""
    if not isinstance(tensor, DTensor):
        return _num_ranks()
    placed = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in placed if placement.is_replicate())


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gradient_norm(module: nn.Module) -> Tensor:
    """Of all gradients together, float32, the same on every rank. A collective."""
    squares = squared_gradient_norm(module)
    if _num_ranks() > 1:
        dist.all_reduce(squares)
    return squares.sqrt().float()


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """By which gradients of this norm come to one of at most `max_norm`: 1 or more, NaN where the norm is."""
    return (norm / max_norm).clamp(min=1.0)


def step(optimizer: Optimizer, learning_rate: float, skip: Tensor, divisor: Tensor | None = None) -> None:
    """One update with the gradients, over `divisor` where there is one; except where `skip` is 1.0: then weights, moments and
    the step count stay as they are.

    AdamW's fused kernels read both on the device, in their one pass over the gradients (they are the gradient scaler's
    `found_inf` and `grad_scale`), so the host never waits; for the others it does.
    """
    refused = False if optimizer.reads_flag else bool(skip.item())
    for part in optimizer.parts:
        for group in part.param_groups:
            group["lr"] = learning_rate
        if optimizer.reads_flag:
            part.found_inf, part.grad_scale = skip, divisor  # type: ignore[attr-defined]
        elif divisor is not None and not refused:
            gradients = [p.grad for group in part.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_([*map(local, gradients)], divisor)
        if not refused:
            part.step()
        part.zero_grad(set_to_none=True)


def state_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`; Muon's `.momentum_buffer`."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in module.named_parameters()
        for part in optimizer.parts
        for key, tensor in part.state.get(parameter, {}).items()
    }


class UpdateRatio:
    """Norm of one step's update over the norm of the weights: about 1e-3 is usual; far above, the rate is too high.

    Measured at the steps that report, with one copy of this rank's shard; nothing waits for the device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._value: Tensor | None = None

    @contextmanager
    def measured(self, due: bool) -> Iterator[None]:
        """Around the optimizer's step. A collective when `due`."""
        if not due:
            yield
            return
        weights = locals_of(self._module.parameters())
        before = [w.clone() for w in weights]
        yield
        moved = torch._foreach_sub(weights, before)
        squares = torch.stack([_sum_of_squares(moved), _sum_of_squares(before)])
        dist.all_reduce(squares)  # replicas are counted as often above as below
        self._value = (squares[0] / squares[1]).sqrt()

    def take(self) -> float | None:
        """The last one measured, None where the step was refused; waits for the device."""
        value, self._value = self._value, None
        return (value.item() or None) if value is not None else None


def _sum_of_squares(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
