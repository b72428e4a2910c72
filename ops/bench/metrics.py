"""What all metrics cost a step, and what a scrape costs a rank.

    OMP_NUM_THREADS=1 python -m ops.bench.metrics [--device cuda|cpu] [--every-steps 10] [--images 32]

Steps without any work, in turns with all that a rank 0 measures (marks of stages, loss terms and their noise levels, counters,
the ledger of goodput, statistics over ranks, the MFU, a record an interval) and without; the difference is the metrics'. Time
is this process's own, of its threads together, so that other load on the machine disturbs it little; medians of rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from trainer import metric_names
from trainer.activity import Activity
from trainer.config import MetricsConfig, PhaseConfig
from trainer.exporter import Exporter
from trainer.flops import StepFlops
from trainer.goodput import Ledger
from trainer.parallel.world import World, init_world
from trainer.progress import Progress
from trainer.reports import Reports
from trainer.run_folder import RunFolder
from trainer.step_plan import StepPlan
from trainer.stragglers import Stragglers
from trainer.watchdog import Watchdog

STEP_S = 0.1
TERMS = ("loss", "denoising", "denoising_weighted", "lpl", "gate", "lpl_a", "lpl_b", "lpl_c", "lpl_d", "lpl_e")
COUNTS: dict[tuple[str, ...], float] = {
    (metric_names.FETCH_BYTES.name,): 1e6, (metric_names.FETCH_SECONDS.name,): 0.1, (metric_names.CACHE_HITS.name,): 1.0,
    (metric_names.CACHE_BYTES.name,): 1e9,
}  # fmt: skip


class Step:
    """All that `trainer.trainer` does for metrics in a step, and nothing else of it."""

    def __init__(self, world: World, folder: RunFolder, images: int, every_steps: int) -> None:
        self.exporter, self.world, self.every_steps = Exporter(metric_names.OF_RANK_0), world, every_steps
        module = nn.Linear(1, 1).to(world.device)
        self.flops = StepFlops(module)
        self.flops.attach()
        self.records = folder.metrics_writer(0)
        self.reports = Reports(world, self.exporter, self.records, 10**9, flops=self.flops, peak_flops=1e12)
        self.reports.print = lambda text: None  # type: ignore[method-assign]
        self.stragglers = Stragglers(MetricsConfig(), world, self.reports, [])
        self.activity = Activity(Watchdog(None, None), Ledger(), world.device)
        self.progress, self.skip = Progress(), torch.zeros((), device=world.device)
        self.terms_B = {name: torch.ones(images, device=world.device) for name in TERMS}
        self.noise = torch.rand(images, device=world.device), torch.ones(images, device=world.device)
        phase = PhaseConfig(name="only", steps=10**9, resolution=32, batch_size=images, learning_rate=1e-4)
        self.phase, self.images = phase, images
        self.flops.begin_step(0, (), another_loss=False)
        with self.flops.counting(self.reports.stages, 1):
            module(torch.zeros(1, 1, device=world.device)).sum().backward()

    def on(self) -> None:
        stages, own, activity, step = self.reports.stages, self.stragglers.own, self.activity, self.progress.step
        own.close()
        activity.loaded()
        stages.enter("other")
        activity.stepping(step, 0, ())
        own.open()
        with stages("copy"):
            pass
        self.flops.begin_step(0, (), another_loss=False)
        with self.flops.counting(stages, 1):
            for stage, part in (("text", "text"), ("encode", "encoder"), ("forward", None),
                                ("perceptual_loss", "perceptual_loss"), ("backward", None)):  # fmt: skip
                with stages(stage, part):
                    pass
        stages.enter("optimizer")
        own.close()
        own.open()
        with stages("average"):
            pass
        stages.enter("other")
        self.reports.add(self.terms_B, self.skip, self.noise)
        own.close()
        self.progress.step += 1
        self.exporter.add(COUNTS)
        self.reports.count(step + 1, self.images, 0.0, STEP_S, self.flops.kind)
        self.stragglers.count(STEP_S)
        activity.stepped(step + 1, STEP_S)
        stages.end_step()
        if (step + 1) % self.every_steps == 0:
            plan = StepPlan(step, self.phase, 0, step, 1e-4, 0, begins_phase=False, ends_phase=False)
            self.reports.tell(plan, self.progress, gradient_norm=1.0, update_ratio=1.0, captions_cut=0)
            self.stragglers.tell()
        own.open()
        activity.loading()
        stages.enter("data")

    def off(self) -> None:
        for _ in range(8):
            with nullcontext():
                pass


def seconds_a_step(step: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """(processor time, clock time) of one step. On a GPU the clock's includes what the device does."""
    cpu, clock = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.process_time() - cpu) / steps, (time.perf_counter() - clock) / steps


def scrape(exporter: Exporter) -> tuple[float, int, int]:
    """(seconds, series, bytes) of a scrape over HTTP."""
    port = exporter.serve("127.0.0.1", 0)
    times, text = [], b""
    for _ in range(20):
        begun = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            text = response.read()
        times.append(time.perf_counter() - begun)
    exporter.close()
    series = sum(1 for line in text.splitlines() if line and not line.startswith(b"#"))
    return statistics.median(times), series, len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="What all metrics cost a step.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--every-steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=32, help="Of a rank's batch.")
    parser.add_argument("--steps", type=int, default=500, help="Of a round.")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = init_world(num_threads=1)
    with tempfile.TemporaryDirectory() as name:
        step = Step(world, RunFolder(name), options.images, options.every_steps)
        found: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
        for _ in range(options.rounds + 1):
            for which, run in (("on", step.on), ("off", step.off)):
                found[which].append(seconds_a_step(run, options.steps, world.device))
        # the first round makes the series
        for i, what in enumerate(("processor", "clock")):
            on, off = (statistics.median(pair[i] for pair in found[which][1:]) for which in ("on", "off"))
            print(f"{what} time: {1e6 * on:.1f} us a step with metrics, {1e6 * off:.1f} without: "
                  f"{(on - off) / STEP_S:.3%} of a step of {STEP_S * 1000:.0f} ms")  # fmt: skip
        seconds, series, size = scrape(step.exporter)
        print(f"a scrape of rank 0: {1000 * seconds:.2f} ms, {series} series, {size / 1024:.1f} KiB")
        seconds, series, size = scrape(Exporter(metric_names.OF_EVERY_RANK))
        print(f"a scrape of another rank: {1000 * seconds:.2f} ms, {series} series, {size / 1024:.1f} KiB")
        step.records.close()


if __name__ == "__main__":
    main()
