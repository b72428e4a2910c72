"""The stage runner: map over items, each done by whoever takes it first, and published exactly once.

A stage is a row of passes, and a pass a map over items: an item in, files and a receipt out. What needs all of them at once,
such as finding duplicates, is a pass of one item. Workers are as many processes as one likes, anywhere; they meet in the
stage's folder alone (data.stages.store), take items by leases that expire (data.stages.leases), and come and go at any time.

An item's work is published in parts of at most 1,000 samples. Whoever goes on with an item of a worker that died begins behind
its last part. Computed is at least once, published exactly once: a part's receipt is made by create-if-absent, and files that
no receipt names are no output.
"""

import logging
import os
import random
import secrets
import socket
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from data.stages import failures, leases
from data.stages.once import OnceReadStore
from data.stages.pinned import BeginAgain, check_all_done, pinned_items
from data.stages.receipts import (
    check_mending,
    done_receipts,
    epoch_of,
    hash_file,
    items_name,
    part_name,
    part_receipts,
    pass_folder,
    sum_counts,
)
from data.stages.store import SUMMARY, Json, StageStore, claim, item_names
from trainer.errors import UserError, one_line

PART_SAMPLES = 1000
"""Most samples of a part: what a worker that is killed can lose."""
ATTEMPTS = 3
"""At an item that fails."""
LEASE_S = 120.0
LISTING_S = 10.0
"""How old a listing of what is done may grow while there is work; and ten times what it takes, where it takes long."""
FINISH = "work/finish/leases"
"""Of what one worker does for all: list a pass's items, and finish."""


@dataclass(frozen=True)
class Part:
    """What a stage has made of some samples of an item."""

    files: Mapping[str, Path]
    """By role, such as `tar` and `index`; temporary ones, which the runner moves to where they stay."""
    counts: Mapping[str, int]
    """Samples: `read`, `kept`, and others by reason, such as `rejected/undecodable`; anything else that adds up."""
    cursor: Json = None
    """Where in the item the next part begins."""
    note: Json = None
    """More for the receipt, small: what a later pass or the summary wants without opening files."""


class Stopped(BaseException):
    """The worker was asked to stop, or has lost its lease. No `Exception`, so that what tries again at any of those ends."""


@dataclass
class Work:
    """An item in a worker's hands."""

    store: StageStore
    item: Json
    """As the pass listed it; `item["name"]` is unique."""
    cursor: Json
    """Of the last part that is published; None: there is none."""
    part: int
    """Number of the part to make next."""
    scratch: Path
    """An empty folder of this attempt."""
    stop: Callable[[], bool] = lambda: False
    samples: int = 0

    def advance(self, samples: int = 1) -> None:
        """Say that samples are done; call it often.

        Raises:
            Stopped: leave everything and go: what is not yielded is not published.
        """
        self.samples += samples
        if self.stop():
            raise Stopped


@dataclass(frozen=True)
class Pass:
    """A map over items."""

    name: str
    items: Callable[[StageStore], Sequence[Json]]
    """What there is to do, once all passes before are done: objects with a `name` fit for a file. Asked once, and kept."""
    parts: Callable[[Work], Iterator[Part]]
    """From `work.cursor` to the item's end. A cursor at the end yields nothing more."""
    spares: bool = False
    """Whether what follows can do without an item that fails for good."""
    left: Callable[[Json, Sequence[Json]], Mapping[str, int]] = lambda item, receipts: {}
    """Of such an item and its parts' receipts: what is not done of it and known, such as `samples`."""


class Stage(ABC):
    """What `run` runs. Must pickle: workers are processes."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when equal settings would give other outputs."""

    @abstractmethod
    def settings(self) -> dict[str, Json]:
        """All that decides the output: compared with what a folder was begun with. No secrets."""

    @abstractmethod
    def passes(self) -> Sequence[Pass]: ...

    def open(self) -> None:  # noqa: B027  # most have nothing to open
        """Called once in each worker before its first item: load models here."""

    def finish(self, store: StageStore) -> dict[str, Json]:
        """When all is done, by one worker, or by another where that died: write what the whole needs; what is returned goes
        into the summary. `store` reads each receipt once."""
        return {}


