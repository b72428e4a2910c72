"""The latent diffusion task: caption dropout follows the stream, and a prompt's picture its place in the list alone."""

from typing import Any

import pytest
import torch

from data.loader import Batch
from tests.tiny import tiny
from trainer.parallel.world import World
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
    return (text.mask_BL.sum(1) == 1).tolist()  # the begin token alone


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_their_share_by_stream_position(share: float) -> None:
    task = LatentDiffusionTask(tiny(f"task.caption_dropout={share}"), CPU)
    drops = dropped(task, 0, 2000)
    assert sum(drops) / 2000 == pytest.approx(share, abs=0.04)
    assert dropped(task, 700, 50) == drops[700:750]


@torch.no_grad()
def test_a_prompts_picture_depends_on_neither_batch_nor_order_of_work(alone: World) -> None:
    task = LatentDiffusionTask(tiny(), CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in task.module.parameters():  # a fresh model predicts zeros
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    settings: dict[str, Any] = {"resolution": 64, "sampler": "euler", "num_steps": 3, "guidance_scale": 2.0, "seed": 1}
    prompts = ["dog", "cat", "pencil"]
    together = task.sample_latents(prompts, 0, **settings)
    single = [task.sample_latents([prompt], i, **settings) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(torch.cat(single), together, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1
    unguided = task.sample_latents(prompts, 0, **{**settings, "guidance_scale": 1.0})
    assert (unguided - together).abs().max() > 1e-3
    assert task.decode(together).shape == (3, 3, 64, 64)
