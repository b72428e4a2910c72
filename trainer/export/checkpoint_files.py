"""A checkpoint in other formats: one safetensors file, or a folder of torch.distributed.checkpoint."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from trainer.checkpoint.opened import NO_PROGRESS, OpenedCheckpoint
from trainer.checkpoint.records import Index
from trainer.checkpoint.storage import DTYPES
from trainer.errors import UserError
from trainer.safetensors_stream import SafetensorsStream

STATE = "loupe.json"
"""Beside a DCP folder's own files: step, images seen and the trainer's state."""


def chosen(index: Index, where: str, weights: str) -> dict[str, str]:
    """Names in a checkpoint to those that are written.

    Args:
        where: its URL, for messages.
        weights: all; or ema or raw: the module's tensors alone, by their own names; of what no average is of, as of buffers,
            ema takes the model's.

    Raises:
        UserError: the checkpoint has none of them.
    """
    stored = index.tensors
    if weights == "all":
        return {name: name for name in stored}
    if weights == "ema" and not any(name.startswith("ema.") for name in stored):
        raise UserError(f"{where}: holds no averaged weights; take --weights raw")
    names = {}
    for name in stored:
        if name.startswith("model."):
            ours = name.removeprefix("model.")
            average = f"ema.{ours}"
            names[average if weights == "ema" and average in stored else name] = ours
    if not names:
        raise UserError(
            f"{where}: holds no tensor called model.*; `loupe checkpoint convert --weights all` takes the others"
        )
    return names


def to_safetensors(
    checkpoint: OpenedCheckpoint, out: Path, names: Mapping[str, str], on_bytes: Callable[[int], None] = NO_PROGRESS
) -> None:
    """Write one file, which appears whole; some hundred megabytes of it are in memory at once.

    Raises:
        UserError: it exists.
        CorruptCheckpoint: the checkpoint is damaged; then nothing is left.
    """
    _must_be_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    tensors = checkpoint.index.tensors
    try:
        with open(temporary, "wb") as file:
            about = {"step": str(checkpoint.manifest.step), "checkpoint": checkpoint.entry.name}
            shapes = {ours: (tensors[name].size, DTYPES[tensors[name].dtype]) for name, ours in names.items()}
            stream = SafetensorsStream(file, shapes, about)
            for part in checkpoint.parts(names):
                read = checkpoint.read(part)
                for name in part:
                    stream.write(names[name], read.pop(name))
                on_bytes(sum(map(checkpoint.num_bytes, part)))
            stream.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def to_dcp(checkpoint: OpenedCheckpoint, out: Path, names: Mapping[str, str]) -> None:
    """Write a folder that `torch.distributed.checkpoint.load` reads, on any number of ranks, and `loupe.json` in it. All of the
    tensors are in memory at once.

    Raises:
        UserError: it exists.
        CorruptCheckpoint: the checkpoint is damaged; then nothing is left.
    """
    _must_be_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        read = checkpoint.read(names)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                {ours: read[name] for name, ours in names.items()}, checkpoint_id=temporary, no_dist=True,
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            )  # fmt: skip
        manifest = checkpoint.manifest
        about = {"step": manifest.step, "images_seen": manifest.images_seen, "state": manifest.state}
        (temporary / STATE).write_text(json.dumps(about, indent=1) + "\n")
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _must_be_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists; give another name, or remove it")
