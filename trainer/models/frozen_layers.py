"""Layers that are never trained and still pass gradients on: they keep less for the backward pass, and compute less.

- A convolution in torch keeps its input, even where the weight wants no gradient. Here it keeps its weight alone.
- Group norm followed by SiLU keeps the input and not what lies between the two.
- Nearest upsampling by 2 and a 3x3 convolution after it are one transposed convolution: each output pixel sees 2x2 distinct
  input pixels, not 3x3, so it costs 4/9.

Shapes: BCHW, G groups, h and w before upsampling. Weights are buffers: nothing can ask for their gradient.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._prims_common
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._triton import has_triton


@dataclass(frozen=True)
class Savings:
    """Which of them; fewer is for measuring what each brings."""

    weight_only: bool = True
    """Convolutions that keep only their weights, group norms that keep only their inputs."""
    phase_convolution: bool = True
    channels_last: bool = True
    compile_norms: bool = True
    """One kernel for each pass of group norm and SiLU, where there is a GPU and Triton."""


ON_CPU = ("cpu",)
"""Devices whose group norm is torch's own."""

ALL_SAVINGS = Savings()
NO_SAVINGS = Savings(weight_only=False, phase_convolution=False, channels_last=False, compile_norms=False)


def frozen_chain(modules: Iterable[nn.Module], savings: Savings = ALL_SAVINGS) -> nn.Sequential:
    """Frozen copies of modules that run one after another."""
    chain = list(modules)
    copies: list[nn.Module] = []
    while chain:
        first, *chain = chain
        if chain and _is_nearest_by_2(first) and _is_plain(chain[0], kernel=3) and savings.phase_convolution:
            copies.append(PhaseConv(chain.pop(0), savings))  # type: ignore[arg-type]
        elif chain and isinstance(first, nn.GroupNorm) and isinstance(chain[0], nn.SiLU) and savings.weight_only:
            copies.append(FrozenNorm(first, savings, silu=True))
            chain.pop(0)
        else:
            copies.append(frozen(first, savings))
    return nn.Sequential(*copies)


def frozen(module: nn.Module, savings: Savings = ALL_SAVINGS) -> nn.Module:
    """A frozen copy of a module, whose layers are replaced where a cheaper one computes the same."""
    if isinstance(module, nn.Sequential):
        return frozen_chain(module, savings)
    if isinstance(module, Upsample2D) and _is_nearest_by_2(module) and savings.phase_convolution:
        assert isinstance(module.conv, nn.Conv2d)
        return PhaseConv(module.conv, savings)
    if savings.weight_only:
        if isinstance(module, ResnetBlock2D) and _is_simple(module):
            return FrozenResnetBlock(module, savings)
        if isinstance(module, nn.GroupNorm) and module.affine:
            return FrozenNorm(module, savings, silu=False)
        if _is_plain(module):
            assert isinstance(module, nn.Conv2d)
            return FrozenConv(module, savings)
    # deepcopy takes what the memo holds for a child that it comes across
    children = {id(child): frozen(child, savings) for child in module.children()}
    twin: nn.Module = copy.deepcopy(module, children)  # type: ignore[arg-type]
    twin.requires_grad_(False)
    if savings.channels_last:
        twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return twin


# ------------------------------------------------------------------------------------------------------------- layers


class FrozenConv(nn.Module):
    """Stride 1, zero padding."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, savings: Savings = ALL_SAVINGS) -> None:
        super().__init__()
        assert _is_plain(conv), conv
        assert isinstance(conv.padding, tuple)
        self.padding = conv.padding
        self.register_buffer("weight", _laid_out(conv.weight, savings))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = _Conv.apply(x_BCHW, self.weight, self.bias, 1, self.padding, False)
        return y_BCHW


class PhaseConv(nn.Module):
    """Nearest upsampling by 2, then a 3x3 convolution with a padding of 1."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, savings: Savings = ALL_SAVINGS) -> None:
        super().__init__()
        assert _is_plain(conv, kernel=3), conv
        self.weight_only = savings.weight_only
        self.register_buffer("weight", _laid_out(phase_weight(conv.weight), savings))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    def forward(self, x_BChw: Tensor) -> Tensor:
        if not self.weight_only:
            return F.conv_transpose2d(x_BChw, self.weight, self.bias, stride=2, padding=1)
        y_BCHW: Tensor = _Conv.apply(x_BChw, self.weight, self.bias, 2, (1, 1), True)
        return y_BCHW


