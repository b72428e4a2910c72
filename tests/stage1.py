"""Stage 1 at a size for tests: real emoji at 32 px, f4, a few seconds of training. And what its runs leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.numerics.lpips_reference import random_weights
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.config import RunConfig
from trainer.config_text import parse, with_overrides
from trainer.models.lpips_weights import build_lpips
from trainer.run_folder import RunFolder
from trainer.tasks import autoencoder

WITH_LPIPS = "task.lpips={{network: alex, url: {}}}"
VQ = "task.model={{kind: vq, block_out_channels: [8, 8, 16], norm_num_groups: 4, codebook: {{size: 32, {}}}}}"
GRADIENT = VQ.format("update: gradient")
RUNNING_MEANS = VQ.format("update: ema, ema_decay: 0.9, restart_below: 0.5, restart_every_steps: 3")
KIND = "asymmetric_kl"
ASYMMETRIC = (
    f"task.model={{kind: {KIND}, block_out_channels: [8, 8, 16], decoder_block_out_channels: [8, 8, 8], "
    "decoder_layers_per_block: 1, norm_num_groups: 4}"
)


def stage1(*overrides: str) -> RunConfig:
    """8 steps of a KL model and, from step 3 on, a discriminator with batch norm and the adaptive weight; no LPIPS."""
    tree = {
        "name": "stage1",
        "task": {
            "kind": "autoencoder",
            "model": {"kind": "kl", "block_out_channels": [8, 8, 16], "norm_num_groups": 4},
            "lpips": None,
            "kl_weight": 1e-4,
            "discriminator": {"start_step": 3, "width": 8, "num_layers": 1},
        },
        "data": {
            "datasets": {"emoji": {"url": "repo://data/assets/emoji_64"}}, "flip_probability": 0.5, "num_workers": 0,
        },
        "phases": [{"name": "train", "steps": 8, "resolution": 32, "batch_size": 8, "learning_rate": 2e-3, "ema_decay": 0.9}],
        "optim": {"betas": [0.5, 0.9], "weight_decay": 0.0, "warmup_steps": 2},
        "metrics": {"every_steps": 1},
        "checkpoint": {"every_steps": 100},
    }  # fmt: skip
    # another kind of model has no posterior to weigh
    without = [] if not any("kind: vq" in override for override in overrides) else ["task.kl_weight=0"]
    return with_overrides(parse(tree, source="tests"), [*without, *overrides])


@contextmanager
def in_float64() -> Iterator[None]:
    """Within, runs of stage 1 compute in double precision, so that what rounding differs by stays small: from one step to the
    next a game of two players multiplies it, in float32 up to the second digit within ten steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "build_lpips", lambda *arguments: build_lpips(*arguments).double())
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def write_lpips(folder: Path) -> str:
    """An override that gives the task LPIPS with random weights."""
    path = folder / "alex.pth"
    torch.save(random_weights("alex"), path)
    return WITH_LPIPS.format(path)


def checkpoint(run: Path, step: int | None = None) -> dict[str, Tensor]:
    """All tensors of a run's checkpoint, of its newest where no step is named."""
    manager = CheckpointManager(f"{run}/checkpoints", keep_last=2, config_digest=None, code_version="")
    tensors: dict[str, Tensor] = {}

    def choose(index: Index, where: str) -> dict[str, Tensor]:
        assert {record.dtype for record in index.tensors.values()} <= {"F32", "I64", "F64"}
        dtypes = {"F32": torch.float32, "I64": torch.int64, "F64": torch.float64}
        tensors.update({n: torch.zeros(r.size, dtype=dtypes[r.dtype]) for n, r in index.tensors.items()})
        return tensors

    path = None if step is None else next(str(p) for p in (run / "checkpoints").glob(f"step-{step:08d}-*"))
    restored = manager.read(choose, path=path)
    assert restored is not None
    return tensors


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def losses(run: Path) -> list[dict[str, float]]:
    """Of each step. A note is no step."""
    return [record["loss"] for record in RunFolder(str(run)).metrics()]


def largest_difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """Over all steps and terms: of the value, relative to it where it is more than 1."""
    assert len(a) == len(b) > 0
    assert all(x.keys() == y.keys() for x, y in zip(a, b, strict=True))
    return max(abs(x[n] - y[n]) / max(1.0, abs(y[n])) for x, y in zip(a, b, strict=True) for n in x)
