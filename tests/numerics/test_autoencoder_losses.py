"""Gradients of each term of stage 1's loss, as its task sends them, against finite differences in float64."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from data.batches import Batch
from tests.numerics.lpips_reference import random_weights
from trainer.config import AutoencoderConfig, InitFromConfig, RunConfig, replace
from trainer.models.autoencoders import Codec
from trainer.recipes import load
from trainer.rng import normal
from trainer.step_plan import StepPlan
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tensors import pixels_to_images

SIDE, BATCH = 32, 2
KL = {"kind": "kl", "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}
VQ = {**KL, "kind": "vq", "codebook": {"size": 16, "weight": 2.0}}
TEACHER = {"url": "nowhere", "latent_channels": 3, "downsampling": 2}
SILENT = {"lpips": None, "discriminator": None, "pixel_weight": 0.0, "kl_weight": 0.0}
"""No term but what a case adds."""

Value = Callable[[dict[str, Tensor]], Tensor]


@pytest.fixture(scope="session")
def lpips_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("lpips") / "alex.pth"
    torch.save(random_weights("alex"), path)
    return {"network": "alex", "url": str(path)}


def teacher() -> Codec:
    torch.manual_seed(7)
    return Codec(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
            block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.7, shift_factor=0.1,
        )
    )  # fmt: skip


def run_config(**fields: Any) -> RunConfig:
    config = AutoencoderConfig.model_validate({"model": KL, **SILENT, **fields})
    recipe = load("demo_autoencoder")
    phase = replace(recipe.phases[0], resolution=SIDE, batch_size=BATCH)
    init_from = None if config.trained == "all" else InitFromConfig(url="nowhere")
    return replace(recipe, task=config, phases=(phase,), init_from=init_from)


def build(**fields: Any) -> AutoencoderTask:
    """In float64, its codes where its latents are."""
    run = run_config(**fields)
    task = AutoencoderTask(run, torch.device("cpu"), teacher=teacher() if fields.get("teacher") else None)
    for part in (task.module, task.lpips, task.teacher, task.image_space, task.discriminator):
        if part is not None:
            part.double()
    if task.codebook:
        with torch.no_grad():
            raw = task.module.encode(images())
            task.module.codes_KC.copy_(_normal(task.module.codes_KC) * raw.std() + raw.mean())
    return task


def plan_of(task: AutoencoderTask, step: int = 0) -> StepPlan:
    phase = task._run.phases[0]
    return StepPlan(step, phase, 0, step, 1e-3, 0, begins_phase=step == 0, ends_phase=False)


def batch(step: int = 0) -> Batch:
    coarse = torch.rand(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    pixels = (F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return Batch(
        step=step, resolution=SIDE, positions_B=torch.arange(BATCH), images_BCHW=pixels, captions=[""] * BATCH,
        labels_B=torch.full((BATCH,), -1), keys=["x"] * BATCH, substitutions=(),
    )  # fmt: skip


def images() -> Tensor:
    return pixels_to_images(batch().images_BCHW).double()


def _normal(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_terms(task: AutoencoderTask, step: int = 0) -> dict[str, Tensor]:
    """Of one step, whose gradients are the parameters' afterwards."""
    for module in (task.module, task.discriminator):
        if module is not None:
            module.zero_grad()
    return task.forward_backward(batch(step), plan_of(task, step), scale=1.0 / BATCH)


def directions(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [_normal(p, seed) for seed, p in enumerate(parameters)]


def assert_gradient(
    parameters: Iterable[Tensor], value: Callable[[], Tensor], *, h: float = 1e-6, rtol: float = 1e-5
) -> None:
    """The parameters' gradients along a random direction against the value's central difference."""
    parameters = list(parameters)
    found = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions(parameters), strict=True)
                if p.grad is not None)  # fmt: skip
    ends = []
    for sign in (1, -1):
        _move(parameters, sign * h)
        ends.append(float(value()))
        _move(parameters, -sign * h)
    expected = (ends[0] - ends[1]) / (2 * h)
    assert abs(expected) > 1e-5, f"{expected}: nothing to compare"
    assert found == pytest.approx(expected, rel=rtol)


