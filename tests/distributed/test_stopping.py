"""A request to stop that comes when samples are due, or while they are drawn: nobody waits for them, and nothing is lost."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.tiny import tiny
from trainer import run as run_module
from trainer import train_state
from trainer.errors import ExitCode
from trainer.evaluate.sampling import sample_prompts
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run import Run
from trainer.run_folder import RunFolder
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import full

DUE = 3
"""Step after which samples are due."""
SETTINGS = (
    f"samples={{every_steps: {DUE}, count: 8, num_steps: 2, sampler: euler}}",
    "checkpoint.every_steps=100",
    "data.num_workers=0",
)


def stopped(world: World, url: str, *, at_step: int | None = None, at_pass: int | None = None) -> dict[str, Any]:
    """A run whose last rank is asked to stop in the training step after `at_step` steps, or in a pass of the samples, of which
    each rank makes four."""
    stop = StopRequest()
    run = Run(tiny(*SETTINGS), RunFolder(url), world, stop)
    assert isinstance(run.task, LatentDiffusionTask)
    forward_backward, sample_latents, passes = run.task.forward_backward, run.task.sample_latents, []
    is_asked = world.rank == world.size - 1

    def step(batch: Any, plan: Any, scale: float) -> Any:
        if is_asked and plan.step == at_step:
            stop.received = "SIGTERM"
        return forward_backward(batch, plan, scale)

    def sample(*arguments: Any, **named: Any) -> Any:
        passes.append(run.trainer.progress.step)
        if is_asked and len(passes) == at_pass:
            stop.received = "SIGTERM"
        return sample_latents(*arguments, **named)

    run.task.forward_backward, run.task.sample_latents = step, sample  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "sample_prompts", partial(sample_prompts, batch_size=1))
        code = run.train()
    tensors = train_state.tensors(run.task, run.trainer.ema, run.trainer.optimizer)
    out = {"code": code, "step": run.trainer.progress.step, "passes": passes,
           "state": {name: full(tensor.detach()).clone() for name, tensor in tensors.items()}}  # fmt: skip
    run.exporter.close()
    return out


def all_three(world: World, folder: Path) -> dict[str, dict[str, Any]]:
    return {
        "before": stopped(world, f"{folder}/before", at_step=DUE - 1),
        "amid": stopped(world, f"{folder}/amid", at_pass=1),
        "after": stopped(world, f"{folder}/after", at_step=DUE),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("stopping")
    return folder, run_ranks(2, all_three, folder)


def files(folder: Path, name: str) -> set[str]:
    return {str(path.relative_to(folder / name)) for path in (folder / name).rglob("*.png")}


def test_samples_that_are_due_are_not_begun(runs: Any) -> None:
    folder, ranks = runs
    for rank in ranks:
        assert (rank["before"]["code"], rank["before"]["step"]) == (ExitCode.REQUEUE, DUE)
        assert rank["before"]["passes"] == []
    assert files(folder, "before") == set(), (
        "neither pictures nor curves: the job waits for this process to be queued again"
    )


def test_samples_that_are_drawn_are_left_by_all_ranks_at_the_same_pass(runs: Any) -> None:
    folder, ranks = runs
    for rank in ranks:
        assert (rank["amid"]["code"], rank["amid"]["step"]) == (ExitCode.REQUEUE, DUE), "before another step"
        assert rank["amid"]["passes"] == [DUE] * 2, "heard of by all in the pass after the next"
    assert files(folder, "amid") == set()
    assert files(folder, "after") == {f"samples/step-{DUE:08d}.png", "curves.png"}, "without a request they are drawn"
    assert [rank["after"]["passes"] for rank in ranks] == [[DUE] * 4] * 2


def test_what_is_saved_is_the_weights_and_not_their_average(runs: Any) -> None:
    folder, ranks = runs
    for rank in ranks:
        before, amid = rank["before"]["state"], rank["amid"]["state"]
        assert before.keys() == amid.keys()
        assert all(torch.equal(before[name], amid[name]) for name in before)
    for name in ("before", "amid"):
        assert len(list((folder / name).glob(f"checkpoints/step-{DUE:08d}-*/COMMIT"))) == 1
