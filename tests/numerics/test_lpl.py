"""The latent perceptual loss against a slow reference in float64: each option, on real features, with and without outliers."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics import lpl_reference
from tests.numerics.lpl_cases import PlantedCodec, fixed, make_codec, make_latents, make_loss, photo_latents, run
from tests.numerics.test_codecs import trained
from trainer.models.autoencoders import Codec

LEVELS = [0.5, 3.1, 3.0]
"""Noise levels of the samples: the middle one is outside a gate of 3."""
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "printed": {"depth_weights": "printed"},
    "uniform": {"depth_weights": "uniform"},
    "all_masked": {"mask_outliers": "all"},
    "none_masked": {"mask_outliers": "none"},
    "detached": {"detach_deviation": True},
    "separate": {"statistics": "separate"},
    "separate_detached": {"statistics": "separate", "detach_deviation": True},
    "target_norm": {"statistics": "target_norm"},
    "target_mask": {"mask_source": "target"},
    "pixel_sum": {"over_pixels": "sum"},
    "gated": {"over_batch": "gated"},
    "first_maps": {"num_maps": 3},
    "one_deep_map": {"maps": (2,)},
    "some_maps": {"maps": (3, 1)},
    "many": {
        "statistics": "separate", "mask_source": "target", "mask_outliers": "all", "over_pixels": "sum",
        "over_batch": "gated", "depth_weights": "printed", "maps": (1, 2),
    },
    "as_public": {
        "statistics": "target_norm", "mask_source": "target", "depth_weights": "uniform", "over_batch": "gated",
        "over_pixels": "sum",
    },
}  # fmt: skip
"""`maps` by their places in the decoder."""
Case = tuple[Codec, Tensor, Tensor]


def make_case(name: str, request: pytest.FixtureRequest, *, side_px: int, count: int) -> Case:
    """A decoder, z0_hat and z0: of the real architecture at random, or the trained one on crops of photos."""
    kind = PlantedCodec if "outliers" in name else Codec
    if name.startswith("photos"):
        shared_dir = request.getfixturevalue("shared_dir")
        codec = kind(trained(shared_dir))
        return codec, *photo_latents(shared_dir, codec, count=count, side_px=side_px)
    codec = make_codec(kind)
    return codec, *make_latents(codec, batch=count, side=side_px // codec.downsampling)


NAMES = ["plain", "outliers", *(pytest.param(name, marks=pytest.mark.shared) for name in ("photos", "photos_outliers"))]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param, request, side_px=32, count=3)


def of_codec(codec: Codec, options: dict[str, Any]) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    """(options by the maps' names, places of the used maps, the reference's own options)"""
    places = options.get("maps")
    named = options | ({"maps": tuple(codec.map_names[i] for i in places)} if places else {})
    used = sorted(places) if places else list(range(options.get("num_maps") or len(codec.map_names)))
    return named, used, {k: v for k, v in options.items() if k not in ("maps", "num_maps")}


@pytest.fixture(scope="module")
def features(case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of the estimates and of the targets, as the loss's own decoder computes them."""
    codec, z0_hat, z0 = case
    decoder = make_loss(codec, fixed()).decoder
    with torch.no_grad():
        estimates, targets = ([features.numpy() for features in decoder(z)] for z in (z0_hat, z0))
    return estimates, targets


