"""Whole runs that save in the background, meet failing storage, and go on with other numbers of ranks."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses
from tests.tiny import tiny
from tests.unit.trainer.test_checkpoint_manager import FailingFileSystem
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import InitFromConfig, RunConfig
from trainer.ema import EMA
from trainer.errors import ExitCode
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World, build_mesh
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder
from trainer.tensors import full
from trainer.warm_start import warm_start

LONG = tiny(
    "phases.low_resolution.steps=38",
    "phases.full_resolution.steps=18",
    "phases.perceptual.steps=4",
    "checkpoint.every_steps=7",
    "data.num_workers=0",
)
"""60 steps; stopped after 20 and 40, in the first phase and in the second."""
SHORT = (
    "phases.low_resolution.steps=8",
    "phases.full_resolution.steps=2",
    "phases.perceptual.steps=2",
    "checkpoint.every_steps=4",
    "data.num_workers=0",
)


class FailingOnce(FailingFileSystem):
    """The first COMMIT fails, when it is told to."""

    def __init__(self) -> None:
        super().__init__("COMMIT", 5)
        self.go = threading.Event()

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if self.suffix == "COMMIT" and path.endswith("COMMIT.tmp"):
            assert self.go.wait(60)
            try:
                return super().open(path, mode, **kwargs)
            finally:
                self.suffix = "none"
        return super().open(path, mode, **kwargs)


def train(world: World, config: RunConfig, url: str, *, stop_after: int = 0, fail: str = "") -> dict[str, Any]:
    """One attempt. `stop_after`: the last rank alone is asked to stop, in time. `fail`: rank 0's storage does, from the
    first save on, or "once" in the very step that is to be the last."""
    from trainer.run import Run

    stop = StopRequest()
    run = Run(config, RunFolder(url), world, stop)
    forward_backward, fs = run.task.forward_backward, FailingOnce()
    out: dict[str, Any] = {}

    def newest() -> float | None:
        return run.exporter.registry.get_sample_value("loupe_checkpoint_last_success_timestamp_seconds")

    def before_step(batch: Any, plan: Any, scale: float) -> Any:
        out.setdefault("saved before", newest())
        if plan.step == stop_after - 2 and world.rank == world.size - 1:
            stop.received = "SIGTERM"  # heard of by all at the next step's end
        if plan.step == stop_after - 1:
            fs.go.set()
        return forward_backward(batch, plan, scale)

    run.task.forward_backward = before_step  # type: ignore[method-assign]
    run._draw_curves = lambda: None  # type: ignore[method-assign]  # half of such a run's time, and no matter here
    if fail and world.is_main:
        run.trainer.checkpoints.folder.fs = fs if fail == "once" else FailingFileSystem("COMMIT", 5)
    try:
        out["code"] = run.train()
    except Exception as e:
        out["error"] = f"{type(e).__name__}: {e}"
    out["step"] = run.trainer.progress.step
    out["failures"] = run.exporter.registry.get_sample_value(
        "loupe_checkpoint_failures_total", {"operation": "save"}
    )  # fmt: skip
    out["saved"] = newest()
    run.exporter.close()
    world.barrier()  # no rank was left in a collective of the run
    return out


def two_copies(world: World) -> World:
    return replace(world, mesh=build_mesh(world.device, world.size, replicas=2))


def first_two(world: World, base: Path) -> dict[str, Any]:
    return {
        "background": train(world, tiny(*SHORT), str(base / "background")),
        "waiting": train(world, tiny(*SHORT, "checkpoint.asynchronous=false"), str(base / "waiting")),
        "hybrid": train(
            two_copies(world),
            tiny(*SHORT, "parallel.replicas=2", "ema.offload=true"),
            str(base / "hybrid"),
            stop_after=6,
        ),
        "failing": train(world, tiny(*SHORT), str(base / "failing"), fail="always"),
        "failing at the stop": train(world, tiny(*SHORT), str(base / "at_stop"), fail="once", stop_after=6),
        "elastic": train(world, LONG, str(base / "elastic"), stop_after=20),
    }


def then_one(world: World, base: Path) -> dict[str, Any]:
    return {
        "undisturbed": train(world, LONG, str(base / "undisturbed")),
        "elastic": train(world, LONG, str(base / "elastic"), stop_after=40),
        "hybrid": train(world, tiny(*SHORT, "checkpoint.asynchronous=false"), str(base / "hybrid")),
    }


def then_two(world: World, base: Path) -> dict[str, Any]:
    source, config = base / "source", tiny(*SHORT, f"init_from={{url: {base / 'source'}}}")
    if world.is_main:
        shutil.copytree(base / "waiting", source)
    world.barrier()
    seen = {
        "elastic": train(world, LONG, str(base / "elastic")),
        "weights": weights_of(world, str(source), base / "weights.safetensors"),
        "warm": train(world, config, str(base / "warm"), stop_after=6),
    }
    world.barrier()
    if world.is_main:
        shutil.rmtree(source)
    return seen | {"resumed": train(world, config, str(base / "warm"))}


def weights_of(world: World, url: str, file: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """What a sharded model has after a start from a run; and whether it is the same from a file of these weights."""
    from trainer.tasks.latent_diffusion import LatentDiffusionTask

    out: list[dict[str, torch.Tensor]] = []
    for source, layout in ((url, world), (str(file), two_copies(world))):
        task = LatentDiffusionTask(LONG, world.device)
        parallelize(task.module, task.sharding_units(), layout, LONG.parallel)
        ema = EMA(task.module)
        warm_start(task.module, ema, InitFromConfig(url=source), layout)
        out.append({name: full(tensor.detach()).clone() for name, tensor in task.module.state_dict().items()})
        assert all(torch.equal(full(average), out[-1][name]) for name, average in ema.average.items())
        if world.is_main:
            save_file(out[0], file)
        world.barrier()
    return out[0], out[0].keys() == out[1].keys() and all(torch.equal(out[0][name], out[1][name]) for name in out[0])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def two(base: Path) -> list[dict[str, Any]]:
    return run_ranks(2, first_two, base)


@pytest.fixture(scope="module")
def two_again(base: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(2, then_two, base)


@pytest.fixture(scope="module")
def one(base: Path, two: list[dict[str, Any]]) -> dict[str, Any]:
    [results] = run_ranks(1, then_one, base)
    assert isinstance(results, dict)
    return results


def checkpoints(run: Path) -> list[int]:
    m = CheckpointManager(str(run / "checkpoints"), keep_last=2, config_digest=None, code_version="")
    for info in m.list():
        m.verify(info.path)
    return [info.step for info in m.list()]


def shards(run: Path, step: int) -> dict[str, bytes]:
    [checkpoint] = (run / "checkpoints").glob(f"step-{step:08d}-*")
    return {path.name: path.read_bytes() for path in checkpoint.glob("shard-*")}


def test_saving_in_the_background_changes_nothing(base: Path, two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["background"]["code"] == seen["waiting"]["code"] == ExitCode.DONE
    assert len(losses(str(base / "background"))) == 12
    assert losses(str(base / "background")) == losses(str(base / "waiting"))
    assert checkpoints(base / "background") == checkpoints(base / "waiting") == [4, 8, 12]
    for step in (4, 8, 12):
        assert shards(base / "background", step) == shards(base / "waiting", step)
        assert len(shards(base / "background", step)) == 2


def test_failing_storage_ends_all_ranks_at_one_step(base: Path, two: list[dict[str, Any]]) -> None:
    by_rank = [seen["failing"] for seen in two]
    # a run's own metrics are rank 0's alone
    assert by_rank[1] == {**by_rank[0], "failures": None, "saved": None, "saved before": None}
    assert by_rank[0]["error"].startswith("CheckpointError: ")
    assert "COMMIT: cannot be written" in by_rank[0]["error"]
    assert 4 < by_rank[0]["step"] <= 8  # after the save of step 4 began, at the latest when the next was to begin
    assert by_rank[0]["failures"] == 1
    assert by_rank[0]["saved"] == 0
    assert CheckpointFolder(str(base / "failing" / "checkpoints")).entries() == []


def test_the_save_at_a_stop_is_made_though_the_one_before_failed(base: Path, two: list[dict[str, Any]]) -> None:
    by_rank = [seen["failing at the stop"] for seen in two]
    assert [(seen["code"], seen["step"]) for seen in by_rank] == [(ExitCode.REQUEUE, 6)] * 2
    assert by_rank[0]["failures"] == 1
    assert by_rank[0]["saved"] > 0
    assert checkpoints(base / "at_stop") == [6]


def test_two_ranks_to_one_to_two(
    base: Path, two: list[dict[str, Any]], one: dict[str, Any], two_again: list[dict[str, Any]]
) -> None:
    assert [seen["elastic"]["code"] for seen in two] == [ExitCode.REQUEUE] * 2
    assert [seen["elastic"]["step"] for seen in two] == [20, 20]
    assert (one["elastic"]["code"], one["elastic"]["step"]) == (ExitCode.REQUEUE, 40)
    assert all(seen["elastic"]["code"] == ExitCode.DONE for seen in two_again)
    assert [RunFolder(str(base / "elastic")).read_json(f"attempts/000{i}.json")["world_size"] for i in range(3)] == [
        2, 1, 2,
    ]  # fmt: skip
    # the age of the checkpoint that it goes on from is told before there is a newer one
    assert two[0]["elastic"]["saved before"] == 0
    assert one["elastic"]["saved before"] == pytest.approx(two[0]["elastic"]["saved"], abs=5.0)
    assert two_again[0]["elastic"]["saved before"] == pytest.approx(one["elastic"]["saved"], abs=5.0)
    changed, undisturbed = losses(str(base / "elastic")), losses(str(base / "undisturbed"))
    assert len(changed) == len(undisturbed) == 60
    for step, (x, y) in enumerate(zip(changed, undisturbed, strict=True)):
        assert x.keys() == y.keys()
        for term in x:
            assert x[term] == pytest.approx(y[term], rel=1e-5, abs=1e-5), (step, term)


def test_two_copies_of_the_model_to_one(base: Path, two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """HSDP, its average in host memory, saved in the background; then one rank with neither."""
    assert [seen["hybrid"]["code"] for seen in two] == [ExitCode.REQUEUE] * 2
    assert one["hybrid"]["code"] == ExitCode.DONE
    changed, undisturbed = losses(str(base / "hybrid")), losses(str(base / "background"))
    assert len(changed) == 12
    for x, y in zip(changed, undisturbed, strict=True):
        assert x == pytest.approx(y, rel=1e-5, abs=1e-5)


def test_a_start_from_another_run_fills_every_ranks_shards(base: Path, two_again: list[dict[str, Any]]) -> None:
    m = CheckpointManager(str(base / "waiting" / "checkpoints"), keep_last=2, config_digest=None, code_version="")
    for weights, same_from_file in (seen["weights"] for seen in two_again):
        assert same_from_file
        stored = {f"ema.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
        restored = m.read(lambda index, where, stored=stored: stored)  # type: ignore[misc]
        assert restored is not None
        assert restored.step == 12
        assert all(torch.equal(stored[f"ema.{name}"], tensor) for name, tensor in weights.items())


def test_a_start_from_another_run_happens_once(base: Path, two_again: list[dict[str, Any]]) -> None:
    """Its weights are gone when the run is resumed."""
    for seen in two_again:
        assert (seen["warm"]["code"], seen["resumed"]["code"]) == (ExitCode.REQUEUE, ExitCode.DONE)
    report = RunFolder(str(base / "warm")).read_json("init_report.json")
    assert report["source"].startswith(f"{base}/source/checkpoints/step-00000012-")
    assert report["missing"] == report["unused"] == report["mismatched"] == []
    for path in (base / "warm" / "checkpoints").glob("*/manifest.json"):
        assert json.loads(path.read_text())["state"]["init_from"] == report["source"]
    warm, fresh = losses(str(base / "warm")), losses(str(base / "background"))
    assert len(warm) == len(fresh)
    assert warm[0]["loss"] != fresh[0]["loss"]
