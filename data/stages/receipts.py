"""The receipts of a stage: which items are whole, and which parts an item has."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import xxhash

from data.ahead import in_order
from data.stages.store import Json, StageStore
from data.storage import CHUNK_BYTES, DamagedFile
from trainer.errors import UserError

READERS = 8
"""Receipts that are asked for at a time."""
MENDING = "work/mending.json"
"""What is to be forgotten of a damaged stage (data.mend_stage). While it is there, nobody works."""
EPOCH = "work/epoch.json"
"""Drawn anew when something was forgotten, before `MENDING` goes: what was listed before is no longer so."""
GIVEN_UP = "items/given_up"
"""The count of items that were left out because they failed."""
NOT_DONE = "given_up/"
"""Begins the counts of what was not done of them, where that is known: shards, tars, samples."""


def pass_folder(pass_name: str) -> str:
    return f"work/{pass_name}"


def items_name(pass_name: str) -> str:
    return f"{pass_folder(pass_name)}/items.json"


def part_name(pass_name: str, item: str, number: int) -> str:
    return f"{pass_folder(pass_name)}/parts/{item}/{number:06d}.json"


def check_name(name: Json, where: str) -> str:
    """The name of a pass or an item, if it is one.

    Raises:
        UserError: it is not fit for a file, and might lead elsewhere.
    """
    if not isinstance(name, str) or not _is_plain(name):
        raise UserError(f"{where}: {name!r} is no name of a pass or an item; nothing there is to be trusted")
    return name


def file_name(name: Json, where: str) -> str:
    """The name of a stage's file as a receipt, or what was made of one, tells it, if it is one: files/PASS/ITEM/FILE.

    Raises:
        UserError: it might lead elsewhere, or name a folder.
    """
    if not is_file_name(name):
        raise UserError(f"{where}/{name}: is no name of a stage's file; the receipt that has it is not to be trusted")
    return str(name)


def is_file_name(name: Json) -> bool:
    parts = name.split("/") if isinstance(name, str) else []
    return len(parts) == 4 and parts[0] == "files" and all(map(_is_plain, parts))


def is_file_of(name: Json, pass_name: str, item: str) -> bool:
    """Whether it is the name of a file of this item's own, as `data.stages.runner` gives them."""
    return is_file_name(name) and str(name).startswith(f"files/{pass_name}/{item}/")


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name


def check_mending(store: StageStore) -> None:
    """
    Raises:
        UserError: what is damaged there is being forgotten, or that was stopped in the midst.
    """
    if store.exists(MENDING):
        raise UserError(
            f"{store.url}: damaged files are being taken out of it, or that was stopped in the midst; run "
            f"`loupe data verify {store.url} --quarantine` to its end, then this again"
        )


def epoch_of(store: StageStore) -> str | None:
    """None: nothing was ever forgotten. Whoever asks under a lease asks after `check_mending`."""
    try:
        return str(store.read_json(EPOCH)["epoch"])
    except FileNotFoundError:
        return None
    except (DamagedFile, KeyError, TypeError):
        raise UserError(f"{store.url}/{EPOCH}: is damaged; stop the workers, delete it and run this again") from None


def part_receipts(store: StageStore, pass_name: str, item: str) -> list[Json]:
    """Of the parts that are published, in order: up to the first that is not there, which mending may have forgotten."""
    folder = f"{pass_folder(pass_name)}/parts/{item}"
    receipts: list[Json] = []
    for name in store.names(folder):
        if name != f"{len(receipts):06d}.json":
            break
        try:
            receipts.append(store.read_json(f"{folder}/{name}"))
        except FileNotFoundError:
            break
    return receipts


def done_receipts(store: StageStore, pass_name: str) -> Iterator[Json]:
    """Of the items that are whole, in the order of their names; several are asked for at a time, as there are thousands.

    Raises:
        UserError: one has gone meanwhile, or is damaged.
    """
    folder = f"{pass_folder(pass_name)}/done"
    reads = in_order(
        lambda name: store.read_json(f"{folder}/{name}"), store.names(folder), threads=READERS, ahead=4 * READERS
    )
    for name, receipt in reads:
        try:
            yield receipt.result()
        except FileNotFoundError:
            raise UserError(
                f"{store.url}/{folder}/{name}: has gone while the receipts were read; is the stage being mended? run again"
            ) from None


def sum_counts(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
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
