"""Validation and snapshots of averages in whole runs: on any number of ranks, through stops, crashes and roll backs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.config_text import with_overrides
from trainer.errors import ExitCode
from trainer.parallel.world import World
from trainer.posthoc_ema import StoredAverages, tensors
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder
from trainer.tensors import put

CONFIG = tiny(
    "phases.low_resolution.steps=4", "phases.full_resolution.steps=1", "phases.full_resolution.resolution=32",
    "phases.perceptual.steps=5", "phases.perceptual.resolution=32", "task.perceptual.tau_reference_px=32",
    "validation={every_steps: 3, count: 6, batch_size: 2, levels: 2}",
    "ema.profiles=[0.05, 0.1]", "ema.snapshot_steps=2", "checkpoint.every_steps=5", "data.num_workers=0",
)  # fmt: skip
"""Ten steps: validations after 3, 6, 9 and at the end, snapshots after every second, checkpoints after 5 and 10."""
ALL = [2, 4, 6, 8, 10]


def train(world: World, url: str, config: RunConfig = CONFIG, **events: int) -> dict[str, Any]:
    """One attempt.

    Args:
        events: `stop_at_pass`: the last rank is asked to stop in that pass of the validations; `crash_at`: all ranks die in
            that step; `roll_back_at`: the run is rolled back after it.
    """
    from trainer.run import Run

    stop, passes = StopRequest(), []
    run = Run(config, RunFolder(url), world, stop)
    run._draw_curves = lambda: None  # type: ignore[method-assign]  # half of such a run's time, and no matter here
    step_of, go_on = run.task.forward_backward, run.trainer.stopping.go_on

    def forward_backward(batch: Any, plan: Any, scale: float) -> Any:
        if plan.step == events.get("crash_at"):
            raise RuntimeError("crash")
        if plan.step == events.get("roll_back_at"):
            events.pop("roll_back_at")
            run.trainer._roll_back_due = True
        return step_of(batch, plan, scale)

    def counted() -> None:
        passes.append(run.trainer.progress.step)
        if len(passes) == events.get("stop_at_pass") and world.rank == world.size - 1:
            stop.received = "SIGTERM"
        go_on()

    run.task.forward_backward = forward_backward  # type: ignore[method-assign]
    run.trainer.stopping.go_on = counted  # type: ignore[method-assign]
    out: dict[str, Any] = {}
    try:
        out["code"] = run.train()
    except RuntimeError as e:
        out["code"] = str(e)
    run.exporter.close()
    world.barrier()
    return {**out, "passes": passes}


def fresh(world: World, folder: Path) -> Any:
    """Of a model that has made a step, so that it says something; the same on any number of ranks but for rounding."""
    from trainer.run import Run

    run = Run(CONFIG, RunFolder(f"{folder}/fresh-{world.size}"), world, StopRequest())
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in run.task.module.named_parameters()}
    for name, average in run.trainer.ema.average.items():
        put(whole[name], average)
    assert run.validation is not None
    with run.trainer.averaged():
        found = run.validation.measure(CONFIG.phases[-1])
    run.exporter.close()
    return found.terms


def on_two(world: World, folder: Path) -> dict[str, Any]:
    return {
        "fresh": fresh(world, folder),
        "whole": train(world, f"{folder}/whole"),
        "stopped": train(world, f"{folder}/stopped", stop_at_pass=6),
        "resumed": train(world, f"{folder}/stopped"),
    }


def disturbed(world: World, folder: Path) -> dict[str, Any]:
    spikes = with_overrides(CONFIG, ["optim.spikes={window_steps: 64}"])
    return {
        "crashed": train(world, f"{folder}/crashed", crash_at=8),
        "before": [s.entry.name for s in StoredAverages(f"{folder}/crashed").stored],
        "recovered": train(world, f"{folder}/crashed"),
        "rolled": train(world, f"{folder}/rolled", spikes, roll_back_at=7),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("validation")
    [one] = run_ranks(1, fresh, folder)
    first, second = run_ranks(2, on_two, folder)
    assert first == second, "all ranks know the same"
    return folder, one, first


def validations(folder: Path, name: str) -> dict[int, Any]:
    return {found["step"]: found["terms"] for found in RunFolder(f"{folder}/{name}").validations()}


def snapshots(folder: Path, name: str) -> list[int]:
    return [stored.step for stored in StoredAverages(f"{folder}/{name}").stored]


def test_two_ranks_measure_exactly_what_one_does(runs: Any) -> None:
    _, one, two = runs
    assert one == two["fresh"]
    assert set(one) == {"denoising", "lpl"}
    assert len(set(one["denoising"].means)) == 2


def test_what_a_run_writes(runs: Any) -> None:
    folder, _, two = runs
    assert two["whole"]["code"] == ExitCode.DONE
    run = RunFolder(f"{folder}/whole")
    # 3 passes of 2 images, of which a rank makes 2, at 2 levels; those at the end nobody stops
    assert two["whole"]["passes"] == [3] * 4 + [6] * 4 + [9] * 4
    assert run.names("evaluation") == ["validation-final.json", *(f"validation-step-{s:08d}.json" for s in (3, 6, 9))]
    found = validations(folder, "whole")
    assert {step: set(terms) for step, terms in found.items()} == {
        3: {"denoising"}, 6: {"denoising", "lpl"}, 9: {"denoising", "lpl"}, 10: {"denoising", "lpl"}
    }  # fmt: skip
    final, summary = run.read_json("evaluation/validation-final.json"), run.read_json("summary.json")
    assert final["denoising"]["by_level"] == pytest.approx(found[10]["denoising"])
    assert summary["validation"]["denoising"] == pytest.approx(final["denoising"]["mean"])
    assert found[3]["denoising"] != found[9]["denoising"], "the model has learnt, or unlearnt"
    assert snapshots(folder, "whole") == ALL
    assert len(run.names("checkpoints")) == 2


def test_a_stop_amid_a_validation_is_obeyed_at_the_next_pass_but_one(runs: Any) -> None:
    _, _, two = runs
    assert two["stopped"]["code"] == ExitCode.REQUEUE
    assert two["stopped"]["passes"] == [3] * 4 + [6] * 3, "asked in the second, heard of by all in the third"
    assert two["resumed"]["code"] == ExitCode.DONE
    assert two["resumed"]["passes"] == [9] * 4


def same_averages(folder: Path, name: str, step: int) -> bool:
    a, b = (tensors(f"{folder}/{run}", 0.1, step) for run in ("whole", name))
    return all(torch.equal(a[key], b[key]) for key in a)


def as_undisturbed(folder: Path, name: str) -> None:
    whole, found = validations(folder, "whole"), validations(folder, name)
    assert set(whole) - set(found) == ({6} if name == "stopped" else set())
    assert all(whole[step] == terms for step, terms in found.items())
    assert losses(f"{folder}/{name}") == losses(f"{folder}/whole")
    assert snapshots(folder, name) == ALL
    assert all(same_averages(folder, name, step) for step in ALL)


def test_later_validations_and_snapshots_are_those_of_an_undisturbed_run(runs: Any) -> None:
    as_undisturbed(runs[0], "stopped")


@pytest.fixture(scope="module")
def more(runs: Any) -> tuple[Path, dict[str, Any]]:
    folder: Path = runs[0]
    first, second = run_ranks(2, disturbed, folder)
    assert first == second
    return folder, first


@pytest.mark.slow
def test_snapshots_of_steps_that_a_crash_has_lost_are_made_again(more: Any) -> None:
    folder, two = more
    assert (two["crashed"]["code"], two["recovered"]["code"]) == ("crash", ExitCode.DONE)
    before = {name.split("-")[1]: name for name in two["before"]}
    stored = StoredAverages(f"{folder}/crashed").stored
    after = {snapshot.entry.name.split("-")[1]: snapshot.entry.name for snapshot in stored}
    assert set(before) >= {"00000002", "00000004", "00000006"}
    assert (before["00000002"], before["00000004"]) == (after["00000002"], after["00000004"])
    assert before["00000006"] != after["00000006"], "the checkpoint that it went on from is of step 5"
    assert len(list((folder / "crashed" / "ema").iterdir())) == len(ALL), "none twice, nothing left behind"
    as_undisturbed(folder, "crashed")


@pytest.mark.slow
def test_snapshots_of_steps_that_were_rolled_back_are_made_again(more: Any) -> None:
    folder, two = more
    assert two["rolled"]["code"] == ExitCode.DONE
    assert snapshots(folder, "rolled") == ALL
    assert same_averages(folder, "rolled", 4)
    assert not same_averages(folder, "rolled", 6), "with other images since"
    assert len(list((folder / "rolled" / "ema").iterdir())) == len(ALL)


def test_profiles_are_of_the_runs_config(runs: Any, alone: World, tmp_path: Path) -> None:
    folder, _, _ = runs
    run = RunFolder(f"{folder}/whole")
    for change, fits in (
        ("ema.snapshot_steps=5", True),
        ("validation=null", True),
        ("ema.profiles=[0.05, 0.2]", False),
    ):
        config = with_overrides(CONFIG, [change])
        if fits:
            run.check(config)
        else:
            with pytest.raises(Exception, match=r"another config \(ema\.profiles"):
                run.check(config)
