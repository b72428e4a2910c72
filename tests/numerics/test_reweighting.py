"""Eq. 15 in closed form, and the variances that it and the rule for weights stand on, against NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.perceptual import make_context
from trainer.config import CodecConfig, LPLConfig, ReweightingConfig
from trainer.losses.lpl import build_lpl
from trainer.losses.reweighting import Reweighting
from trainer.losses.variances import LossVariances
from trainer.models.autoencoders import Codec, load_codec

KEEP, REFUSE = torch.ones(()), torch.zeros(())


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec(CodecConfig(url="repo://trainer/assets/demo_autoencoder"))


def latents(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z0 = torch.randn(size, 4, 8, 8, generator=g)
    return z0, z0 + 0.3 * torch.randn(size, 4, 8, 8, generator=g)


def test_the_gradient_of_the_total_is_that_of_eq_15() -> None:
    weight, ratio, tau = 3.0, 0.7, 2.0
    loss = Reweighting(ReweightingConfig(variance_ratio=ratio), None)
    levels = torch.tensor([0.5, 2.0, 2.1, math.inf, math.nan])
    z0, estimate = latents(0, 5)
    estimate.requires_grad_()
    denoising_B = (estimate - z0).square().flatten(1).mean(1)
    added_B, terms = loss(estimate, z0, levels, make_context(z0, threshold=tau, denoising_B=denoising_B))
    (got,) = torch.autograd.grad((denoising_B + weight * added_B).mean(), estimate)
    # w(sigma_t) times the gradient of |estimate - z0|^2, by hand
    w_B = torch.tensor([1 + weight * ratio, 1 + weight * ratio, 1.0, 1.0, 1.0])
    want = w_B[:, None, None, None] * 2 * (estimate.detach() - z0) / z0[0].numel() / 5
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(added_B, torch.tensor([ratio, ratio, 0, 0, 0]) * denoising_B)
    assert terms["gate"].tolist() == [1, 1, 0, 0, 0]
    assert terms["reweighting_ratio"].tolist() == pytest.approx([ratio] * 5)
    assert loss.state_tensors() == {}


def test_a_sample_outside_the_gate_adds_nothing_though_it_is_no_number() -> None:
    loss = Reweighting(ReweightingConfig(variance_ratio=2.0), None)
    z0, estimate = latents(0, 2)
    denoising_B = torch.tensor([1.0, math.nan], requires_grad=True)
    added_B, _ = loss(estimate, z0, torch.tensor([1.0, 9.0]), make_context(z0, denoising_B=denoising_B))
    added_B.sum().backward()
    assert added_B.tolist() == [2.0, 0.0]
    assert denoising_B.grad is not None
    assert denoising_B.grad.tolist() == [2.0, 0.0]


def test_the_ratio_is_measured_in_the_phases_first_steps(codec: Codec) -> None:
    lpl = build_lpl(LPLConfig(num_maps=1), codec)
    loss = Reweighting(ReweightingConfig(measure_steps=3), lpl)
    loss.begin_phase(torch.nn.Identity())
    ratios, wanted = [], []
    lpl_variances: list[float] = []
    variances: list[float] = []
    for step in range(5):
        all_lpl, all_denoising = [], []
        for micro in range(2):
            z0, estimate = latents(10 * step + micro)
            levels = torch.tensor([1.0, 1.0, 9.0, 1.0])
            denoising_B = torch.linspace(0.1, 1.0, 4) * (step + 1) + micro
            context = make_context(z0, denoising_B=denoising_B, phase_step=step)
            _, terms = loss(estimate.requires_grad_(), z0, levels, context)
            assert terms["reweighting_ratio"].unique().numel() == 1
            all_lpl.append(lpl(estimate.detach(), z0, levels, context)[0])
            all_denoising.append(denoising_B)
        ratios.append(terms["reweighting_ratio"][0].item())
        wanted.append(np.mean(lpl_variances) / np.mean(variances) if variances else 0.0)
        loss.end_step(REFUSE if step == 1 else KEEP)
        if step in (0, 2):  # step 1 was refused, from step 3 on nothing is measured
            lpl_variances.append(torch.cat(all_lpl).double().numpy().var(ddof=1))
            variances.append(torch.cat(all_denoising).double().numpy().var(ddof=1))
    assert ratios == pytest.approx(wanted, rel=1e-5)
    assert ratios[0] == 0 < ratios[1] == ratios[2] != ratios[3] == ratios[4]
    # a checkpoint in place: another one goes on where this one stands
    other = Reweighting(ReweightingConfig(measure_steps=3), lpl)
    assert other.state_tensors().keys() == loss.state_tensors().keys()
    for name, tensor in other.state_tensors().items():
        tensor.copy_(loss.state_tensors()[name])
    z0, estimate = latents(99)
    assert other(estimate, z0, levels, make_context(z0, phase_step=5))[1]["reweighting_ratio"][0].item() == ratios[-1]
    loss.begin_phase(torch.nn.Identity())
    assert loss(estimate, z0, levels, make_context(z0, phase_step=5))[1]["reweighting_ratio"][0].item() == 0


def test_variances_decay_by_half_in_their_half_life() -> None:
    g = np.random.default_rng(0)
    ours, steps = LossVariances(2, half_life_steps=2), []
    for i in range(7):
        terms_2B = g.normal(size=(2, 12)) * np.array([[1.0 + i], [0.1]]) + 5.0 * i
        for part in np.split(terms_2B, 3, axis=1):
            ours.add(*torch.from_numpy(part).float())
        if i == 4:
            ours.end_step(REFUSE)
            continue
        ours.end_step(KEEP)
        steps.append(terms_2B.astype(np.float32).astype(np.float64).var(axis=1, ddof=1))
    weights = 0.5 ** (np.arange(6)[::-1] / 2)
    a, b = np.average(steps, axis=0, weights=weights)
    assert ours.ratio(0, 1).item() == pytest.approx(a / b, rel=1e-6)
    assert ours.ratio(1, 0).item() == pytest.approx(b / a, rel=1e-6)
    before = ours.sums.clone()
    ours.end_step(KEEP)  # nothing was added
    assert torch.equal(ours.sums, before)


@pytest.mark.parametrize("bad", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_a_variance_that_is_none_does_not_count(bad: list[float]) -> None:
    ours = LossVariances(2)
    ours.add(torch.tensor(bad), torch.ones(len(bad)))
    ours.end_step(KEEP)
    assert ours.ratio(0, 1).item() == 0
    ours.add(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]))
    ours.end_step(KEEP)
    assert ours.ratio(0, 1).item() == 4.0


def test_a_loss_that_never_varies_gets_no_weight() -> None:
    ours = LossVariances(2)
    ours.add(torch.tensor([1.0, 2.0]), torch.zeros(2))
    ours.end_step(KEEP)
    assert ours.ratio(0, 1).item() == 0


def test_no_ratio_until_enough_steps_have_counted() -> None:
    """One step whose only gated sample is nearly clean must not decide a weight."""
    variances = LossVariances(2, half_life_steps=100)
    g = torch.Generator().manual_seed(0)
    known = []
    for i in range(12):
        perceptual_B = 1e-6 * torch.eye(8)[0] if i == 0 else torch.rand(8, generator=g)
        variances.add(torch.rand(8, generator=g), perceptual_B)
        variances.end_step(REFUSE if i == 3 else KEEP)
        known.append(variances.ratio(0, 1, min_steps=8).item())
    assert [value > 0 for value in known] == [False] * 8 + [True] * 4
    assert max(known) < 3
