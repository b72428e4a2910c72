"""Shards brought to this machine before the plan needs them."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from data.batches import LeftOut, ShardKey
from data.cache import CacheFull
from data.plan import SampleRef
from data.reader import BadShard, Dataset, StorageError
from trainer.errors import UserError

_THREADS = 2
"""A process fetches so many shards at a time, each by a few connections."""
_LOOK_AHEAD_SAMPLES = 1 << 16
"""The plan is read no further ahead: more than a window of 64 shards of 64 MB."""
_IDLE_S = 1.0


class Request(Protocol):
    """What a step needs."""

    @property
    def refs(self) -> tuple[SampleRef, ...]: ...


@dataclass
class _Ahead:
    shard: ShardKey
    step: int
    """That needs it first."""


class Prefetcher:
    """Threads of one data worker that read the plan of its next steps and fetch the shards it names, in its order.

    A node's workers read much the same plan: a shard that another one is fetching is passed over, so they share the work.
    What cannot be fetched is left for the step that needs it to complain of.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        request: Callable[[int], Request],
        steps: Iterable[int],
        *,
        max_shards: int,
        left_out: Mapping[ShardKey, LeftOut] | None = None,
    ) -> None:
        """
        Args:
            request: for the threads alone; plans keep what they computed last, and are not safe to share.
            steps: in the order in which they will be asked for.
            max_shards: fetched ahead of the step that needs them first.
            left_out: shards that steps from theirs on do without.
        """
        self._left_out = dict(left_out or {})
        self._datasets, self._request, self._steps = datasets, request, iter(steps)
        self._max_shards = max_shards
        self._planning = threading.Lock()
        self._changed = threading.Condition()
        self._step = -1
        self._closed = False
        self._error: Exception | None = None
        self._queue: deque[_Ahead] = deque()
        """Read from the plan, and not fetched yet."""
        self._ahead: deque[_Ahead] = deque()
        """Fetched, or on their way, before their step."""
        self._last_step: dict[ShardKey, int] = {}
        """The last step that needs a shard, as far as the plan was read. Those whose last step has passed are forgotten."""
        self._read: deque[tuple[int, int]] = deque()
        """(step, samples) read from the plan and not come yet."""
        self._threads = [threading.Thread(target=self._run, name="prefetch", daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int) -> None:
        """The worker is at this step now."""
        with self._changed:
            if self._error:
                raise self._error
            self._step = step
            self._changed.notify_all()

    def close(self) -> None:
        """Threads end after the shard that they fetch; nobody waits for them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (due := self._next()) is not None:
                name, shard_index = due.shard
                try:
                    self._datasets[name].prepare(shard_index, wait=False)
                except CacheFull:  # room comes when the worker gets on
                    with self._changed:
                        if due in self._ahead:
                            self._ahead.remove(due)
                        self._queue.appendleft(due)
                        self._changed.wait(_IDLE_S)
                except (BadShard, StorageError, UserError):
                    continue  # counted, and met again by the step that needs it
        except Exception as e:  # a mistake of ours; raised in the worker
            with self._changed:
                self._error = e

    def _next(self) -> _Ahead | None:
        """The next shard to fetch; None at the end."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                self._forget_past()
                if self._queue and len(self._ahead) < self._max_shards:
                    due = self._queue.popleft()
                    self._ahead.append(due)
                    return due
                enough = len(self._queue) + len(self._ahead) >= self._max_shards
                enough = enough or sum(count for _, count in self._read) >= _LOOK_AHEAD_SAMPLES
                if enough:
                    self._changed.wait(_IDLE_S)
                    continue
            if not self._read_a_step():
                with self._changed:
                    if not self._queue:
                        return None
                    self._changed.wait(_IDLE_S)

    def _forget_past(self) -> None:
        while self._ahead and self._ahead[0].step <= self._step:
            self._ahead.popleft()
        while self._read and self._read[0][0] <= self._step:
            self._read.popleft()
        # needed again, it may have been evicted
        for name, shard_index in [shard for shard, last in self._last_step.items() if last < self._step]:
            del self._last_step[name, shard_index]
            self._datasets[name].release(shard_index)

    def _read_a_step(self) -> bool:
        """Of the plan; False at its end. Outside the lock, as it computes for a moment."""
        with self._planning:
            step = next(self._steps, None)
            if step is None:
                return False
            refs = self._request(step).refs
            located = ((ref.dataset, self._datasets[ref.dataset].locate(ref.index)[0]) for ref in refs)
            shards = [s for s in dict.fromkeys(located) if s not in self._left_out or step < self._left_out[s].since]
            with self._changed:
                self._read.append((step, len(refs)))
                for shard in shards:
                    if shard not in self._last_step:
                        self._queue.append(_Ahead(shard, step))
                    self._last_step[shard] = step
        return True
