"""Keeps a start's record of goodput in the run folder, and its metric, while the ranks train: a thread on rank 0. No torch."""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from trainer.errors import one_line
from trainer.goodput import Counters, Ledger, StartRecord, name_of, next_record
from trainer.run_folder import RunFolder

WRITE_S = 10.0
"""Between two writes: what a kill may take along."""
_END_S = 20.0
"""Longest that hung storage may hold up the end."""


class GoodputKeeper:
    """Use as a context manager around all that a start does; does nothing before `open`, so on other ranks nothing at all.

    Its thread, not the training thread, writes: storage may take long, and evaluations take longer than `WRITE_S`.
    """

    def __init__(self, ledger: Ledger, *, write_s: float = WRITE_S) -> None:
        self.ledger = ledger
        self._write_s = write_s
        self._folder: RunFolder | None = None
        self._record: StartRecord | None = None
        self._counters: Callable[[], Counters] | None = None
        self._tell: Callable[[dict[str, float]], None] = lambda totals: None
        self._wake = threading.Event()
        self._closing = self._refused = False
        self._thread = threading.Thread(target=self._run, name="goodput", daemon=True)

    def open(self, folder: RunFolder, start: int) -> Counters:
        """Go on from the records of earlier starts; returns the run's counters at their last word.

        Raises:
            OSError: storage does not give them, or does not take this start's.
        """
        self._folder, self._record = folder, next_record(folder, start, self.ledger)
        self._write(ended=False)
        self._thread.start()
        return self._record.counters

    def export(self, tell: Callable[[dict[str, float]], None], counters: Callable[[], Counters]) -> None:
        """From now on `tell` is given the run's seconds by state, every `WRITE_S` and at the end, and what `counters` says is
        recorded. Both are called in a thread."""
        self._tell, self._counters = tell, counters
        self._wake.set()

    def totals(self) -> dict[str, float]:
        """The run's seconds by state until now."""
        return self._now(ended=False).totals()

    def __enter__(self) -> "GoodputKeeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last word."""
        if self._folder is None:
            return
        self._closing = True
        self._wake.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            print(f"WARNING: storage did not take {name_of(self._now(ended=True).start)} in {_END_S:.0f} s", flush=True)

    def _now(self, *, ended: bool) -> StartRecord:
        assert self._record is not None
        seconds, state = self.ledger.now()
        counters = self._record.counters if self._counters is None else self._counters()
        return replace(
            self._record, seconds=seconds, state=state, step=self.ledger.reached, counters=counters, ended=ended
        )

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(self._write_s)
            self._wake.clear()
            closing = (
                self._closing
            )  # asked before the write: an end that comes during one has the next for its last word
            self._write(ended=closing)

    def _write(self, *, ended: bool) -> None:
        """No run ends for the want of this record: a refusal is said once, and the next try may go well."""
        assert self._folder is not None
        record = self._now(ended=ended)
        self._tell(record.totals())
        try:
            self._folder.write_json(name_of(record.start), record.to_json())
            self._refused = False
        except Exception as e:  # each storage client raises what it likes
            if not self._refused:
                print(f"WARNING: {name_of(record.start)} cannot be written ({one_line(e)}); trying again", flush=True)
            self._refused = True
