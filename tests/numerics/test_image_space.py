"""Losses on decoded images against plain computations: diffusers' decoder, LPIPS's own loader, whole batches, no gate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from pydantic import ValidationError
from torch import Tensor

from data.batches import Batch
from tests.numerics.lpips_reference import loader, photos, random_weights
from tests.perceptual import make_context
from tests.tiny import tiny
from trainer.config import DecodedRGBConfig, ImageSpaceConfig, LPIPSConfig
from trainer.errors import UserError
from trainer.losses.image_space import DecodedRGBLoss, ImageSpaceLoss
from trainer.losses.perceptual import PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.step_plan import StepPlanner
from trainer.tasks.latent_diffusion import LatentDiffusionTask

SIDE, PHOTO_SIDE = 64, 40
LEVELS = [0.5, 9.0, 2.0, 0.0, 3.5, 3.0, 1.0]
PHOTO_LEVELS = [0.5, 9.0, 2.0, 3.0]
"""Five and three of them are inside a bound of 3; in chunks of 2 the last has one."""


@pytest.fixture
def codec(request: pytest.FixtureRequest) -> Codec:
    if request.param == "demo":
        return Codec.load("repo://trainer/assets/demo_autoencoder")
    shared_dir: Path = request.getfixturevalue("shared_dir")
    folder = shared_dir / "data" / "taef2"
    load = loader(shared_dir, "taef2_load").load_taef2
    return Codec(load(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth"))


@pytest.fixture
def demo_codec() -> Codec:
    return Codec.load("repo://trainer/assets/demo_autoencoder")


@pytest.fixture(scope="session")
def lpips_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lpips") / "alex.pth"
    torch.save(random_weights("alex"), path)
    return str(path)


def latents(codec: Codec, images: Tensor) -> tuple[Tensor, Tensor]:
    """(estimate, truth)"""
    with torch.no_grad():
        z0 = codec.encode(images)
    return z0 + 0.3 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(z0), z0


def pictures(count: int = len(LEVELS), side: int = SIDE) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


def decoded(codec: Codec, z: Tensor) -> Tensor:
    vae: Any = codec.vae
    out: Tensor = vae.decode(z / codec.scaling_factor + codec.shift_factor).sample
    return out


def run(
    loss: PerceptualLoss, z0_hat: Tensor, z0: Tensor, images: Tensor, levels: list[float] = LEVELS
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Per-sample loss, terms, and the gradient of a sum with unequal weights."""
    z0_hat = z0_hat.clone().requires_grad_()
    context = make_context(z0, threshold=3.0, images_BCHW=images)
    loss_B, terms = loss(z0_hat, z0, torch.tensor(levels), context)
    (gradient,) = torch.autograd.grad((loss_B * _factors(loss_B)).sum(), z0_hat)
    return loss_B.detach(), terms, gradient


def _factors(loss_B: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, len(loss_B), dtype=loss_B.dtype)


