"""Runs on a dataset some of whose shards cannot be read: all ranks leave the same ones out, and so does a resume."""

import json
import multiprocessing
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data.mds import mds
from data.reader import open_dataset
from data.schema import COLUMNS, DatasetInfo, index_digest
from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import SHORT, train
from tests.distributed.test_training import losses
from tests.tiny import tiny
from trainer.config import CODE_ROOT
from trainer.errors import ExitCode
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run import Run
from trainer.run_folder import RunFolder

EMOJI = str(CODE_ROOT / "data" / "assets" / "emoji_64")
NUM_SAMPLES = 96
WORKERS = "data.num_workers=1"


def many_shards(folder: Path) -> Path:
    """The first emoji in about ten shards."""
    emoji = open_dataset(EMOJI, name="emoji")
    writer = mds().Writer(out=str(folder), columns=COLUMNS, hashes=["xxh64"], size_limit=16 << 10)
    for index in range(NUM_SAMPLES):
        sample = emoji.read(index)
        writer.write({"key": sample.key, "image": sample.image, "captions": list(sample.texts), "label": -1})
    writer.finish()
    digest = index_digest((folder / "index.json").read_bytes())
    info = DatasetInfo(name="x", num_samples=NUM_SAMPLES, index_digest=digest)
    (folder / "dataset.json").write_text(info.model_dump_json())
    return folder


def bad(folder: Path) -> None:
    (folder / "shard.00001.mds").unlink()
    with open(folder / "shard.00003.mds", "r+b") as file:
        file.seek(500)
        file.write(b"\xff\xff")


def config(data: Path, *more: str) -> Any:
    return tiny(*SHORT, f"data.datasets.emoji.url={data}", "metrics.every_steps=2", WORKERS, *more)


def attempts(world: World, folder: Path) -> dict[str, Any]:
    data = folder / "data"
    out = {
        "straight": train(world, config(data), str(folder / "straight")),
        "stopped": train(world, config(data), str(folder / "resumed"), stop_after=6),
        "lost": train(world, config(data), str(folder / "lost"), stop_after=6),
        "too many": train(world, config(data, "data.max_bad_shards=1"), str(folder / "too_many")),
    }
    world.barrier()
    if world.is_main:  # storage is mended while the run stands still
        (data / "shard.00001.mds").write_bytes((folder / "whole" / "shard.00001.mds").read_bytes())
        shutil.rmtree(folder / "lost" / "checkpoints")
    world.barrier()
    return {
        **out,
        "resumed": train(world, config(data), str(folder / "resumed")),
        "begun again": train(world, config(data), str(folder / "lost")),
    }


def killed(world: World, folder: Path) -> dict[str, Any]:
    """A run whose data worker is killed, and the next start of it."""
    chosen = config(folder / "whole", "phases.low_resolution.steps=400")
    killer = threading.Thread(target=_kill_a_worker, daemon=True)
    killer.start()
    out = train(world, chosen, str(folder / "killed"))
    killer.join()
    run = Run(chosen, RunFolder(str(folder / "killed")), world, StopRequest())
    out["deaths"] = run.exporter.registry.get_sample_value("loupe_data_worker_deaths_total")
    run.exporter.close()
    return out


def _kill_a_worker() -> None:
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.1)
    workers[0].kill()


def test_a_worker_that_died_is_counted_in_the_next_attempt(tmp_path: Path) -> None:
    many_shards(tmp_path / "whole")
    [seen] = run_ranks(1, killed, tmp_path)
    assert seen["error"].startswith("WorkerDied: step ")
    assert "by SIGKILL" in seen["error"]
    assert seen["deaths"] == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("bad_shards")
    many_shards(folder / "whole")
    bad(many_shards(folder / "data"))
    return folder, run_ranks(2, attempts, folder)


def state_of(run: Path) -> dict[str, Any]:
    newest = max(run.glob("checkpoints/*/manifest.json"))
    state: dict[str, Any] = json.loads(newest.read_text())["state"]
    return state


@pytest.mark.slow
def test_a_run_goes_on_without_them_and_a_resume_repeats_it(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = runs
    for seen in ranks:
        assert (seen["straight"]["code"], seen["stopped"]["code"], seen["resumed"]["code"]) == (
            ExitCode.DONE, ExitCode.REQUEUE, ExitCode.DONE,
        )  # fmt: skip
    assert len(losses(str(folder / "straight"))) == 6
    assert losses(str(folder / "resumed")) == losses(str(folder / "straight"))
    for name in ("straight", "resumed"):
        state = state_of(folder / name)
        *found, _ = zip(*state["bad_shards"], strict=True)
        assert found == [("emoji", "emoji"), (1, 3), ("missing_shard", "damaged_shard")]
        assert state["substitutions"] == []  # by shard, not by sample
        notes = [json.loads(line) for line in (folder / name / "metrics" / "0000.jsonl").read_text().splitlines()]
        told = [note["note"] for note in notes if "note" in note and "shard.00001.mds" in note["note"]]
        assert len(told) == 1
        assert "cannot be read (missing_shard)" in told[0]


@pytest.mark.slow
def test_a_start_from_before_they_were_found_leaves_them_out_from_the_same_step_on(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, ranks = runs
    assert all(seen["begun again"]["code"] == ExitCode.DONE for seen in ranks)
    assert losses(str(folder / "lost")) == losses(str(folder / "straight"))
    assert state_of(folder / "lost")["bad_shards"] == state_of(folder / "straight")["bad_shards"]


@pytest.mark.slow
def test_too_many_end_the_run_and_are_named(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = runs
    for seen in ranks:
        error = seen["too many"]["error"]
        assert error.startswith("UserError: data.max_bad_shards: 2 shards cannot be read, the limit is 1: ")
        assert f"{folder}/data/shard.00001.mds (missing_shard)" in error
        assert f"{folder}/data/shard.00003.mds (damaged_shard)" in error
        assert "\n" not in error


@pytest.mark.slow
def test_their_state_is_small(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = runs
    assert len(json.dumps(state_of(folder / "straight")["bad_shards"])) < 100
