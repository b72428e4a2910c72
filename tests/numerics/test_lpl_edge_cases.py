"""What a careful implementation of the latent perceptual loss survives, with each kind of statistics and mask."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics import lpl_reference
from tests.numerics.lpl_cases import fixed, make_codec, make_latents, run
from trainer.losses.feature_loss import feature_loss

OPTIONS: list[dict[str, Any]] = [
    {"mask_outliers": masked, "statistics": statistics, **source}
    for statistics in ("shared", "separate", "target_norm")
    for masked, source in ((False, {}), (True, {}), (True, {"mask_source": "target"}))
]
BY_DEVIATION = [o for o in OPTIONS if o["statistics"] != "target_norm" and o.get("mask_source") != "target"]


def compare(estimate: Tensor, target: Tensor, options: dict[str, Any]) -> None:
    """Value and gradient with the slow reference's, of one map."""
    rule = {**options, "mask_outliers": "all" if options["mask_outliers"] else "none"}
    levels = [0.0] * len(estimate)
    estimate = estimate.detach().clone().requires_grad_()
    fast = feature_loss(estimate, target, **options)
    slow, _ = lpl_reference.reference_loss(
        [estimate.detach().numpy()], [target.numpy()], levels, 1.0, latents_side=estimate.shape[-1], **rule
    )
    np.testing.assert_allclose(fast.detach().numpy(), slow, rtol=1e-5)
    (gradient,) = torch.autograd.grad(fast.sum(), estimate)
    precise = estimate.detach().double().requires_grad_()
    loss = lpl_reference.differentiable_loss(
        [precise], [target.double()], levels, 1.0, latents_side=estimate.shape[-1], **rule
    )
    (wanted,) = torch.autograd.grad(loss, precise)
    # of two pixels standardised by themselves nothing is left, and so no gradient
    assert (gradient.double() - wanted).norm() <= 1e-4 * wanted.norm() + 1e-5


def test_equal_latents_have_no_loss_and_no_gradient() -> None:
    codec = make_codec()
    _, z0 = make_latents(codec, batch=2, side=8)
    z0_hat = z0.clone().requires_grad_()
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 1.0], fixed())
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0, 0.0]
    assert z0_hat.grad is not None
    assert z0_hat.grad.abs().max() == 0.0


