"""`loupe sample` on two ranks: the same bytes as on one, errors and stops on both, also from sharded training's samples."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.sampling_runs import PROMPTS, files, options, run_of
from trainer.errors import ExitCode, UserError
from trainer.parallel.world import World
from trainer.sampling.job import run
from trainer.sampling.model import SamplingModel
from trainer.sampling.settings import SampleSettings


def on_each(world: World, source: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"said": []}

    def loupe(out: Path | None, stop: Any = lambda: False, **changes: Any) -> ExitCode:
        return run(
            options(source, out, **changes), world.device, world=world, stop=stop, say=found["said"].append,
        )  # fmt: skip

    # three lots of two pictures: the ranks' shares are not equal
    found["code"] = loupe(folder / f"whole-{world.size}", lot=2)
    found["memory"] = loupe(None, lot=2, grid=str(folder / f"memory-{world.size}.png"))
    looks = iter([False, world.rank == world.size - 1])
    stop = (lambda: next(looks)) if world.size > 1 else (lambda: False)
    found["stopped"] = loupe(folder / f"stopped-{world.size}", stop, lot=1, batch_size=1)
    found["after"] = sorted(files(folder / f"stopped-{world.size}"))
    world.barrier()
    found["again"] = loupe(folder / f"stopped-{world.size}", lot=1)
    bad: dict[str, dict[str, Any]] = {"prompts": {"classes": ("1",), "prompts": ()}, "sampler": {"sampler": "ddim"}}
    for name, changes in bad.items():
        try:
            loupe(folder / "bad", **changes)
        except UserError as e:
            found[name] = str(e)
    if world.rank == 0:
        (folder / f"full-{world.size}").mkdir()
        (folder / f"full-{world.size}" / "images").write_text("in the way of the folder")
    world.barrier()
    try:
        loupe(folder / f"full-{world.size}")
    except UserError as e:
        found["full"] = str(e)
    model = SamplingModel.open(str(source), world.device)
    found["pictures"] = model.images(PROMPTS[:2], range(2), SampleSettings("euler", 2, resolution=32))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sampling")
    source = run_of(folder / "run")
    return folder, [*run_ranks(1, on_each, source, folder), *run_ranks(2, on_each, source, folder)]


def test_two_ranks_draw_the_bytes_of_one(ranks: Any) -> None:
    folder, found = ranks
    assert [each["code"] for each in found] == [ExitCode.DONE] * 3
    one, two = (files(folder / f"whole-{size}") for size in (1, 2))
    assert len(one) == len(PROMPTS)
    assert one == two
    assert (folder / "memory-1.png").read_bytes() == (folder / "memory-2.png").read_bytes()
    assert all(torch.equal(each["pictures"], found[0]["pictures"]) for each in found)


def test_rank_0_speaks(ranks: Any) -> None:
    _, (_, first, second) = ranks
    assert any("6 pictures, samples.json" in line for line in first["said"])
    assert second["said"] == []


def test_a_stop_of_one_rank_is_one_of_all(ranks: Any) -> None:
    folder, (_, *both) = ranks
    for each in both:
        assert each["stopped"] == ExitCode.REQUEUE
        assert len(each["after"]) == 2, "a picture of each rank, and then the last one was asked"
        assert each["again"] == ExitCode.DONE
    assert files(folder / "stopped-2") == files(folder / "stopped-1")


def test_an_error_is_the_same_on_all(ranks: Any) -> None:
    _, (one, *both) = ranks
    for each in both:
        assert each["prompts"] == one["prompts"]
        assert each["prompts"].startswith("--classes: class 1 for a model that takes captions")
        assert each["sampler"].startswith("--sampler: ddim does not go with flow")
        assert each["full"].startswith("--out: ")
