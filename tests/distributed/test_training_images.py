"""Image metrics amid training on sharded weights: on two ranks the figures of one, those of `loupe evaluate run` for the
checkpoint of the step, of the average; and runs that are stopped amid them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import cli
from launch.entry import run_command
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses
from tests.distributed.test_validation import train
from tests.feature_networks import write_dinov2
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.config_text import with_overrides
from trainer.errors import ExitCode
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder
from trainer.tensors import put

pytestmark = pytest.mark.slow
"""Of ranks that train or measure: half a minute and more."""

EMOJI = "repo://data/assets/emoji_64"
STEPS = 6


def config(folder: Path, *overrides: str) -> RunConfig:
    section = (
        f"{{every_steps: 3, reference: {EMOJI}, num_samples: 20, reference_count: 40, resolution: 32, num_steps: 2, "
        f"resamples: 20, lot: 4, "
        f"batch_size: 8, allow_few: true, cache: {folder}/cache, networks: [{{name: dinov2, weights: {folder}/dinov2}}]}}"
    )
    return tiny(
        "phases.low_resolution.steps=4", "phases.full_resolution.steps=1", "phases.full_resolution.resolution=32",
        "phases.perceptual.steps=1", "phases.perceptual.resolution=32", "task.perceptual.tau_reference_px=32",
        "checkpoint.every_steps=3", "data.num_workers=0", "ema.start_step=0", "phases.low_resolution.ema_decay=0.9",
        f"image_evaluation={section}", *overrides,
    )  # fmt: skip


def fresh(world: World, folder: Path) -> dict[str, Any]:
    """Of weights that draw something, whose average is another; the same on any number of ranks."""
    from trainer.run import Run

    found: dict[str, Any] = {}
    for name, overrides in (("lots of 4", ()), ("lots of 3", ("image_evaluation.lot=3",))):
        run = Run(config(folder, *overrides), RunFolder(f"{folder}/fresh-{world.size}-{name}"), world, StopRequest())
        generator = torch.Generator().manual_seed(0)
        for key, parameter in run.task.module.named_parameters():
            for target in (run.trainer.ema.average[key], parameter.detach()):
                put(torch.randn(parameter.shape, generator=generator) * 0.1, target)
        assert run.images
        run.images.begin()
        evaluation = run.images._evaluation
        with run.trainer.averaged():
            found[name] = evaluation.measure(3).values
        run.task.module.eval()
        found[f"{name}, raw"] = evaluation.measure(3).values
        run.exporter.close()
    return found


def ended(world: World, url: str, config: RunConfig) -> ExitCode:
    """An attempt whose last rank is asked to stop when all steps are done."""
    from trainer.run import Run

    stop = StopRequest()
    run = Run(config, RunFolder(url), world, stop)
    run._draw_curves = lambda: None  # type: ignore[method-assign]
    at_the_end = run._at_the_end

    def asked() -> dict[str, Any]:
        if world.rank == world.size - 1:
            stop.received = "SIGTERM"
        return at_the_end()

    run._at_the_end = asked  # type: ignore[method-assign]
    code = run.train()
    run.exporter.close()
    world.barrier()
    return code


def on_two(world: World, folder: Path) -> dict[str, Any]:
    run = config(folder)
    return {
        "fresh": fresh(world, folder),
        "without": train(world, f"{folder}/without", with_overrides(run, ["image_evaluation=null"])),
        "whole": train(world, f"{folder}/whole", run),
        # step 3 takes three passes and those of its figures
        "stopped": train(world, f"{folder}/stopped", run, stop_at_pass=2),
        "ended": ended(world, f"{folder}/stopped", run),
        "resumed": train(world, f"{folder}/stopped", run),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("images")
    write_dinov2(folder / "dinov2")
    [one] = run_ranks(1, fresh, folder)
    first, second = run_ranks(2, on_two, folder)
    assert first == second, "all ranks know the same"
    return folder, one, first


def test_two_ranks_measure_what_one_does(runs: Any) -> None:
    _, one, two = runs
    for name, figures in one.items():
        assert two["fresh"][name] == pytest.approx(figures, rel=1e-9), name
    assert "fd_dinov2" in one["lots of 4"]
    assert one["lots of 3"] == pytest.approx(one["lots of 4"], rel=1e-2, abs=1e-2), "other lots, other rounding"


def test_it_is_the_average_that_is_judged(runs: Any) -> None:
    _, one, _ = runs
    assert one["lots of 4"]["fd_dinov2"] != pytest.approx(one["lots of 4, raw"]["fd_dinov2"], rel=1e-3)


def records(folder: Path, name: str) -> dict[int, Any]:
    run = RunFolder(f"{folder}/{name}")
    found = [run.read_json(f"evaluations/{file}") for file in run.names("evaluations")]
    return {record["step"]: record for record in found}


def test_what_a_run_writes_and_that_training_does_not_notice(runs: Any) -> None:
    folder, _, two = runs
    assert two["whole"]["code"] == ExitCode.DONE
    run, found = RunFolder(f"{folder}/whole"), records(folder, "whole")
    assert list(found) == [3, STEPS]
    assert run.names("evaluation") == ["images-final.json", "images-step-00000003.json"]
    told = {record["step"]: record for record in run.evaluations()}
    for step, record in found.items():
        assert told[step]["fd_dinov2"] == pytest.approx(record["figures"]["fd_dinov2"]["value"])
    assert run.read_json("summary.json")["image_evaluation"]["counts"] == {"generated": 20, "real": 40}
    assert losses(f"{folder}/whole") == losses(f"{folder}/without")


def test_loupe_evaluate_run_finds_the_same_figures(runs: Any, tmp_path: Path) -> None:
    folder, _, _ = runs
    checkpoints = sorted((folder / "whole/checkpoints").glob("step-*"))
    assert [int(path.name[5:13]) for path in checkpoints] == [3, STEPS]
    for checkpoint in checkpoints:
        step = int(checkpoint.name[5:13])
        out = tmp_path / str(step)
        words = [
            "run",
            str(checkpoint),
            "--reference",
            EMOJI,
            "--count",
            "20",
            "--reference-count",
            "40",
            "--size",
            "32",
        ]
        words += ["--steps", "2", "--resamples", "20", "--allow-few", "--batch-size", "8", "--lot", "4", "--no-record"]
        words += ["--network", f"dinov2={folder}/dinov2", "--cache", f"{folder}/cache", "--out", str(out)]
        assert run_command(cli, ["evaluate", *words], prog_name="loupe") == 0
        theirs, ours = json.loads((out / "evaluation.json").read_text()), records(folder, "whole")[step]
        assert theirs["reference"]["dinov2"]["was_there"]
        assert theirs["definition"] == ours["definition"]
        for name, figure in theirs["figures"].items():
            assert ours["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-6), (step, name)


def test_a_stop_amid_it_is_obeyed_at_the_next_pass_but_one(runs: Any) -> None:
    folder, _, two = runs
    assert two["stopped"]["code"] == ExitCode.REQUEUE
    assert two["stopped"]["passes"] == [3] * 3, "asked in the second, heard of by all in the third"
    assert two["ended"] == ExitCode.REQUEUE, "what the end takes is not cut off by a time limit"
    assert two["resumed"]["code"] == ExitCode.DONE
    found, whole = records(folder, "stopped"), records(folder, "whole")
    # as of samples and validations, what a stop has ended is not made again
    assert list(found) == [STEPS]
    assert losses(f"{folder}/stopped") == losses(f"{folder}/whole")
    values = [{name: f["value"] for name, f in one[STEPS]["figures"].items()} for one in (found, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert np.isfinite(list(values[0].values())).all()
