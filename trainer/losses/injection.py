"""Losses that depend on the model through z0_hat alone: value and gradient are computed at once, a few samples at a time.

Plainly, the decoder's activations of the whole batch would live from the forward pass to the backward pass. Here they live for
one chunk: its gradient with respect to z0_hat is kept, as large as the latents, and is multiplied by what comes back from the
weighted total. Weights, accumulation and loss scale flow through; a second derivative does not exist.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Value = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(z0_hat of a chunk, its row numbers on the device) -> loss of each of its samples, and named terms."""


def injected(
    z0_hat_BCHW: Tensor,
    rows: Tensor,
    value: Value,
    *,
    term_names: Sequence[str],
    chunk_size: int,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) and terms (B,), 0 but in `rows`; samples that are not in `rows` cost nothing.

    A rank without any row runs nothing and still has a graph. Collectives have no place in `value`.

    Args:
        rows: row numbers (N,) without repeats, on the host.
        value: differentiable in its first argument.
        term_names: of the terms that `value` gives, so that a rank without rows has them too.
        weight_N: factor on each row's loss and terms, on the host.
    """
    assert rows.device.type == "cpu", "row numbers that come from the device would be waited for"
    device_rows = to_device(rows, z0_hat_BCHW.device)
    precise = torch.promote_types(z0_hat_BCHW.dtype, torch.float32)
    weights = None if weight_N is None else to_device(weight_N.to(precise), z0_hat_BCHW.device)
    wants_gradient = torch.is_grad_enabled() and z0_hat_BCHW.requires_grad  # inside the Function it is always disabled
    loss_B, *terms = _Injected.apply(
        z0_hat_BCHW, device_rows, weights, value, tuple(term_names), chunk_size, wants_gradient
    )
    return loss_B, dict(zip(term_names, terms, strict=True))


class _Injected(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        z0_hat: Tensor,
        rows: Tensor,
        weights: Tensor | None,
        value: Value,
        term_names: tuple[str, ...],
        chunk_size: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        terms: dict[str, list[Tensor]] = {name: [] for name in term_names}
        # chunks of equal size, as nearly as can be: fewer shapes, and no last one of a single sample
        for part in rows.tensor_split(-(-len(rows) // chunk_size)) if len(rows) else ():
            with torch.set_grad_enabled(wants_gradient):
                z = z0_hat[part].detach().requires_grad_(wants_gradient)
                loss, named = value(z, part)
                if wants_gradient:
                    gradients += torch.autograd.grad(loss.sum(), z)
            losses.append(loss.detach())
            for name in term_names:
                terms[name].append(named[name].detach())
        zeros = torch.zeros(len(z0_hat), dtype=torch.promote_types(z0_hat.dtype, torch.float32), device=z0_hat.device)

        def spread(parts: list[Tensor]) -> Tensor:
            if not parts:
                return zeros.clone()
            values = torch.cat(parts)
            return zeros.index_copy(0, rows, (values if weights is None else values * weights).to(zeros.dtype))

        spread_terms = [spread(terms[name]) for name in term_names]
        ctx.mark_non_differentiable(*spread_terms)
        gradient = torch.cat(gradients) if gradients else None
        if gradient is not None and weights is not None:
            gradient = gradient * weights.to(gradient.dtype)[:, None, None, None]
        ctx.save_for_backward(rows, gradient)
        ctx.shape, ctx.dtype = z0_hat.shape, z0_hat.dtype
        return spread(losses), *spread_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_B: Tensor, *of_terms: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, gradient = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=ctx.dtype, device=rows.device)
        if gradient is not None:
            weighted = gradient * grad_loss_B[rows].to(gradient.dtype)[:, None, None, None]
            out = out.index_copy(0, rows, weighted.to(ctx.dtype))
        return out, None, None, None, None, None, None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
