"""What bf16 and TF32 do to losses and gradients: every part against float32 or float64 on the CPU, on the same inputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gpu import BOTH, CPU, Precision, autocast
from tests.gpu.parity import Step, autoencoder_step, steps
from tests.numerics.lpl_cases import make_codec, make_latents
from tests.numerics.lpl_reference import reference_loss
from tests.perceptual import make_context
from tests.small_recipes import cut, write_assets
from tests.stage1 import stage1, write_lpips
from tests.text_models import CAPTIONS, write_sd3
from trainer.config import LPLConfig
from trainer.losses.lpl import LatentPerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.models.frozen_text import FrozenText

BF16_LOSS, BF16_GRADIENT = 1e-2, 3e-2
"""Relative errors of a loss term and of the gradient's vector. bf16 keeps 8 bits: each product is off by up to 2^-9 = 0.2 %,
at random, so means over many of them by less. On a CPU: at most 0.2 % of a loss term, at most 0.9 % of the gradient."""
CUT_LOSS, CUT_GRADIENT = 2e-2, 1e-1
"""Of cut recipes, whose random decoder takes two estimates of one image for nearly alike: what bf16 does to their features is
then more of the difference. On a CPU: at most 0.4 % of a loss term, at most 4.9 % of the gradient, with LPL and 16 channels."""
OTHERS: dict[Precision, tuple[float, float]] = {"tf32": (2e-3, 5e-3), "fp32": (1e-4, 1e-3)}
"""TF32 keeps 11 bits in matrix products and convolutions, an eighth of bf16's error; float32 differs by the order of sums,
and where a pixel at the mask's threshold falls on its other side."""


def check(found: list[Step], loss: float, gradient: float) -> None:
    for step in found:
        cosine = 1.0 - gradient**2 / 2  # of an error in a random direction
        assert step.terms == pytest.approx(step.reference, rel=loss, abs=1e-7), step.phase
        assert step.error < gradient, step.phase
        assert step.cosine > cosine, step.phase


@pytest.mark.parametrize("device", BOTH)
def test_a_step_in_bf16(device: str) -> None:
    found = steps(torch.device(device), "bf16")
    check(found, BF16_LOSS, BF16_GRADIENT)
    assert [step.phase for step in found] == ["low_resolution"] * 8 + ["full_resolution"] * 6 + ["perceptual"] * 6
    assert all("lpl" in step.terms for step in found[14:])
    assert all(step.error > 1e-3 for step in found), "that was not bf16"


@pytest.mark.gpu
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_in_float32(name: Precision) -> None:
    loss, gradient = OTHERS[name]
    check(steps(torch.device("cuda"), name), loss, gradient)


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_a_step_of_an_autoencoder_in_bf16(norm: str, device: str, tmp_path: Path) -> None:
    """Both players. The sign of a difference, which L1's gradient is, flips where bf16 moves an image past another. On
    a CPU: at most 0.3 % of a loss term, 8 % of the gradient."""
    config = stage1(
        write_lpips(tmp_path), "task.discriminator.start_step=0", f"task.discriminator.norm={norm}",
        "task.learned_log_variance=true",
    )  # fmt: skip
    whole, game = autoencoder_step(torch.device(device), "bf16", config)
    assert {"generator", "adaptive_weight", "lpips", "kl"} <= whole.reference.keys()
    for step in (whole, game):
        for term, value in step.reference.items():
            assert step.terms[term] == pytest.approx(value, rel=CUT_LOSS, abs=CUT_LOSS), term
        assert 1e-3 < step.error < CUT_GRADIENT


# ------------------------------------------------------------------------------------------------------ every denoiser


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assets")
    write_assets(root)
    return root


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize(
    "name", ["imagenet_512_lpl_v", "sd3_medium_512", "imagenet_256_dit", "cc12m_256_unet", "cc12m_256_pixart"]
)
def test_every_denoiser_in_bf16(name: str, device: str, assets: Path) -> None:
    """Three steps of the recipe with its widths cut, every weight of the denoiser at work."""
    found = steps(torch.device(device), "bf16", cut(name, assets), nudge=0.05)
    assert len(found) == 3
    check(found, CUT_LOSS, CUT_GRADIENT)


# ------------------------------------------------------------------------------------------- the frozen networks' parts


@pytest.mark.parametrize("device", BOTH)
def test_the_latent_perceptual_loss_in_bf16(device: str) -> None:
    """Against the slow reference on float64 features, and the gradient against float64's."""
    slow, fast = make_codec(channels=(8, 16)).double(), make_codec(channels=(8, 16)).to(device)
    z0_hat, z0 = make_latents(slow, batch=2, side=16)
    levels = torch.tensor([0.5, 3.1])
    config = LPLConfig(tau_reference_px=None, mask_outliers="all")
    with torch.no_grad():
        estimates, targets = ([m.numpy() for m in slow.decode_features(z.double())] for z in (z0_hat, z0))
    want, _ = reference_loss(estimates, targets, levels.tolist(), 3.0, latents_side=16, mask_outliers="all")

    def loss_and_gradient(codec: Codec, dtype: torch.dtype, on: torch.device) -> tuple[Tensor, Tensor]:
        estimate = z0_hat.to(on, dtype).requires_grad_()
        loss = LatentPerceptualLoss(FrozenDecoder(codec), config)
        loss_B, _ = loss(estimate, z0.to(on, dtype), levels, make_context(z0, downsampling=codec.downsampling))
        (gradient,) = torch.autograd.grad(loss_B.sum(), estimate)
        return loss_B.detach().cpu().double(), gradient.cpu().double()

    _, want_gradient = loss_and_gradient(slow, torch.float64, CPU)
    with autocast(torch.device(device)):
        loss_B, gradient = loss_and_gradient(fast, torch.float32, torch.device(device))
    assert want[0] > 0.01
    assert loss_B.tolist() == pytest.approx([want[0], 0.0], rel=BF16_LOSS)
    assert want[1] == 0.0
    assert ((gradient - want_gradient).norm() / want_gradient.norm()).item() < BF16_GRADIENT
    assert gradient[1].abs().max() == 0.0


@pytest.mark.parametrize("device", BOTH)
def test_frozen_text_encoders_in_bf16(device: str, tmp_path: Path) -> None:
    """Stable Diffusion 3's three: token states and pooled text as float32 gives them, and masks alike."""
    config = write_sd3(tmp_path)
    exact, text = FrozenText(config), FrozenText(config, torch.device(device))
    if device == "cpu":
        text = text.to(torch.bfloat16)  # of itself it is float32 there
    assert {p.dtype for p in text.parameters()} == {torch.bfloat16}
    captions = [*CAPTIONS, None]
    with torch.no_grad():
        want = exact(exact.prepare(captions))
        got = text(text.prepare(captions).to(torch.device(device)))
    assert want.pooled_BP is not None
    assert got.pooled_BP is not None
    assert want.mask_BL is not None
    assert got.mask_BL is not None
    assert torch.equal(got.mask_BL.cpu(), want.mask_BL)
    for a, b in ((want.tokens_BLT, got.tokens_BLT), (want.pooled_BP, got.pooled_BP)):
        assert b.dtype == torch.float32
        assert ((a - b.cpu()).norm() / a.norm()).item() < BF16_GRADIENT
