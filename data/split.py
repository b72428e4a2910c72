"""Which images of some folders are held out: the same ones whenever it is asked, whoever asks, and none that is trained on."""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.source import Entry, Source
from data.storage import Storage
from trainer.errors import UserError

MAX_SHARE = 0.5
"""Of a folder, that may be held out."""
SUMMARY = "split.json"


def split(sources: Sequence[Source], num_heldout: int) -> tuple[list[Source], Source, int]:
    """What is left of each source to train on; one source of all that is held out; and how many images are in neither.

    Of each folder the images with the smallest hash of their file name are held out, so many as `heldout_counts` says. An
    image that equals one of them byte for byte is left out. Labels are kept where there is one source.

    Raises:
        UserError: too few images, or one cannot be read.
    """
    counts = heldout_counts([len(source.entries) for source in sources], num_heldout)
    names = source_names(sources)
    training, heldout, seen = [], [], set()
    for source, count, name in zip(sources, counts, names, strict=True):
        ordered = sorted(source.entries, key=lambda entry: (_digest(entry.key.encode()), entry.key))
        held = {entry.key for entry in ordered[:count]}
        for entry in source.entries:
            if entry.key in held:
                seen.add(_content(entry))
                alone = len(sources) == 1
                heldout.append(entry if alone else replace(entry, key=f"{name}/{entry.key}", label=-1))
        training.append(replace(source, entries=[entry for entry in source.entries if entry.key not in held]))
    kept = [
        replace(source, entries=[e for e in source.entries if e.path is None or _content(e) not in seen])
        for source in training
    ]
    twins = sum(len(before.entries) - len(after.entries) for before, after in zip(training, kept, strict=True))
    first, *others = sources
    classes = None if others else first.class_names
    joined = Source(
        first.folder,
        first.layout,
        heldout,
        classes,
        sum(s.merged_rows for s in sources),
        tuple(s.folder for s in others),
    )
    return kept, joined, twins


def heldout_counts(sizes: Sequence[int], total: int) -> list[int]:
    """`total` over folders of so many images, in proportion to the square root of their sizes: a small folder gives a larger
    share, and a large one more images. At most half of any.

    Raises:
        UserError: the folders are too small.
    """
    limits = [int(size * MAX_SHARE) for size in sizes]
    if sum(limits) < total:
        raise UserError(f"--heldout: {total} of {sum(sizes)} images are more than half of each folder; hold out fewer, or "
                        "give more images")  # fmt: skip
    counts = [0] * len(sizes)
    roots = [math.sqrt(size) for size in sizes]
    for _ in range(total):  # the one that is furthest behind its share
        open_ones = [i for i in range(len(sizes)) if counts[i] < limits[i]]
        counts[max(open_ones, key=lambda i: roots[i] / (counts[i] + 0.5))] += 1
    return counts


def source_names(sources: Sequence[Source]) -> list[str]:
    """A name for each, fit for a file and a config: its folder's, with a number where two have the same."""
    names: list[str] = []
    for source in sources:
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in source.folder.resolve().name)
        name, number = plain or "images", 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names


def claim(out: str, names: Sequence[str], *, overwrite: bool) -> None:
    """Before anything is built at `out`, a folder or URL that will hold `heldout` and `train/NAME`. An earlier summary goes.

    Raises:
        UserError: a split is there and may not be replaced, or it has a dataset that this one would leave as it is: of images
            that may now be held out.
    """
    storage = Storage(out)
    present = set(storage.names(hidden=True))
    if present & {SUMMARY, "heldout", "train"} and not overwrite:
        raise UserError(f"{out}: holds a split already; add --overwrite to replace it, or name another folder")
    built = set(Storage(f"{out}/train").names())
    if others := sorted(built - set(names)):
        raise UserError(f"{out}/train/{others[0]}: of another split, and may have images that this one holds out; remove "
                        "it, or name another folder")  # fmt: skip
    if SUMMARY in present:
        storage.delete(SUMMARY)


def write_summary(out: str, summary: dict[str, Any]) -> None:
    """When the datasets are there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SUMMARY
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        Storage(out).put(file, SUMMARY)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _content(entry: Entry) -> bytes:
    """Of an image file that is there."""
    if entry.path is None:
        return b""
    try:
        return _digest(Path(entry.path).read_bytes())
    except OSError as e:
        raise UserError(f"{entry.path}: cannot be read ({e.strerror})") from None
