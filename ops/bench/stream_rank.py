"""One rank of a run that trains nothing: the stream with all that a run does about it, and a log of what it delivered.

Loader, plan, agreement on bad shards and stop, saved state and record are the trainer's own. A step is a short sleep.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data.batches import Batch, LeftOut, ShardKey
from data.loader import Loader
from data.reader import Dataset, open_dataset
from trainer.bad_data import BadData
from trainer.bad_shards import BadShardRecord
from trainer.config import RunConfig
from trainer.errors import ExitCode, UserError
from trainer.exporter import Exporter
from trainer.parallel.agreement import Agreement
from trainer.parallel.world import init_world
from trainer.preemption import SIGNALS, StopRequest
from trainer.progress import Progress
from trainer.reports import Reports
from trainer.requests import RankRequests
from trainer.run_folder import RunFolder
from trainer.step_plan import StepPlanner

STATES = "states"
FAR = "far"
"""Protocol of a local folder that is remote to us."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Attempt:
    """One start of a run on `world_size` ranks."""

    folder: str
    number: int
    config: RunConfig
    world_size: int
    port: int
    caches: Sequence[str]
    """Node caches; ranks are dealt to them, as to nodes."""
    cache_gib: float | None
    save_every: int
    step_s: float
    seed: int
    forkserver: str | None = None
    """Address of one that data workers are forked from; absent: each rank starts its own, as a trainer does, which takes
    seconds."""


@cache
def register_far() -> None:
    """A local folder that is no local file system to the stream: shards are fetched into the node's cache."""
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Far(DirFileSystem):  # type: ignore[misc]
        protocol = FAR

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(path="/", fs=LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(path).removeprefix(f"{FAR}://")

    fsspec.register_implementation(FAR, Far, clobber=True)


class FarRequests(RankRequests):
    """In the data workers, too."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        register_far()
        self.__dict__.update(state)


def open_datasets(config: RunConfig, cache_dir: str, cache_gib: float | None = None) -> dict[str, Dataset]:
    register_far()
    return {
        name: open_dataset(
            d.url, name=name, cache_dir=cache_dir, cache_gib=cache_gib, deadline_s=0.75 * _TIMEOUT_S
        )
        for name, d in config.data.datasets.items()
    }  # fmt: skip


def planner_of(config: RunConfig, datasets: dict[str, Dataset]) -> StepPlanner:
    sizes = {name: dataset.shard_sizes for name, dataset in datasets.items()}
    return StepPlanner(config, sizes, buckets={name: dataset.info.buckets for name, dataset in datasets.items()})


def loader_of(
    config: RunConfig, datasets: dict[str, Dataset], request: Any, progress: Progress, num_workers: int
) -> Loader:
    data = config.data
    return Loader(
        datasets, request, seed=config.seed, random_crop=data.random_crop, flip_probability=data.flip_probability,
        caption_weights=data.caption_weights, num_workers=num_workers, prefetch_steps=data.prefetch_steps,
        timeout_s=_TIMEOUT_S, substitutions=progress.substitutions, left_out=progress.bad_shards, decode=data.decode,
        prefetch_shards=(data.prefetch_shards or 0) if num_workers else 0,
    )  # fmt: skip


def newest_state(folder: RunFolder) -> Progress:
    names = folder.names(STATES)
    return Progress.from_json(folder.read_json(f"{STATES}/{names[-1]}")) if names else Progress()


def delivered(batch: Batch) -> dict[str, Any]:
    """What is compared of a batch: of each image its key, caption and a digest of its pixels."""
    import xxhash

    pixels = [xxhash.xxh64_hexdigest(image_CHW.numpy().tobytes()) for image_CHW in batch.images_BCHW]
    return {"step": batch.step, "keys": batch.keys, "captions": batch.captions, "pixels": pixels}


def rank_process(attempt: Attempt, rank: int) -> None:
    """Its exit code is a run's: DONE, or REQUEUE where it was stopped."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    stop = StopRequest()
    log = Path(attempt.folder) / "logs" / f"{attempt.number:02d}-{attempt.world_size}-{rank}.jsonl"
    output = os.open(log.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if attempt.forkserver:
        _share_forkserver(attempt.forkserver)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(attempt.world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(attempt.port), "LOUPE_DEVICE": "cpu",
    }  # fmt: skip
    try:
        code = _stream(attempt, rank, stop, log)
    except UserError as e:
        print(f"UserError: {e}", flush=True)
        code = ExitCode.STOP
    os._exit(code)  # other ranks may be gone: no process group is torn down


def _stream(attempt: Attempt, rank: int, stop: StopRequest, log: Path) -> ExitCode:
    world = init_world(num_threads=1, timeout_s=120)
    config, folder, exporter = attempt.config, RunFolder(attempt.folder), Exporter()
    datasets = open_datasets(config, attempt.caches[rank % len(attempt.caches)], attempt.cache_gib)
    planner = planner_of(config, datasets)
    progress = world.broadcast(newest_state(folder))
    total = planner.schedule.total_steps
    reports = Reports(world, exporter, None, total)
    bad_data = BadData(
        config.data, world, exporter, reports, lambda name, shard: f"shard {shard} of {name}",
        BadShardRecord(folder, "sequences"),
    )  # fmt: skip
    agreement, pace = Agreement(world.host_group), random.Random(f"{attempt.seed}/{attempt.number}/{rank}")
    bad_data.recall(progress)

    def save() -> None:
        bad_data.agree(progress)
        states = world.gather(json.dumps(progress.to_json()))
        assert len(set(states)) == 1, "states of ranks differ"
        if world.is_main:
            folder.write_text(f"{STATES}/{progress.step:06d}.json", states[0])
        world.barrier()

    request = FarRequests(planner, rank, attempt.world_size)
    with (
        open(log, "a", encoding="utf-8") as lines,
        loader_of(config, datasets, request, progress, config.data.num_workers) as loader,
    ):
        first = progress.step
        for batch in loader.steps(first, total):
            if not bad_data.none_is_new(batch, progress, loader):
                continue
            # now and then, as they are others after a bad shard; whole, as it is read at any moment
            if batch.step == first or batch.step % 4 == 0:
                pids = " ".join(str(process.pid) for process in multiprocessing.active_children())
                folder.write_text(f"logs/{log.stem}.workers", pids)
            lines.write(json.dumps(delivered(batch)) + "\n")
            lines.flush()
            time.sleep(pace.random() * attempt.step_s)
            bad_data.add(batch)
            progress.step = batch.step + 1
            progress.images += planner.plan(batch.step).phase.batch_size
            if progress.step % attempt.save_every == 0 or progress.step == total:
                save()
            if "stop" in agreement.poll(stop=stop.received is not None) and progress.step < total:
                save()
                return ExitCode.REQUEUE
    return ExitCode.DONE


def _share_forkserver(address: str) -> None:
    """To save the seconds that importing torch takes. A fork server's own children cannot ask whether it lives."""
    shared: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    shared._forkserver_address = address
    shared.ensure_running = lambda: None


def uninterrupted(config: RunConfig, cache_dir: str, left_out: Mapping[ShardKey, LeftOut]) -> list[dict[str, Any]]:
    """What is delivered of each global batch, made in this process, one after another."""
    datasets = open_datasets(config, cache_dir)
    planner = planner_of(config, datasets)
    progress = Progress(bad_shards=dict(left_out))
    with loader_of(config, datasets, RankRequests(planner, 0, 1), progress, num_workers=0) as loader:
        return [delivered(batch) for batch in loader.steps(0, planner.schedule.total_steps)]
