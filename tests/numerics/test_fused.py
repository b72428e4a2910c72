"""The norms with backward passes of their own against autograd through their plain forms."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.fused import Gated, JoinedHeads, ModulatedNorm

EPS = 1e-6
HEADS, CHANNELS = 3, 8
WIDTH = HEADS * CHANNELS
Function = Callable[..., tuple[Tensor, ...]]


def plain_norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, ...]:
    normal = F.layer_norm(x_BND.float(), x_BND.shape[-1:], eps=EPS)
    return ((1 + scale_BD.float()[:, None]) * normal + shift_BD.float()[:, None],)


def fused_norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, ...]:
    return (ModulatedNorm.apply(x_BND, shift_BD, scale_BD, EPS),)


def plain_gate(x_BND: Tensor, gate_BD: Tensor, branch_BND: Tensor) -> tuple[Tensor, ...]:
    return (x_BND + gate_BD[:, None] * branch_BND,)


def fused_gate(x_BND: Tensor, gate_BD: Tensor, branch_BND: Tensor) -> tuple[Tensor, ...]:
    return (Gated.apply(x_BND, gate_BD, branch_BND),)


def plain_heads(weights_M2d: Tensor, *projected: Tensor) -> tuple[Tensor, ...]:
    joined: list[list[Tensor]] = [[], [], []]
    for (q_weight, k_weight), x in zip(weights_M2d, projected, strict=True):
        q, k, v = x.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        joined[0].append(F.rms_norm(q.float(), (CHANNELS,), q_weight.float(), EPS).to(x.dtype))
        joined[1].append(F.rms_norm(k.float(), (CHANNELS,), k_weight.float(), EPS).to(x.dtype))
        joined[2].append(v)
    return tuple(torch.cat(parts, dim=2) for parts in joined)


def fused_heads(weights_M2d: Tensor, *projected: Tensor) -> tuple[Tensor, ...]:
    heads: tuple[Tensor, ...] = JoinedHeads.apply(HEADS, EPS, weights_M2d, *projected)
    return heads


def projections(*lengths: int, batch: int = 2) -> list[tuple[int, ...]]:
    return [(len(lengths), 2, CHANNELS), *((batch, length, 3 * WIDTH) for length in lengths)]


CASES = [
    (plain_norm, fused_norm, [(2, 5, WIDTH), (2, WIDTH), (2, WIDTH)]),
    (plain_gate, fused_gate, [(2, 5, WIDTH), (2, WIDTH), (2, 5, WIDTH)]),
    (plain_heads, fused_heads, projections(7)),
    (plain_heads, fused_heads, projections(7, 4)),
    (
        plain_heads,
        fused_heads,
        projections(1, batch=1),
    ),  # where a slice is contiguous, in place would be the input's place
]
NAMES = ["norm", "gate", "heads", "heads-of-two", "heads-of-one-token"]


def inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(function: Function, given: list[Tensor]) -> list[Tensor]:
    outputs = function(*given)
    torch.manual_seed(1)
    wanted = [torch.randn(out.shape).to(out.dtype) for out in outputs]  # `randn_like` would follow strides
    return [*outputs, *torch.autograd.grad(outputs, given, wanted)]


@pytest.mark.parametrize(("plain", "fused", "shapes"), CASES, ids=NAMES)
def test_outputs_and_gradients_are_the_plain_forms(
    plain: Function, fused: Function, shapes: list[tuple[int, ...]]
) -> None:
    given = inputs(shapes, torch.float32)
    kept = [x.detach().clone() for x in given]
    for own, expected in zip(outputs_and_gradients(fused, given), outputs_and_gradients(plain, given), strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-5)
    for before, after in zip(kept, given, strict=True):
        assert torch.equal(before, after), "inputs stay as they were"


@pytest.mark.parametrize(("plain", "fused", "shapes"), CASES, ids=NAMES)
def test_of_bf16_dtypes_are_kept_and_rounding_is_all(
    plain: Function, fused: Function, shapes: list[tuple[int, ...]]
) -> None:
    given = inputs(shapes, torch.bfloat16)
    for own, expected in zip(outputs_and_gradients(fused, given), outputs_and_gradients(plain, given), strict=True):
        assert own.dtype == expected.dtype
        torch.testing.assert_close(own.float(), expected.float(), rtol=3e-2, atol=5e-2)


def kept_bytes(function: Function, given: list[Tensor]) -> int:
    """By outputs and for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = function(*given)
    for out in outputs:
        keep(out)
    return sum(kept.values())


@pytest.mark.parametrize(("plain", "fused", "shapes", "share"), [
    (plain_norm, fused_norm, [(2, 50, WIDTH), (2, WIDTH), (2, WIDTH)], 0.75),
    (plain_gate, fused_gate, [(2, 50, WIDTH), (2, WIDTH), (2, 50, WIDTH)], 1.0),
    (plain_heads, fused_heads, projections(70, 40), 0.75),
])  # fmt: skip
def test_less_is_kept(plain: Function, fused: Function, shapes: list[tuple[int, ...]], share: float) -> None:
    given = inputs(shapes, torch.float32)
    assert kept_bytes(fused, given) <= share * kept_bytes(plain, given)


@pytest.mark.parametrize(("plain", "fused", "shapes"), CASES, ids=NAMES)
@pytest.mark.parametrize("wanted", [0, -1])
def test_of_a_frozen_network_only_what_is_asked_for_is_computed(
    plain: Function, fused: Function, shapes: list[tuple[int, ...]], wanted: int
) -> None:
    given = [x.detach() for x in inputs(shapes, torch.float32)]
    given[wanted].requires_grad_()
    torch.manual_seed(1)
    ways = [torch.randn(out.shape) for out in plain(*given)]
    own, expected = (
        torch.autograd.grad([out for out in outputs if out.requires_grad], given[wanted],
                            [way for out, way in zip(outputs, ways, strict=True) if out.requires_grad])
        for outputs in (fused(*given), plain(*given))
    )  # fmt: skip
    torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-5)


def test_a_frozen_gate_keeps_no_branch() -> None:
    x, gate, branch = (x.detach() for x in inputs([(2, 50, WIDTH), (2, WIDTH), (2, 50, WIDTH)], torch.float32))
    alone = kept_bytes(fused_gate, [x.clone().requires_grad_(), gate, branch])
    branch_only = [x, gate, (branch * 1).requires_grad_()]
    assert alone == x.nbytes, "the output"
    assert kept_bytes(fused_gate, branch_only) == x.nbytes + gate.nbytes
