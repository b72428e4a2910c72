"""The game's losses by hand, and the adaptive weight against ordinary autograd through a decoder."""

import math
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from tests.distributed.harness import run_ranks
from trainer.config import DiscriminatorConfig
from trainer.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, last_layer_gradient
from trainer.models.autoencoders import run_chain
from trainer.models.discriminator import Discriminator

REAL = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)
FAKE = torch.tensor([[-2.0, 0.25], [3.0, -0.5]]).view(2, 1, 1, 2)


def test_hinge_by_hand() -> None:
    # 1/2 ((0 + 0.5)/2 + (0 + 1.25)/2), 1/2 ((2 + 0)/2 + (4 + 0.5)/2)
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, "hinge"), torch.tensor([0.4375, 1.625]))


def test_vanilla_by_hand() -> None:
    def cross_entropy(logit: float, label: int) -> float:
        probability = 1 / (1 + math.exp(-logit))
        return -math.log(probability if label else 1 - probability)

    expected = [
        0.5 * (sum(cross_entropy(x, 1) for x in real) / 2 + sum(cross_entropy(x, 0) for x in fake) / 2)
        for real, fake in zip(REAL.flatten(1).tolist(), FAKE.flatten(1).tolist(), strict=True)
    ]
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, "vanilla"), torch.tensor(expected))
    sure = torch.full((1, 1, 1, 1), 200.0)  # where a sigmoid's logarithm would be infinite
    torch.testing.assert_close(discriminator_loss(-sure, sure, "vanilla"), torch.tensor([200.0]))


def test_generator_by_hand() -> None:
    torch.testing.assert_close(generator_loss(FAKE), torch.tensor([0.875, -1.25]))


def test_bf16_logits_are_averaged_in_float32() -> None:
    logits = torch.randn(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for loss_B, wide_B in (
        (generator_loss(logits), generator_loss(logits.float())),
        (discriminator_loss(logits, -logits, "hinge"), discriminator_loss(logits.float(), -logits.float(), "hinge")),
    ):
        assert loss_B.dtype == torch.float32
        assert torch.equal(loss_B, wide_B)


# --------------------------------------------------------------------------------------------------- the adaptive weight

BATCH = 4


def build() -> tuple[Decoder, Discriminator]:
    torch.manual_seed(0)
    decoder = Decoder(
        in_channels=3, out_channels=3, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return decoder, Discriminator(DiscriminatorConfig(num_layers=1, width=4, norm="none"))


def latents_and_images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randn(BATCH, 3, 16, 16, generator=generator)


def decode(decoder: Decoder, z: Tensor) -> tuple[Tensor, Tensor]:
    """Input of the last convolution, and images."""
    h = run_chain([decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_norm_out, decoder.conv_act], z)
    return h, decoder.conv_out(h)


def weight_from_images(rows: slice) -> Tensor:
    """As a rank computes it: from gradients at the images, of its own rows' mean losses."""
    decoder, discriminator = build()
    z, x = (both[rows] for both in latents_and_images())
    with torch.no_grad():
        before_last, x_hat = decode(decoder, z)
    x_hat.requires_grad_()
    nll, game = (x - x_hat).abs().mean(), generator_loss(discriminator(x_hat)).mean()
    shape = (3, 8, 3, 3)
    return adaptive_weight(
        *(last_layer_gradient(before_last, shape, torch.autograd.grad(v, x_hat)[0]) for v in (nll, game))
    )


def weight_by_autograd() -> Tensor:
    """Eq. 7 of Esser et al. as it is written: both losses of the whole batch through the graph, to conv_out.weight."""
    decoder, discriminator = build()
    z, x = latents_and_images()
    x_hat = decode(decoder, z)[1]
    nll, game = (x - x_hat).abs().mean(), -discriminator(x_hat).mean()
    of_nll, of_game = (torch.autograd.grad(v, decoder.conv_out.weight, retain_graph=True)[0] for v in (nll, game))
    return of_nll.norm() / (of_game.norm() + 1e-4)


def test_adaptive_weight_by_ordinary_autograd() -> None:
    found, expected = weight_from_images(slice(None)), weight_by_autograd()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert 0 < found < 1e4
    assert not found.requires_grad


def test_bounds_of_the_adaptive_weight() -> None:
    ones = torch.ones(2, 2, 3, 3)
    norm = 6.0  # sqrt(2 * 2 * 3 * 3)
    for nll, game, expected in (
        (ones, ones, norm / (norm + 1e-4)),
        (0.1 * ones, 0 * ones, 0.1 * norm / 1e-4),
        (ones, 0 * ones, 1e4),
        (ones, 1e-9 * ones, 1e4),
        (0 * ones, ones, 0.0),
        (0 * ones, 0 * ones, 0.0),
    ):
        weight = adaptive_weight(nll.requires_grad_(), game.requires_grad_())
        assert weight.item() == pytest.approx(expected, rel=1e-5)
        assert not weight.requires_grad
    assert adaptive_weight(ones, ones * torch.nan).isnan(), "a step with it must be refused, not hidden"


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_the_last_layer(dtype: torch.dtype, kernel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 8, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    gradient = torch.randn(3, 5, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    conv = nn.Conv2d(8, 5, kernel, padding=kernel // 2).double()
    (expected,) = torch.autograd.grad(conv(h.double()), conv.weight, gradient.double())
    found = last_layer_gradient(h.requires_grad_(), tuple(conv.weight.shape), gradient)  # type: ignore[arg-type]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert not found.requires_grad
    rtol = 1e-12 if dtype == torch.float64 else 1e-5  # bf16 inputs are exact in float32
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def test_gradient_of_the_last_layer_under_autocast() -> None:
    """Of bf16 activations as autograd with bf16 products has it, but for their rounding; itself in float32."""
    h = torch.randn(3, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    conv = nn.Conv2d(8, 3, 3, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = last_layer_gradient(h.to(torch.bfloat16), (3, 8, 3, 3), gradient)
        y = conv(h)
    assert y.dtype == torch.bfloat16
    (expected,) = torch.autograd.grad(y, conv.weight, gradient.to(torch.bfloat16))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-2 * expected.norm()


def of_rank(world: Any) -> Tensor:
    return weight_from_images(slice(2 * world.rank, 2 * world.rank + 2))


def test_two_ranks_equal_one() -> None:
    first, second = run_ranks(2, of_rank)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weight_by_autograd(), rtol=1e-5, atol=0)
    own = weight_from_images(slice(0, 2))
    assert abs(own - first) > 1e-3 * first, "halves alike: nothing was compared"
