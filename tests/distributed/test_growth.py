"""From a low resolution to a higher one inside a run: whatever positions do at the larger grid, the model goes on from what
it has learnt. Lower noise per patch makes the loss differ somewhat between resolutions by itself."""

from pathlib import Path
from statistics import mean

import pytest

from tests.distributed.harness import run_ranks
from tests.tiny import DEMO_SIZES, tiny
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.slow

STRETCH = ("task.model.position_growth=stretch", "task.model.base_grid=4")
VARIANTS = {
    "extend": (),
    "stretch": STRETCH,
    "stretch_rotary": (*STRETCH, "task.model.positions=rotary"),
}
LOW, HIGH = 120, 24
"""Steps at 32 px and at 64 px."""


def train_all(world: World, folder: Path) -> dict[str, list[float]]:
    from trainer.run import Run

    losses = {}
    for name, overrides in VARIANTS.items():
        config = tiny(
            *DEMO_SIZES, f"phases.low_resolution.steps={LOW}", f"phases.full_resolution.steps={HIGH}",
            "phases.perceptual.steps=1", "checkpoint.every_steps=1000",
            *(f"phases.{i}.batch_size=16" for i in range(3)), *overrides,
        )  # fmt: skip
        run_folder = RunFolder(str(folder / name))
        run = Run(config, run_folder, world, StopRequest())
        run.train()
        run.exporter.close()
        losses[name] = [record["loss"]["denoising"] for record in run_folder.metrics()]
    return losses


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    result: dict[str, list[float]] = run_ranks(1, train_all, tmp_path_factory.mktemp("growth"))[0]
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_goes_on_where_it_was(losses, name) -> None:
    found = losses[name]
    fresh, before = mean(found[:3]), mean(found[LOW - 20 : LOW])
    at_once, settled = mean(found[LOW : LOW + 3]), mean(found[LOW + HIGH - 8 : LOW + HIGH])
    assert before < 0.65 * fresh, "it has learnt something to go on from"
    assert at_once - before < 0.35 * (fresh - before), "a model that had to begin anew would lose all of it"
    assert settled - before < 0.15 * (fresh - before)
