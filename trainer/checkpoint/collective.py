"""Work that all ranks agree about: an error on one is raised on every one, so no rank is left waiting."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.errors import UserError, one_line

T = TypeVar("T")

KINDS: tuple[type[Exception], ...] = (UserError, CheckpointError, CorruptCheckpoint)
"""Kinds that travel, the first that any rank met is raised. A rank that cannot reach storage outweighs one that read
damaged bytes: nothing is set aside while storage itself is in trouble."""


@dataclass(frozen=True)
class Failure:
    """An error as it travels: as words, because not every exception survives pickling."""

    kind: int
    message: str


class Ranks:
    """The ranks of a process group, or the one process where torch.distributed is not initialised."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world_size = dist.get_world_size(group) if self.distributed else 1

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Rank 0's result, on every rank."""
        outcome: list[T | Failure | None] = [None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [work()]
            except Exception as e:
                error, outcome = e, [_failure(e, 0)]
        if self.distributed:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], Failure):
            raise _error(outcome[0]) from error
        return outcome[0]  # type: ignore[return-value]

    def on_all(self, work: Callable[[], T]) -> T:
        """Each rank's own result."""
        result: T | None = None
        failure: Failure | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as e:
            error, failure = e, _failure(e, self.rank)
        failures: list[Failure | None] = [failure]
        if self.distributed:
            failures = [None] * self.world_size
            dist.all_gather_object(failures, failure, group=self.group)
        met = [f for f in failures if f]
        if met:
            raise _error(min(met, key=lambda f: f.kind)) from error
        return result  # type: ignore[return-value]


def error_of_ranks(errors: Mapping[int, BaseException]) -> Exception:
    """One error for those that `CheckpointException.failures` holds by rank; the same on every rank."""
    return _error(min((_failure(errors[rank], rank) for rank in sorted(errors)), key=lambda f: f.kind))


def _failure(error: BaseException, rank: int) -> Failure:
    for kind in reversed(range(len(KINDS))):
        if isinstance(error, KINDS[kind]):
            return Failure(kind, str(error))
    return Failure(KINDS.index(CheckpointError), f"rank {rank}: {type(error).__name__}: {one_line(error)}")


def _error(failure: Failure) -> Exception:
    return KINDS[failure.kind](failure.message)
