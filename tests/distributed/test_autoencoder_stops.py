"""What must not change anything in stage 1: a stop and a resume, a discriminator that has not begun, a step that is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.stage1 import RUNNING_MEANS, checkpoint, losses, stage1, unequal
from trainer import train_state
from trainer.errors import ExitCode, UserError
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run import Run
from trainer.run_folder import RunFolder
from trainer.tasks import autoencoder
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tensors import full

pytestmark = pytest.mark.slow

ALL_STATES = (RUNNING_MEANS, "task.discriminator.norm=spectral", "checkpoint.every_steps=3")
"""Codes that are means and begin again, and buffers of spectral norms, which move in every step."""
POISONED = {4: "gradient", 5: "loss", 6: "weights"}
"""What is no number of the discriminator's, by step, on the last rank alone."""


def everything(world: World, folder: Path) -> dict[str, Any]:
    config = stage1(*ALL_STATES)
    attempts = [train(world, config, str(folder / "stopped"), stop_after=stop)["code"] for stop in (2, 5, 0)]
    return {
        "whole": train(world, config, str(folder / "whole"))["code"],
        "stopped": attempts,
        "alone": train(world, stage1(*ALL_STATES, "task.discriminator=null"), str(folder / "alone"))["code"],
        "poisoned": poisoned(world, str(folder / "poisoned"), POISONED),
        "always": poisoned(world, str(folder / "always"), dict.fromkeys(range(4, 8), "weights")),
    }


def state(run: Run) -> dict[str, torch.Tensor]:
    tensors = train_state.tensors(run.trainer.task, run.trainer.ema, run.trainer.optimizer)
    return {name: full(tensor.detach()).clone() for name, tensor in tensors.items()}


def poisoned(world: World, url: str, steps: dict[int, str]) -> dict[str, Any]:
    """A run of which in some steps something is no number. What those steps changed, by step, and what was counted."""
    run = Run(stage1(*ALL_STATES, "optim.max_skipped_in_a_row=4"), RunFolder(url), world, StopRequest())
    task = run.task
    assert isinstance(task, AutoencoderTask)
    assert task.discriminator
    weight = next(task.discriminator.parameters())
    forward_backward, train_step, changed = task.forward_backward, run.trainer._train_step, {}
    bad_rank = world.rank == world.size - 1

    def with_bad_gradient(batch: Any, plan: Any, scale: float) -> Any:
        terms = forward_backward(batch, plan, scale)
        if bad_rank and steps.get(plan.step) == "gradient":
            assert weight.grad is not None
            weight.grad.view(-1)[0] = float("nan")
        return terms

    def watched(batch: Any, plan: Any) -> None:
        kind, before = steps.get(plan.step), state(run)
        kept = weight.detach().clone()
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if bad_rank and kind == "weights":
                weight.view(-1)[0] = float("nan")
            if bad_rank and kind == "loss":  # of which no gradient knows
                loss = autoencoder.discriminator_loss
                patch.setattr(autoencoder, "discriminator_loss", lambda *a: loss(*a) + float("inf"))
            with torch.enable_grad():
                train_step(batch, plan)
            if bad_rank and kind == "weights":
                assert torch.isnan(weight).sum() == 1
                weight.copy_(kept)
        changed[plan.step] = unequal(before, state(run))

    task.forward_backward, run.trainer._train_step = with_bad_gradient, watched  # type: ignore[method-assign]
    out: dict[str, Any] = {"changed": changed}
    try:
        out["code"] = run.train()
    except UserError as e:
        out["error"] = str(e)
    read = run.exporter.registry.get_sample_value
    out["counted"] = read("loupe_steps_skipped_total", {"reason": "non_finite"})
    run.exporter.close()
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stops")
    first, second = run_ranks(2, everything, folder)
    for name in ("poisoned", "always"):
        assert second[name].pop("counted") is None, "a run's own metrics are rank 0's alone"
        second[name]["counted"] = first[name]["counted"]
    assert first == second
    assert first["whole"] == first["alone"] == ExitCode.DONE
    return folder, first


def test_a_resumed_run_ends_bit_equal(runs: tuple[Path, dict[str, Any]]) -> None:
    """Stopped before the discriminator begins, and while it plays: every tensor of both optimizers, and of the codebook."""
    folder, results = runs
    assert results["stopped"] == [ExitCode.REQUEUE, ExitCode.REQUEUE, ExitCode.DONE]
    assert losses(folder / "stopped") == losses(folder / "whole")
    tensors = checkpoint(folder / "whole")
    assert unequal(tensors, checkpoint(folder / "stopped")) == []
    for part in ("model.", "ema.", "optim.", "task.discriminator.", "task.discriminator_optim.", "task.codebook."):
        assert any(name.startswith(part) for name in tensors), part
    assert any(name.endswith("._u") for name in tensors)
    steps = {name: tensor.item() for name, tensor in tensors.items() if name.endswith(".step")}
    assert {step for name, step in steps.items() if name.startswith("optim.")} == {8}
    assert {step for name, step in steps.items() if name.startswith("task.discriminator_optim.")} == {5}


def test_a_discriminator_that_has_not_begun_is_not_there(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    with_one, without = losses(folder / "whole"), losses(folder / "alone")
    assert with_one[:3] == without[:3]
    assert with_one[3]["l1"] == without[3]["l1"]
    assert with_one[4]["l1"] != without[4]["l1"], "it has changed the weights by now"
    fresh = AutoencoderTask(stage1(*ALL_STATES), torch.device("cpu")).state_tensors()
    saved = checkpoint(folder / "whole", step=3)
    of_game = [name for name in fresh if name.startswith("discriminator")]
    assert len(of_game) > 10
    assert all(torch.equal(saved[f"task.{name}"], fresh[name]) for name in of_game)
    without_it = checkpoint(folder / "alone", step=3)
    assert unequal({name: saved[name] for name in without_it}, without_it) == []


def test_what_is_no_number_of_the_discriminator_refuses_the_whole_step(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = runs
    seen = results["poisoned"]
    assert seen["code"] == ExitCode.DONE
    assert {step: names for step, names in seen["changed"].items() if not names} == {step: [] for step in POISONED}
    for step in (3, 7):
        moved = seen["changed"][step]
        assert any(name.endswith("._u") for name in moved)
        assert {name.split(".")[0] for name in moved} == {"model", "ema", "optim", "task"}
    assert seen["counted"] == len(POISONED)
    records = losses(folder / "poisoned")
    assert records[:4] == losses(folder / "whole")[:4]
    assert all(torch.tensor(list(terms.values())).isfinite().all() for terms in records)


def test_one_that_stays_so_stops_the_run(runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = runs
    assert "optim.max_skipped_in_a_row: 4 steps in a row were not finite" in results["always"]["error"]
