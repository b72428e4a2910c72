"""What the trainer costs beside its task, and whether memory stays flat: thousands of steps of a task that computes nothing.

    python -m ops.bench.soak [--steps 10000] [--ranks 1] [--profile]

Everything is the trainer's own: run folder, metrics and their endpoint, watchdog, agreement on stops and bad data, clipping,
optimizer, average, reports every 10 steps. Only the task (one weight, no loss) and the loader (one batch, always the same) are
stand-ins. Printed are processor time, less the task's own, and wall time a step, and as shares of a step of 100 ms; and of
each tenth of the run what the process holds: resident memory, Python's objects, open files, threads. `--profile` takes turns
with and without `profile` of the config, its window long over, for what it costs then.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

STEP_S = 0.1
"""The step that overhead is a share of."""
BATCH = 32
MOST_SHARE = 0.01
FLAT_MIB = 8.0
"""Growth of resident memory that is no leak."""
PARTS = 10
"""Of a run; in the first one caches fill, and nothing is compared."""


@dataclass(frozen=True)
class Held:
    """By the process, after a step."""

    step: int
    wall_s: float
    processor_s: float
    """Without the task's own."""
    resident_mib: float
    objects: int
    files: int
    threads: int

    @classmethod
    def now(cls, step: int, task_s: float) -> "Held":
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return cls(
            step, time.monotonic(), time.process_time() - task_s, pages * os.sysconf("SC_PAGESIZE") / 2**20,
            len(gc.get_objects()), len(os.listdir("/proc/self/fd")), threading.active_count(),
        )  # fmt: skip