def _move(parameters: list[Tensor], distance: float) -> None:
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions(parameters), strict=True):
            parameter.add_(distance * direction)


def groups(task: AutoencoderTask) -> dict[str, list[Tensor]]:
    """Those with a gradient, in a few groups, and some tensors alone."""
    vae = task.module.autoencoder
    named = {
        "encoder": [*vae.encoder.parameters(), *vae.quant_conv.parameters()],
        "decoder": [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()],
        "first": [vae.encoder.conv_in.weight],
        "norm": [vae.decoder.mid_block.resnets[0].norm1.weight],
        "last": [vae.decoder.conv_out.weight],
    }
    return {
        name: some for name, some in named.items() if any(p.grad is not None and p.grad.abs().sum() > 0 for p in some)
    }


def check(task: AutoencoderTask, expected_groups: set[str], value: Value, step: int = 0) -> None:
    def evaluated() -> Tensor:
        return value({name: term.mean() for name, term in step_terms(task, step).items()})

    terms = step_terms(task, step)
    torch.testing.assert_close(terms["loss"].mean(), value({name: term.mean() for name, term in terms.items()}))
    assert terms["loss"].dtype == torch.float64
    found = groups(task)
    assert found.keys() == expected_groups
    for some in found.values():
        step_terms(task, step)
        assert_gradient(some, evaluated)


ALL, ENCODER, DECODER = (
    {"encoder", "decoder", "first", "norm", "last"},
    {"encoder", "first"},
    {"decoder", "norm", "last"},
)

# ------------------------------------------------------------------------------------------------- of images and latents


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_pixels(kind: str) -> None:
    check(build(pixel_loss=kind, pixel_weight=1.5), ALL, lambda terms: 1.5 * terms[kind])


def test_lpips(lpips_config: dict[str, str]) -> None:
    check(build(lpips=lpips_config, lpips_weight=0.7), ALL, lambda terms: 0.7 * terms["lpips"])


def test_kl() -> None:
    def value(terms: dict[str, Tensor]) -> Tensor:
        return 3.0 * terms["kl"]

    task = build(kl_weight=3.0)
    check(task, ENCODER, value)
    mean, log_variance = task.module.encode(images()).chunk(2, 1)
    divergence_B = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))  # from N(0, 1), by hand
    torch.testing.assert_close(step_terms(task)["kl"], divergence_B.detach() / (3 * SIDE * SIDE))


def test_log_variance() -> None:
    task = build(pixel_weight=1.0, learned_log_variance=True)
    s = task.module.log_variance
    assert s is not None
    with torch.no_grad():
        s.fill_(-0.4)

    def value(terms: dict[str, Tensor]) -> Tensor:
        return terms["l1"] / s.detach().exp()[0] + s.detach()[0]

    check(task, ALL, value)
    step_terms(task)
    assert_gradient([s], lambda: value({"l1": step_terms(task)["l1"].mean()}))


def test_equivariance() -> None:
    task = build(equivariance={"weight": 2.0, "scales": [0.5]})
    step = next(i for i in range(20) if (t := task._transform(i)) and t.quarter_turns == 3)
    check(task, ALL, lambda terms: 2.0 * terms["equivariance"], step)


def test_outliers() -> None:
    """Mean and deviation are held, so the difference is of the penalty with those of the unmoved weights."""
    task = build(outliers={"weight": 2.0, "threshold": 1.5, "maps": ["mid", "up1"]})
    terms = step_terms(task)
    torch.testing.assert_close(terms["loss"], 2.0 * terms["outliers"])

    def maps() -> list[Tensor]:
        noise = _posterior_noise(task)
        every = task.module(images(), noise).maps
        return [every[0].detach(), every[2].detach()]

    held = [(m.mean((2, 3), keepdim=True), m.std((2, 3), keepdim=True, unbiased=False)) for m in maps()]

    def value() -> Tensor:
        parts = []
        for f, (mean, deviation) in zip(maps(), held, strict=True):
            excess = (((f - mean) / (deviation**2 + 1e-6).sqrt()).abs() - 1.5).clamp(min=0)
            parts.append((excess**2).mean())
        return 2.0 * torch.stack(parts).mean()

    torch.testing.assert_close(value(), terms["loss"].mean())
    found = groups(task)
    assert found.keys() == {"encoder", "decoder", "first", "norm"}  # no map lies behind the last convolution
    for some in found.values():
        assert_gradient(some, value)


