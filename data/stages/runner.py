"""The stage runner: map over items, each done by whoever takes it first, and published exactly once.

A stage is a row of passes, and a pass a map over items: an item in, files and a receipt out. What needs all of them at once,
such as finding duplicates, is a pass of one item. Workers are as many processes as one likes, anywhere; they meet in the
stage's folder alone (data.stages.store), take items by leases that expire (data.stages.leases), and come and go at any time.

An item's work is published in parts of at most 1,000 samples. Whoever goes on with an item of a worker that died begins behind
its last part. Computed is at least once, published exactly once: a part's receipt is made by create-if-absent, and files that
no receipt names are no output.
"""

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

import xxhash

from data.ahead import in_order
from data.stages import leases
from data.stages.store import SUMMARY, Json, StageStore, claim, item_names
from data.storage import CHUNK_BYTES
from trainer.errors import UserError, one_line

PART_SAMPLES = 1000
"""Most samples of a part: what a worker that is killed can lose."""
ATTEMPTS = 3
"""At an item that fails."""
LEASE_S = 120.0
READERS = 8
"""Receipts that are asked for at a time."""
LISTING_S = 10.0
"""How old a listing of what is done may grow while there is work."""


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


class Stopped(Exception):
    """The worker was asked to stop, or has lost its lease."""


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
        """When all is done, by one worker or more: write what the whole needs; what is returned goes into the summary."""
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

    def run(self) -> list[str]:
        """Work until the stage is done, or nothing is left but what failed; returns lines about that.

        Raises:
            Stopped: asked to.
            UserError: the folder is of another stage or settings.
            StorageError: storage fails.
        """
        passes = [one_pass.name for one_pass in self.stage.passes()]
        claim(self.store, self.stage.name, self.stage.version, self.stage.settings(), passes)
        if self.store.exists(SUMMARY):
            return []
        for one_pass in self.stage.passes():
            if failures := self._run_pass(one_pass):
                return failures
        self._finish()
        return []

    # ------------------------------------------------------------------------------------------------------------ pass

    def _run_pass(self, one_pass: Pass) -> list[str]:
        items = pinned_items(self.store, one_pass)
        folder = pass_folder(one_pass.name)
        todo = {item["name"]: item for item in items}
        order = list(todo)
        random.Random(self.name).shuffle(order)  # else all workers would try for the same items
        failed: dict[str, str] = {}
        while todo:
            for name in self.store.names(f"{folder}/done"):
                todo.pop(name.removesuffix(".json"), None)
            failures = self._failures(folder)
            held = leases.held(self.store.names(f"{folder}/leases"))
            listed = time.monotonic()
            open_items = [name for name in order if name in todo and name not in failed]
            worked = False
            for name in open_items:
                self._check_stop()
                if len(failures.get(name, [])) >= self.attempts:
                    failed[name] = self._why(folder, failures[name][-1])
                    continue
                worked |= self._try(one_pass, todo[name], held.get(name))
                if worked and time.monotonic() - listed > LISTING_S:
                    break
            if all(name in failed for name in todo):
                break
            if not worked:
                self.stop.wait(min(self.lease_s / 4, 2.0))
                self._check_stop()
        return [f"{one_pass.name} {name}: {why}" for name, why in sorted(failed.items()) if name in todo]

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
            if self.store.exists(f"{folder}/done/{name}.json"):  # between the listing and the lease
                return True
            if lease.deaths >= leases.MAX_DEATHS:
                why = f"{lease.deaths} workers died at it one after another; look at their logs"
                self._fail(folder, name, attempt, why, final=True)
                return True
            try:
                self._do(one_pass, item, lease)
            except Stopped:
                self._check_stop()
            except Exception as e:  # of whatever kind: others go on, and it is told in the end
                self._fail(
                    folder, name, attempt, one_line(e), final=isinstance(e, UserError), trace=traceback.format_exc()
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

    def _finish(self) -> None:
        counts = {
            p.name: dict(sum_counts(r["counts"] for r in done_receipts(self.store, p.name)))
            for p in self.stage.passes()
        }
        more = self.stage.finish(self.store)
        self.store.create_json(SUMMARY, {"stage": self.stage.name, "counts": counts, "time": time.time(), **more})

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _fail(self, folder: str, item: str, attempt: str, why: str, *, final: bool, trace: str = "") -> None:
        for n in range(self.attempts if final else 1):
            record = {
                "item": item,
                "attempt": attempt,
                "worker": self.name,
                "why": why,
                "trace": trace,
                "time": time.time(),
            }
            self.store.create_json(f"{folder}/failed/{item}.{attempt}{n}.json", record)

    def _failures(self, folder: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for file in self.store.names(f"{folder}/failed"):
            found.setdefault(file.removesuffix(".json").rpartition(".")[0], []).append(file)
        return found

    def _why(self, folder: str, file: str) -> str:
        try:
            return str(self.store.read_json(f"{folder}/failed/{file}")["why"])
        except FileNotFoundError:
            return "its failures were forgotten meanwhile; run again"


# ----------------------------------------------------------------------------------------------------------- the folder


def pass_folder(pass_name: str) -> str:
    return f"work/{pass_name}"


def part_name(pass_name: str, item: str, number: int) -> str:
    return f"{pass_folder(pass_name)}/parts/{item}/{number:06d}.json"


def pinned_items(store: StageStore, one_pass: Pass) -> list[Json]:
    """The items of a pass, the same for all workers at all times."""
    name = f"{pass_folder(one_pass.name)}/items.json"
    if not store.exists(name):
        items = list(one_pass.items(store))
        names = item_names(items)
        assert len(set(names)) == len(names), "items of one name"
        store.create_json(name, items)
    found = store.read_json(name)
    assert isinstance(found, list)
    return found


def part_receipts(store: StageStore, pass_name: str, item: str) -> list[Json]:
    """Of the parts that are published, in order."""
    names = store.names(f"{pass_folder(pass_name)}/parts/{item}")
    return [store.read_json(f"{pass_folder(pass_name)}/parts/{item}/{name}") for name in names]


def done_receipts(store: StageStore, pass_name: str) -> Iterator[Json]:
    """Of the items that are whole, in the order of their names; several are asked for at a time, as there are thousands."""
    folder = f"{pass_folder(pass_name)}/done"
    reads = in_order(
        lambda name: store.read_json(f"{folder}/{name}"), store.names(folder), threads=READERS, ahead=4 * READERS
    )
    for _, receipt in reads:
        yield receipt.result()


def retry_failed(store: StageStore, stage: Stage) -> int:
    """Forget why items failed, and which workers died at them, so that they are tried again; returns how many there were."""
    items = set()
    for one_pass in stage.passes():
        folder = f"{pass_folder(one_pass.name)}/failed"
        for file in store.names(folder):
            items.add((one_pass.name, file.removesuffix(".json").rpartition(".")[0]))
            store.delete(f"{folder}/{file}")
        folder = f"{pass_folder(one_pass.name)}/leases"
        for item, generation in leases.held(store.names(folder)).items():
            found = leases.holder(store, folder, item, generation)
            if found and found.deaths and found.deadline < time.time():
                for old in range(generation + 1):
                    store.delete(f"{folder}/{leases.lease_name(item, old)}")
    return len(items)


def sum_counts(counts: Iterator[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return total


def hash_file(path: Path) -> str:
    hasher = xxhash.xxh64()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
