"""Sampling many prompts with all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config import SamplesConfig
from trainer.parallel.world import World
from trainer.tasks.latent_diffusion import LatentDiffusionTask


def sample_prompts(
    task: LatentDiffusionTask, world: World, prompts: Sequence[str], config: SamplesConfig, *, resolution: int,
    batch_size: int = 32,
) -> Tensor:  # fmt: skip
    """Latents (len(prompts), C, h, w) on the CPU, on every rank. A collective: ranks share the prompts."""
    per_rank = -(-len(prompts) // world.size)
    first = world.rank * per_rank
    mine: list[Tensor] = []
    # every rank runs the same number of passes, on stand-ins where its share is over: sharded passes are collectives
    for start in range(first, first + per_rank, batch_size):
        end = min(start + batch_size, first + per_rank)
        chunk = [prompts[min(i, len(prompts) - 1)] for i in range(start, end)]
        mine.append(
            task.sample_latents(
                chunk, start, resolution=resolution, sampler=config.sampler, num_steps=config.num_steps,
                guidance_scale=config.guidance_scale, seed=config.seed,
            ).cpu()
        )  # fmt: skip
    return torch.cat([part for parts in world.gather(mine) for part in parts])[: len(prompts)]
