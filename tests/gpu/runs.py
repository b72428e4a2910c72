"""Whole runs of the tiny demo on one rank of whatever device, watched from inside. Importable: ranks are new processes."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.test_training import _poison
from tests.gpu import autocast
from tests.stage1 import RUNNING_MEANS, stage1
from tests.tiny import tiny
from trainer import train_state
from trainer.checkpoint.host_copy import HostCopy
from trainer.config import RunConfig
from trainer.ema import EMA
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run import Run
from trainer.run_folder import RunFolder
from trainer.tasks import autoencoder, latent_diffusion
from trainer.tensors import full, local

State = dict[str, Tensor]

STOPPED_IN, POISONED = 7, 6
"""Steps. What stops a run in a step ends it one step later, which all ranks know of."""
SHORT = ("phases.full_resolution.steps=4", "phases.perceptual.steps=2")
NUM_STEPS = 14


@dataclass
class Seen:
    device: str
    codes: dict[str, int] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    """What a checkpoint holds, by name of a moment."""
    facts: dict[str, Any] = field(default_factory=dict)


def tensors(run: Run) -> dict[str, Tensor]:
    trainer = run.trainer
    return train_state.tensors(trainer.task, trainer.ema, trainer.optimizer, trainer.spikes)


def state(run: Run) -> State:
    return {name: full(tensor.detach()).cpu().clone() for name, tensor in tensors(run).items()}


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """`owner.name(...)` becomes `wrapper(original, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def make(world: World, url: Path, *overrides: str) -> Run:
    config: RunConfig = tiny(
        "optim.spikes={sigma: 6, window_steps: 8}", "parallel.shard_one_rank=true", "data.num_workers=0", *overrides
    )
    return Run(config, RunFolder(str(url)), world, StopRequest())


def finish(run: Run) -> int:
    try:
        return int(run.train())
    finally:
        run.exporter.close()


# ------------------------------------------------------------------------------------------------------- what is watched


def several(world: World, root: Path) -> Seen:
    seen = Seen(device=world.device.type)
    with bf16():
        run = make(world, root / "plain", "data.num_workers=1", *SHORT)
        twin = beside(run, offload=True)
        seen.codes["plain"] = finish(run)
        seen.states["plain"] = state(run)
        seen.states["offloaded"] = {f"ema.{name}": full(a).cpu() for name, a in twin.average.items()}
        seen.facts["average_is_on"] = {local(a).device.type for a in twin.average.values()}
        seen.facts["staging"] = staging(run)

        seen.codes["offload"] = finish(make(world, root / "offload", "ema.offload=true", *SHORT))

        run = make(world, root / "stopped", *SHORT)
        around(run.task, "forward_backward", stop_in(STOPPED_IN))
        seen.codes["stopped"] = finish(run)
        seen.states["stopped"] = state(run)
        run = make(world, root / "stopped", *SHORT)
        around(run.trainer, "_restore", then_snapshot(run, seen.states, "resumed"))
        seen.codes["resumed"] = finish(run)

        run = make(world, root / "poisoned", *SHORT)
        _poison(run, "once")
        around(run.trainer, "_train_step", snapshots(run, seen.states))
        seen.codes["poisoned"] = finish(run)
    return seen


@contextmanager
def bf16() -> Any:
    """As on a GPU, on whatever device."""
    before = latent_diffusion.autocast, autoencoder.autocast
    latent_diffusion.autocast = autoencoder.autocast = autocast
    try:
        yield
    finally:
        latent_diffusion.autocast, autoencoder.autocast = before


def beside(run: Run, *, offload: bool) -> EMA:
    """Another average of the same weights, updated in step with the run's."""
    twin = EMA(run.task.module, offload=offload)

    def update(original: Callable[..., None], decay: float, skip: Tensor, steps: int) -> None:
        original(decay, skip, steps)
        twin.update(decay, skip, steps)

    def wait_for_copy(original: Callable[[], None]) -> None:
        original()
        twin.wait_for_copy()

    around(run.trainer.ema, "wait_for_copy", wait_for_copy)
    around(run.trainer.ema, "update", update)
    return twin


def stop_in(step: int) -> Callable[..., Any]:
    def wrapper(original: Callable[..., Any], batch: Any, plan: Any, **rest: Any) -> Any:
        if plan.step == step:
            os.kill(os.getpid(), signal.SIGUSR2)
        return original(batch, plan, **rest)

    return wrapper


def then_snapshot(run: Run, states: dict[str, State], name: str) -> Callable[..., None]:
    def wrapper(original: Callable[[], None]) -> None:
        original()
        states[name] = state(run)

    return wrapper


def snapshots(run: Run, states: dict[str, State]) -> Callable[..., None]:
    def wrapper(original: Callable[..., None], batch: Any, plan: Any) -> None:
        if plan.step == POISONED:
            states["before_poison"] = state(run)
        original(batch, plan)
        if plan.step in (POISONED, POISONED + 1):
            states["poisoned" if plan.step == POISONED else "after_poison"] = state(run)

    return wrapper


def staging(run: Run) -> dict[str, bool]:
    """The copy that a save in the background writes, taken while the weights change at once."""
    given, before = tensors(run), state(run)
    copies = HostCopy().take(given)
    with torch.no_grad():
        for tensor in given.values():
            local(tensor).add_(1)
    parts = {name: local(copy) for name, copy in copies.items()}
    return {
        "on_host": all(part.device.type == "cpu" for part in parts.values()),
        "pinned": all(parts[name].is_pinned() for name, tensor in given.items() if local(tensor).numel() > 1),
        "as_it_was": all(torch.equal(full(copy).cpu(), before[name]) for name, copy in copies.items()),
    }


# ------------------------------------------------------------------------------------------------------ the host's waits

READS = (
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive", "_unique2",
)  # fmt: skip


class HostReads(TorchDispatchMode):
    """Operations that would make the host wait for a GPU: those whose result the host needs to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Any:
    """On a GPU, within, an operation that waits for it raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_waiting(world: World, root: Path) -> Seen:
    """A run whose steps may not wait, but for the first of each phase and those that report."""
    steps = [f"phases.{name}.steps=4" for name in ("low_resolution", "full_resolution", "perceptual")]
    seen = Seen(device=world.device.type)
    with bf16():
        run = make(world, root / "watched", "metrics.every_steps=1000", "ema.offload=true", *steps)
        watch_waits(run, seen, "watched")
    return seen


def autoencoders_without_waiting(world: World, root: Path, lpips: str) -> Seen:
    """Stage 1 with all that a step of it may have: of a KL model, and of codes that are means and begin again."""
    few = ("metrics.every_steps=1000", "data.num_workers=0", "ema.offload=true", "task.discriminator.norm=spectral")
    regular = ("task.outliers={}", "task.equivariance={scales: [0.5]}", "task.learned_log_variance=true")
    seen = Seen(device=world.device.type)
    for name, overrides in (("kl", (lpips, *regular)), ("vq", (RUNNING_MEANS, "task.discriminator.norm=batch"))):
        with bf16():
            run = Run(stage1(*few, *overrides), RunFolder(str(root / name)), world, StopRequest())
            watch_waits(run, seen, name)
    return seen


def watch_waits(run: Run, seen: Seen, name: str) -> None:
    """Train it. In `seen.facts`: the steps that were watched, and on a CPU the reads that would have waited."""
    reads, on_gpu = HostReads(), seen.device == "cuda"
    watched: list[int] = []

    def step(original: Callable[..., None], batch: Any, plan: Any) -> None:
        steady = not (plan.begins_phase or plan.ends_phase)
        watch: AbstractContextManager[Any] = nullcontext()
        if steady:
            watched.append(plan.step)
            watch = no_waiting() if on_gpu else reads
        with watch:
            original(batch, plan)

    around(run.trainer, "_train_step", step)
    seen.codes[name] = finish(run)
    seen.facts |= {name: watched, "reads": [*seen.facts.get("reads", []), *reads.found]}


def compiled(world: World, root: Path) -> Seen:
    from torch._dynamo.utils import counters

    seen = Seen(device=world.device.type)
    with bf16():
        for name in ("false", "true"):
            seen.codes[name] = finish(make(world, root / name, f"parallel.compile={name}"))
    seen.facts["graphs"] = counters["stats"]["unique_graphs"]
    return seen
