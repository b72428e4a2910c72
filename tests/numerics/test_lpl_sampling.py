"""Estimating the latent perceptual loss from some of the samples: unbiased in value and gradient, exactly so many, the same
after a resume and on every rank."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_ranks
from tests.numerics.lpl_cases import fixed, make_codec, make_latents, make_loss
from tests.perceptual import make_context
from trainer.config import ParadigmConfig, SampledConfig
from trainer.diffusion.paradigms import build_paradigm
from trainer.losses.estimators import (
    GatedSampler,
    inclusion_probabilities,
    level_quantiles,
    sizes,
    systematic_choice,
)
from trainer.losses.lpl import LatentPerceptualLoss
from trainer.losses.perceptual import PerceptualContext
from trainer.models.autoencoders import Codec
from trainer.parallel.world import World

PARADIGM = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=64)
LARGEST = 1.0 - 2.0**-53
"""Of the draws."""


def drawn(z0: Tensor, u: float, **fields: Any) -> PerceptualContext:
    uniform: Callable[[str], Tensor] = lambda purpose: torch.full((len(z0),), u, dtype=torch.float64)  # noqa: E731
    return make_context(z0, paradigm=PARADIGM, uniform=uniform, **fields)


def choose(sampler: GatedSampler, level_B: Tensor, u: float) -> Any:
    return sampler.choose(level_B, drawn(torch.zeros(len(level_B), 1, 1, 1), u))


def skewed(sampler: GatedSampler, ratio: float, foretold: float) -> None:
    """Sums as if residuals grew so many times from the first bin to the last, over 50 samples each."""
    size_K = torch.logspace(0, torch.tensor(ratio).log10().item(), sampler.config.num_bins, dtype=torch.float64)
    sums_K4 = 50 * torch.stack(
        [torch.ones_like(size_K), size_K**2 + foretold**2, torch.full_like(size_K, foretold), torch.ones_like(size_K)],
        -1,
    )
    sampler.state_tensors()["sampled"].copy_(sums_K4)


# ---------------------------------------------------------------------------------------------------- the choice itself

TABLES = {
    "even": torch.ones(9),
    "skewed": torch.logspace(-2, 1, 13),
    "one_rules": torch.tensor([1e-3] * 10 + [5.0]),
    "extreme": torch.tensor([1e-30, 1e-12, 1.0, 1e12, 2e12]),
    "two_certain": torch.tensor([9.0, 0.2, 0.3, 8.0, 0.25, 0.3, 0.2]),
}


def by_bisection(size_N: Tensor, count: int) -> Tensor:
    """The c at which min(1, c * size) sums to `count`, found by halving."""
    low, high = 0.0, 1e40
    for _ in range(400):
        c = (low + high) / 2
        low, high = (c, high) if (c * size_N).clamp(max=1).sum() < count else (low, c)
    return (high * size_N).clamp(max=1)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_probabilities_sum_to_the_count_and_follow_sizes(name: str, count: int) -> None:
    size_N = TABLES[name].double()
    probability_N = inclusion_probabilities(size_N, count)
    assert probability_N.min() > 0
    assert probability_N.max() <= 1
    assert probability_N.sum().item() == pytest.approx(count, abs=1e-9)
    if name != "extreme":  # there, the smallest are raised so that each can be chosen
        torch.testing.assert_close(probability_N, by_bisection(size_N, count), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_exactly_so_many_are_chosen_each_as_often_as_its_probability_says(name: str, count: int) -> None:
    probability_N = inclusion_probabilities(TABLES[name], count)
    num_draws = 2000
    draws = [*((torch.arange(num_draws) + 0.5) / num_draws).tolist(), 0.0, LARGEST]
    chosen_MC = torch.stack([systematic_choice(probability_N, u) for u in draws])
    assert chosen_MC.shape == (len(draws), count)
    assert (chosen_MC.sort().values.diff() > 0).all(), "one was chosen twice"
    assert 0 <= chosen_MC.min() <= chosen_MC.max() < len(probability_N)
    times_N = chosen_MC[:num_draws].flatten().bincount(minlength=len(probability_N))
    # evenly spaced draws: each interval holds its share of them to within two
    torch.testing.assert_close(times_N.double(), probability_N * num_draws, rtol=0, atol=2.001)


def test_bins_are_filled_evenly_by_training() -> None:
    edges = level_quantiles(PARADIGM, 3.0, 8)
    level = PARADIGM.noise_level(PARADIGM.sample_t(torch.rand(50_000, generator=torch.Generator().manual_seed(1))))
    counts = torch.bucketize(level[level <= 3.0].double(), edges).bincount(minlength=8)
    assert counts.min() > 0.9 * counts.float().mean()
    assert counts.max() < 1.1 * counts.float().mean()


def test_a_bin_without_data_is_taken_for_an_ordinary_one() -> None:
    size_K, foretold = sizes(torch.zeros(4, 4, dtype=torch.float64))
    assert (size_K.tolist(), foretold) == ([1.0] * 4, 0.0)
    sums = torch.tensor([[100.0, 400.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    assert sizes(sums)[0].tolist() == [2.0, 2.0]
    # D = 0.5 S everywhere: foretold, and nothing is left
    size_K, foretold = sizes(torch.tensor([[10.0, 2.5, 5.0, 10.0], [10.0, 10.0, 20.0, 40.0]], dtype=torch.float64))
    assert (size_K.tolist(), foretold) == ([1.0, 1.0], 0.5)


# ------------------------------------------------------------------------------------------------- values and gradients


@cache
def parts() -> tuple[Codec, Tensor, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Codec, z0_hat, z0, levels; and of the loss over the first two maps and over deeper ones: each sample's value and its
    gradient, plainly computed, 0 outside the gate."""
    codec = make_codec()
    _, z0 = make_latents(codec, 24, 4)
    level_B = torch.linspace(0.05, 3.9, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(3))]
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(4))
    z0_hat = z0 + 0.5 * level_B[:, None, None, None] * noise
    out = {}
    for name, maps in {"whole": ("mid", "up0"), "deep": ("up1", "up2", "up3")}.items():
        z = z0_hat.clone().requires_grad_()
        loss_B, _ = make_loss(codec, fixed(maps=maps))(z, z0, level_B, drawn(z0, 0.5))
        (gradient,) = torch.autograd.grad(loss_B.sum(), z)
        out[name] = loss_B.detach().double(), gradient.flatten(1).double()
    return codec, z0_hat, z0, level_B, out