def soak(steps: int, folder: str, overrides: tuple[str, ...] = ()) -> list[Held]:
    """A whole run in this process, as a rank of its job; what it held after each tenth of the steps."""
    from ops.bench.recipes import random_batch
    from trainer import run as runs
    from trainer.config import LatentDiffusionConfig
    from trainer.config_text import with_overrides
    from trainer.preemption import StopRequest
    from trainer.recipes import load
    from trainer.run_folder import RunFolder
    from trainer.start_times import StartTimes

    config = with_overrides(load("demo"), (
        "samples=null", "prompt_accuracy=null", "validation=null", f"checkpoint.every_steps={steps}", "data.num_workers=0",
        f"phases.low_resolution.steps={steps}", f"phases.low_resolution.batch_size={BATCH}",
        "parallel.num_threads=1", *overrides,
    ))  # fmt: skip
    config = config.model_copy(update={"phases": config.phases[:1]})
    assert isinstance(config.task, LatentDiffusionConfig)
    size = int(os.environ.get("WORLD_SIZE", 1))
    batch = random_batch(config.task, config.phases[0], BATCH // size)
    held: list[Held] = []
    tasks: list[Any] = []

    def make_task(config: object, device: object) -> object:
        tasks.append(_no_op(config, device))
        return tasks[0]

    class OneBatch:
        def steps(self, first: int, end: int) -> Iterator[Any]:
            for step in range(first, end):
                if step % max(1, steps // PARTS) == 0 or step == steps - 1:
                    held.append(Held.now(step, tasks[0].spent_s))
                yield changed(batch, step=step)

    @contextlib.contextmanager
    def loader(*_: object) -> Iterator[OneBatch]:
        yield OneBatch()

    kind = config.task.kind
    of_kind = runs.TASKS[kind]
    runs.TASKS[kind] = make_task  # type: ignore[assignment]
    make = runs.Run._make_loader
    runs.Run._make_loader = loader  # type: ignore[assignment, method-assign]
    try:
        runs.run(config, RunFolder(folder), StopRequest(), StartTimes())
    finally:
        runs.TASKS[kind], runs.Run._make_loader = of_kind, make  # type: ignore[method-assign]
    return held


def _no_op(_config: object, _device: object) -> object:
    import torch
    from torch import Tensor, nn

    from data.batches import Batch
    from trainer.step_plan import StepPlan
    from trainer.tasks.base import Task

    class NoOp(Task):
        def __init__(self) -> None:
            self.module = nn.Linear(1, 1, bias=False)
            self._input, self._loss_B = torch.zeros(1, 1), torch.zeros(BATCH)
            self.spent_s = 0.0
            """Of the processor, by its own pass forward and backward."""

        def sharding_units(self) -> list[nn.Module]:
            return []

        def check(self) -> list[str]:
            return []

        def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
            began = time.process_time()
            self.module(self._input).sum().backward()
            self.spent_s += time.process_time() - began
            loss_B = self._loss_B[: len(batch.keys)]
            return {"loss": loss_B, "denoising": loss_B}

    return NoOp()


def in_processes(steps: int, ranks: int, overrides: tuple[str, ...] = ()) -> list[Held]:
    """A run of so many ranks; what rank 0 held."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "ops.bench.soak", "--steps", str(steps), "--of-rank", folder, *overrides],
                env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(ranks),
                     "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        if any([process.wait() for process in processes]):
            raise SystemExit("a rank has failed")
        found = json.loads((Path(folder) / "held.json").read_text())
    return [Held(**held) for held in found]


def processor_ms(held: list[Held]) -> float:
    """Of a step, on rank 0; the median of the parts after the first."""
    parts = list(itertools.pairwise(held))[1:]
    return 1e3 * statistics.median((b.processor_s - a.processor_s) / (b.step - a.step) for a, b in parts)


def tell(held: list[Held]) -> None:
    print(
        f"{'step':>8s} {'resident MiB':>13s} {'objects':>9s} {'files':>6s} {'threads':>8s} {'wall ms':>8s} {'processor':>10s}"
    )
    for i, now in enumerate(held):
        line = f"{now.step:8d} {now.resident_mib:13.1f} {now.objects:9d} {now.files:6d} {now.threads:8d}"
        if i:
            before = held[i - 1]
            ms = 1e3 / (now.step - before.step)
            line += f" {ms * (now.wall_s - before.wall_s):8.3f} {ms * (now.processor_s - before.processor_s):10.3f}"
        print(line)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="what `profile` costs when its window is over")
    parser.add_argument("--of-rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the demo's config")
    options = parser.parse_args(arguments)
    if options.of_rank:
        held = soak(options.steps, f"{options.of_rank}/run", tuple(options.overrides))
        if int(os.environ["RANK"]) == 0:
            (Path(options.of_rank) / "held.json").write_text(json.dumps([vars(one) for one in held]))
        return 0
    overrides = tuple(options.overrides)
    if options.profile:
        turns = {"without": overrides, "with": ("profile={after_steps: 2, num_steps: 2}", *overrides)}
        found: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(3):
            for name, these in turns.items():
                found[name].append(processor_ms(in_processes(options.steps, options.ranks, these)))
        medians = {name: statistics.median(ms) for name, ms in found.items()}
        print(f"profile, its window over: {(medians['with'] - medians['without']) / (1e3 * STEP_S):+.3%} of a step of 100 ms; "
              f"processor ms a step with {found['with']}, without {found['without']}")  # fmt: skip
        return 0
    held = in_processes(options.steps, options.ranks, overrides)
    ms = processor_ms(held)
    first, last = held[1], held[-1]
    grown = last.resident_mib - first.resident_mib
    print(f"{ms / (1e3 * STEP_S):.2%} of a step of {1e3 * STEP_S:.0f} ms: {ms:.3f} ms of the processor a step, "
          f"{options.ranks} rank(s)")  # fmt: skip
    print(f"{grown:+.1f} MiB resident, {last.objects - first.objects:+d} objects, {last.files - first.files:+d} files and "
          f"{last.threads - first.threads:+d} threads from step {first.step} to {last.step}")  # fmt: skip
    tell(held)
    return int(grown > FLAT_MIB or ms > 1e3 * STEP_S * MOST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
