"""Check a stage's output: every file that a receipt names, its size and hash, and that receipts agree with one another."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

from data.ahead import in_order
from data.stages.receipts import (
    GIVEN_UP,
    MENDING,
    NOT_DONE,
    READERS,
    epoch_of,
    is_file_of,
    items_name,
    part_name,
    pass_folder,
    sum_counts,
)
from data.stages.store import SUMMARY, Json, StageStore, read_stage
from data.storage import CHUNK_BYTES, DamagedFile, StorageError
from trainer.errors import UserError, one_line

FILE_DEADLINE_S = 60.0
"""For one file, all attempts together; longer where its size needs it, see `data.storage.deadline_for`."""
MAX_UNREAD = 100
"""Files that storage does not give: then it is storage that is to be mended first."""


class Damage(NamedTuple):
    """An item that is not what it should be."""

    pass_name: str
    item: str
    part: int | None = None
    """That is damaged; None: the item's own receipt alone."""
    file: str | None = None
    """Of the part, as its receipt names it."""


class _Bad(NamedTuple):
    why: str
    unread: bool = False
    """Storage does not give it, so nobody knows whether it is damaged."""


@dataclass
class StageReport:
    stage: str
    finished: bool
    epoch: str | None = None
    """Of the stage when verifying began, see `data.stages.receipts.EPOCH`."""
    num_files: int = 0
    num_bytes: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By pass."""
    failures: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    """What `data.mend_stage` can mend of the failures."""
    lasting: list[str] = field(default_factory=list)
    """Of the failures, those that it cannot."""
    bad_summary: bool = False
    """It does not fit the receipts, or is damaged; mended by writing it again."""
    unread: int = 0
    """Files and receipts that storage did not give; they are in `lasting`, too."""
    stopped: bool = False
    """Too many of those: the rest was not looked at."""

    def fail(self, why: str, damage: Damage | None = None) -> None:
        self.failures.append(why)
        if damage:
            self.damaged.append(damage)

    def fail_for_good(self, why: str) -> None:
        self.failures.append(why)
        self.lasting.append(why)

    def found(self, bad: _Bad, damage: Damage | None) -> None:
        if not bad.unread:
            self.fail(bad.why, damage)
            return
        self.fail_for_good(bad.why)
        self.unread += 1


def verify_stage(url: str, *, threads: int = 4, progress: Callable[[int], None] = lambda files: None) -> StageReport:
    """Read every file of a stage's output. What is missing, or of another size, hash or form, is damaged; what storage does not
    give is told, and is neither damaged nor whole.

    Raises:
        UserError: no stage's output.
        StorageError: storage lists nothing.
    """
    store = StageStore(url)
    stage = read_stage(store)
    report = StageReport(str(stage["stage"]), store.exists(SUMMARY), epoch_of(store))
    if store.exists(MENDING):
        report.fail(
            f"{store.url}/{MENDING}: taking out what is damaged was stopped in the midst; go on with --quarantine"
        )
    for name in stage["passes"]:
        counts: Counter[str] = Counter()
        for (damage, file), future in in_order(
            lambda job: _check(store, *job), _files(store, name, counts, report), threads=threads, ahead=2 * threads
        ):
            report.num_files += 1
            if problem := future.result():
                report.found(problem, damage)
            else:
                report.num_bytes += int(file["bytes"])
            progress(report.num_files)
            if report.unread >= MAX_UNREAD:
                break
        report.counts[name] = dict(counts)
        if report.unread >= MAX_UNREAD:
            report.stopped = True
            report.fail_for_good(
                f"{store.url}: {report.unread} files could not be read, so the rest was not looked at; mend the access to "
                "the storage, then verify again"
            )
            return report
    if report.finished:
        _check_summary(store, report)
    return report


def _check_summary(store: StageStore, report: StageReport) -> None:
    summary = _receipt(store, SUMMARY)
    if isinstance(summary, _Bad):
        report.bad_summary = not summary.unread
        report.found(summary, None)
        return
    try:
        told = dict(summary["counts"])
    except (KeyError, TypeError, ValueError) as e:
        report.bad_summary = True
        report.fail(f"{store.url}/{SUMMARY}: is damaged ({e})")
        return
    if report.unread:  # counts that are not all of them
        return
    for name, counts in report.counts.items():
        if told.get(name, counts) != counts:
            report.bad_summary = True
            report.fail(f"{store.url}/{SUMMARY}: counts of {name} are not the sum of the receipts'")


def _files(store: StageStore, name: str, total: Counter[str], report: StageReport) -> Iterator[tuple[Damage, Json]]:
    """Every file of a pass, and what is damaged if it is."""
    folder = pass_folder(name)
    done = [file.removesuffix(".json") for file in store.names(f"{folder}/done")]
    begun = set(store.names(f"{folder}/parts")) - set(done)
    items = _items(store, name, report)
    if report.finished and items is not None:
        for item in sorted(items - set(done)):
            report.fail(f"{store.url}: {name} {item}: has no receipt", Damage(name, item))
    for item in sorted(set(done) - items) if items is not None else ():
        report.fail(
            f"{store.url}: {name} {item}: has a receipt, and is none of the pass's items", Damage(name, item, 0)
        )
    reads = in_order(
        lambda item: _receipt(store, f"{folder}/done/{item}.json"), done, threads=READERS, ahead=4 * READERS
    )
    for item, future in reads:
        receipt = future.result()
        if not isinstance(receipt, _Bad) and not _is_whole(receipt, item):
            receipt = _Bad(f"{store.url}/{folder}/done/{item}.json: is no receipt of it")
        if isinstance(receipt, _Bad):
            report.found(receipt, Damage(name, item))
            begun.add(item)
            continue
        total.update(receipt["counts"])
        _check_receipt(store, name, receipt, report)
        for number, part in enumerate(receipt["parts"]):
            yield from ((Damage(name, item, number, str(file["name"])), file) for file in part["files"].values())
    for item in sorted(begun):  # what their next worker goes on from
        for number, file in enumerate(store.names(f"{folder}/parts/{item}")):
            part = _receipt(store, part_name(name, item, number))
            if not isinstance(part, _Bad) and not _is_part(part):
                part = _Bad(f"{store.url}/{folder}/parts/{item}/{file}: is no receipt of a part")
            if isinstance(part, _Bad):
                report.found(part, Damage(name, item, number))
                break
            yield from ((Damage(name, item, number, str(f["name"])), f) for f in part["files"].values())


def _items(store: StageStore, name: str, report: StageReport) -> set[str] | None:
    """Names of what the pass has to do; None: they are not known."""
    if not report.finished and not store.exists(items_name(name)):
        return None
    items = _receipt(store, items_name(name))
    if isinstance(items, _Bad) and items.unread:
        report.found(items, None)
        return None
    if isinstance(items, list):
        with suppress(KeyError, TypeError):
            return {str(item["name"]) for item in items}
    why = items.why if isinstance(items, _Bad) else f"{store.url}/{items_name(name)}: is damaged"
    report.fail_for_good(f"{why}; run the stage anew, into another folder")
    return None


def _check_receipt(store: StageStore, name: str, receipt: Json, report: StageReport) -> None:
    parts, item = receipt["parts"], receipt["item"]
    if [part["part"] for part in parts] != list(range(len(parts))):
        report.fail(f"{store.url}: {name} {item}: its parts are not 0 to {len(parts) - 1}", Damage(name, item))
    counts = sum_counts(part["counts"] for part in parts)
    if receipt.get("given_up") is not None:
        counts[GIVEN_UP] += 1
        counts.update({name: number for name, number in receipt["counts"].items() if name.startswith(NOT_DONE)})
    if dict(counts) != receipt["counts"]:
        report.fail(f"{store.url}: {name} {item}: its counts are not the sum of its parts'", Damage(name, item))


def _receipt(store: StageStore, name: str) -> Json:
    """What stands there, or what is wrong with it."""
    try:
        return store.read_json(name)
    except FileNotFoundError:
        return _Bad(f"{store.url}/{name}: is missing")
    except DamagedFile as e:
        return _Bad(str(e))
    except (UserError, StorageError) as e:
        return _Bad(one_line(e), unread=True)


def _is_whole(receipt: Json, item: str) -> bool:
    return (
        isinstance(receipt, dict)
        and receipt.get("item") == item
        and _are_counts(receipt.get("counts"))
        and isinstance(receipt.get("parts"), list)
        and all(map(_is_part, receipt["parts"]))
    )


def _is_part(part: Json) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("part"), int)
        and _are_counts(part.get("counts"))
        and isinstance(part.get("files"), dict)
        and all(map(_is_file, part["files"].values()))
    )


def _is_file(file: Json) -> bool:
    types = {"name": str, "bytes": int, "xxh64": str}
    return isinstance(file, dict) and all(isinstance(file.get(name), kind) for name, kind in types.items())


def _are_counts(tree: Json) -> bool:
    return isinstance(tree, dict) and all(isinstance(number, int) for number in tree.values())


def _check(store: StageStore, damage: Damage, file: Json) -> _Bad | None:
    """What is wrong with a file; None: nothing."""
    name = file["name"]
    if not is_file_of(name, damage.pass_name, damage.item):
        return _Bad(f"{store.url}/{name}: is no name of a file of {damage.item}; its receipt is not to be trusted")

    def hashed() -> tuple[int, str]:
        hasher, num_bytes = xxhash.xxh64(), 0
        with store.fs.open(store.path(name), "rb") as opened:
            while num_bytes <= file["bytes"] and (chunk := opened.read(CHUNK_BYTES)):
                hasher.update(chunk)
                num_bytes += len(chunk)
        return num_bytes, hasher.hexdigest()

    try:
        num_bytes, digest = store.ask(hashed, name, FILE_DEADLINE_S, "read", file["bytes"])
    except FileNotFoundError:
        return _Bad(f"{store.url}/{name}: is missing, though a receipt names it")
    except (UserError, StorageError) as e:
        return _Bad(one_line(e), unread=True)
    if num_bytes > file["bytes"]:
        return _Bad(f"{store.url}/{name}: is larger than its receipt says, {file['bytes']} bytes")
    if num_bytes < file["bytes"]:
        return _Bad(f"{store.url}/{name}: has {num_bytes} bytes, its receipt says {file['bytes']}")
    if digest != file["xxh64"]:
        return _Bad(f"{store.url}/{name}: its hash is not the receipt's, the file is damaged")
    return None