@pytest.mark.parametrize(("height", "width"), [(1, 2), (2, 2), (4, 4), (6, 8), (7, 7)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_maps_of_fewer_than_50_pixels(height: int, width: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(height * width)
    estimate, target = torch.randn(2, 2, 5, height, width, generator=generator).unbind()
    compare(estimate, target, options)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("options", BY_DEVIATION, ids=str)
def test_a_constant_channel_adds_nothing_and_is_counted(value: float, options: dict[str, Any]) -> None:
    estimate, target = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    of_three = feature_loss(estimate[:, :3], target[:, :3], **options)
    # under the mask there is no inlier at all, since the comparisons are strict
    estimate[:, 3] = value
    compare(estimate, target, options)
    estimate.requires_grad_()
    loss = feature_loss(estimate, target, **options)
    torch.testing.assert_close(loss, of_three * 3 / 4, rtol=1e-6, atol=0.0)
    loss.sum().backward()
    assert estimate.grad is not None
    assert estimate.grad[:, 3].abs().max() == 0.0


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_a_constant_channel_of_the_target(value: float) -> None:
    """Standardised by itself, it would be 0 everywhere: a distance that says nothing of the estimate. Else it is like any."""
    estimate, target = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    target[:, 3] = value
    for options in OPTIONS:
        compare(estimate, target, options)
    of_three = feature_loss(estimate[:, :3], target[:, :3], mask_outliers=False, statistics="separate")
    loss = feature_loss(estimate, target, mask_outliers=False, statistics="separate")
    torch.testing.assert_close(loss, of_three * 3 / 4, rtol=1e-6, atol=0.0)
    assert feature_loss(estimate, target, mask_outliers=False) > of_three * 3 / 4


def test_a_channel_constant_over_its_inliers_adds_nothing() -> None:
    estimate = torch.full((1, 1, 16, 16), 0.3)
    estimate[0, 0, 3, 3] = 1e3
    target = torch.randn(1, 1, 16, 16)
    for statistics in ("shared", "separate"):
        assert feature_loss(estimate, target, mask_outliers=True, statistics=statistics).item() == 0.0
        assert feature_loss(estimate, target, mask_outliers=False, statistics=statistics).item() > 0.0


def test_outliers_cannot_hide_or_dominate_the_loss() -> None:
    estimate, target = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    clean = feature_loss(estimate, target, mask_outliers=True)
    estimate[:, :, 5, 5] = target[:, :, 5, 5] = 1e4
    torch.testing.assert_close(feature_loss(estimate, target, mask_outliers=True), clean, rtol=0.02, atol=0.0)
    assert feature_loss(estimate, target, mask_outliers=False) < 0.1 * clean


@pytest.mark.parametrize("levels", [[3.01, 50.0], [math.inf, math.inf], [math.nan, math.inf]], ids=str)
def test_nothing_inside_the_gate_is_exactly_zero_with_a_graph(levels: list[float]) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    weight = torch.ones((), requires_grad=True)
    loss_B, terms = run(codec, z0_hat * weight, z0, levels, fixed())
    loss_B.mean().backward()
    assert loss_B.tolist() == [0.0, 0.0]
    assert all(term.abs().max() == 0.0 for term in terms.values())
    assert weight.grad is not None  # every rank takes part in the gradient's reduction
    assert weight.grad == 0.0


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("broken_target", [False, True])
def test_overflow_outside_the_gate_reaches_neither_loss_nor_gradient(value: float, broken_target: bool) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    alone_B, _ = run(codec, z0_hat, z0, [1.0, 9.0], fixed())
    z0_hat[1] = value
    if broken_target:
        z0[1] = value
    z0_hat.requires_grad_()
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 9.0], fixed())
    loss_B.mean().backward()
    assert torch.equal(loss_B, alone_B)
    assert z0_hat.grad is not None
    assert z0_hat.grad[1].abs().max() == 0.0
    assert z0_hat.grad[0].isfinite().all()
    assert z0_hat.grad[0].abs().max() > 0.0


@pytest.mark.parametrize("where", ["estimate", "target"])
@pytest.mark.parametrize(
    ("value", "mask_outliers"), itertools.product([math.inf, -math.inf, math.nan], ["deep", "all", "none"])
)
def test_a_non_finite_sample_is_non_finite_alone(value: float, mask_outliers, where: str) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=3, side=8)
    config = fixed(mask_outliers=mask_outliers)
    clean_B, _ = run(codec, z0_hat, z0, [1.0, 1.0, 1.0], config)
    (z0_hat if where == "estimate" else z0)[1, 0, 2, 2] = value
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 1.0, 1.0], config)
    assert loss_B.isfinite().tolist() == [True, False, True]
    assert torch.equal(loss_B[[0, 2]], clean_B[[0, 2]])


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_non_finite_feature_makes_the_sample_non_finite(where: int, value: float, options: dict[str, Any]) -> None:
    """Also in a channel that is constant but for it, or where the mask hides it."""
    maps = list(torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind())
    maps[0][2, 1] = 0.5
    maps[where][1:, 1, 4, 4] = value
    assert feature_loss(*maps, **options).isfinite().tolist() == [True, False, False]


def test_statistics_are_float32_under_autocast() -> None:
    estimate, target = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    plain = feature_loss(estimate, target, mask_outliers=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_loss(estimate, target, mask_outliers=True), plain)
    # bf16 maps of large mean: statistics in bf16 would be off by more than the values themselves
    big = (estimate + 50.0).bfloat16()
    expected = feature_loss(big.double(), target.double() + 50.0, mask_outliers=True)
    loss = feature_loss(big, target + 50.0, mask_outliers=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_of_bf16_maps_are_those_of_the_same_numbers_in_float64(options: dict[str, Any]) -> None:
    """In either layout. The gradient is rounded once, to the maps' precision."""
    maps = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 5.0
    maps[:, :, ::2, 3, 4:9] += 300.0
    found = []
    for dtype, layout in (
        (torch.float64, torch.contiguous_format), (torch.bfloat16, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
    ):  # fmt: skip
        estimate, target = (m.bfloat16().to(dtype).contiguous(memory_format=layout) for m in maps)
        estimate.requires_grad_()
        loss_B = feature_loss(estimate, target, **options)
        (gradient,) = torch.autograd.grad(loss_B.sum(), estimate)
        assert gradient.dtype == dtype
        found.append((loss_B.detach().double(), gradient.double()))
    for loss_B, gradient in found[1:]:
        torch.testing.assert_close(loss_B, found[0][0], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(gradient, found[0][1], rtol=4e-3, atol=1e-9)


def test_there_is_no_second_derivative() -> None:
    estimate, target = torch.randn(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    estimate = estimate.clone().requires_grad_()
    factor = torch.ones((), requires_grad=True)
    loss = factor * feature_loss(estimate, target, mask_outliers=False).sum()
    (gradient,) = torch.autograd.grad(loss, estimate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_little_is_kept_for_the_backward_pass() -> None:
    """The maps themselves, a mask of a byte a pixel, and numbers of channels."""
    estimate, target = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    estimate = estimate.clone().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_B = feature_loss(estimate, target, mask_outliers=True)
    own = (estimate.untyped_storage().data_ptr(), target.untyped_storage().data_ptr())
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in others) < 1.05 * estimate.numel()
    loss_B.sum().backward()