def assert_as_plain(
    found: tuple[Tensor, dict[str, Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    z0_hat: Tensor,
    levels: list[float] = LEVELS,
    *,
    rtol: float = 1e-5,
    gradient_rtol: float = 1e-4,
) -> None:
    """`plain`: the estimate of the whole batch to losses without a gate."""
    inside = [i for i, level in enumerate(levels) if level <= 3.0]
    loss_B, terms, gradient = found
    z0_hat = z0_hat.clone().requires_grad_()
    plain_B = plain(z0_hat)
    (plain_gradient,) = torch.autograd.grad((plain_B * _factors(plain_B)).sum(), z0_hat)
    torch.testing.assert_close(loss_B[inside], plain_B.detach()[inside], rtol=rtol, atol=0.0)
    for i in inside:
        assert (gradient[i] - plain_gradient[i]).norm() <= gradient_rtol * plain_gradient[i].norm()
    outside = [i for i in range(len(loss_B)) if i not in inside]
    assert (plain_B[outside] > 0).all()
    for zero in (loss_B[outside], gradient[outside], *(term[outside] for term in terms.values())):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert terms["gate"].tolist() == [float(i in inside) for i in range(len(loss_B))]


# ----------------------------------------------------------------------------------------------------------- the numbers


ALL_PARTS = {"latent_weight": 0.3, "decoded_weight": 2.0, "input_weight": 0.7}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("codec", "options", "dtype"),
    [
        ("demo", {}, torch.float64),
        ("demo", ALL_PARTS, torch.float64),
        ("demo", {"latent_weight": 0.0, "decoded_weight": 0.0, "input_weight": 1.0}, torch.float64),
        ("demo", {"input_weight": 0.5, "resize_px": 32}, torch.float64),
        ("demo", ALL_PARTS, torch.float32),
        ("taef2", {**ALL_PARTS, "resize_px": 32}, torch.float64),
        ("taef2", ALL_PARTS, torch.float32),
    ],
    indirect=["codec"],
    ids=str,
)
def test_image_space_on_real_photos(
    codec: Codec, options: dict[str, Any], dtype: torch.dtype, shared_dir: Path
) -> None:
    url = str(shared_dir / "data" / "stlpips" / "alex_shift_tolerant.pth")
    codec = codec.to(dtype)
    lpips = loader(shared_dir, "stlpips_load").STLPIPS(url).to(dtype)
    config = ImageSpaceConfig(lpips=LPIPSConfig(network="alex_shift_tolerant", url=url), chunk_size=2, **options)
    x = photos(shared_dir, len(PHOTO_LEVELS), PHOTO_SIDE).to(dtype)
    z0_hat, z0 = latents(codec, x)

    def resized(images: Tensor) -> Tensor:
        if config.resize_px is None:
            return images
        return F.interpolate(images, size=[config.resize_px] * 2, mode="bicubic", antialias=True)

    def plain(z0_hat: Tensor) -> Tensor:
        y, y_hat = resized(decoded(codec, z0)), resized(decoded(codec, z0_hat))
        latent = (z0_hat - z0).pow(2).mean((1, 2, 3))
        of_truth, of_input = lpips(y, y_hat), lpips(resized(x), y_hat)
        return config.latent_weight * latent + config.decoded_weight * of_truth + config.input_weight * of_input

    loss = ImageSpaceLoss(config, codec).to(dtype)
    loss_B, terms, gradient = run(loss, z0_hat, z0, x, PHOTO_LEVELS)
    assert loss_B.dtype == dtype
    tolerances = {"rtol": 1e-10, "gradient_rtol": 1e-10}
    if dtype == torch.float32:
        # A ReLU's slope jumps, and rounding decides on which side of it an activation lies: behind a decoder with ReLUs two
        # orders of operations in float32 were seen to differ by 4e-3, while in float64 they agree to 1e-13.
        has_relu = any(isinstance(m, torch.nn.ReLU) for m in codec.vae.decoder.modules())
        tolerances = {"rtol": 1e-5, "gradient_rtol": 2e-2 if has_relu else 1e-4}
    assert_as_plain((loss_B, terms, gradient), plain, z0_hat, PHOTO_LEVELS, **tolerances)
    weights = {"latent": config.latent_weight, "decoded": config.decoded_weight, "input": config.input_weight}
    named = {f"image_space_{part}": w for part, w in weights.items() if w or part == "latent"}
    assert set(terms) == {"gate", *named}
    weighted = torch.stack([weight * terms[name] for name, weight in named.items()]).sum(0)
    torch.testing.assert_close(weighted, loss_B)
    torch.testing.assert_close(terms["image_space_latent"][0], (z0_hat - z0)[0].square().mean())


def test_decoded_rgb(demo_codec: Codec) -> None:
    x = pictures()
    z0_hat, z0 = latents(demo_codec, x)
    loss = DecodedRGBLoss(DecodedRGBConfig(chunk_size=2), demo_codec)

    def plain(z0_hat: Tensor) -> Tensor:
        return (decoded(demo_codec, z0_hat) - decoded(demo_codec, z0)).pow(2).mean((1, 2, 3))

    found = run(loss, z0_hat, z0, x)
    assert set(found[1]) == {"gate"}
    assert_as_plain(found, plain, z0_hat)


def test_inputs_of_another_size_are_resized_to_the_decoded_images(demo_codec: Codec, lpips_url: str) -> None:
    config = ImageSpaceConfig(lpips=LPIPSConfig(network="alex", url=lpips_url), input_weight=1.0, decoded_weight=0.0)
    loss = ImageSpaceLoss(config, demo_codec)
    x = pictures()
    z0_hat, z0 = latents(demo_codec, x)
    large = F.interpolate(x, size=(96, 96), mode="bicubic")
    small = F.interpolate(large, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    with_large, with_small, with_x = (run(loss, z0_hat, z0, images)[0] for images in (large, small, x))
    assert torch.equal(with_large, with_small)
    assert not torch.equal(with_small, with_x)


def test_latents_alone_need_no_weights(demo_codec: Codec) -> None:
    loss = ImageSpaceLoss(ImageSpaceConfig(decoded_weight=0.0, latent_weight=2.0), demo_codec)
    z0_hat, z0 = latents(demo_codec, pictures())
    assert_as_plain(run(loss, z0_hat, z0, pictures()), lambda z: 2 * (z - z0).pow(2).mean((1, 2, 3)), z0_hat)
    with pytest.raises(ValidationError, match="all are 0"):
        ImageSpaceConfig(decoded_weight=0.0, latent_weight=0.0)


# ----------------------------------------------------------------------------------------------------------- edge cases

KINDS = ["image_space", "decoded_rgb"]


def build(kind: str, codec: Codec, lpips_url: str) -> PerceptualLoss:
    if kind == "decoded_rgb":
        return DecodedRGBLoss(DecodedRGBConfig(chunk_size=3), codec)
    lpips = LPIPSConfig(network="alex", url=lpips_url)
    return ImageSpaceLoss(ImageSpaceConfig(lpips=lpips, input_weight=0.1, chunk_size=3), codec)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_inside(kind: str, demo_codec: Codec, lpips_url: str) -> None:
    x = pictures(2)
    z0_hat, z0 = latents(demo_codec, x)
    loss = build(kind, demo_codec, lpips_url)
    loss_B, terms, gradient = run(loss, z0_hat, z0, x, [4.0, torch.nan])
    for zero in (loss_B, gradient, *terms.values()):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert terms.keys() == run(loss, z0_hat, z0, x, [1.0, 1.0])[1].keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("clamping", [False, True], ids=["kl", "tiny"])
def test_a_sample_that_is_not_finite_is_alone(
    kind: str, value: float, clamping: bool, demo_codec: Codec, lpips_url: str
) -> None:
    """`AutoencoderTiny` begins with a tanh, behind which an infinite latent looks like a large one."""
    codec = demo_codec
    if clamping:
        torch.manual_seed(0)
        codec = Codec(AutoencoderTiny(latent_channels=4))
    loss = build(kind, codec, lpips_url)
    x = pictures(side=40)
    z0_hat, z0 = latents(codec, x)
    expected, _, expected_gradient = run(loss, z0_hat, z0, x)
    z0_hat[2, 0, 1, 1] = z0_hat[1, 0, 1, 1] = value  # the other one is outside of the gate
    found, _, gradient = run(loss, z0_hat, z0, x)
    assert not found[2].isfinite()
    others = [i for i in range(len(LEVELS)) if i != 2]
    torch.testing.assert_close(found[others], expected[others])
    torch.testing.assert_close(gradient[others], expected_gradient[others])
    assert found[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_inside_is_decoded(
    kind: str, demo_codec: Codec, lpips_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = build(kind, demo_codec, lpips_url)
    assert isinstance(loss, ImageSpaceLoss | DecodedRGBLoss)
    decoder = loss.of_latents.decoder if isinstance(loss, ImageSpaceLoss) else loss.decoder
    assert decoder is not None
    plain, sizes = decoder.images, []

    def counted(z: Tensor) -> Tensor:
        sizes.append((len(z), z.requires_grad))
        return plain(z)

    monkeypatch.setattr(decoder, "images", counted)
    x = pictures()
    run(loss, *latents(demo_codec, x), x)
    assert sorted(sizes) == [(2, False), (2, True), (3, False), (3, True)]


def test_images_that_are_too_small_are_refused_before_the_first_step(demo_codec: Codec, lpips_url: str) -> None:
    lpips = LPIPSConfig(network="alex", url=lpips_url)
    loss = ImageSpaceLoss(ImageSpaceConfig(lpips=lpips), demo_codec)
    assert loss.check(32) == []
    with pytest.raises(
        UserError, match=r"task\.perceptual\.resize_px: None, of images with 24 .* 31 that network alex"
    ):
        loss.check(24)
    assert ImageSpaceLoss(ImageSpaceConfig(lpips=lpips, resize_px=64), demo_codec).check(24) == []
    with pytest.raises(UserError, match=r"task\.perceptual\.resize_px: 16, .* leaves 16, fewer than the 31"):
        ImageSpaceLoss(ImageSpaceConfig(lpips=lpips, resize_px=16), demo_codec).check(512)


# ----------------------------------------------------------------------------------------------------------- in a task


@pytest.mark.parametrize("paradigm", ["ddpm_eps", "ddpm_v", "flow"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training(kind: str, paradigm: str, lpips_url: str) -> None:
    section = {
        "image_space": f"{{kind: image_space, tau_reference_px: 64, lpips: {{network: alex, url: {lpips_url}}}}}",
        "decoded_rgb": "{kind: decoded_rgb, tau_reference_px: 64}",
    }[kind]
    config = tiny(f"task.perceptual={section}", f"task.paradigm.kind={paradigm}")
    task = LatentDiffusionTask(config, torch.device("cpu"))
    assert task.perceptual is not None
    assert task.check() == []
    plan = StepPlanner(config, dict.fromkeys(config.data.datasets, (100,))).plan(18)
    assert plan.phase.perceptual
    pixels = ((pictures(8) + 1) * 127.5).to(torch.uint8)
    batch = Batch(
        step=18, resolution=64, positions_B=torch.arange(1000, 1008), images_BCHW=pixels, captions=["dog"] * 8,
        labels_B=torch.full((8,), -1), keys=["x"] * 8, substitutions=(),
    )  # fmt: skip
    terms = task.forward_backward(batch, plan, scale=1 / 8)
    assert 0 < terms["gate"].sum() < 8
    assert torch.equal(terms[kind] > 0, terms["gate"] > 0)
    expected = plan.phase.denoising_weight * terms["denoising"] + plan.phase.perceptual.weight * terms[kind]
    torch.testing.assert_close(terms["loss"], expected)
    gradients = [p.grad for p in task.module.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)

    without = LatentDiffusionTask(
        tiny(f"task.paradigm.kind={paradigm}", "phases.perceptual.perceptual=null"), torch.device("cpu")
    )
    without.forward_backward(batch, plan, scale=1 / 8)
    others = [p.grad for p in without.module.parameters() if p.grad is not None]
    assert max((g - o).abs().max() for g, o in zip(gradients, others, strict=True)) > 1e-6


@pytest.mark.parametrize("field", ["url", "heads_url"])
def test_weights_that_are_not_there_are_refused(field: str, demo_codec: Codec, lpips_url: str) -> None:
    config = ImageSpaceConfig(lpips=LPIPSConfig(network="alex", **{"url": lpips_url, field: "/nowhere/w.pth"}))
    with pytest.raises(UserError, match=r"task\.perceptual\.lpips\."):
        ImageSpaceLoss(config, demo_codec)
