"""The PatchGAN against pix2pix's, layer by layer; what a logit sees; its norms, on one rank and two."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.distributed.harness import run_ranks
from trainer.config import DiscriminatorConfig
from trainer.models.discriminator import BatchNorm, Discriminator


def build(seed: int = 0, **fields: Any) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(DiscriminatorConfig(**{"width": 4, **fields}))


def pictures(side: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ----------------------------------------------------------------------------------------------------- what a logit sees


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_patch_by_gradient(num_layers: int, patch: int) -> None:
    config = DiscriminatorConfig(num_layers=num_layers, width=2, norm="none")
    assert config.patch_px == patch
    images = pictures(patch + 2 ** (num_layers + 2), count=1).requires_grad_()
    logits = build(num_layers=num_layers, width=2, norm="none")(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    seen = gradient[0].abs().sum(0) > 0
    for sides in (seen.any(0), seen.any(1)):
        places = sides.nonzero().flatten()
        assert places[0] > 0, "the patch reaches over the border; the image must be larger"
        assert places[-1] < len(sides) - 1
        assert places[-1] - places[0] + 1 == patch


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_smallest_image(num_layers: int, norm: str) -> None:
    config = DiscriminatorConfig(num_layers=num_layers, width=2)
    discriminator = build(num_layers=num_layers, width=2, norm=norm)
    assert discriminator(pictures(config.smallest_px, count=1)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        discriminator(pictures(config.smallest_px - 1))


# --------------------------------------------------------------------------------------------------- the same as pix2pix's


def n_layer_discriminator(num_layers: int, ndf: int, *, norm: bool) -> nn.Sequential:
    """As pix2pix builds `NLayerDiscriminator`, with BatchNorm2d or no norm at all."""
    kernel, padding = 4, 1
    sequence: list[nn.Module] = [nn.Conv2d(3, ndf, kernel, stride=2, padding=padding), nn.LeakyReLU(0.2, True)]
    multiple = 1
    for n in range(1, num_layers):
        previous, multiple = multiple, min(2**n, 8)
        sequence.append(nn.Conv2d(ndf * previous, ndf * multiple, kernel, stride=2, padding=padding, bias=not norm))
        sequence += [nn.BatchNorm2d(ndf * multiple)] if norm else []
        sequence.append(nn.LeakyReLU(0.2, True))
    previous, multiple = multiple, min(2**num_layers, 8)
    sequence.append(nn.Conv2d(ndf * previous, ndf * multiple, kernel, stride=1, padding=padding, bias=not norm))
    sequence += [nn.BatchNorm2d(ndf * multiple)] if norm else []
    sequence.append(nn.LeakyReLU(0.2, True))
    sequence.append(nn.Conv2d(ndf * multiple, 1, kernel, stride=1, padding=padding))
    return nn.Sequential(*sequence)


@pytest.mark.parametrize("num_layers", [1, 3, 5])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_layers_are_those_of_pix2pix(num_layers: int, norm: str) -> None:
    ours = build(num_layers=num_layers, norm=norm)
    theirs = n_layer_discriminator(num_layers, 4, norm=norm == "batch")
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
        h = other_h = pictures(128, count=1 if num_layers == 5 else 2)
        for layer, other_layer in zip(ours.layers, theirs, strict=True):
            h, other_h = layer(h), other_layer(other_h)
            torch.testing.assert_close(h, other_h, rtol=1e-4, atol=1e-5)
    assert h.std() > 0


def test_initial_weights_are_those_of_pix2pix() -> None:
    """N(0, 0.02^2) of convolutions, N(1, 0.02^2) of norms."""
    discriminator = build(width=16)
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    norms = torch.cat([layer.weight.detach() for layer in discriminator.layers if isinstance(layer, BatchNorm)])
    for conv in convolutions:
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(norms.mean().item() - 1) < 0.01
    assert norms.std().item() == pytest.approx(0.02, rel=0.25)


# ---------------------------------------------------------------------------------------------------------- spectral norm


def test_spectral_norm() -> None:
    discriminator = build(norm="spectral", width=8)
    images = pictures(32)
    with torch.no_grad():
        for _ in range(60):
            discriminator(images)
    for layer in discriminator.layers:
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
            assert largest.item() == pytest.approx(1.0, abs=0.02)
    assert not any(isinstance(layer, BatchNorm) for layer in discriminator.layers)


def test_the_state_of_spectral_norm_is_saved() -> None:
    first = build(norm="spectral")
    images = pictures(32)
    first(images)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert sum(name.endswith(("._u", "._v")) for name in state) == 2 * 5
    second = build(seed=1, norm="spectral")
    second.load_state_dict(state)
    for _ in range(2):
        assert torch.equal(first(images), second(images))


def test_a_step_has_one_power_iteration_however_many_passes() -> None:
    """As Miyato et al., algorithm 1, has it: u and v of the step before, one product with each side of the weight."""
    discriminator = build(norm="spectral").eval()
    layer: Any = discriminator.layers[2]
    spectral = layer.parametrizations.weight[0]
    weight, v = layer.parametrizations.weight.original.detach().flatten(1), spectral._v.clone()
    u = weight @ v / (weight @ v).norm()
    v = weight.T @ u / (weight.T @ u).norm()
    discriminator.begin_step()
    for _ in range(3):
        discriminator(pictures(32))
        torch.testing.assert_close(spectral._u, u)
        torch.testing.assert_close(spectral._v, v)
    torch.testing.assert_close(layer.weight.detach().flatten(1), weight / (u @ weight @ v))


def test_spectral_norm_is_not_lowered_by_autocast() -> None:
    """On a GPU autocast would take the power iteration's products to bf16; a CPU's does not know them."""
    seen = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.mv:
                seen.append(torch.is_autocast_enabled("cpu"))
            return func(*args, **(kwargs or {}))

    discriminator = build(norm="spectral")
    with torch.autocast("cpu", dtype=torch.bfloat16), Products():
        logits = discriminator(pictures(32))
    assert logits.dtype == torch.bfloat16
    assert seen
    assert not any(seen)


# ------------------------------------------------------------------------------------------------------------- batch norm

CHANNELS = 5


def maps(dtype: torch.dtype = torch.float32) -> Tensor:
    """Far from 0, where a difference of squares would lose its digits; unlike from rank to rank."""
    x = torch.randn(4, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(2))
    x = x * torch.linspace(0.1, 3.0, CHANNELS)[:, None, None] + 100.0
    x[2:] += 5.0
    return x.to(dtype)


def normed(norm: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of an uneven sum with respect to input, weight and bias."""
    x = x.clone().requires_grad_()
    y = norm(x)
    gradients = torch.autograd.grad((y.float() * weights).sum(), [x, norm.weight, norm.bias])
    return (y.detach(), *gradients)