@dataclass
class Worker:
    """One process's loop.

    Args:
        stop: set to stop soon; what was not published is left to others.
        attempts: at an item that fails, by all workers together.
    """

    stage: Stage
    store: StageStore
    lease_s: float = LEASE_S
    attempts: int = ATTEMPTS
    stop: threading.Event = field(default_factory=threading.Event)
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}")
    _opened: bool = False
    _epoch: str | None = None
    """Of the stage when this worker began to look at it."""

    def run(self) -> list[str]:
        """Work until the stage is done, or nothing is left but what failed; returns lines about that.

        Raises:
            Stopped: asked to.
            UserError: the folder is of another stage or settings.
            StorageError: storage fails.
        """
        passes = [one_pass.name for one_pass in self.stage.passes()]
        while True:
            # Each time: a build may have been begun anew there with other settings.
            claim(self.store, self.stage.name, self.stage.version, self.stage.settings(), passes)
            check_mending(self.store)
            self._epoch = epoch_of(self.store)
            try:
                return self._run_all()
            except BeginAgain as e:
                logging.warning("%s: %s, so this worker looks at it anew", self.store.url, e)
                self._wait()

    def _run_all(self) -> list[str]:
        if self.store.exists(SUMMARY):
            return []
        for one_pass in self.stage.passes():
            if failed := self._run_pass(one_pass):
                return failed
        self._finish()
        return []

    def _check_current(self) -> None:
        """Under a lease, which mending looks for once it has said that it begins.

        Raises:
            UserError: the stage is being mended.
            BeginAgain: it has been, since this worker listed what is done.
        """
        check_mending(self.store)
        self._check_epoch()

    def _check_epoch(self) -> None:
        if epoch_of(self.store) != self._epoch:
            raise BeginAgain("damage was taken out meanwhile")

    # ------------------------------------------------------------------------------------------------------------ pass

    def _run_pass(self, one_pass: Pass) -> list[str]:
        items = self._pinned(one_pass)
        folder = pass_folder(one_pass.name)
        by_name = {item["name"]: item for item in items}
        order = list(by_name)
        random.Random(self.name).shuffle(order)  # else all workers would try for the same items
        failed: dict[str, str] = {}
        while True:
            began = time.monotonic()
            done = {name.removesuffix(".json") for name in self.store.names(f"{folder}/done")}
            failures_of = failures.listed(self.store, folder)
            held = leases.held(self.store.names(f"{folder}/leases"))
            listed = time.monotonic()
            listing_s = listed - began
            worked = False
            for name in order:
                if name in done or name in failed:
                    continue
                self._check_stop()
                if len(failures_of.get(name, [])) >= self.attempts:
                    failed[name] = failures.reason(self.store, folder, failures_of[name][-1])
                    continue
                worked |= self._try(one_pass, by_name[name], held.get(name))
                if worked and time.monotonic() - listed > max(LISTING_S, 10 * listing_s):
                    break
            if all(name in done or name in failed for name in order):
                break
            if not worked:
                self._wait(listing_s)
        return [f"{one_pass.name} {name}: {why}" for name, why in sorted(failed.items()) if name not in done]

    def _pinned(self, one_pass: Pass) -> list[Json]:
        """Its items; listed under a lease, since they follow from what is done before, which must not be mended meanwhile."""
        name = items_name(one_pass.name)

        def make(_: leases.Lease) -> None:
            pinned_items(self.store, one_pass, check=self._check_epoch)

        self._alone(
            f"items-{one_pass.name}", lambda: self.store.exists(name), make, f"listed what {one_pass.name} has to do"
        )
        return pinned_items(self.store, one_pass, check=self._check_epoch)

    def _wait(self, listing_s: float = 0.0) -> None:
        """For others; longer where it takes long to see how far they are."""
        self.stop.wait(max(min(self.lease_s / 4, 2.0), 10 * listing_s))
        self._check_stop()

    def _try(self, one_pass: Pass, item: Json, generation: int | None) -> bool:
        """Take an item and do it; False if somebody else has it."""
        folder, name = pass_folder(one_pass.name), item["name"]
        attempt = secrets.token_hex(6)
        if not self._opened:  # before a lease: a machine that lacks what the stage needs must not fail its items
            self.stage.open()
            self._opened = True
        lease = leases.take(
            self.store, f"{folder}/leases", name, generation, worker=self.name, attempt=attempt, seconds=self.lease_s,
            parts=lambda: len(self.store.names(f"{folder}/parts/{name}")),
        )  # fmt: skip
        if lease is None:
            return False
        with lease:
            self._check_current()
            if self.store.exists(f"{folder}/done/{name}.json"):  # between the listing and the lease
                return True
            if lease.deaths >= leases.MAX_DEATHS:
                why = f"{lease.deaths} workers died at it one after another; look at their logs"
                failures.record(self.store, folder, name, attempt, self.name, why, times=self.attempts)
                return True
            try:
                self._do(one_pass, item, lease)
            except Stopped:
                self._check_stop()
            except BeginAgain:
                raise
            except Exception as e:  # of whatever kind: others go on, and it is told in the end
                times = self.attempts if failures.is_final(e) else 1
                failures.record(
                    self.store, folder, name, attempt, self.name, one_line(e), trace=traceback.format_exc(), times=times
                )
        return True

    def _do(self, one_pass: Pass, item: Json, lease: leases.Lease) -> None:
        folder, name = pass_folder(one_pass.name), item["name"]
        receipts = part_receipts(self.store, one_pass.name, name)
        with tempfile.TemporaryDirectory(prefix=f"loupe-{self.stage.name}-") as scratch:
            work = Work(
                self.store, item, receipts[-1]["cursor"] if receipts else None, len(receipts), Path(scratch),
                stop=lambda: self.stop.is_set() or lease.lost.is_set(),
            )  # fmt: skip
            lease.samples = lambda: work.samples
            began = time.monotonic()
            for part in one_pass.parts(work):
                work.advance(0)
                receipts.append(self._publish(one_pass, name, work.part, part, lease, time.monotonic() - began))
                work.part, work.cursor, began = len(receipts), part.cursor, time.monotonic()
        whole = {
            "item": name, "counts": dict(sum_counts(r["counts"] for r in receipts)), "parts": receipts,
            "attempt": lease.attempt, "worker": self.name, "time": time.time(),
        }  # fmt: skip
        # A worker that slept through its lease may have slept through mending, too.
        self._check_epoch()
        self.store.create_json(f"{folder}/done/{name}.json", whole)
        self._sweep(f"files/{one_pass.name}/{name}", receipts)

    def _sweep(self, folder: str, receipts: Sequence[Json]) -> None:
        """Delete what attempts left that died between a file and its receipt. One that still lives publishes no receipt now."""
        named = {file["name"] for receipt in receipts for file in receipt["files"].values()}
        for file in self.store.names(folder):
            if f"{folder}/{file}" not in named:
                self.store.delete(f"{folder}/{file}")

    def _publish(self, one_pass: Pass, item: str, number: int, part: Part, lease: leases.Lease, seconds: float) -> Json:
        """Files first, then the receipt that makes them part of the output.

        Raises:
            Stopped: another attempt has published this part.
        """
        stored: dict[str, Json] = {}
        for role, file in part.files.items():
            name = f"files/{one_pass.name}/{item}/{number:06d}-{role}-{lease.attempt}{''.join(file.suffixes)}"
            stored[role] = {"name": name, "bytes": file.stat().st_size, "xxh64": hash_file(file)}
            self.store.put_new(file, name)
            file.unlink()
        receipt = {
            "item": item, "part": number, "files": stored, "counts": dict(part.counts), "cursor": part.cursor,
            "note": part.note, "attempt": lease.attempt, "worker": self.name, "seconds": round(seconds, 3), "time": time.time(),
        }  # fmt: skip
        if not self.store.create_json(part_name(one_pass.name, item, number), receipt):
            for entry in stored.values():
                self.store.delete(entry["name"])
            raise Stopped
        return receipt

    # ------------------------------------------------------------------------------------------------------------- end

    def _alone(self, what: str, done: Callable[[], bool], do: Callable[[leases.Lease], None], while_they: str) -> None:
        """What one worker does for all; the others wait until it is done, and take over where it dies."""
        pause_s = 0.1
        while not done():
            lease = leases.take(
                self.store, FINISH, what, leases.held(self.store.names(FINISH)).get(what), worker=self.name,
                attempt=secrets.token_hex(6), seconds=self.lease_s, parts=lambda: 0,
            )  # fmt: skip
            if lease is None:
                self.stop.wait(pause_s)
                self._check_stop()
                pause_s = min(2 * pause_s, self.lease_s / 4, 2.0)
                continue
            with lease:
                self._check_current()
                if lease.deaths >= leases.MAX_DEATHS:
                    raise UserError(
                        f"{self.store.url}: {lease.deaths} workers died one after another while they {while_they}; "
                        "look at their logs, then run again"
                    )
                do(lease)

    def _finish(self) -> None:
        def finish(lease: leases.Lease) -> None:
            if not self.store.exists(SUMMARY):  # between the look and the lease
                self._summarize(lease)

        self._alone("finish", lambda: self.store.exists(SUMMARY), finish, "finished the stage")

    def _summarize(self, lease: leases.Lease) -> None:
        counts: dict[str, Json] = {}
        given_up: dict[str, Json] = {}
        with OnceReadStore(self.store.url) as store:
            for one_pass in self.stage.passes():
                total: Counter[str] = Counter()
                names = item_names(pinned_items(store, one_pass))
                check_all_done(store, one_pass.name, names)
                for receipt in done_receipts(store, one_pass.name):
                    total.update(receipt["counts"])
                    if (why := receipt.get("given_up")) is not None:
                        given_up.setdefault(one_pass.name, {})[receipt["item"]] = why
                    self._check_stop()
                counts[one_pass.name] = dict(total)
            more = self.stage.finish(store)
        if lease.lost.is_set():  # another is at it
            return
        self._check_current()
        about = {"given_up": given_up} if given_up else {}
        self.store.create_json(
            SUMMARY, {"stage": self.stage.name, "counts": counts, "time": time.time(), **about, **more}
        )

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped
