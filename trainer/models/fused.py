"""Normalisations with backward passes of their own, which recompute what autograd would keep and take fewer passes over
memory. A compiler sees through them and fuses as it would without.

B batch, N tokens of one stream, S of all streams, M streams, D width, H heads, d a head's channels. Norms compute in float32.
Gradients that nobody asks for, a frozen network's, are not computed, and nothing is kept for them.
"""

from typing import Any

import torch
from torch import Tensor


class ModulatedNorm(torch.autograd.Function):
    """Layer norm without weights, then adaptive scale and shift (Peebles & Xie 2023), float32. Keeps its input alone, and
    recomputes the normalised one."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
        normal_BND, mean_BN1, rstd_BN1 = torch.native_layer_norm(x_BND.float(), x_BND.shape[-1:], None, None, eps)
        ctx.save_for_backward(x_BND, mean_BN1, rstd_BN1, scale_BD)
        ctx.dtypes = x_BND.dtype, shift_BD.dtype, scale_BD.dtype
        return normal_BND.mul_(_factor(scale_BD)).add_(shift_BD.float()[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_BND = gradients[0].float()
        x_BND, mean_BN1, rstd_BN1, scale_BD = ctx.saved_tensors
        of_x, of_shift, of_scale = ctx.dtypes
        x = shift = scale = None
        if ctx.needs_input_grad[0]:
            x, _, _ = torch.ops.aten.native_layer_norm_backward(
                gradient_BND * _factor(scale_BD), x_BND.float(), x_BND.shape[-1:], mean_BN1, rstd_BN1, None, None,
                [True, False, False],
            )  # fmt: skip
            x = x.to(of_x)
        if ctx.needs_input_grad[1]:
            shift = gradient_BND.sum(1).to(of_shift)
        if ctx.needs_input_grad[2]:
            normal_BND = (x_BND.float() - mean_BN1).mul_(rstd_BN1)
            scale = normal_BND.mul_(gradient_BND).sum(1).to(of_scale)  # in place: three buffers do not fit the cache
        return x, shift, scale, None


def _factor(scale_BD: Tensor) -> Tensor:
    return 1 + scale_BD.float()[:, None]


class Gated(torch.autograd.Function):
    """Residual stream plus a gated branch, in one pass over both, and one each in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, gate_BD: Tensor, branch_BND: Tensor) -> Tensor:
        ctx.dtypes = gate_BD.dtype, branch_BND.dtype
        _, for_gate, for_branch = ctx.needs_input_grad
        ctx.save_for_backward(gate_BD if for_branch else None, branch_BND if for_gate else None)
        return torch.addcmul(x_BND, gate_BD[:, None], branch_BND)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BND,) = gradients
        gate_BD, branch_BND = ctx.saved_tensors
        of_gate, of_branch = ctx.dtypes
        gate = None if branch_BND is None else (gradient_BND * branch_BND).sum(1).to(of_gate)
        branch = None if gate_BD is None else (gradient_BND * gate_BD[:, None]).to(of_branch)
        return gradient_BND, gate, branch


class JoinedHeads(torch.autograd.Function):
    """Queries, keys and values of M streams of tokens as those of one, queries and keys normalised by head (RMS: Zhang &
    Sennrich 2019) with each stream's own weights.

    Keeps the joined projections and one number a head, and neither what a norm was given nor what it gave.
    """

    @staticmethod
    def forward(ctx: Any, num_heads: int, eps: float, weights_M2d: Tensor, *projected: Tensor) -> tuple[Tensor, ...]:
        """`projected`: (B, N, 3 H d) of each stream. Three tensors (B, H, S, d)."""
        ctx.lengths = [x.shape[1] for x in projected]
        joined = projected[0] if len(projected) == 1 else torch.cat(projected, dim=1)
        joined_BS3Hd = joined.unflatten(-1, (3, num_heads, -1))
        raw_BS2Hd = joined_BS3Hd[:, :, :2]
        normal_BS2Hd = raw_BS2Hd.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        norm = torch.linalg.vector_norm(normal_BS2Hd, dim=-1, keepdim=True)
        rstd = norm.square_().div_(normal_BS2Hd.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(joined_BS3Hd, rstd, weights_M2d)
        _weigh(normal_BS2Hd.mul_(rstd), weights_M2d, ctx.lengths)
        normal_BS2Hd = normal_BS2Hd.to(joined.dtype)
        heads = normal_BS2Hd[:, :, 0], normal_BS2Hd[:, :, 1], joined_BS3Hd[:, :, 2]
        return tuple(x.transpose(1, 2) for x in heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        joined_BS3Hd, rstd, weights_M2d = ctx.saved_tensors
        q, k, v = (x.transpose(1, 2) for x in gradients)
        along_BS2Hd = torch.stack([q, k], dim=2).float()
        normal_BS2Hd = joined_BS3Hd[:, :, :2].float() * rstd
        product_BS2Hd = along_BS2Hd * normal_BS2Hd
        weights_M2d_gradient = None
        if ctx.needs_input_grad[2]:
            parts = product_BS2Hd.sum(0).split(ctx.lengths)
            weights_M2d_gradient = torch.stack([part.sum((0, 2)) for part in parts]).to(weights_M2d.dtype)
        _weigh(along_BS2Hd, weights_M2d, ctx.lengths)
        _weigh(product_BS2Hd, weights_M2d, ctx.lengths)
        mean = product_BS2Hd.sum(-1, keepdim=True).div_(product_BS2Hd.shape[-1])
        raw_BS2Hd = along_BS2Hd.addcmul_(normal_BS2Hd, mean, value=-1).mul_(rstd)
        out = []
        for part, of_v in zip(raw_BS2Hd.split(ctx.lengths, 1), v.split(ctx.lengths, 1), strict=True):
            out.append(torch.cat([part.to(of_v.dtype), of_v[:, :, None]], dim=2).flatten(2))
        return None, None, weights_M2d_gradient, *out


def _weigh(x_BS2Hd: Tensor, weights_M2d: Tensor, lengths: list[int]) -> None:
    """By each stream's weights, in place."""
    num_heads = x_BS2Hd.shape[3]
    for part, weight_2d in zip(x_BS2Hd.split(lengths, dim=1), weights_M2d.float(), strict=True):
        part.flatten(2).mul_(
            weight_2d[:, None].expand(-1, num_heads, -1).flatten()
        )  # long rows are faster than short ones