def with_parameters(norm: Any) -> Any:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS))
        norm.bias.copy_(torch.linspace(-1.0, 1.0, CHANNELS))
    return norm


def of_sum() -> Tensor:
    return torch.randn(4, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(3))


def test_batch_norm_of_one_rank() -> None:
    expected = normed(with_parameters(nn.BatchNorm2d(CHANNELS)), maps(), of_sum())
    for found, value in zip(normed(with_parameters(BatchNorm(CHANNELS)), maps(), of_sum()), expected, strict=True):
        torch.testing.assert_close(found, value)


def on_a_rank(world: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows = slice(2 * world.rank, 2 * world.rank + 2)
    y, of_x, *of_parameters = normed(with_parameters(BatchNorm(CHANNELS)), maps(dtype)[rows], of_sum()[rows])
    for gradient in of_parameters:
        dist.all_reduce(gradient)
    return y, of_x, *of_parameters


def on_two_ranks(world: Any) -> list[tuple[Tensor, ...]]:
    """Batch norm in float32 and bf16; the whole discriminator with its gradients."""
    discriminator = build(num_layers=2)
    images = pictures(32, count=4)[2 * world.rank : 2 * world.rank + 2].requires_grad_()
    warnings.simplefilter("error")  # each line of one would be in every rank's log
    loss = discriminator(images).square().sum()
    of_images, *gradients = torch.autograd.grad(loss, [images, *discriminator.parameters()])
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [on_a_rank(world, torch.float32), on_a_rank(world, torch.bfloat16), (of_images, *gradients)]


def test_batch_norm_of_two_ranks_is_that_of_the_joined_batch() -> None:
    first, second = run_ranks(2, on_two_ranks)
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        # torch's own computes in float32 on a GPU too, where it takes bf16 beside float32 weights
        y, of_x, *of_parameters = normed(with_parameters(nn.BatchNorm2d(CHANNELS)), maps(dtype).float(), of_sum())
        joined = [torch.cat(both) for both in zip(first[i][:2], second[i][:2], strict=True)]
        tolerance: dict[str, Any] = {
            "rtol": 1e-4,
            "atol": 2e-4,
        }  # values of 100 in float32: 1e-5 of a deviation of 0.1
        torch.testing.assert_close(joined[0], y, **tolerance)
        if dtype == torch.bfloat16:
            tolerance = {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(joined[1], of_x.to(dtype), **tolerance)
        for found, other, expected in zip(first[i][2:], second[i][2:], of_parameters, strict=True):
            assert torch.equal(found, other)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    alone = build(num_layers=2)
    images = pictures(32, count=4).requires_grad_()
    of_images, *gradients = torch.autograd.grad(alone(images).square().sum(), [images, *alone.parameters()])
    torch.testing.assert_close(torch.cat([first[2][0], second[2][0]]), of_images, rtol=1e-4, atol=1e-6)
    for found, expected in zip(first[2][1:], gradients, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_widths_double_to_eight_times_the_first() -> None:
    weights = [layer.weight for layer in build(num_layers=5, width=3).layers if isinstance(layer, nn.Conv2d)]
    assert [w.shape[0] for w in weights] == [3, 6, 12, 24, 24, 24, 1]
    assert all(b.shape[1] == a.shape[0] for a, b in pairwise(weights))
