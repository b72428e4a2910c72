"""Which runs below some roots are being trained now, by what their folders say, and where their ranks answer. No torch.

Object storage charges for each look, so a run that has ended is looked at less often than one that lives or is about to.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from launch.runs.find import folders_in
from launch.runs.read import ended, in_parallel, read_errors, read_record, restarts_of, seconds
from trainer.discovery import TARGETS, Targets, public, targets_of
from trainer.errors import UserError, one_line
from trainer.run_folder import JOB, SUMMARY, RunFolder, modified

FRESH_S = 3600.0
"""Without a sign of life for so long a run has none: more than a watchdog lets pass between two steps."""
WAITS_S = 86400.0
"""In a queue, or between two starts; after that it is looked at as one that has ended."""
ENDED_EVERY = 10
"""Looks, of which one is also for runs that had ended."""


class Away(Enum):
    """Why a run has no ranks that answer."""

    WAITS = "it is queued, starts, or is between two starts"
    ENDED = "it has ended, or gives no sign of life"


def live_targets(folder: RunFolder, *, fresh_s: float = FRESH_S) -> Targets | Away:
    """Of the start that is at work in a run folder, or why there is none.

    Raises:
        what `read_errors` has: storage fails, or a record is damaged.
    """
    names = set(folder.names(""))
    job = read_record(folder, JOB) if JOB in names else {}
    if SUMMARY in names or ended(job):
        return Away.ENDED
    later = max((seconds(entry.get("time")) or 0.0 for entry in restarts_of(job)), default=0.0)
    submitted = max(seconds(job.get("submitted_at")) or 0.0, later)
    if TARGETS not in names:
        return _waiting(submitted)
    record = read_record(folder, TARGETS)
    targets = targets_of(record, run=folder.url.rpartition("/")[2], folder=public(folder.url))
    if record.get("ended") or later > targets.time > 0:
        return _waiting(max(submitted, targets.time, seconds(record.get("ended")) or 0.0))
    return targets if time.time() - _last_sign(folder, targets) < fresh_s else Away.ENDED


def _waiting(since: float) -> Away:
    return Away.WAITS if time.time() - since < WAITS_S else Away.ENDED


def _last_sign(folder: RunFolder, targets: Targets) -> float:
    """Unix time of the last thing that the start has written: its targets, or a record of its metrics."""
    name = f"metrics/{targets.start:04d}.jsonl"
    try:
        return max(targets.time, modified(folder.fs, folder.path(name)) or 0.0)
    except FileNotFoundError:
        return targets.time


@dataclass(frozen=True)
class Found:
    runs: tuple[Targets, ...]
    folders: int
    """That were looked through, runs or not."""
    skipped: tuple[str, ...]
    """A line for each run that could not be read."""
    time: float

    def groups(self) -> list[dict[str, object]]:
        return [group for targets in self.runs for group in targets.groups()]


@dataclass
class LiveRuns:
    """Looks again and again."""

    roots: Sequence[str]
    fresh_s: float = FRESH_S
    depth: int = 2
    _looks: int = 0
    _ended: set[str] = field(default_factory=set)
    _live: dict[str, Targets] = field(default_factory=dict)
    """By folder, of the last look."""

    def look(self) -> Found:
        """
        Raises:
            UserError: a root cannot be listed.
        """
        again = self._looks % ENDED_EVERY == 0
        self._looks += 1
        folders, skipped = [], []
        for root in self.roots:
            found, more = folders_in(root, depth=self.depth)
            folders += found
            skipped += [more] if more else []
        asked = [folder for folder in folders if again or folder.url not in self._ended]
        results = in_parallel([partial(self._ask, folder) for folder in asked])
        live: dict[str, Targets] = {}
        for folder, result in zip(asked, results, strict=True):
            if isinstance(result, Targets):
                live[folder.url] = result
                self._ended.discard(folder.url)
            elif isinstance(result, Away):
                (self._ended.add if result is Away.ENDED else self._ended.discard)(folder.url)
            else:
                skipped.append(f"{public(folder.url)}: {result or 'not read in time'}")
                if before := self._live.get(folder.url):  # what cannot be read for a moment need not have ended
                    live[folder.url] = before
        self._live = live
        return Found(tuple(live.values()), len(folders), tuple(skipped), time.time())

    def _ask(self, folder: RunFolder) -> Targets | Away | str:
        try:
            return live_targets(folder, fresh_s=self.fresh_s)
        except read_errors() as e:
            return one_line(e) if isinstance(e, UserError) else f"{type(e).__name__}: {one_line(e)}"
