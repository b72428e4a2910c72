"""Whole runs on a stream of aspect buckets, mixed, with classes balanced and captions by weight: the same images in the same
batches on any number of ranks and over stops, and every task takes images that are not square."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from data.buckets import ASPECTS
from data.images import read_image
from data.reader import open_dataset
from tests.bucketed import of_aspect, row, write_dataset
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses
from tests.distributed.test_variants import EMOJI
from tests.stage1 import RUNNING_MEANS, stage1
from tests.tiny import DEMO_SIZES, tiny
from trainer.config import RunConfig
from trainer.errors import ExitCode, UserError
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.slow
"""Of ranks that train or measure: half a minute and more."""

STEPS = 13
PHASES = ("low_resolution", "full_resolution", "perceptual")
UNET = (
    "task.model={kind: unet, block_out_channels: [32, 32], attention_levels: [true, false], layers_per_block: 1, "
    "head_dim: 8}"
)
PIXART = "task.model={kind: pixart, num_blocks: 1, num_heads: 2, head_dim: 8, patch_size: 1, base_grid: 4}"
DIT = (
    "task.model={kind: dit, num_blocks: 2, num_heads: 2, head_dim: 8, patch_size: 1, base_grid: 4}",
    "task.text={kind: classes, num_classes: 3, width: 32}",
)
MMDIT = (
    "task.model={kind: mmdit, layout: shared, positions: rotary, position_growth: stretch, num_blocks: 2, num_heads: 2, "
    "head_dim: 16, patch_size: 1, base_grid: 8}"
)
TURNED = "task.equivariance={weight: 1.0, scales: [0.5, 1.0], rotations: true}"


def write_sets(root: Path) -> None:
    emoji = open_dataset(EMOJI, name="emoji")

    def rows(name: str, first: int, count: int) -> list[dict[str, Any]]:
        found = []
        for i in range(first, first + count):
            sample = emoji.read(i)
            image, texts = of_aspect(read_image(sample.image), name), list(sample.texts)
            captions = {"original": texts} if i % 2 else {"original": texts, "short": [texts[0][:8]]}
            found.append(row(f"{i:04d}", image, label=min(i % 5, 2), **captions))
        return found

    write_dataset(root / "a", {"1:1": rows("1:1", 0, 14), "4:3": rows("4:3", 20, 11), "1:2": rows("1:2", 40, 9)})
    write_dataset(root / "b", {"2:1": rows("2:1", 60, 8), "1:1": rows("1:1", 80, 13)})
    write_dataset(root / "wide", {"4:3": rows("4:3", 100, 12), "1:2": rows("1:2", 120, 12)})


def mixed(root: Path, *overrides: str) -> RunConfig:
    return tiny(
        *DEMO_SIZES,  # smaller ones have fewer buckets
        f"data.datasets={{a: {{url: {root / 'a'}}}, b: {{url: {root / 'b'}, class_balanced: true}}}}",
        "data.buckets=true",
        "data.caption_weights={original: 1, short: 3}",
        "data.random_crop=true",
        "data.flip_probability=0.5",
        "data.shuffle_window_shards=2",
        "data.num_workers=0",
        "phases.low_resolution.steps=5",
        "phases.full_resolution.steps=4",
        "phases.perceptual.steps=4",
        "phases.full_resolution.data_mix={a: 1, b: 3}",
        "phases.full_resolution.batch_size=12",
        *overrides,
    )


def attempt(world: World, config: RunConfig, url: str, stop_after: int = 0) -> dict[str, Any]:
    """One attempt, and what each step was given on this rank."""
    from trainer.run import Run

    stop = StopRequest()
    run = Run(config, RunFolder(url), world, stop)
    forward_backward = run.task.forward_backward
    seen: dict[int, tuple[list[str], list[str], tuple[int, ...]]] = {}

    def watched(batch: Any, plan: Any, scale: float) -> Any:
        seen[plan.step] = (batch.keys, batch.captions, tuple(batch.images_BCHW.shape[-2:]))
        if plan.step == stop_after - 2 and world.rank == world.size - 1:
            stop.received = "SIGTERM"  # heard of by all at the next step's end
        return forward_backward(batch, plan, scale)

    run.task.forward_backward = watched  # type: ignore[method-assign]
    run._draw_curves = lambda: None  # type: ignore[method-assign]
    try:
        code: Any = run.train()
    except UserError as e:
        code = str(e)
    finally:
        run.exporter.close()
    state = run.trainer.progress.to_json()
    del state["train_seconds"]  # each rank's own clock
    return {"code": code, "seen": seen, "state": state}


def on_one(world: World, root: Path) -> dict[str, Any]:
    runs = {
        "one": attempt(world, mixed(root), str(root / "one")),
        "workers": attempt(world, mixed(root, "data.num_workers=2"), str(root / "workers")),
        "stopped": attempt(world, mixed(root), str(root / "stopped"), stop_after=7),
        "elastic": attempt(world, mixed(root), str(root / "elastic"), stop_after=4),
    }
    runs["resumed"] = attempt(world, mixed(root), str(root / "stopped"))
    wide = (
        f"data.datasets={{wide: {{url: {root / 'wide'}}}}}", "data.buckets=true", "data.num_workers=0",
    )  # fmt: skip
    short = (*DEMO_SIZES, "phases.low_resolution.resolution=64", *(f"phases.{name}.steps=1" for name in PHASES))
    diffusion = {"unet": (UNET,), "pixart": (PIXART,), "dit": DIT, "mmdit": (MMDIT,)}
    for name, overrides in diffusion.items():
        runs[name] = attempt(world, tiny(*short, *wide, *overrides), str(root / name))
    for name, overrides in (("kl", (TURNED,)), ("vq", (RUNNING_MEANS,))):
        runs[name] = attempt(world, stage1(*wide, "phases.train.steps=4", *overrides), str(root / name))
    return runs


def on_two(world: World, root: Path) -> dict[str, Any]:
    return {
        "two": attempt(world, mixed(root), str(root / "two")),
        "accumulated": attempt(world, mixed(root, "parallel.micro_batch_size=2"), str(root / "accumulated")),
        "elastic": attempt(world, mixed(root), str(root / "elastic")),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic_stream")
    write_sets(folder)
    return folder


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    [found] = run_ranks(1, on_one, root)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def two(root: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(2, on_two, root)


def test_batches_are_of_one_bucket_and_losses_are_finite(root: Path, one: dict[str, Any]) -> None:
    run = one["one"]
    assert run["code"] == ExitCode.DONE
    records = losses(str(root / "one"))
    assert len(records) == STEPS
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert all("lpl" in record for record in records[9:])
    aspects = [width / height for _, _, (height, width) in run["seen"].values()]
    assert len(set(aspects)) >= 4
    for keys, _, (height, width) in run["seen"].values():
        numbers = [int(key[2:]) for key in keys]
        buckets = {next(b for first, b in ((80, "1:1"), (60, "2:1"), (40, "1:2"), (20, "4:3"), (0, "1:1")) if n >= first)
                   for n in numbers}  # fmt: skip
        assert len(buckets) == 1
        assert width / height == pytest.approx(ASPECTS[buckets.pop()], rel=0.35)
    drawn = [key for keys, _, _ in run["seen"].values() for key in keys]
    assert {key[0] for key in drawn} == {"a", "b"}
    assert {key[0] for key in drawn[: 5 * 8]} == {"a", "b"}


def test_workers_change_nothing(root: Path, one: dict[str, Any]) -> None:
    assert one["workers"]["seen"] == one["one"]["seen"]
    assert losses(str(root / "workers")) == losses(str(root / "one"))


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(root: Path, one: dict[str, Any]) -> None:
    assert one["stopped"]["code"] == ExitCode.REQUEUE
    assert max(one["stopped"]["seen"]) == 6
    assert one["resumed"]["code"] == ExitCode.DONE
    assert min(one["resumed"]["seen"]) == 7
    assert one["stopped"]["seen"] | one["resumed"]["seen"] == one["one"]["seen"]
    assert losses(str(root / "stopped")) == losses(str(root / "one"))


def joined(ranks: list[dict[str, Any]], name: str) -> dict[int, Any]:
    """What all ranks together were given in each step."""
    out = {}
    for step in ranks[0][name]["seen"]:
        parts = [rank[name]["seen"][step] for rank in ranks]
        assert len({shape for _, _, shape in parts}) == 1
        out[step] = (
            [k for keys, _, _ in parts for k in keys],
            [c for _, texts, _ in parts for c in texts],
            parts[0][2],
        )
    return out


@pytest.mark.parametrize("name", ["two", "elastic"])
def test_two_ranks_together_are_given_what_one_is(
    root: Path, one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    assert {rank[name]["code"] for rank in two} == {ExitCode.DONE}
    seen = joined(two, name)
    assert min(seen) == (4 if name == "elastic" else 0)
    assert one["elastic"]["seen"] | seen == one["one"]["seen"]


@pytest.mark.parametrize("name", ["two", "accumulated", "elastic"])
def test_losses_do_not_depend_on_ranks_micro_batches_or_stops(root: Path, two: list[dict[str, Any]], name: str) -> None:
    assert two[0][name]["code"] == ExitCode.DONE
    found, expected = losses(str(root / name)), losses(str(root / "one"))
    assert len(found) == len(expected) == STEPS
    for step, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.keys() == y.keys()
        for term in x:
            assert x[term] == pytest.approx(y[term], rel=1e-5, abs=1e-5), (step, term)


def test_what_is_saved_of_the_stream_is_small_and_equal_on_all_ranks(root: Path, two: list[dict[str, Any]]) -> None:
    assert two[0]["elastic"]["state"] == two[1]["elastic"]["state"]
    manifests = list((root / "elastic" / "checkpoints").glob("*/manifest.json"))
    assert manifests
    for manifest in manifests:
        state = json.loads(manifest.read_text())["state"]
        assert state["substitutions"] == []
        assert len(json.dumps(state)) < 1024


@pytest.mark.parametrize("name", ["unet", "pixart", "dit", "mmdit", "kl", "vq"])
def test_every_task_takes_images_that_are_not_square(root: Path, one: dict[str, Any], name: str) -> None:
    run = one[name]
    assert run["code"] == ExitCode.DONE, run["code"]
    assert {height == width for _, _, (height, width) in run["seen"].values()} == {False}
    assert all(math.isfinite(value) for record in losses(str(root / name)) for value in record.values())