def _posterior_noise(task: AutoencoderTask) -> Tensor:
    shape = (3, SIDE // 2, SIDE // 2)
    return normal(task._run.seed, range(BATCH), "posterior", shape, device=torch.device("cpu")).double()


# ------------------------------------------------------------------------------------------------------- of the codebook


def test_codebook_and_commitment() -> None:
    """Each moves its own side alone: |sg(z) - e|^2 the codes, |z - sg(e)|^2 the encoder."""
    task = build(model=VQ)
    codes = task.module.codes_KC

    def of(name: str, factor: float) -> Callable[[], Tensor]:
        return lambda: factor * step_terms(task)[name].mean()

    terms = step_terms(task)
    torch.testing.assert_close(terms["loss"], 2.0 * (terms["codebook"] + 0.25 * terms["commitment"]))
    assert groups(task).keys() == ENCODER
    for parameters, name, factor in (([codes], "codebook", 2.0), (groups(task)["encoder"], "commitment", 0.5)):
        step_terms(task)
        assert_gradient(parameters, of(name, factor))


def test_straight_through() -> None:
    """The encoder's gradient is as if quantisation only added a constant to its latents; the codes have none."""
    task = build(model={**VQ, "codebook": {"size": 16, "weight": 0.0}}, pixel_weight=1.0)
    x = images()
    with torch.no_grad():
        raw = task.module.encode(x)
        nearest = torch.cdist(raw.permute(0, 2, 3, 1).flatten(0, 2), task.module.codes_KC).argmin(1)
        codes = task.module.codes_KC[nearest].view(BATCH, *raw.shape[2:], 3).permute(0, 3, 1, 2)
        offset = codes - raw

    def value() -> Tensor:
        with torch.no_grad():
            return (task.module.decode(task.module.encode(x) + offset)[0] - x).abs().mean()

    terms = step_terms(task)
    torch.testing.assert_close(terms["l1"].mean(), value())
    found = groups(task)
    assert found.keys() == ALL
    for some in found.values():
        assert_gradient(some, value)
    gradient = task.module.codes_KC.grad
    assert gradient is None or not gradient.any()


# ----------------------------------------------------------------------------------------------------- of the two players

GAME = {"start_step": 0, "num_layers": 1, "width": 4, "weight": 0.8}


@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_generator_term_with_its_weight_held(norm: str, adaptive: bool) -> None:
    task = build(pixel_weight=1.0, discriminator={**GAME, "norm": norm, "adaptive_weight": adaptive})
    _strengthen(task)
    held = step_terms(task)["adaptive_weight"][0].clone()
    assert held != 1 if adaptive else held == 1

    def value() -> Tensor:
        terms = {name: term.mean() for name, term in step_terms(task).items()}
        return terms["l1"] + 0.8 * held * terms["generator"]

    terms = step_terms(task)
    torch.testing.assert_close(terms["loss"].mean(), value())
    found = groups(task)
    assert found.keys() == ALL
    for some in found.values():
        step_terms(task)
        assert_gradient(some, value)


@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
def test_discriminator(norm: str, loss: str) -> None:
    task = build(pixel_weight=1.0, discriminator={**GAME, "norm": norm, "loss": loss})
    _strengthen(task)
    assert task.discriminator is not None
    parameters = list(task.discriminator.parameters())
    for chosen in (parameters, parameters[:1], parameters[-2:]):
        step_terms(task)
        assert all(p.grad is not None for p in chosen)
        assert_gradient(chosen, lambda: step_terms(task)["discriminator"].mean())


def _strengthen(task: AutoencoderTask) -> None:
    """Fresh discriminators say about 0 of everything; this one's logits lie on both sides of a hinge's kink."""
    assert task.discriminator is not None
    with torch.no_grad():
        for parameter in task.discriminator.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)


