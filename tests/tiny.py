"""The demo at a size for tests: the real data, codec, model and losses at half the size, a few seconds of training."""

from trainer.config import RunConfig
from trainer.config_text import with_overrides
from trainer.recipes import load

TINY = (
    "task.model={kind: mmdit, num_blocks: 2, num_heads: 2, head_dim: 16, patch_size: 1, position_grid: 16, base_grid: 8}",
    "task.text={kind: bytes, max_bytes: 24, width: 32, num_blocks: 1, num_heads: 2}",
    "task.perceptual.tau_reference_px=32",
    "phases.low_resolution.steps=8",
    "phases.low_resolution.resolution=16",
    "phases.low_resolution.batch_size=8",
    "phases.full_resolution.steps=6",
    "phases.full_resolution.resolution=32",
    "phases.full_resolution.batch_size=8",
    "phases.perceptual.steps=6",
    "phases.perceptual.resolution=32",
    "phases.perceptual.batch_size=8",
    "metrics.every_steps=1",
    "metrics.count_flops=false",
    "checkpoint.every_steps=5",
    "samples=null",
    "prompt_accuracy=null",
    "optim.warmup_steps=4",
    "ema.start_step=3",
)

DEMO_SIZES = (
    "phases.low_resolution.resolution=32",
    "phases.full_resolution.resolution=64",
    "phases.perceptual.resolution=64",
    "task.perceptual.tau_reference_px=64",
)
"""The demo's own, for tests of data that have these sizes."""


def tiny(*overrides: str) -> RunConfig:
    """20 steps in the demo's three phases, LPL in the last."""
    return with_overrides(load("demo"), [*TINY, *overrides])
