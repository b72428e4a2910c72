"""Where a run's checkpoints and the snapshots of its averages are written: managers of both, wired to the run."""

import sys
from datetime import timedelta
from importlib.metadata import version

import torch.distributed as dist

from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig, explain_digests
from trainer.parallel.world import World
from trainer.run_folder import CHECKPOINTS, EMA_SNAPSHOTS, RunFolder

SAVE_TIMEOUT = timedelta(hours=2)
"""Longest that ranks wait for one another's part of a save in the background."""


def checkpoints_of(config: RunConfig, folder: RunFolder, world: World, digest: str, attempt: int) -> CheckpointManager:
    """A collective. `digest`: of config and datasets, what a checkpoint is bound to."""
    return _manager(f"{folder.url}/{CHECKPOINTS}", config.checkpoint.keep_last, folder, world, digest, attempt)


def snapshots_of(
    config: RunConfig, folder: RunFolder, world: World, digest: str, attempt: int
) -> CheckpointManager | None:
    """A collective. None where the run keeps none."""
    if not config.ema.snapshot_steps:
        return None
    keep = config.ema.keep_snapshots or sys.maxsize
    return _manager(f"{folder.url}/{EMA_SNAPSHOTS}", keep, folder, world, digest, attempt)


def _manager(url: str, keep_last: int, folder: RunFolder, world: World, digest: str, attempt: int) -> CheckpointManager:
    return CheckpointManager(
        url,
        keep_last=keep_last,
        config_digest=digest,
        code_version=version("loupe"),
        process_group=world.host_group,
        background_group=dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT),
        explain=lambda found: explain_digests(found, digest),
        may_commit=lambda: folder.check_newest(attempt),
    )