def phase_weight(weight_OIKK: Tensor) -> Tensor:
    """The transposed convolution (I, O, 4, 4), stride 2, padding 1, that equals upsampling and this 3x3 convolution.

    Along one side the output is y[n] = sum_k w[k] x[(n + k - 1) // 2], of a transposed convolution with weights v it is
    y[n] = sum_i v[n + 1 - 2 i] x[i]; so v[j] = w[2 - j] + w[3 - j].
    """
    sums_JK = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64, device=weight_OIKK.device)
    weight_IOJJ = torch.einsum("jk,ml,oikl->iojm", sums_JK, sums_JK, weight_OIKK.detach().double())
    return weight_IOJJ.to(weight_OIKK.dtype)


class FrozenNorm(nn.Module):
    """Group norm, and SiLU where asked; statistics in float32 at least."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm, savings: Savings = ALL_SAVINGS, *, silu: bool) -> None:
        super().__init__()
        self.num_groups, self.eps, self.silu, self.compiled = norm.num_groups, norm.eps, silu, savings.compile_norms
        self.register_buffer("weight", norm.weight.detach().clone())
        self.register_buffer("bias", norm.bias.detach().clone())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = _NormSiLU.apply(
            x_BCHW, self.weight, self.bias, self.num_groups, self.eps, self.silu, self.compiled
        )
        return y_BCHW


class FrozenResnetBlock(nn.Module):
    """diffusers' `ResnetBlock2D` without a time embedding."""

    def __init__(self, block: ResnetBlock2D, savings: Savings = ALL_SAVINGS) -> None:
        super().__init__()
        self.norm1 = FrozenNorm(block.norm1, savings, silu=True)
        self.conv1 = frozen(block.conv1, savings)
        self.norm2 = FrozenNorm(block.norm2, savings, silu=True)
        self.conv2 = frozen(block.conv2, savings)
        self.shortcut = nn.Identity() if block.conv_shortcut is None else frozen(block.conv_shortcut, savings)

    def forward(self, x_BCHW: Tensor, temb: None = None) -> Tensor:
        h = self.conv1(self.norm1(x_BCHW))
        y_BCHW: Tensor = self.shortcut(x_BCHW) + self.conv2(self.norm2(h))
        return y_BCHW


# ---------------------------------------------------------------------------------------------------------- their passes


class _Conv(torch.autograd.Function):
    """A convolution, or a transposed one of stride 2. Each is the other's gradient with respect to its input, with the same
    weight, so nothing else is kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Any, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.transposed = stride, padding, transposed
        with as_it_is(x):
            convolution = F.conv_transpose2d if transposed else F.conv2d
            return convolution(x, weight, bias, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        with as_it_is(gradient):
            convolution = F.conv2d if ctx.transposed else F.conv_transpose2d
            back = convolution(gradient, weight, stride=ctx.stride, padding=ctx.padding)
        return back, None, None, None, None, None


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, compiled: bool
    ) -> Tensor:
        run = _kernel(norm_silu, compiled and x.is_cuda)
        y, mean_BG, rstd_BG = run(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, mean_BG, rstd_BG, weight, bias)
        ctx.silu, ctx.compiled = silu, compiled and x.is_cuda
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        back = _kernel(norm_silu_gradient, ctx.compiled)(gradient, *ctx.saved_tensors, ctx.silu)
        return back, None, None, None, None, None, None


def norm_silu(
    x: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised and activated, mean (B, G), 1 / deviation (B, G)) of x (B, C, ...)."""
    if x.device.type in ON_CPU:
        return _norm_silu_cpu(x, weight_C, bias_C, groups, eps, silu)
    # torch's own on a GPU would bring channels-last maps into another order, and back again for the convolution
    dense = x.to(torch.promote_types(x.dtype, torch.float32))
    var_BG, mean_BG = torch.var_mean(dense.unflatten(1, (groups, -1)).flatten(3), (2, 3), correction=0)
    rstd_BG = (var_BG + eps).rsqrt()
    y = _affine(dense, mean_BG, rstd_BG, weight_C, bias_C)
    return (F.silu(y) if silu else y).to(x.dtype), mean_BG, rstd_BG


