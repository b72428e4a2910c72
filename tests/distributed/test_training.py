"""Whole runs on one and two ranks: the same losses whatever the layout, and a bad step that all ranks survive together."""

import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import ExitCode, UserError
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder


def train(world: World, config: RunConfig, url: str, poison: str = "") -> int:
    from trainer.run import Run

    folder = RunFolder(url)
    run = Run(config, folder, world, StopRequest())
    if not config.samples:  # of no pictures at all; drawing takes a good part of such a run's time
        run._draw_curves = lambda: None  # type: ignore[method-assign]
    if poison:
        _poison(run, poison)
    try:
        return run.train()
    finally:
        if world.is_main:  # what Prometheus would have got
            target = folder.read_json("metrics_targets.json")["targets"][0]
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
                folder.write_bytes("scraped.txt", response.read())
        run.exporter.close()


def _poison(run: Any, kind: str) -> None:
    """A real non-finite loss: pixels of one image that are not numbers, from some step on, on one rank. Or images whose
    gradient is far too large, wherever in the stream they stand."""
    task, forward_backward = run.task, run.task.forward_backward
    if kind.startswith("spikes"):
        first, end = {"spikes": (96, 112), "spikes_at_a_save": (104, 120), "spikes_always": (96, 9999)}[kind]

        def spiking(batch: Any, plan: Any, scale: float) -> Any:
            bad = bool(((batch.positions_B >= first) & (batch.positions_B < end)).any())
            return forward_backward(batch, plan, scale * 1e4 if bad else scale)

        task.forward_backward = spiking
        return
    latents_of = task._latents_of

    def poisoned(batch: Any, plan: Any, scale: float) -> Any:
        steps = {"once": {6}, "always": set(range(6, 99))}[kind]
        bad = run.world.rank == run.world.size - 1 and plan.step in steps
        task._latents_of = (lambda b: _first_row_nan(latents_of(b))) if bad else latents_of
        return forward_backward(batch, plan, scale)

    task.forward_backward = poisoned


def _first_row_nan(latents: torch.Tensor) -> torch.Tensor:
    latents[0] = float("nan")
    return latents


def losses(url: str) -> list[dict[str, float]]:
    return [record["loss"] for record in RunFolder(url).metrics()]


def several(world: World, jobs: list[tuple[RunConfig, str, str]]) -> list[Any]:
    """Runs one after the other in one process group; an error's message in place of an exit code."""
    out: list[Any] = []
    for config, url, poison in jobs:
        try:
            out.append(train(world, config, url, poison))
        except UserError as e:
            out.append(str(e))
    return out


