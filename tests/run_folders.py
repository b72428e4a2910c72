"""Run folders for tests, written by what writes them in a run: claim, attempts, metrics, job records, checkpoints."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.job import JobSpec, record_job
from tests.tiny import tiny
from trainer.goodput import Ledger, name_of, next_record
from trainer.run_folder import CHECKPOINTS, RunFolder

NOW = time.time()


def record(step: int, when: float, *, phase: str = "low_resolution", **changes: Any) -> dict[str, Any]:
    """A record of the metrics, as trainer/reports.py writes it."""
    return {
        "time": when, "step": step, "total_steps": 20, "phase": phase, "images": 8 * step, "images_per_s": 4.0,
        "train_seconds": 2.0 * step, "learning_rate": 1e-3, "update_ratio": None, "gradient_norm": 1.0, "steps_skipped": 0,
        "roll_backs": 0, "peak_memory_bytes": 1, "loss": {"denoising": 1.0 / step, "loss": 1.0 / step}, **changes,
    }  # fmt: skip


def keep_ledger(folder: RunFolder, start: int, begin: float, steps: Sequence[int], *, ended: bool = False) -> None:
    """The goodput record of a start that waits 3 s for data and computes 2 s for each of `steps`."""
    at = [begin]
    ledger = Ledger(clock=lambda: at[0], wall=lambda: at[0])
    record = next_record(folder, start, ledger)
    for step in steps:
        ledger.enter("data")
        at[0] += 3
        ledger.enter("rework" if step <= ledger.reached else "productive")
        at[0] += 2
        ledger.reached = max(ledger.reached, step)
    seconds, state = ledger.now()
    record = replace(record, seconds=seconds, state=state, step=ledger.reached, ended=ended)
    folder.write_json(name_of(start), record.to_json())


def make_run(
    url: str, *, cluster: str = "local", attempts: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4),), start: float | None = None,
    checkpoint: int | None = None, **job: Any,
) -> RunFolder:  # fmt: skip
    """A run of tests/tiny.py's schedule: of each attempt the steps that it recorded, 5 s apart; attempts 50 s apart. Of 5 s a
    step takes 2.

    `start`: Unix time of the first attempt; 100 s ago.
    """
    start = time.time() - 100 if start is None else start
    folder = RunFolder(url)
    folder.claim(tiny())
    code_dir = f"{url}/code" if folder.is_local else "/nonexistent/code"
    spec = JobSpec("demo", url, cluster, gpus_per_node=2, cpu=True, code_dir=code_dir)
    record_job(folder, spec, **job)
    for number, steps in enumerate(attempts):
        begin = start + 50 * number
        folder.start_attempt({"time": begin, "host": "node", "pid": 1, "world_size": 2})
        writer = folder.metrics_writer(number)
        for i, step in enumerate(steps):
            writer.write(record(step, begin + 5 * (i + 1)))
        writer.close()
        keep_ledger(folder, number, begin, steps)
    if checkpoint is not None:
        import torch  # here: most tests need none of it

        from trainer.checkpoint.manager import CheckpointManager

        manager = CheckpointManager(f"{folder.url}/{CHECKPOINTS}", keep_last=2, config_digest="d", code_version="0")
        manager.save({"w": torch.ones(4)}, step=checkpoint, images_seen=8 * checkpoint, state={})
    return folder


def job_of(path: Path) -> dict[str, Any]:
    return RunFolder(str(path)).read_json("job.json")
