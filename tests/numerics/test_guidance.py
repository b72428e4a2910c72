"""Classifier-free guidance: its extrapolation, where it applies, and how it is rescaled, against their own formulas."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from trainer.config import ParadigmConfig
from trainer.diffusion.guidance import Guidance, guided, rescaled, times
from trainer.diffusion.paradigms import Paradigm, build_paradigm
from trainer.diffusion.samplers import Evaluations, build_sampler, evaluations


def build(kind) -> Paradigm:
    return build_paradigm(ParadigmConfig(kind=kind), resolution=512)


def noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Network:
    """Knows a condition of its samples: B with, and of 2B the second half without."""

    def __init__(self, paradigm: Paradigm) -> None:
        self.paradigm = paradigm
        self.calls: list[tuple[int, float]] = []

    def cond(self, zt: Tensor, t: Tensor) -> Tensor:
        return self.uncond(zt, t) + 0.2 * zt + 0.1

    def uncond(self, zt: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * zt.roll(1, 1) + self.paradigm.model_time(t).view(-1, 1, 1, 1) / 500 - 1.0)

    def __call__(self, zt: Tensor, t: Tensor) -> Tensor:
        assert zt.shape[0] == t.shape[0]
        self.calls.append((len(zt), float(t[0])))
        if len(zt) == 2:
            return self.cond(zt, t)
        assert torch.equal(zt[:2], zt[2:])
        assert torch.equal(t[:2], t[2:])
        return torch.cat([self.cond(zt[:2], t[:2]), self.uncond(zt[2:], t[2:])])


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_extrapolates_in_one_call_of_twice_the_batch(scale: float) -> None:
    network, z = Network(build("flow")), noise()
    t = torch.full((2,), 0.4)
    cond, uncond = network.cond(z, t), network.uncond(z, t)
    torch.testing.assert_close(guided(network, Guidance(scale))(z, 0.4), scale * cond + (1 - scale) * uncond)
    assert network.calls == [(4, pytest.approx(0.4))]


def test_a_scale_of_one_is_the_conditional_prediction_at_half_the_cost() -> None:
    network, z = Network(build("flow")), noise()
    out = guided(network, Guidance(1.0, (0.0, 1.0), 0.7))(z, 0.4)
    assert torch.equal(out, network.cond(z, torch.full((2,), 0.4)))
    assert [rows for rows, _ in network.calls] == [2]


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescaling_is_that_of_lin_et_al(phi: float) -> None:
    """Against diffusers, and at phi = 1 by what it is for: the deviation of each sample is the conditional one's."""
    cond, uncond = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    cfg = uncond + 7.5 * (cond - uncond)
    found = rescaled(cfg, cond, phi)
    torch.testing.assert_close(found, rescale_noise_cfg(cfg, cond, guidance_rescale=phi), rtol=1e-5, atol=1e-5)
    deviations = [x.flatten(1).std(1) for x in (found, cond, cfg)]
    torch.testing.assert_close(deviations[0], phi * deviations[1] + (1 - phi) * deviations[2])
    network, z = Network(build("flow")), noise()
    t = torch.full((2,), 0.9)
    plain = network.uncond(z, t) + 3.0 * (network.cond(z, t) - network.uncond(z, t))
    expected = rescale_noise_cfg(plain, network.cond(z, t), guidance_rescale=phi)
    torch.testing.assert_close(guided(network, Guidance(3.0, None, phi))(z, 0.9), expected, rtol=1e-5, atol=1e-5)


def test_a_flat_prediction_stays_as_it_is() -> None:
    """Of a fresh network: deviation 0, by which nothing can be divided."""
    assert torch.equal(rescaled(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), 0.7), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("kind", "name", "inside"), [("flow", "euler", 2), ("ddpm_v", "ddim", 2), ("flow", "heun", 4), ("flow", "rk4", 10)]
)
def test_guidance_is_applied_within_its_interval_alone(kind: str, name: str, inside: int) -> None:
    """Against a sampler of a prediction that decides at each time by itself; and the cost is what is told before."""
    paradigm, interval, scale, steps = build(kind), (0.35, 0.8), 3.0, 6
    network = Network(paradigm)

    def predict(zt: Tensor, t: float) -> Tensor:
        t_B = times(t, zt)
        share = float(paradigm.model_time(t_B)[0]) / 1000
        factor = scale if 0.35 <= share <= 0.8 else 1.0
        return network.uncond(zt, t_B) + factor * (network.cond(zt, t_B) - network.uncond(zt, t_B))

    sampler, guidance = build_sampler(name), Guidance(scale, interval)
    out = sampler(guided(network, guidance), paradigm, noise(), steps)
    torch.testing.assert_close(out, sampler(predict, paradigm, noise(), steps), rtol=1e-5, atol=1e-5)
    doubled = [t for rows, t in network.calls if rows == 4]
    assert len(doubled) == inside
    found = evaluations(name, paradigm, steps, guidance)
    assert found == Evaluations(len(network.calls), len(network.calls) + inside)


def test_an_interval_of_all_times_is_none() -> None:
    paradigm = build("flow")
    always = evaluations("rk4", paradigm, 5, Guidance(2.0))
    assert always == evaluations("rk4", paradigm, 5, Guidance(2.0, (0.0, 1.0))) == Evaluations(20, 40)
    assert evaluations("rk4", paradigm, 5, Guidance(1.0)) == Evaluations(20, 20)


@pytest.mark.parametrize(("kind", "name"), [
    ("ddpm_eps", "ddim"), ("ddpm_v", "dpm-solver"), ("flow", "euler"), ("flow", "heun"), ("flow", "rk4"),
    ("flow", "rk4-38"), ("flow", "dpm-solver"),
])  # fmt: skip
def test_every_sampler_follows_the_guided_prediction(kind: str, name: str) -> None:
    paradigm, scale = build(kind), 2.0
    network = Network(paradigm)

    def extrapolated(zt: Tensor, t: float) -> Tensor:
        t_B = times(t, zt)
        return (1 - scale) * network.uncond(zt, t_B) + scale * network.cond(zt, t_B)

    out = build_sampler(name)(guided(network, Guidance(scale)), paradigm, noise(), 5)
    assert {rows for rows, _ in network.calls} == {4}
    torch.testing.assert_close(out, build_sampler(name)(extrapolated, paradigm, noise(), 5), rtol=1e-4, atol=1e-4)