LOW = ("phases.low_resolution.steps=20", "phases.full_resolution.steps=2", "phases.perceptual.steps=2")
"""Most of them in the phase whose steps are short."""
SPIKES = ("optim.spikes={sigma: 12, window_steps: 8, roll_back_after: 2}", *LOW)
"""Batches of 8 images, a checkpoint every 5 steps: images 96 to 111 are those of steps 12 and 13."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")

    def jobs(names: dict[str, tuple[tuple[str, ...], str]]) -> list[tuple[RunConfig, str, str]]:
        return [(tiny(*overrides), str(folder / name), poison) for name, (overrides, poison) in names.items()]

    def in_this_process(names: dict[str, tuple[tuple[str, ...], str]]) -> dict[str, tuple[tuple[str, ...], str]]:
        """Where workers change nothing, none is started."""
        return {name: ((*overrides, "data.num_workers=0"), poison) for name, (overrides, poison) in names.items()}

    one = {"one": ((), "")} | in_this_process({
        "accumulate_1x8": (LOW, ""),
        "accumulate_2x4": ((*LOW, "parallel.micro_batch_size=4"), ""),
        "no_workers": ((), ""),
    })  # fmt: skip
    two = in_this_process({
        "two": ((), ""),
        "nan_once": ((), "once"),
        "spikes": (SPIKES, "spikes"),
        "spikes_without_checkpoint": ((*SPIKES, "checkpoint.every_steps=100"), "spikes"),
        "spikes_at_a_save": (
            (*SPIKES, "metrics.every_steps=50", "checkpoint.asynchronous=false"),
            "spikes_at_a_save",
        ),
        "spikes_always": ((*SPIKES, "optim.spikes.max_roll_backs=1", "metrics.every_steps=50"), "spikes_always"),
        "nan_always": (("optim.max_skipped_in_a_row=3",), "always"),
    })  # fmt: skip
    codes = dict(zip(one, run_ranks(1, several, jobs(one))[0], strict=True))
    by_rank = run_ranks(2, several, jobs(two))
    assert by_rank[0] == by_rank[1]
    return folder, codes | dict(zip(two, by_rank[0], strict=True))


def same(folder: Path, a: str, b: str, tolerance: float) -> int:
    first, second = losses(str(folder / a)), losses(str(folder / b))
    assert len(first) == len(second) >= 20
    for x, y in zip(first, second, strict=True):
        assert x.keys() == y.keys()
        for term in x:
            assert x[term] == pytest.approx(y[term], rel=tolerance, abs=tolerance)
    return len(first)


def test_one_rank_equals_two(runs) -> None:
    folder, codes = runs
    assert codes["one"] == codes["two"] == ExitCode.DONE
    assert same(folder, "one", "two", 1e-5) == 20


def test_accumulation_equals_one_large_batch(runs) -> None:
    folder, codes = runs
    assert codes["accumulate_1x8"] == codes["accumulate_2x4"] == ExitCode.DONE
    same(folder, "accumulate_1x8", "accumulate_2x4", 1e-5)


def test_worker_processes_change_nothing(runs) -> None:
    folder, _ = runs
    assert losses(str(folder / "one")) == losses(str(folder / "no_workers"))


def test_phases_switch_without_a_restart(runs) -> None:
    folder, _ = runs
    records = RunFolder(str(folder / "one")).metrics()
    assert [r["phase"] for r in records] == ["low_resolution"] * 8 + ["full_resolution"] * 6 + ["perceptual"] * 6
    assert ["lpl" in r["loss"] for r in records] == [False] * 14 + [True] * 6
    assert RunFolder(str(folder / "one")).names("attempts") == ["0000.json"]
    assert records[-1]["images"] == 160


def test_a_non_finite_loss_on_one_rank_skips_the_step_on_all(runs) -> None:
    folder, codes = runs
    assert codes["nan_once"] == ExitCode.DONE
    records = RunFolder(str(folder / "nan_once")).metrics()
    assert len(records) == 19  # the skipped step has no losses to report
    assert [r["steps_skipped"] for r in records][-1] == 1
    clean = losses(str(folder / "two"))
    assert losses(str(folder / "nan_once"))[:6] == clean[:6]
    assert all(torch.isfinite(torch.tensor(r["loss"]["loss"])) for r in records)


def test_losses_that_stay_non_finite_stop_the_run_and_name_images(runs) -> None:
    _, codes = runs
    assert "optim.max_skipped_in_a_row: 3 steps in a row" in codes["nan_always"]
    assert "emoji/" in codes["nan_always"]


def test_the_resolved_config_is_in_the_run_folder(runs) -> None:
    folder, _ = runs
    assert (folder / "one" / "config.yaml").read_text() == to_yaml(tiny())


def test_metrics_of_a_real_run(runs) -> None:
    folder, _ = runs
    scraped = dict(
        line.rsplit(" ", 1) for line in (folder / "nan_once" / "scraped.txt").read_text().splitlines() if line[0] != "#"
    )
    last = RunFolder(str(folder / "nan_once")).metrics()[-1]
    assert float(scraped["loupe_step"]) == 20
    assert float(scraped["loupe_images_total"]) == 160
    assert float(scraped['loupe_steps_skipped_total{reason="non_finite"}']) == 1
    assert float(scraped['loupe_phase{phase="perceptual"}']) == 2
    assert 'loupe_phase{phase="low_resolution"}' not in scraped
    assert float(scraped['loupe_loss{term="lpl"}']) == last["loss"]["lpl"]
    assert float(scraped["loupe_gradient_norm"]) == last["gradient_norm"]
    assert float(scraped["loupe_world_size"]) == 2
    assert float(scraped['loupe_step_seconds_count{stage="total"}']) == 20
    assert float(scraped["loupe_checkpoint_seconds_count"]) == 4
    assert float(scraped["loupe_checkpoint_last_success_timestamp_seconds"]) > last["time"] - 60
    assert float(scraped["loupe_peak_memory_bytes"]) > 50e6
    assert float(scraped["loupe_flops_per_second"]) == float(scraped["loupe_mfu_ratio"]) == 0, "nothing was counted"


def test_checkpoints_are_kept_and_retired(runs) -> None:
    folder, _ = runs
    steps = sorted(int(p.parent.name.split("-")[1]) for p in (folder / "one" / "checkpoints").glob("*/COMMIT"))
    assert steps == [10, 15, 20]  # every 5 steps, the last 3 kept


def test_after_spikes_the_run_goes_back_to_its_checkpoint_and_passes_over_the_images(runs) -> None:
    folder, codes = runs
    assert codes["spikes"] == ExitCode.DONE
    records = RunFolder(str(folder / "spikes")).metrics()
    # every step reports here, so the flag of step 13 is read at once; else a step later
    state = RunFolder(str(folder / "spikes")).read_json(newest_manifest(folder / "spikes"))["state"]
    assert state["passed_over"] == [[10, 4 * 8]]
    assert (state["roll_backs"], state["steps_skipped"]) == (1, 2)
    assert state["images"] == 24 * 8
    assert records[-1]["step"] == 24
    assert records[-1]["roll_backs"] == 1
    undisturbed = losses(str(folder / "accumulate_1x8"))  # on one rank
    ours = [record["loss"] for record in records]
    assert [x["loss"] for x in ours[:10]] == pytest.approx([x["loss"] for x in undisturbed[:10]], rel=1e-5)
    later = zip(ours[10:], undisturbed[10:], strict=True)
    assert all(abs(a["loss"] / b["loss"] - 1) > 1e-4 for a, b in later), "other images from there on"
    scraped = (folder / "spikes" / "scraped.txt").read_text()
    assert 'loupe_steps_skipped_total{reason="spike"} 2.0' in scraped
    assert "loupe_roll_backs_total 1.0" in scraped
    assert records[-1]["update_ratio"] > 0


def newest_manifest(run: Path) -> str:
    return str(max(run.glob("checkpoints/*/manifest.json")).relative_to(run))


def test_spikes_before_the_first_checkpoint_are_only_skipped(runs) -> None:
    folder, codes = runs
    assert codes["spikes_without_checkpoint"] == ExitCode.DONE
    run = folder / "spikes_without_checkpoint"
    state = RunFolder(str(run)).read_json(newest_manifest(run))["state"]
    assert (state["passed_over"], state["roll_backs"], state["steps_skipped"]) == ([], 0, 2)


def test_a_run_that_spikes_again_and_again_stops(runs) -> None:
    message = runs[1]["spikes_always"]
    assert "optim.spikes.max_roll_backs: 1 roll backs did not help" in message
    # Flags are read a step late here. The spike after the one that decided belongs to the first roll back: from step 10 on
    # it takes two new ones, at steps 10 and 11, to ask for another.
    assert "again at step 13;" in message


def test_spikes_at_a_save_leave_no_checkpoint_between(runs) -> None:
    """Those of steps 13 and 14, before the save of step 15: the roll back goes to step 10."""
    folder, codes = runs
    assert codes["spikes_at_a_save"] == ExitCode.DONE
    run = folder / "spikes_at_a_save"
    state = RunFolder(str(run)).read_json(newest_manifest(run))["state"]
    assert (state["passed_over"], state["roll_backs"], state["steps_skipped"]) == ([[10, 5 * 8]], 1, 2)
