"""A training step against the loop that one would write today with diffusers: one model, one encoder, the same batches, each
in a process of its own, in turns.

    python -m ops.bench.step [--recipe demo] [--resolution 64] [--batch-size 32] [--repeats 30] [--compile] [--stored-latents]
    python -m ops.bench.step --recipe sd3_medium_512 --resolution 256 --batch-size 16 --compile         # 2B, on a GPU
    python -m ops.bench.step --recipe sd3_medium_512 --batch-size 16 --compile task.model.num_blocks=18 \\
        task.model.num_heads=18 task.model.num_dual_attention_blocks=0                                  # 856M
    python -m ops.bench.step --recipe sd3_medium_512 --buckets --batch-size 4 --compile                 # mixed aspects
    make bench-gpu                                                                                      # all of them

The peer is diffusers' `SD3Transformer2DModel` with our weights, autocast to bf16 on a GPU, scaled-dot-product attention, fused
AdamW, clipping, diffusers' `EMAModel`, the frozen autoencoder and the text encoder, compiled whole with `--compile`. Ours is
the trainer's step. First each takes three steps with equal draws and with captions that fill the text encoder, whose losses
must agree. Then they are timed in turns, so that noise of the machine falls on both: with those captions, and with the
recipe's own where they are at hand, whose padding the peer computes as all of diffusers' scripts do. The ratio is the median
of the turns'. Peak memory is that of tensors, states included. What LPL costs is `ops.bench.lpl --step`.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from data.batches import Batch
from ops.bench.lpl import MIB, flops_of, peak_of
from ops.bench.step_loops import DiffusersLoop, Ours, batches, comparable, dataset_captions, with_captions
from trainer.config import RunConfig, replace
from trainer.config_text import with_overrides
from trainer.errors import UserError
from trainer.parallel.world import init_world
from trainer.peak_flops import from_table
from trainer.profiling import spans_of
from trainer.recipes import load
from trainer.stage_times import Stages
from trainer.trace_summary import Summary, summarise

PEER, OURS = "diffusers loop", "ours"
CHECKED_STEPS = 3
TRACED_STEPS = 2
TOLERANCE = 1e-4
"""Of losses in float32, relative; bf16 has 2e-2."""


def config_of(options: argparse.Namespace) -> RunConfig:
    """
    Raises:
        UserError: unknown recipe, field or value, or of a model that the peer does not have.
    """
    return comparable(with_overrides(load(options.recipe), options.overrides))


class Side:
    """One of the two, in its process. Methods are called by name from the other end of a pipe."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._world = init_world()
        self._device = self._world.device
        config = config_of(options)
        config = replace(config, parallel=replace(config.parallel, compile=options.compile))
        phase = config.phases[-1]
        phase = replace(
            phase, resolution=options.resolution or phase.resolution, batch_size=options.batch_size or phase.batch_size
        )
        torch.manual_seed(0)
        self._ours = Ours(config, phase, self._world)
        self._batches = batches(
            config, phase, phase.batch_size, stored=options.stored_latents, buckets=options.buckets
        )  # fmt: skip
        self._captions = dataset_captions(config, phase.batch_size)
        self._loop: Ours | DiffusersLoop = self._ours
        if name == PEER:
            self._loop = DiffusersLoop(self._ours, self._device, compiled=options.compile)
        else:
            self._ours.parallelize(self._world)
        self._turn = cycle(self._batches)

    def what(self) -> tuple[str, int, str, list[str]]:
        """Phase's side, batch size, device, shapes of images."""
        phase, cuda = self._ours.phase, self._device.type == "cuda"
        name = torch.cuda.get_device_name(self._device) if cuda else f"{torch.get_num_threads()} CPU thread(s), float32"
        shapes = [f"{b.images_BCHW.shape[-1]}x{b.images_BCHW.shape[-2]}" for b in self._batches]
        return f"{phase.resolution} px", phase.batch_size, name, shapes

    def losses(self) -> list[float]:
        """Of steps whose draws are the same on both sides."""
        found = []
        for _, batch in zip(range(CHECKED_STEPS), cycle(self._batches), strict=False):
            found.append(float(self._with_equal_draws(batch)))
        return found

    def _with_equal_draws(self, batch: Batch) -> Tensor:
        loop = self._loop
        return loop.step(batch, equal_draws=True) if isinstance(loop, DiffusersLoop) else loop.step(batch)

    def first_s(self) -> float:
        """Seconds of the first step of each shape, compilation included; before any other step."""
        began = time.perf_counter()
        for batch in self._batches:
            self._with_equal_draws(batch)
        self._synchronize()
        return time.perf_counter() - began

    def counted(self) -> tuple[int, int]:
        """FLOPs of a step and the peak of its memory in bytes; of the first shape."""
        flops = flops_of(self._one)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._loop.held()}
        return flops, peak_of(self._one, self._device) + sum(held.values())

    def take_captions(self) -> bool:
        """From now on the dataset's; false where it is not at hand."""
        if self._captions is not None:
            self._batches = with_captions(self._batches, self._captions)
            self._turn = cycle(self._batches)
        return self._captions is not None

    def step_s(self) -> float:
        """Of a step of each shape, on average."""
        began = time.perf_counter()
        for _ in self._batches:
            self._loop.step(next(self._turn))
        self._synchronize()
        return (time.perf_counter() - began) / len(self._batches)

    def graphs(self) -> int:
        """Compiled so far."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def traced(self) -> Summary:
        if isinstance(self._loop, Ours):
            self._ours.task.stages = Stages(self._device)
            self._ours.task.stages.annotate(lambda stage: record_function(f"stage:{stage}"))
        cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
            for _ in range(TRACED_STEPS):
                self._one()
            self._synchronize()
        spans = list(spans_of(trace.events(), cuda=cuda))
        return summarise(spans, (min(s.begin for s in spans), max(s.end for s in spans)), TRACED_STEPS)

    def _one(self) -> Tensor:
        return self._loop.step(self._batches[0])

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _serve(name: str, options: argparse.Namespace, connection: Connection) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)  # each is alone, whatever job this is in
    side = Side(name, options)
    while (method := connection.recv()) is not None:
        connection.send(getattr(side, method)())
    os._exit(0)


@dataclass
class Remote:
    """A side as the one that compares them sees it."""

    connection: Connection
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By captions."""
    flops: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def ask(self, method: Callable[[Side], Any]) -> Any:
        try:
            self.connection.send(method.__name__)
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise SystemExit("one of the two processes has ended; its error is above") from None


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="of an MMDiT in SD3's layout")
    parser.add_argument("--resolution", type=int, help="in pixels; the last phase's unless told")
    parser.add_argument("--batch-size", type=int, help="of one rank; the last phase's unless told")
    parser.add_argument("--repeats", type=int, default=30, help="turns")
    parser.add_argument("--compile", action="store_true", help="both: our blocks, and the peer's model whole")
    parser.add_argument("--stored-latents", action="store_true", help="in place of online encoding")
    parser.add_argument("--buckets", action="store_true", help="images of the default aspect buckets, in turns")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the recipe's config")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = parser_of_options().parse_args(arguments)
    try:
        config_of(options)
    except UserError as e:
        raise SystemExit(f"error: {e}") from None
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Remote] = {}
    for name in (PEER, OURS):
        here, there = context.Pipe()
        context.Process(target=_serve, args=(name, options, there), daemon=True).start()
        there.close()
        sides[name] = Remote(here)
    _, _, device, _ = sides[OURS].ask(Side.what)
    first_s = {name: side.ask(Side.first_s) for name, side in sides.items()}
    pairs = zip(*(side.ask(Side.losses) for side in sides.values()), strict=True)
    tolerance = TOLERANCE if "CPU" in device else 2e-2
    for theirs, own in pairs:
        print(f"loss: diffusers {theirs:.6f}, ours {own:.6f}, {abs(own / theirs - 1):.1e} apart")
        assert abs(own / theirs - 1) < tolerance, "the two do not compute the same"
    kinds = ["full captions"]
    recompiled = _time(sides, kinds[0], options.repeats)
    if all([side.ask(Side.take_captions) for side in sides.values()]):
        kinds.append("its own captions")
        recompiled += _time(sides, kinds[1], options.repeats)
    _tell(sides, kinds, options, first_s)
    print(f"compiled anew after the first steps: {recompiled} graphs")
    for side in sides.values():
        side.connection.send(None)