def is_within(samples_MX: Tensor, exact_X: Tensor, errors: float) -> bool:
    """Whether the mean over M draws is within so many standard errors of the exact value, in norm."""
    difference = (samples_MX.mean(0) - exact_X).norm()
    return bool(difference <= errors * (samples_MX.var(0).sum() / len(samples_MX)).sqrt())


@pytest.mark.parametrize(("count", "whole_maps", "ratio", "foretold"),
                         [(1, 0, 1.0, 0.0), (4, 0, 30.0, 0.0), (13, 0, 1000.0, 0.0),
                          (2, 2, 30.0, 0.4), (4, 2, 3.0, 5.0)])  # fmt: skip
def test_the_mean_over_draws_is_the_exact_loss_and_gradient(
    count: int, whole_maps: int, ratio: float, foretold: float
) -> None:
    _, _, z0, level_B, of = parts()
    sampler = GatedSampler(SampledConfig(samples_per_rank=count, whole_maps=whole_maps))
    skewed(sampler, ratio, foretold if whole_maps else 0.0)
    is_deep = [not whole_maps, True]
    # evenly spaced, so that their mean is nearer to the integral than that of as many at random
    draws = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    choices = [choose(sampler, level_B, u) for u in draws.tolist()]
    assert {len(c.rows) for c in choices} == {count}
    factors_MBL = torch.stack([c.map_factors(len(z0), is_deep) for c in choices]).double()

    value_BL = torch.stack([of["whole"][0], of["deep"][0]], -1)
    values_M1 = (factors_MBL * value_BL).sum((1, 2))[:, None]
    assert is_within(values_M1, value_BL.sum()[None], 0.5)
    gradient_BLX = torch.stack([of["whole"][1], of["deep"][1]], 1)
    # with respect to z0_hat, each sample its own; and to eight parameters that all samples share
    gradients_MX = torch.einsum("mbl,blx->mbx", factors_MBL, gradient_BLX).flatten(1)
    assert is_within(gradients_MX, gradient_BLX.sum(1).flatten(), 0.5)
    jacobian_PBX = torch.randn(
        8, *gradient_BLX[:, 0].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    shared_MP = torch.einsum("mbl,blx,pbx->mp", factors_MBL, gradient_BLX, jacobian_PBX)
    assert is_within(shared_MP, torch.einsum("blx,pbx->p", gradient_BLX, jacobian_PBX), 0.5)

    if ratio > 10:  # weights that know nothing of the probabilities do not pass
        num_gated = int((level_B <= 3.0).sum())
        wrong_MBL = torch.where(factors_MBL[..., 1:] > 0, num_gated / count, 0.0)
        assert not is_within((wrong_MBL * value_BL[:, 1:]).sum((1, 2))[:, None], value_BL[:, 1].sum()[None], 0.5)


@pytest.mark.parametrize("whole_maps", [0, 2])
def test_the_loss_has_the_chosen_samples_weighted(whole_maps: int) -> None:
    codec, z0_hat, z0, level_B, of = parts()
    loss = make_loss(codec, fixed(sampled=SampledConfig(samples_per_rank=5, whole_maps=whole_maps)))
    assert loss.sampler
    skewed(loss.sampler, 20.0, 0.4 if whole_maps else 0.0)
    decoded: list[tuple[int, int]] = []
    plain = loss.decoder.forward

    def spy(latents_BCHW: Tensor, window: Any = None, num_maps: int | None = None) -> list[Tensor]:
        decoded.append((len(latents_BCHW), num_maps or 5))
        return plain(latents_BCHW, window, num_maps)

    loss.decoder.forward = spy  # type: ignore[method-assign]
    z = z0_hat.clone().requires_grad_()
    loss_B, terms = loss(z, z0, level_B, drawn(z0, 0.7))
    (gradient,) = torch.autograd.grad(loss_B.sum(), z)
    choice = choose(loss.sampler, level_B, 0.7)
    factors_BL = choice.map_factors(len(z0), [not whole_maps, True]).double()
    value_BL = torch.stack([of["whole"][0], of["deep"][0]], -1)
    gradient_BLX = torch.stack([of["whole"][1], of["deep"][1]], 1)
    torch.testing.assert_close(loss_B.double(), (factors_BL * value_BL).sum(-1), rtol=1e-4, atol=1e-6)
    expected = (factors_BL[..., None] * gradient_BLX).sum(1)
    torch.testing.assert_close(gradient.flatten(1).double(), expected, rtol=1e-3, atol=1e-5)

    gated = level_B <= 3.0
    assert torch.equal(terms["gate"], gated.float())
    assert (loss_B[~gated] == 0).all()
    assert sum(n for n, depth in decoded if depth == 5) == 2 * 5
    assert sum(n for n, depth in decoded if depth == 2) == (2 * (int(gated.sum()) - 5) if whole_maps else 0)
    # terms are estimates of the exact one's
    _, exact = make_loss(codec, fixed())(z0_hat, z0, level_B, drawn(z0, 0.7))
    for i, name in enumerate(("mid", "up0", "up1", "up2", "up3")):
        factor_B = factors_BL[:, 1] if i >= whole_maps else gated
        torch.testing.assert_close(
            terms[f"lpl_{name}"], (exact[f"lpl_{name}"] * factor_B).float(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("whole_maps", [0, 2])
def test_where_no_more_are_gated_than_may_be_decoded_nothing_is_estimated(whole_maps: int) -> None:
    codec, z0_hat, z0, level_B, _ = parts()
    sampled = SampledConfig(samples_per_rank=24, whole_maps=whole_maps)
    loss_B, terms = make_loss(codec, fixed(sampled=sampled))(z0_hat, z0, level_B, drawn(z0, 0.2))
    exact_B, exact = make_loss(codec, fixed())(z0_hat, z0, level_B, drawn(z0, 0.2))
    assert torch.equal(loss_B, exact_B)
    assert terms.keys() == exact.keys()
    outside = torch.full_like(level_B, 99.0)
    none_B, none = make_loss(codec, fixed(sampled=sampled))(
        z0_hat.clone().requires_grad_(), z0, outside, drawn(z0, 0.2)
    )
    none_B.sum().backward()
    assert terms.keys() == none.keys()
    assert not none_B.any()


# --------------------------------------------------------------------------------------------------- from step to step


def train(loss: LatentPerceptualLoss, steps: range, *, loud: int | None = None) -> list[list[int]]:
    """Steps of two micro-batches; the rows chosen in each. Step 3 is refused, its loss being non-finite. In step `loud`,
    estimates are far off."""
    _, _, z0, _, _ = parts()
    z0, chosen = z0[:12], []
    for step in steps:
        for micro in range(2):
            generator = torch.Generator().manual_seed(2 * step + micro)
            level_B = 3.0 * torch.rand(12, generator=generator)
            size_B = level_B**2 + (30.0 * (level_B < 1.0) if step == loud else 0.0)
            z0_hat = z0 + size_B[:, None, None, None] * torch.randn(z0.shape, generator=generator)
            if step == 3:
                z0_hat = z0_hat * float("nan")
            u = torch.rand((), generator=generator, dtype=torch.float64).item()
            loss_B, _ = loss(z0_hat, z0, level_B, drawn(z0, u))
            chosen.append((loss_B != 0).nonzero().flatten().tolist())
        loss.end_step(torch.tensor(0.0 if step == 3 else 1.0))
    return chosen


def make_trained() -> LatentPerceptualLoss:
    return make_loss(parts()[0], fixed(num_maps=2, sampled=SampledConfig(samples_per_rank=3, num_bins=4)))


def test_a_resumed_run_chooses_what_an_undisturbed_one_does() -> None:
    undisturbed = make_trained()
    expected = train(undisturbed, range(9))
    final = undisturbed.state_tensors()["sampled"]
    assert final.isfinite().all()
    untaught = [train(make_trained(), range(step, step + 1)) for step in range(9)]
    assert expected != [chosen for step in untaught for chosen in step], "the losses do not matter here"
    for stop in (1, 3, 4, 6):
        before, after = make_trained(), make_trained()
        head = train(before, range(stop))
        saved = {name: tensor.clone() for name, tensor in before.state_tensors().items()}
        going_on = train(before, range(stop, 9))
        for name, tensor in after.state_tensors().items():
            tensor.copy_(saved[name])
        assert head + train(after, range(stop, 9)) == head + going_on == expected
        assert torch.equal(after.state_tensors()["sampled"], final)


def test_the_host_knows_losses_two_steps_later_and_no_refused_ones() -> None:
    quiet, loud = train(make_trained(), range(9)), train(make_trained(), range(9), loud=4)
    assert quiet[: 2 * 6] == loud[: 2 * 6]
    assert quiet[2 * 6 :] != loud[2 * 6 :]
    loss = make_trained()
    train(loss, range(3))
    before = loss.state_tensors()["sampled"].clone()
    train(loss, range(3, 4))
    assert torch.equal(loss.state_tensors()["sampled"], before[1:].expand(2, -1, -1))


def of_rank(world: World) -> tuple[Tensor, list[int]]:
    sampler = GatedSampler(SampledConfig(samples_per_rank=2, num_bins=4))
    level_B = torch.tensor([0.1, 0.6, 1.4, 2.7])
    for step in range(3):
        context = drawn(torch.zeros(4, 1, 1, 1), 0.3)
        # the second rank has none inside
        levels = level_B if world.rank == 0 else level_B + 9.0
        choice = sampler.choose(levels, context)
        sampler.record(choice, (1.0 + step) * torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(4), levels, context)
        sampler.end_step(torch.tensor(1.0))
    return sampler.state_tensors()["sampled"].clone(), choose(sampler, level_B, 0.3).rows.tolist()


def test_ranks_have_one_table() -> None:
    (first, chosen), (second, also) = run_ranks(2, of_rank)
    assert torch.equal(first, second)
    assert chosen == also
    assert first[1, :, 1].sum() > 0