@pytest.fixture(scope="module")
def features64(case: Case) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Two estimates in float64, their features with the graph behind them, and the targets'; by the codec itself."""
    codec, z0_hat, z0 = case
    codec64 = deepcopy(codec).double()
    z64 = z0_hat[:2].double().requires_grad_()
    return z64, codec64.decode_features(z64), codec64.decode_features(z0[:2].double())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32_values_match_the_reference_in_float64(
    case: Case, features: tuple[list[np.ndarray], list[np.ndarray]], options: dict[str, Any]
) -> None:
    codec, z0_hat, z0 = case
    named, used, of_reference = of_codec(codec, options)
    loss_B, terms = run(codec, z0_hat, z0, LEVELS, fixed(**named))

    of_reference.pop("detach_deviation", None)
    estimates, targets = ([maps[i] for i in used] for maps in features)
    losses, parts = lpl_reference.reference_loss(
        estimates, targets, LEVELS, 3.0, latents_side=z0.shape[-1], **of_reference
    )
    np.testing.assert_allclose(loss_B.numpy(), losses, rtol=1e-5)
    assert list(terms) == ["gate", *(f"lpl_{codec.map_names[i]}" for i in used)]
    for place, i in enumerate(used):
        term = terms[f"lpl_{codec.map_names[i]}"]
        np.testing.assert_allclose(term.numpy(), [part[place] for part in parts], rtol=1e-5)
        assert not term.requires_grad
    assert terms["gate"].tolist() == [1.0, 0.0, 1.0]
    assert loss_B[1] == 0.0
    assert losses[0] > 1e-4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_matches_an_independent_formulation_in_float64(
    case: Case, features64: tuple[Tensor, list[Tensor], list[Tensor]], options: dict[str, Any]
) -> None:
    codec, z0_hat, z0 = case
    named, used, of_reference = of_codec(codec, options)
    z0_hat, z0, levels = z0_hat[:2].clone().requires_grad_(), z0[:2], LEVELS[:2]
    run(codec, z0_hat, z0, levels, fixed(**named))[0].sum().backward()

    z64, estimates, targets = features64
    total = lpl_reference.differentiable_loss(
        [estimates[i] for i in used], [targets[i] for i in used], levels, 3.0, latents_side=z0.shape[-1], **of_reference
    )
    (gradient64,) = torch.autograd.grad(total, z64, retain_graph=True)
    assert z0_hat.grad is not None
    error = (z0_hat.grad.double() - gradient64).norm() / gradient64.norm()
    assert error < 1e-4, error
    assert z0_hat.grad[1].abs().max() == 0.0


def test_every_option_matters(case: Case) -> None:
    """So that none of the comparisons above is one of equals: values or gradients differ from the default's."""
    codec, z0_hat, z0 = case
    z0_hat, z0, levels = z0_hat[:2], z0[:2], LEVELS[:2]

    def found(options: dict[str, Any]) -> Tensor:
        z = z0_hat.clone().requires_grad_()
        loss_B, _ = run(codec, z, z0, levels, fixed(**of_codec(codec, options)[0]))
        (gradient,) = torch.autograd.grad(loss_B.sum(), z)
        return torch.cat([loss_B.detach(), gradient.flatten() / gradient.norm()])

    default = found({})
    for name, options in OPTIONS.items():
        if name != "default" and (isinstance(codec, PlantedCodec) or "mask" not in name):
            assert (found(options) - default).norm() > 1e-4 * default.norm(), name


@pytest.mark.parametrize("options", [{}, OPTIONS["separate"], OPTIONS["target_norm"]], ids=str)
@pytest.mark.parametrize("kind", [Codec, PlantedCodec])
def test_gradient_matches_finite_differences(kind: type[Codec], options: dict[str, Any]) -> None:
    codec = make_codec(kind).double()
    z0_hat, z0 = (z.double() for z in make_latents(codec, batch=1, side=4))
    z0_hat.requires_grad_()
    loss = run(codec, z0_hat, z0, [1.0], fixed(**options))[0].sum()
    (gradient,) = torch.autograd.grad(loss, z0_hat)
    direction = torch.randn(z0.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (
            run(codec, z0_hat + s * direction, z0, [1.0], fixed(**options))[0].sum() for s in (step, -step)
        )
    assert torch.isclose((ahead - behind) / (2 * step), (gradient * direction).sum(), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, OPTIONS["as_public"]], ids=["default", "as_public"])
@pytest.mark.parametrize("name", NAMES)
def test_in_bf16(name: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """The decoder's products and maps in bf16 and statistics in float32, as on a GPU. A batch's loss: that of one photo is
    off by more where the trained decoder's channels are zero but for a few pixels, which the mask leaves alone or not."""
    codec, z0_hat, z0 = make_case(name, request, side_px=64, count=4)
    config = fixed(**of_codec(codec, options)[0])
    exact_B, _ = run(codec, z0_hat, z0, [1.0] * 4, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_B, _ = run(codec, z0_hat, z0, [1.0] * 4, config, dtype=torch.bfloat16)
    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B.mean(), exact_B.mean(), rtol=2e-2, atol=0.0)
    assert not torch.allclose(loss_B, exact_B, rtol=1e-5), "that was not bf16"


def test_detaching_the_deviation_changes_the_gradient_and_not_the_value(case: Case) -> None:
    codec, z0_hat, z0 = case
    for statistics in ("shared", "separate"):
        values, gradients = [], []
        for detach in (False, True):
            z = z0_hat.clone().requires_grad_()
            loss_B, _ = run(codec, z, z0, LEVELS, fixed(detach_deviation=detach, statistics=statistics))
            values.append(loss_B.detach())
            gradients.append(torch.autograd.grad(loss_B.sum(), z)[0])
        assert torch.equal(*values)
        assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() > 0.01
