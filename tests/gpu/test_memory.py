"""Every recipe's model at full width: three real steps, and whether a rank's memory holds what its docstring promises."""

import pytest
import torch

from ops.bench import recipes as bench
from tests.gpu import on_rank
from trainer.parallel.world import World
from trainer.recipes import load

SMALL, LARGE = 2, 4
"""Micro-batches that fit beside the whole state of the largest model on one GPU with 80 GB. Between them memory grows by
what an image needs, so the recipe's own micro-batch is reckoned, not run: one rank has no room for it."""
PROMISED = 80e9
"""Bytes of the GPUs that docstrings name."""
RESERVE = 4e9
"""For CUDA itself, NCCL's buffers and what the allocator cannot fill."""


def costs(world: World, name: str) -> list[list[bench.Cost]]:
    """Of each phase of another shape, at both micro-batches."""
    config, found = load(name), []
    for phase in bench.shapes(config):
        of_phase = []
        for micro_batch in (SMALL, LARGE):
            of_phase.append(bench.measure(name, config, phase, world, micro_batch=micro_batch, steps=3))
            torch.cuda.empty_cache()
        found.append(of_phase)
    return found


@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    [
        "imagenet_512_lpl",
        "cc12m_512_lpl_flow",
        "sd3_medium_512",
        "imagenet_256_dit",
        "cc12m_256_unet",
        "cc12m_256_pixart",
    ],
)
def test_a_recipe_at_full_width(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(name)
    assert config.task.kind == "latent_diffusion"
    too_large = []
    for small, large in on_rank("cuda", costs, name):
        assert small.peak_bytes is not None
        assert small.rank_bytes is not None
        assert large.peak_bytes is not None
        assert torch.tensor([small.loss, large.loss]).isfinite().all()
        assert small.peak_bytes > small.state_bytes, "the state is part of the peak"
        per_image = (large.peak_bytes - small.peak_bytes) / (LARGE - SMALL)
        images = bench.share(name, small.phase, config)
        needed = small.rank_bytes + per_image * (images - SMALL) + bench.encoder_bytes(config.task)
        with capsys.disabled():
            print(f"\n{bench.HEADER}\n{bench.line(small)}\n{bench.line(large)}")
            print(f"{images} images a rank need {needed / 1e9:.1f} GB, text encoders included")
        if needed + RESERVE > PROMISED:
            too_large.append(f"{small.phase.name}: {needed / 1e9:.1f} GB for {images} images")
    assert not too_large, "set parallel.micro_batch_size"
