"""What `loupe plan` says of a rank's state and of a checkpoint, beside a sharded run's own."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from trainer import optim, train_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.ema import EMA
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World
from trainer.plan.memory import checkpoint_bytes, state_bytes
from trainer.plan.recipe import Parameters
from trainer.recipes import load
from trainer.tasks.latent_diffusion import LatentDiffusionTask, TextToImage
from trainer.tensors import locals_of


def held(world: World, url: str) -> tuple[dict[str, int], Parameters]:
    run = load("demo")
    task = LatentDiffusionTask(run, world.device)
    units = task.sharding_units()
    within = {id(p) for unit in units for p in unit.parameters()}
    parameters = Parameters(
        tuple(tuple(tuple(p.shape) for p in unit.parameters()) for unit in units),
        tuple(tuple(p.shape) for p in task.module.parameters() if id(p) not in within),
    )
    parallelize(task.module, units, world, run.parallel)
    optimizer = optim.build_optimizer(task.module, run.optim)
    ema = EMA(task.module)
    manager = CheckpointManager(url, keep_last=2, config_digest="digest", code_version="0")
    manager.save(train_state.tensors(task, ema, optimizer), step=1, images_seen=8, state={})
    for parameter in task.module.parameters():
        parameter.grad = parameter.detach().clone()

    def size(tensors: Any) -> int:
        return sum(tensor.nbytes for tensor in locals_of(list(tensors)))

    return {
        "parameters": size(task.module.parameters()),
        "gradients": size(p.grad for p in task.module.parameters() if p.grad is not None),
        "optimizer": size(optim.state_tensors(task.module, optimizer).values()),
        "ema": size(ema.average.values()),
    }, parameters


def test_state_is_exact_and_a_checkpoint_within_five_percent(tmp_path: Path) -> None:
    url = str(tmp_path / "checkpoints")
    (first, parameters), (second, _) = run_ranks(2, held, url)
    run = load("demo")
    planned = state_bytes(run, parameters, 2)
    assert planned == first
    assert all(second[part] <= first[part] for part in first)
    on_disk = sum(path.stat().st_size for path in Path(url).rglob("*") if path.is_file())
    assert run.task.kind == "latent_diffusion"
    buffers = sum(buffer.nbytes for buffer in TextToImage(run.task).buffers())
    assert checkpoint_bytes(run, parameters, buffers) == pytest.approx(on_disk, rel=0.05)
