"""Sampling many prompts with all ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.config import SamplesConfig
from trainer.parallel.world import World
from trainer.sampling.settings import SampleSettings
from trainer.tasks.latent_diffusion import LatentDiffusionTask


def sample_prompts(
    task: LatentDiffusionTask, world: World, prompts: Sequence[str], config: SamplesConfig, *, resolution: int,
    batch_size: int = 32, go_on: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Latents (len(prompts), C, h, w) on the CPU, on every rank. A collective: ranks share the prompts.

    Args:
        go_on: called before each pass; what it raises, on all ranks or none, ends the sampling.
    """
    settings = SampleSettings.of(config, resolution=resolution)
    per_rank = -(-len(prompts) // world.size)
    first = world.rank * per_rank
    mine: list[Tensor] = []
    # every rank runs the same number of passes, on stand-ins where its share is over: sharded passes are collectives
    for start in range(first, first + per_rank, batch_size):
        go_on()
        end = min(start + batch_size, first + per_rank)
        chunk = [prompts[min(i, len(prompts) - 1)] for i in range(start, end)]
        mine.append(task.sample_latents(chunk, start, settings).cpu())
    return torch.cat([part for parts in world.gather(mine) for part in parts])[: len(prompts)]