def _time(sides: dict[str, Remote], kind: str, repeats: int) -> int:
    """In turns. Graphs that ours has compiled meanwhile."""
    for side in sides.values():
        side.ask(Side.step_s)  # the first of these captions
        side.flops[kind], side.peaks[kind] = side.ask(Side.counted)
        side.seconds[kind] = []
    graphs: int = sides[OURS].ask(Side.graphs)
    for _ in range(repeats):
        for side in sides.values():
            side.seconds[kind].append(side.ask(Side.step_s))
    compiled: int = sides[OURS].ask(Side.graphs)
    return compiled - graphs


def _tell(sides: dict[str, Remote], kinds: list[str], options: argparse.Namespace, first_s: dict[str, float]) -> None:
    size, batch_size, device, shapes = sides[OURS].ask(Side.what)
    theirs, ours = sides[PEER], sides[OURS]
    print()
    for kind in kinds:
        faster = statistics.median(a / b for a, b in zip(theirs.seconds[kind], ours.seconds[kind], strict=True))
        print(f"ours over the diffusers loop, {kind}: {faster:.3f}x the images a second, "
              f"{ours.peaks[kind] / theirs.peaks[kind]:.3f}x the peak memory")  # fmt: skip
    how = ", compiled" * options.compile + ", stored latents" * options.stored_latents
    print(
        f"{' '.join([options.recipe, *options.overrides])}, {size}, {batch_size} images of {', '.join(shapes)}, {device}{how}"
    )
    peak = from_table(device)
    print(
        f"{'':33s} {'ms':>9s} {'images/s':>9s} {'GFLOP':>9s} {'TFLOP/s':>8s} {'MFU':>6s} {'peak MiB':>9s} {'first s':>8s}"
    )
    for kind in kinds:
        for name, side in sides.items():
            median_s = statistics.median(side.seconds[kind])
            rate = side.flops[kind] / median_s
            print(f"{name + ', ' + kind:33s} {median_s * 1e3:9.1f} {batch_size / median_s:9.2f} {side.flops[kind] / 1e9:9.1f} "
                  f"{rate / 1e12:8.3f} {f'{rate / peak:.1%}' if peak else '-':>6s} {side.peaks[kind] / MIB:9.1f} "
                  f"{first_s[name]:8.1f}")  # fmt: skip
    for name, side in sides.items():
        traced = side.ask(Side.traced)
        counts = f"{traced.kernels:.0f} kernels, the host waits {traced.waits:.1f} times" if traced.kernels else (
            f"{traced.waits:.1f} values read by the host"
        )  # fmt: skip
        print(f"traced, {name}: {traced.idle:.1%} idle, {counts}")
        if traced.stages_ms:
            print("  " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in traced.stages_ms.items()) + " ms of the host")


if __name__ == "__main__":
    main()
