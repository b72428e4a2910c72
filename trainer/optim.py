"""The optimizer, its update that the device may refuse, and its state as named tensors."""

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig
from trainer.tensors import full


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019). Matrices decay; vectors (biases, norms' scales) do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True
    )
    # AdamW makes its zeros at the first step; made now, a checkpoint can be read into them
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before, the same on every rank."""
    return full(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)).detach()


def step(optimizer: torch.optim.AdamW, learning_rate: float, skip: Tensor) -> None:
    """One update, except where `skip` is 1.0: then weights, moments and the step count stay as they are.

    The fused kernels read the flag on the device (it is the gradient scaler's `found_inf`), so the host never waits.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def state_tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in module.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
