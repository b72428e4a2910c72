"""A rank that is slow on its own is named, by how much; equal ranks are left alone."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.tiny import tiny
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.slow

STEPS = 48
SLOW_S = 0.4
SETTINGS = (
    "data.num_workers=0",
    "metrics.every_steps=8",
    "metrics.straggler_steps=8",
    "metrics.straggler_ratio=3",
    "watchdog=null",
    f"phases=[{{name: only, steps: {STEPS}, resolution: 32, batch_size: 8, learning_rate: 1e-4}}]",
)


def slowed(run: Any, where: str) -> None:
    """Rank 1 takes longer in half of the run: for its batch or in the optimizer; or all do alike."""
    trainer, rank = run.trainer, run.world.rank
    to_device, end_step = trainer._to_device, run.task.end_step

    def copy(batch: Any) -> Any:
        if where == "all" or (where == "copy" and rank == 1 and batch.step < STEPS // 2):
            time.sleep(SLOW_S)
        return to_device(batch)

    def end(plan: Any, keep: Any) -> None:
        if where == "optimizer" and rank == 1 and plan.step < STEPS // 2:
            time.sleep(SLOW_S)
        end_step(plan, keep)

    trainer._to_device, run.task.end_step = copy, end


def train(world: World, folder: Path) -> dict[str, tuple[float, float]]:
    """This rank's last own seconds and ratio, as exported."""
    from trainer.run import Run

    found = {}
    for where in ("all", "copy", "optimizer"):
        run = Run(tiny(*SETTINGS), RunFolder(str(folder / where)), world, StopRequest())
        slowed(run, where)
        assert run.train() == 0
        exported = [run.exporter.registry.get_sample_value(f"loupe_rank_own_{name}") for name in ("seconds", "ratio")]
        found[where] = (exported[0] or 0.0, exported[1] or 0.0)
        run.exporter.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, tuple[float, float]]]]:
    folder = tmp_path_factory.mktemp("stragglers")
    return folder, run_ranks(2, train, folder)


def notes(folder: Path) -> list[dict[str, Any]]:
    return [record for record in RunFolder(str(folder))._records() if re.search(r"rank \d", record.get("note", ""))]


@pytest.mark.parametrize("where", ["copy", "optimizer"])
def test_the_slow_rank_is_named_and_later_no_more(runs: tuple[Path, Any], where: str) -> None:
    # of a machine busy with other things, rank 0 may be named beside
    slow, again = (note for note in notes(runs[0] / where) if "rank 1 (" in note["note"])
    figures = slow["straggler"]
    assert figures["rank"] == 1
    assert 0.8 * SLOW_S < figures["own_s"] - figures["median_s"] < 30 * SLOW_S
    assert slow["note"].startswith(f"WARNING: rank 1 (node {figures['node']}) is {figures['ratio']:.2f}x the median")
    assert "over the last 8 steps" in slow["note"]
    assert again["note"].startswith("rank 1 ")
    assert again["note"].endswith("keeps step with the others again")


def test_equal_ranks_are_not_reported_however_slow(runs: tuple[Path, Any]) -> None:
    folder, exported = runs
    assert not notes(folder / "all")
    for rank in exported:
        seconds, ratio = rank["all"]
        assert SLOW_S < seconds < 30 * SLOW_S
        assert ratio < 3
