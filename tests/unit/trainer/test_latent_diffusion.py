"""The latent diffusion task: what is drawn follows the stream, noise levels weigh as the config says, and a prompt's
picture follows its place in the list alone."""

from dataclasses import replace

import pytest
import torch

from data.batches import Batch
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.models.text_encoders import TokenInput
from trainer.parallel.world import World
from trainer.rng import spread_uniform, uniform
from trainer.sampling.settings import SampleSettings
from trainer.step_plan import StepPlanner
from trainer.tasks.latent_diffusion import LatentDiffusionTask

CPU = torch.device("cpu")


def batch(first: int, count: int) -> Batch:
    return Batch(
        step=0, resolution=64, positions_B=torch.arange(first, first + count),
        images_BCHW=torch.zeros(count, 3, 64, 64, dtype=torch.uint8), captions=["dog"] * count,
        labels_B=torch.full((count,), -1), keys=["x"] * count, substitutions=(),
    )  # fmt: skip


def dropped(task: LatentDiffusionTask, first: int, count: int) -> list[bool]:
    text = task._text_of(batch(first, count), range(first, first + count))
    assert isinstance(text, TokenInput)
    return (text.mask_BL.sum(1) == 1).tolist()  # the begin token alone


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_their_share_by_stream_position(share: float) -> None:
    task = LatentDiffusionTask(tiny(f"task.caption_dropout={share}"), CPU)
    drops = dropped(task, 0, 2000)
    assert sum(drops) / 2000 == pytest.approx(share, abs=0.04)
    assert dropped(task, 700, 50) == drops[700:750]


def test_padding_that_no_caption_needs_is_not_computed_and_changes_nothing() -> None:
    """Compiled blocks keep one length, so a task for them is the one to compare with."""
    found = []
    for compiled in (False, True):
        run = tiny(f"parallel.compile={compiled}", "task.caption_dropout=0.0", "phases.low_resolution.perceptual=null")
        task = LatentDiffusionTask(run, CPU)
        torch.manual_seed(1)
        for parameter in task.module.parameters():  # fresh ones let no text through
            torch.nn.init.normal_(parameter, std=0.2)
        given = replace(batch(0, 2), captions=["dog", "fox cub"])
        text = task._text_of(given, range(2))
        assert isinstance(text, TokenInput)
        plan = StepPlanner(run, dict.fromkeys(run.data.datasets, (100,))).plan(0)
        loss_B = task.forward_backward(given, plan, scale=1.0)["loss"]
        gradients = {name: p.grad for name, p in task.module.named_parameters() if p.grad is not None}
        found.append((text.ids_BL.shape[1], loss_B, gradients))
    (length, loss_B, gradients), (full_length, full_loss_B, full_gradients) = found
    assert length == len("fox cub") + 1 < full_length
    torch.testing.assert_close(loss_B, full_loss_B)
    assert gradients.keys() == full_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, full_gradients[name], rtol=1e-4, atol=1e-5)
    assert gradients["text.embedding.weight"].abs().max() > 1e-3


def step(
    run: RunConfig, first: int, count: int, number: int = 7
) -> tuple[LatentDiffusionTask, dict[str, torch.Tensor]]:
    """A fresh task's first step of the run's first phase; such a model predicts zeros."""
    task = LatentDiffusionTask(run, CPU)
    plan = StepPlanner(run, dict.fromkeys(run.data.datasets, (100,))).plan(number)
    return task, task.forward_backward(batch(first, count), plan, scale=1.0)


@pytest.mark.parametrize("draws", ["low_discrepancy", "independent"])
def test_min_snr_weighs_each_sample_by_the_time_that_its_place_and_step_draw(draws: str) -> None:
    run = tiny(
        "task.paradigm.weighting=min_snr",
        f"task.paradigm.timestep_draws={draws}",
        "phases.low_resolution.perceptual=null",
    )
    task, terms = step(run, 1000, 6)
    positions = range(1000, 1006)
    u = uniform(run.seed, positions, "timestep") if draws == "independent" else spread_uniform(run.seed, positions, 7)
    paradigm = task.paradigm(64)
    weight = paradigm.loss_weight(paradigm.sample_t(u))
    assert weight.max() > 1.5 * weight.min()
    torch.testing.assert_close(terms["denoising_weighted"], weight * terms["denoising"])
    torch.testing.assert_close(terms["loss"], run.phases[0].denoising_weight * terms["denoising_weighted"])


def test_the_weight_is_in_the_gradient_and_not_in_the_plain_squared_error() -> None:
    runs = [
        tiny(f"task.paradigm.weighting={w}", "phases.low_resolution.perceptual=null") for w in ("uniform", "min_snr")
    ]
    (plain, plain_terms), (weighted, terms) = (step(run, 1000, 1) for run in runs)
    assert set(plain_terms) == {"loss", "denoising"}
    assert set(terms) == {"loss", "denoising", "denoising_weighted"}
    assert torch.equal(terms["denoising"], plain_terms["denoising"])
    weight = (terms["denoising_weighted"] / terms["denoising"]).item()
    assert 0.0 < weight < 0.9
    gradients = [
        torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
        for task in (plain, weighted)
    ]
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], weight * gradients[0], rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_a_prompts_picture_depends_on_neither_batch_nor_order_of_work(alone: World) -> None:
    task = LatentDiffusionTask(tiny(), CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in task.module.parameters():  # a fresh model predicts zeros
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    settings = SampleSettings("euler", 3, guidance=2.0, seed=1, resolution=64)
    prompts = ["dog", "cat", "pencil"]
    together = task.sample_latents(prompts, 0, settings)
    single = [task.sample_latents([prompt], i, settings) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(torch.cat(single), together, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1
    unguided = task.sample_latents(prompts, 0, replace(settings, guidance=1.0))
    assert (unguided - together).abs().max() > 1e-3
    seldom = task.sample_latents(prompts, 0, replace(settings, guidance_interval=(0.5, 0.9)))
    assert 1e-3 < (unguided - seldom).abs().max() < (unguided - together).abs().max()
    assert task.decode(together).shape == (3, 3, 64, 64)
