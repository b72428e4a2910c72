"""Checkpoints looked at by a person's command, one process and no training: what there is, what is in one, is it whole."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint import folder as names
from trainer.checkpoint import retention
from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.manifests import read_manifest
from trainer.checkpoint.reading import load, read_index
from trainer.checkpoint.records import ITEM_BYTES, Index, Manifest, parse_index
from trainer.checkpoint.storage import DTYPES
from trainer.errors import UserError

log = logging.getLogger(__name__)

PART_BYTES = 512 << 20
"""Of tensors that are in memory at once, unless one alone is larger."""

GONE = "deleted meanwhile"
"""The problem of one that was there when it was listed."""

NO_PROGRESS: Callable[[int], None] = lambda _: None  # noqa: E731


@dataclass(frozen=True)
class Listed:
    """A checkpoint as `loupe checkpoint ls` shows it. `problem`: why it is none to go on from; empty where it is one."""

    entry: Entry
    manifest: Manifest | None
    problem: str

    @property
    def num_bytes(self) -> int:
        return sum(self.entry.sizes.values())

    @property
    def valid(self) -> bool:
        return not self.problem


def survey(folder: CheckpointFolder) -> list[Listed]:
    """All that is named like a checkpoint, oldest step first; records and sizes are verified, tensors are not read."""
    return [_listed(folder, entry) for entry in folder.entries()]


def _listed(folder: CheckpointFolder, entry: Entry) -> Listed:
    if entry.set_aside:
        return Listed(entry, None, "set aside")
    if not entry.committed:
        return Listed(entry, None, "not committed")
    try:
        return Listed(entry, read_manifest(folder, entry), "")
    except (CorruptCheckpoint, UserError) as e:
        gone = is_gone(folder, entry)
        return Listed(entry, None, GONE if gone else str(e).removeprefix(f"{folder.url_of(entry.name)}/"))


def is_gone(folder: CheckpointFolder, entry: Entry) -> bool:
    """Whether it was deleted since it was listed, as retention of a run that goes on does: then it is not damaged. COMMIT goes
    first."""
    return names.COMMIT in entry.sizes and names.COMMIT not in folder.sizes(entry.name)


def verify(folder: CheckpointFolder, entry: Entry, on_bytes: Callable[[int], None] = NO_PROGRESS) -> Manifest:
    """Read a whole checkpoint and compare every object with its checksum, and the index with the objects.

    Args:
        on_bytes: told how many were read since the last call.

    Raises:
        CorruptCheckpoint: naming the object.
        UserError: of another version of the format.
    """
    manifest = read_manifest(folder, entry)
    for record in manifest.objects:
        name = f"{entry.name}/{record.path}"
        if folder.checksum(name, record.bytes, on_bytes) != record.xxh64:
            raise CorruptCheckpoint(f"{folder.url_of(name)}: its checksum does not match the manifest")
    parse_index(read_index(folder, entry, manifest), manifest, f"{folder.url_of(entry.name)}/{names.INDEX}")
    return manifest


@dataclass(frozen=True, eq=False)
class OpenedCheckpoint:
    """One whose records verify. Its tensors are verified as they are read."""

    folder: CheckpointFolder
    entry: Entry
    manifest: Manifest
    index: Index

    @classmethod
    def of(cls, folder: CheckpointFolder, entry: Entry) -> "OpenedCheckpoint":
        """
        Raises:
            CorruptCheckpoint: its records do not verify.
            UserError: of another version of the format.
        """
        manifest = read_manifest(folder, entry)
        where = f"{folder.url_of(entry.name)}/{names.INDEX}"
        return cls(folder, entry, manifest, parse_index(read_index(folder, entry, manifest), manifest, where))

    @property
    def url(self) -> str:
        return self.folder.url_of(self.entry.name)

    def num_bytes(self, name: str) -> int:
        record = self.index.tensors[name]
        return math.prod(record.size) * ITEM_BYTES[record.dtype]

    def read(self, tensors: Iterable[str]) -> dict[str, Tensor]:
        """On the host."""
        records = {name: self.index.tensors[name] for name in tensors}
        found = {name: torch.empty(record.size, dtype=DTYPES[record.dtype]) for name, record in records.items()}
        load(self.folder, Ranks(None), self.entry.name, self.index, found)
        return found

    def parts(self, tensors: Iterable[str]) -> Iterator[list[str]]:
        """Names in their order, so many together as fit into memory."""
        part: list[str] = []
        size = 0
        for name in tensors:
            if part and size + self.num_bytes(name) > PART_BYTES:
                yield part
                part, size = [], 0
            part.append(name)
            size += self.num_bytes(name)
        if part:
            yield part

    @contextlib.contextmanager
    def held(self, purpose: str) -> Iterator[None]:
        """Kept from a live run's retention, where the folder may be written.

        Raises:
            CorruptCheckpoint: retention was faster.
        """
        name, held = retention.unique_hold(purpose), False
        try:
            retention.hold(self.folder, self.entry, name)
            held = True
        except (UserError, CheckpointError) as e:  # someone else's run; checksums tell if it goes while it is read
            if isinstance(e, CorruptCheckpoint):
                raise
            log.warning("checkpoint %s is read without being held: %s", self.entry.name, e)
        try:
            yield
        finally:
            if held:
                retention.release(self.folder, self.entry.name, name)
