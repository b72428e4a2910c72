"""Evaluations of images by two ranks: the figures of one, to the last bit; and errors and stops that both hear of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.feature_networks import Blocks
from tests.image_sets import SIDE, drawn, network, values, written
from trainer.errors import UserError
from trainer.evaluate.image_sets import ImageSet
from trainer.evaluate.images_run import Settings, evaluate_images
from trainer.evaluate.judged_sets import Judging, Stopped
from trainer.parallel.world import World

pytestmark = pytest.mark.slow
"""Of ranks that train or measure: half a minute and more."""


def evaluated(world: World, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"said": []}
    size, last = world.size, world.rank == world.size - 1

    def evaluate(name: str, stop: Any = lambda loaded: False) -> Any:
        loaded = network()
        judging = Judging(world.device, 8, world, say=found["said"].append, stop=lambda: stop(loaded))
        try:
            return evaluate_images(
                ImageSet(str(folder / "made")), ImageSet(str(folder / "real")), Settings(SIDE, resamples=20), [loaded],
                judging, out=folder / f"{name}-{size}", cache=folder / f"{name}-{size}" / "cache",
            )  # fmt: skip
        finally:
            assert isinstance(loaded.network, Blocks)
            found[f"{name} seen"] = loaded.network.images

    whole = evaluate("whole")
    found["figures"] = None if whole is None else whole.figures
    # asked of one rank alone, in its first part
    with pytest.raises(Stopped):
        evaluate("stopped", lambda loaded: last and loaded.network.images >= 16)
    again = evaluate("stopped")
    found["again"] = None if again is None else values(again)

    right = Blocks.features
    if last:
        Blocks.features = lambda self, pixels_BCHW: right(self, pixels_BCHW)[:, :47]  # type: ignore[method-assign]
    try:
        evaluate("wrong")
    except UserError as e:
        found["wrong"] = str(e)
    finally:
        Blocks.features = right  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluations")
    written(folder / "made", drawn(130, 2))
    real = written(folder / "real", drawn(150, 1))
    (real / "0100.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    return [*run_ranks(1, evaluated, folder), *run_ranks(2, evaluated, folder)]


def test_two_ranks_give_the_figures_of_one(ranks: list[dict[str, Any]]) -> None:
    alone, first, second = ranks
    assert first["figures"] == alone["figures"]
    assert second["figures"] is None
    # each has its share: 3 parts and 3 parts, the last of either filled up to whole batches
    assert alone["whole seen"] == 64 + 64 + 24 + 64 + 64 + 8
    assert (first["whole seen"], second["whole seen"]) == (64 + 24 + 64 + 8, 64 + 64)


def test_a_stop_on_one_rank_stops_all_and_nothing_is_lost(ranks: list[dict[str, Any]]) -> None:
    alone, first, second = ranks
    assert alone["again"] == first["again"] == {name: figure["value"] for name, figure in alone["figures"].items()}
    # rank 0 had finished its part, the other was in the midst of its own
    assert first["stopped seen"] + second["stopped seen"] == alone["whole seen"] - 64
    assert not [line for found in ranks for line in found["said"]]


def test_an_error_on_one_rank_is_raised_on_all(ranks: list[dict[str, Any]]) -> None:
    expected = "--network: blocks gave features of (8, 47), and it is to give (8, 48); mend it"
    assert [found["wrong"] for found in ranks] == [expected] * 3
    assert torch.get_float32_matmul_precision() == "highest"