def test_adaptive_weight_of_a_step_by_ordinary_autograd(lpips_config: dict[str, str]) -> None:
    """lambda by gradients with respect to the last convolution's weight, through the graph; at any `scale`."""
    task = build(pixel_weight=1.0, lpips=lpips_config, discriminator={**GAME, "norm": "none"})
    _strengthen(task)
    assert task.lpips is not None
    assert task.discriminator is not None
    x = images()
    x_hat = task.module(x, _posterior_noise(task)).x
    weight = task.module.autoencoder.decoder.conv_out.weight
    nll = (x - x_hat).abs().mean() + task.lpips(x_hat, x).mean()
    game = -task.discriminator(x_hat).mean()
    norms = [torch.autograd.grad(value, weight, retain_graph=True)[0].norm() for value in (nll, game)]
    expected = (norms[0] / (norms[1] + 1e-4)).expand(BATCH)
    for scale in (1.0 / BATCH, 1e-3):
        terms = task.forward_backward(batch(), plan_of(task), scale=scale)
        torch.testing.assert_close(terms["adaptive_weight"], expected, rtol=1e-9, atol=0)


def test_there_is_no_discriminator_before_its_start() -> None:
    task = build(pixel_weight=1.0, discriminator={**GAME, "start_step": 3})
    without = build(pixel_weight=1.0)
    without.module.load_state_dict(task.module.state_dict())
    assert task.discriminator is not None
    for step, plays in ((2, False), (3, True)):
        terms, plain = step_terms(task, step), step_terms(without, step)
        assert ("generator" in terms) == ("adaptive_weight" in terms) == plays
        same = [
            torch.equal(p.grad, q.grad)
            for p, q in zip(task.module.parameters(), without.module.parameters(), strict=True)
            if p.grad is not None and q.grad is not None
        ]
        assert all(same) != plays
        assert any(p.grad is not None for p in task.discriminator.parameters()) == plays
        assert torch.equal(terms["l1"], plain["l1"])


# ------------------------------------------------------------------------------------------------------- with a teacher


def test_image_space(lpips_config: dict[str, str]) -> None:
    parts = {"lpips": lpips_config, "latent_weight": 0.5, "decoded_weight": 2.0, "input_weight": 1.5}
    task = build(teacher=TEACHER, image_space=parts, trained="encoder")
    names = {"image_space_latent": 0.5, "image_space_decoded": 2.0, "image_space_input": 1.5}
    check(task, ENCODER, lambda terms: torch.stack([w * terms[name] for name, w in names.items()]).sum())


def test_consistency(lpips_config: dict[str, str]) -> None:
    """On the latents that the trained decoder has seen: drawn ones."""
    parts = {"pixel_weight": 2.0, "lpips_weight": 0.5}
    task = build(teacher=TEACHER, consistency=parts, trained="decoder", lpips=lpips_config, lpips_weight=0.0)
    check(task, DECODER, lambda terms: 2.0 * terms["consistency"] + 0.5 * terms["consistency_lpips"])
    with torch.no_grad():
        mean, log_variance = task.module.encode(images()).chunk(2, 1)
        drawn = mean + (0.5 * log_variance).exp() * _posterior_noise(task)
        assert task.teacher is not None
        vae: Any = task.teacher.vae
        expected = (task.module.decode(drawn)[0] - vae.decode(drawn).sample).abs().mean((1, 2, 3))
    torch.testing.assert_close(step_terms(task)["consistency"], expected)


@pytest.mark.parametrize("with_images", [False, True])
def test_second_stage(with_images: bool, lpips_config: dict[str, str]) -> None:
    fields: dict[str, Any] = {"reconstructs": "latents", "teacher": TEACHER}
    if with_images:
        fields["image_space"] = {"lpips": lpips_config, "latent_weight": 1.0, "decoded_weight": 1.0}
    task = build(**fields)
    names = ("image_space_latent", "image_space_decoded") if with_images else ("l2",)
    check(task, ALL, lambda terms: torch.stack([terms[name] for name in names]).sum())
