"""How the watchdogs of a job's ranks hear each other: over the store of the job's rendezvous, by connections of their own,
since torch's own may be held by what hangs."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from trainer.background import Background
from trainer.errors import one_line

_POLL_S = 2.0
_POLLS_PER_S = 500
"""What the store is asked at most by all ranks together."""
_ANSWER_S = 6.0
"""How long the other ranks' answers are waited for, beside the time in which they look for a call."""
_CONNECT_S = 10.0
_ANSWER_POLL_S = 0.25
_HEAD_START_S = 1.0
_CALL, _ANSWER, _COUNT = "call", "answer", "count"


class Peers:
    """The watchdogs of the other ranks."""

    def __init__(self, rank: int, size: int, attempt: int, on_call: Callable[[str], None]) -> None:
        """`on_call`: given, in words, who calls and why; in a thread of this object, once."""
        self._rank, self._size, self._attempt, self._on_call = rank, size, attempt, on_call
        self._poll_s = max(_POLL_S, size / _POLLS_PER_S)
        self._store: dist.Store | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="watchdog's peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_POLL_S)

    def call(self, what: str) -> list[int] | None:
        """Call all ranks, and wait for their answers, but not for long; the ranks that have not answered. None where the
        store, which lives with rank 0 or torchrun's agent, does not answer itself, or has gone."""
        self._closed.set()
        answers_s = _ANSWER_S + self._poll_s
        asking: Background[list[int]] = Background("watchdog's call")
        asking.start(lambda: self._ask(what, answers_s))
        asking.wait(answers_s + _POLL_S)
        if asking.running:
            return None
        try:
            return asking.collect()
        except Exception as e:  # rank 0 may have ended by now; the end must come all the same
            print(f"watchdog: the ranks' store: {one_line(e)}", flush=True)
            return None

    def let_others_go_first(self) -> None:
        """The store must be there until all have heard who answered."""
        if self._rank == 0:
            time.sleep(_HEAD_START_S)

    def _connect(self) -> dist.Store:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_CONNECT_S),
        )
        # torchrun's store outlives its workers: what one start has said is not for the next
        return dist.PrefixStore(f"loupe/watchdog/{self._attempt}", store)

    def _listen(self) -> None:
        try:
            store = self._store = self._connect()
            while not self._closed.wait(self._poll_s):
                if store.check([_CALL]):
                    self._on_call(store.get(_CALL).decode())
                    return
        except Exception as e:  # without the others each watchdog still has its own limit
            if not self._closed.is_set():
                print(f"watchdog: the other ranks cannot be heard: {one_line(e)}", flush=True)

    def _ask(self, what: str, seconds: float) -> list[int]:
        store = self._store or self._connect()
        store.set(f"{_ANSWER}/{self._rank}", what)
        if not store.check([_CALL]):
            store.set(_CALL, what)
        answered = store.add(_COUNT, 1)
        end = time.monotonic() + seconds
        while answered < self._size and time.monotonic() < end:
            time.sleep(_ANSWER_POLL_S)
            answered = store.add(_COUNT, 0)
        if answered >= self._size:
            return []
        return [rank for rank in range(self._size) if not store.check([f"{_ANSWER}/{rank}"])]
