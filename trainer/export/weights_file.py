"""A run's weights as plain safetensors, by our own names, for `init_from`, `loupe sample --weights`, or any other reader."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.checkpoint.retention import unique_hold
from trainer.checkpoint.storage import DTYPES
from trainer.errors import UserError
from trainer.export.checkpoint_files import chosen
from trainer.export.components import write_weights
from trainer.export.facts import facts_of
from trainer.export.latent_diffusion import write_config, write_record
from trainer.export.target import free_target, put_in_place
from trainer.run_folder import CHECKPOINTS, RunFolder
from trainer.sampling.source import EMA, POST_HOC, RAW, opened, post_hoc_of
from trainer.sampling.weights import plan_of

STEM = "model"


@dataclass(frozen=True)
class ExportedWeights:
    step: int
    tensors: int
    bytes: int


@torch.no_grad()
def export_weights(run: str, out: str, *, dtype: torch.dtype | None = None, weights: str = "ema") -> ExportedWeights:
    """Write `model.safetensors` (above 5 GB several files with their index) and `config.yaml` at `out`, a path or any fsspec
    URL, where they appear whole. Of a run of any task.

    Args:
        dtype: of floating-point tensors; None: as they are stored.
        weights: ema, raw, or ema:SIGMA.

    Raises:
        UserError: no run or no checkpoint there, `out` holds something else, or a value is not finite in `dtype`.
    """
    found = opened(run)
    folder = RunFolder(found.url)
    target = free_target(out)
    step, state = read_weights(folder, found.checkpoint, weights)
    state = {name: _as(dtype, name, tensor) for name, tensor in state.items()}
    config, size = found.config, sum(tensor.nbytes for tensor in state.values())
    facts = facts_of(folder, step)

    def write(where: Path) -> None:
        write_weights(state, where, STEM, {"run": config.name, "step": str(step), "weights": weights})
        write_config(where, config)
        kind = "as stored" if dtype is None else str(dtype).removeprefix("torch.")
        write_record(where, "safetensors", {
            "run": config.name, "step": step, "weights": weights, "dtype": kind, "commit": facts.commit, "tensors": len(state)
        })  # fmt: skip

    put_in_place(target, write)
    return ExportedWeights(step, len(state), size)


def read_weights(run: RunFolder, checkpoint: str | None, weights: str) -> tuple[int, dict[str, Tensor]]:
    """A module's state on the host, by its own names.

    Raises:
        UserError: there is no such checkpoint, or it has no such weights.
    """
    if weights.startswith(POST_HOC):
        return _post_hoc(run, checkpoint, weights)
    if weights not in (EMA, RAW):
        raise UserError(f"--weights: {weights!r} is none of ema, raw and ema:SIGMA")
    found: dict[str, Tensor] = {}

    def choose(index: Index, where: str) -> Mapping[str, Tensor]:
        found.clear()
        names, records = chosen(index, where, weights), index.tensors
        targets = {n: torch.empty(records[n].size, dtype=DTYPES[records[n].dtype]) for n in names}
        found.update((ours, targets[name]) for name, ours in names.items())
        return targets

    manager = CheckpointManager(f"{run.url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version="")
    restored = manager.read(choose, path=checkpoint, hold=unique_hold("export"))
    if restored is None:
        raise UserError(f"{run.url}: no checkpoint to export; train first")
    return restored.step, found


def _post_hoc(run: RunFolder, checkpoint: str | None, weights: str) -> tuple[int, dict[str, Tensor]]:
    """An average of another width; buffers are the model's."""
    from trainer.posthoc_ema import StoredAverages

    averages = StoredAverages(run.url)
    plan = plan_of(averages, *post_hoc_of(weights, checkpoint))
    return plan.step, dict(averages.read(plan))


def _as(dtype: torch.dtype | None, name: str, tensor: Tensor) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name}: holds values that are not finite in {kind}; take --dtype float32, and if they are not finite "
                        "in that either, the run has diverged")  # fmt: skip
    return cast
