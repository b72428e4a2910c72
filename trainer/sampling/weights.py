"""The weights that a model draws with, read into it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fsspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.checkpoint.retention import unique_hold
from trainer.errors import UserError
from trainer.run_folder import CHECKPOINTS, EMA_SNAPSHOTS
from trainer.safetensors_source import SafetensorsSource
from trainer.sampling.source import EMA, POST_HOC, RAW, OpenedRun, check_weights, post_hoc_of

if TYPE_CHECKING:
    from trainer.posthoc_ema import Plan, StoredAverages


_DIGITS = 15
"""Of a step, at most."""


@dataclass(frozen=True)
class Filled:
    """What was read."""

    step: int
    """0 where a file does not say it."""
    source: str
    """URL."""
    weights: str
    """As they are asked for to get them again: of ema:SIGMA with its step."""
    sha256: str | None = None
    """Of a file: another may come in its place."""


def fill(module: nn.Module, run: OpenedRun, weights: str, group: dist.ProcessGroup | None) -> Filled:
    """Read `weights` into the module, in place, the same on every rank. A collective.

    Raises:
        UserError: there are none, or they are not this model's.
    """
    check_weights(weights)
    if weights in (EMA, RAW):
        return _from_checkpoint(module, run, weights, group)
    ranks = Ranks(group)
    if weights.startswith(POST_HOC):
        return _post_hoc(module, run, weights, ranks)
    file = SafetensorsSource(weights)
    ranks.on_all(lambda: _put(module.state_dict(), file.read(), weights))
    step = ranks.on_rank_0(lambda: file.words().get("step", ""))
    known = int(step) if step.isascii() and step.isdigit() and len(step) <= _DIGITS else 0
    return Filled(known, weights, weights, ranks.on_rank_0(lambda: _sha256(weights)))


def plan_of(averages: "StoredAverages", sigma_rel: float, step: int | None) -> "Plan":
    """As `StoredAverages.plan`, of what `post_hoc_of` has read."""
    return averages.plan(sigma_rel, step, width_field="--weights: sigma_rel", step_field="--weights: step")


def _from_checkpoint(module: nn.Module, run: OpenedRun, weights: str, group: dist.ProcessGroup | None) -> Filled:
    targets, parameters = module.state_dict(), dict(module.named_parameters())
    ranks = Ranks(group)
    manager = CheckpointManager(
        f"{run.url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version="", process_group=group
    )

    def choose(index: Index, where: str) -> dict[str, Tensor]:
        # the average is of parameters alone: buffers are the model's either way
        names = {n: f"ema.{n}" if weights == EMA and n in parameters else f"model.{n}" for n in targets}
        if weights == EMA and not any(name.startswith("ema.") for name in index.tensors):
            raise UserError(f"{where}: holds no averaged weights; take --weights raw")
        return by_stored_name(index, where, names, targets, mend="draw with the code that wrote it")

    hold = ranks.on_rank_0(lambda: unique_hold("sample"))
    try:
        restored = manager.read(choose, path=run.checkpoint, hold=hold)
    except CorruptCheckpoint as e:
        raise UserError(f"{run.checkpoint}: the checkpoint is damaged ({e}); give another") from e
    if restored is None:
        raise UserError(f"{run.url}: no checkpoint to draw with; train first")
    return Filled(restored.step, restored.path, weights)


def by_stored_name(
    index: Index, where: str, names: Mapping[str, str], targets: Mapping[str, Tensor], *, mend: str
) -> dict[str, Tensor]:
    """Targets by the names that a checkpoint has for them.

    Args:
        names: the checkpoint's, by the module's.
        mend: what the user can do.

    Raises:
        UserError: one is not there, or has another shape.
    """
    for name, target in targets.items():
        stored = index.tensors.get(names[name])
        if stored is None or tuple(stored.size) != tuple(target.shape):
            found = "is not there" if stored is None else f"has shape {list(stored.size)}"
            raise UserError(f"{where}: {names[name]} {found}, the run's config has it of {list(target.shape)}; {mend}")
    return {names[name]: target for name, target in targets.items()}


def _post_hoc(module: nn.Module, run: OpenedRun, weights: str, ranks: Ranks) -> Filled:
    """The average of another width, from what the run has stored for it."""
    from trainer.posthoc_ema import StoredAverages

    sigma_rel, step = post_hoc_of(weights, run.checkpoint)
    # of one step on all ranks: while they look, the run may write another snapshot
    step = ranks.on_rank_0(lambda: plan_of(StoredAverages(run.url), sigma_rel, step).step)

    def read() -> None:
        averages = StoredAverages(run.url)
        _put(module.state_dict(), dict(averages.read(plan_of(averages, sigma_rel, step))), f"{run.url} ({weights})")

    ranks.on_all(read)
    return Filled(step, f"{run.url}/{EMA_SNAPSHOTS}", f"{POST_HOC}{sigma_rel:g}@{step}")


def _sha256(url: str) -> str:
    with fsspec.open(url, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def _put(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Every target from the tensor of its name, in the target's type; what else there is stays unused."""
    for name, target in targets.items():
        stored = state.get(name)
        if stored is None or stored.shape != target.shape:
            found = "is not there" if stored is None else f"has shape {list(stored.shape)}"
            raise UserError(f"--weights: {where}: {name} {found}, the run has it of {list(target.shape)}; give weights "
                            "of this run's model, by its own names")  # fmt: skip
        target.copy_(stored)
