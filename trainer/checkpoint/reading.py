"""What one process reads of a checkpoint's records, and how all ranks load its tensors."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from trainer.checkpoint import folder as names
from trainer.checkpoint.collective import Ranks, error_of_ranks
from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.records import INDEX_LIMIT, Index, Manifest, xxh64
from trainer.checkpoint.storage import DTYPE_NAMES, ShardReader
from trainer.errors import UserError


@dataclass(frozen=True)
class Whole:
    """A checkpoint whose records verify and whose objects have their sizes."""

    name: str
    manifest: Manifest
    index_data: bytes
    """Verified, not yet parsed: so it travels to all ranks."""


def read_index(folder: CheckpointFolder, entry: Entry, manifest: Manifest) -> bytes:
    """Verified already here, so that a damaged index is found before other ranks are sent it."""
    name = f"{entry.name}/{names.INDEX}"
    data = folder.read_small(name, size=entry.sizes[names.INDEX], limit=INDEX_LIMIT)
    expected = next(record.xxh64 for record in manifest.objects if record.path == names.INDEX)
    if xxh64(data) != expected:
        raise CorruptCheckpoint(f"{folder.url_of(name)}: its checksum does not match the manifest")
    return data


def load(
    folder: CheckpointFolder, ranks: Ranks, checkpoint: str, index: Index, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill `tensors`, by their names in the checkpoint, in place: all of it or some. A collective."""
    with dcp_errors(ranks):
        dcp.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=ShardReader(folder, checkpoint, index),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )


def check_same_tensors(index: Index, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Everything that the run has must be in the checkpoint, in its shape and type, and nothing else."""
    only_stored, only_run = sorted(set(index.tensors) - set(tensors)), sorted(set(tensors) - set(index.tensors))
    if only_stored or only_run:
        raise UserError(
            f"{where}: the checkpoint has {_some(only_stored)} that this run lacks, this run has {_some(only_run)} "
            "that the checkpoint lacks; continue with the code and config that wrote it, or take another run folder"
        )
    for name, tensor in tensors.items():
        stored = index.tensors[name]
        if (stored.dtype, stored.size) != (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)):
            raise UserError(
                f"{where}: {name} is {stored.dtype} {list(stored.size)} in the checkpoint and "
                f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} in this run; continue with the code and config that "
                "wrote it, or take another run folder"
            )


def _some(tensor_names: list[str]) -> str:
    if not tensor_names:
        return "no tensor"
    more = f" and {len(tensor_names) - 3} more" if len(tensor_names) > 3 else ""
    return ", ".join(tensor_names[:3]) + more


@contextlib.contextmanager
def dcp_errors(ranks: Ranks) -> Iterator[None]:
    """DCP's own exception is a BaseException that holds one error a rank: raise the same ordinary one on all."""
    with contextlib.ExitStack() as stack:
        if not ranks.distributed:  # warnings' filters are not this thread's alone: elsewhere they stay untouched
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as e:
            own = e.failures.get(ranks.rank)
            if own and not isinstance(own[0], Exception):  # an interrupt, which DCP has caught as well
                raise own[0] from None
            raise error_of_ranks({rank: error for rank, (error, _trace) in e.failures.items()}) from e