def norm_silu_gradient(
    gradient: Tensor, x: Tensor, mean_BG: Tensor, rstd_BG: Tensor, weight_C: Tensor, bias_C: Tensor, silu: bool
) -> Tensor:
    """Of the loss with respect to x; what lies between norm and activation is computed anew."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dense, gradient = x.to(dtype), gradient.to(dtype)
    if silu:
        y = _affine(dense, mean_BG, rstd_BG, weight_C, bias_C)
        gradient = torch.ops.aten.silu_backward(gradient, y)
    if x.device.type in ON_CPU:
        return _norm_gradient_cpu(gradient, dense, mean_BG, rstd_BG, weight_C).to(x.dtype)
    groups = mean_BG.shape[1]
    gradient_BGK, x_BGK = (
        t.unflatten(1, (groups, -1)).flatten(3) for t in (gradient * _along(weight_C.to(dtype), x), dense)
    )
    mean, rstd = mean_BG[:, :, None, None], rstd_BG[:, :, None, None]
    normal_BGK = (x_BGK - mean) * rstd
    along = (gradient_BGK * normal_BGK).mean((2, 3), keepdim=True)
    back = rstd * (gradient_BGK - gradient_BGK.mean((2, 3), keepdim=True) - normal_BGK * along)
    return back.unflatten(3, x.shape[2:]).flatten(1, 2).to(x.dtype)


def _affine(dense: Tensor, mean_BG: Tensor, rstd_BG: Tensor, weight_C: Tensor, bias_C: Tensor) -> Tensor:
    """Group norm from its statistics, which are wide enough a type to compute in."""
    each = dense.shape[1] // mean_BG.shape[1]
    mean_BC, rstd_BC = (t.to(dense.dtype).repeat_interleave(each, 1) for t in (mean_BG, rstd_BG))
    scale_BC = rstd_BC * weight_C.to(dense.dtype)
    shift_BC = bias_C.to(dense.dtype) - mean_BC * scale_BC
    return torch.addcmul(_along(shift_BC, dense), dense, _along(scale_BC, dense))


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """(..., C) to go with x (B, C, ...)."""
    return channels.reshape(*channels.shape, *(1,) * (x.ndim - 2))


def _norm_silu_cpu(
    x: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own group norm, several times as fast there as reductions over these shapes."""
    dense = _dense(x.to(torch.promote_types(x.dtype, torch.float32)))
    weight_C, bias_C = weight_C.to(dense.dtype), bias_C.to(dense.dtype)
    batch, channels, pixels = _sizes(dense)
    y, mean_BG, rstd_BG = torch.native_group_norm(dense, weight_C, bias_C, batch, channels, pixels, groups, eps)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype), mean_BG, rstd_BG


def _norm_gradient_cpu(gradient: Tensor, x: Tensor, mean_BG: Tensor, rstd_BG: Tensor, weight_C: Tensor) -> Tensor:
    x = _dense(x)
    gradient = gradient.contiguous(memory_format=_format(x))
    groups = mean_BG.shape[1]
    back: Tensor = torch.ops.aten.native_group_norm_backward(
        gradient, x, mean_BG, rstd_BG, weight_C.to(x.dtype), *_sizes(x), groups, [True, False, False]
    )[0]
    return back


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    """That torch's own group norm takes x to be in: where a side is 1, strides alone may say both."""
    return torch._prims_common.suggest_memory_format(x)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, channels, *sides = x.shape
    return batch, channels, math.prod(sides)


def as_it_is(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast would lower what was chosen, in the backward pass too where that runs inside it."""
    if not torch.amp.is_autocast_available(x.device.type):  # the meta device's
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # one kernel for all sizes: a chunk's differ


def _kernel(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled and has_triton() else function


# ------------------------------------------------------------------------------------------- what can stand for what


def _is_plain(module: nn.Module, kernel: int | None = None) -> bool:
    """A convolution whose gradient is a transposed one's, without any leftover."""
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    ones = {*module.stride, *module.dilation, module.groups} == {1}
    return ones and (kernel is None or (module.kernel_size == (kernel, kernel) and module.padding == (1, 1)))


def _is_nearest_by_2(module: nn.Module) -> bool:
    if isinstance(module, nn.Upsample):
        return module.scale_factor == 2.0 and module.mode == "nearest"
    if not isinstance(module, Upsample2D) or not module.interpolate or module.norm is not None:
        return False
    return module.name == "conv" and isinstance(module.conv, nn.Conv2d) and _is_plain(module.conv, kernel=3)


def _is_simple(block: ResnetBlock2D) -> bool:
    """As diffusers' decoders have them, but for an activation that is not SiLU."""
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.time_emb_proj is None
        and block.time_embedding_norm != "scale_shift"
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
    )


def _laid_out(weight: Tensor, savings: Savings) -> Tensor:
    memory_format = torch.channels_last if savings.channels_last else torch.contiguous_format
    return weight.detach().clone(memory_format=memory_format)
