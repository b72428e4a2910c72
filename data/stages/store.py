"""A stage's folder at a path or any fsspec URL: what workers that never talk to one another agree by.

    stage.json              name, version, settings and an id; made once, and refused when another command's differ
    work/PASS/items.json    what there is to do; made once, so that all workers do the same
    work/PASS/leases/       who works at what until when
    work/PASS/parts/ITEM/   receipts of what an item has so far, in order
    work/PASS/done/         receipts of whole items; a file that no receipt names is no part of the output
    work/PASS/failed/       why an attempt at an item failed
    files/PASS/             what the receipts name
    summary.json            counts of the whole stage, and what was given up; last
    work/finish/leases/     who writes it
    work/mending.json       what is being taken out, since it is damaged; nobody works meanwhile (data.mend_stage)
    work/epoch.json         another one after each mending, by which workers that were there before see that they begin again
    quarantine/             damaged files that were taken out

Objects are made by create-if-absent, which one of several writers wins: that alone is what makes publication exactly once.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.deadlines import call_within
from data.storage import CHUNK_BYTES, DEADLINE_S, MIN_BYTES_PER_S, DamagedFile, Storage, StorageError
from trainer.errors import UserError

Json = Any

STAGE, SUMMARY = "stage.json", "summary.json"
MAX_JSON_BYTES = 256 << 20
_SHOWN, _SHOWN_CHARACTERS = 8, 200
"""Settings that differ, and of a value, in a message."""


class StageStore(Storage):
    """`Storage` with what stages need beside reading and putting files."""

    mend = "if it is damaged, `loupe data verify` its stage with --quarantine, then run the stage again"
    told_by = "its receipt"

    def create(self, name: str, data: bytes, *, deadline_s: float = DEADLINE_S) -> bool:
        """Make a small object unless there is one; True if it now holds `data`, which should be like no other writer's.

        Readers see it whole or not at all, and of several writers one wins. An attempt that hung and was left behind may land
        later: then it makes what its writer gave up, or nothing where another has come first; it never replaces.

        Raises:
            UserError: access is denied, or this storage cannot create exclusively.
            StorageError: storage fails for longer than the deadline.
        """

        def make() -> bool:
            try:
                if self.is_local:
                    self._link(name, data)
                else:
                    self.fs.pipe_file(self.path(name), data, mode="create")
                return True
            except FileNotFoundError:
                raise UserError(f"{self.url}: there is no such bucket; make it, or mend the URL") from None
            except FileExistsError:
                # Also when the answer to our own first try was lost, or it hung: then the content is ours.
                self.fs.invalidate_cache()
                try:
                    return self.fs.cat_file(self.path(name)) == data
                except FileNotFoundError:  # another's, deleted in between, as leases are
                    return False

        return self.ask(make, name, deadline_s, "written", len(data))

    def _link(self, name: str, data: bytes) -> None:
        """By hard link: exclusive as O_EXCL is, but nobody sees the file before its content, nor after a crash without."""
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self._write_through(temporary, data)
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _write_through(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes, *, deadline_s: float = DEADLINE_S) -> None:
        """Write a small object that this process alone writes.

        An attempt that hung and was left behind may land after a later one: what is written must bear that. A lease that is
        renewed bears it: it seems older than it is.
        """

        def write() -> None:
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
                return
            path = Path(self.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            self._write_through(temporary, data)
            os.replace(temporary, path)

        self.ask(write, name, deadline_s, "written", len(data))

    def put_new(self, file: Path, name: str, *, deadline_s: float = DEADLINE_S) -> None:
        """Bring a file to a name that no other writer uses; on disk before a receipt can name it.

        Raises:
            StorageError: storage fails for longer than the deadline, or the longer one that the file's size allows.
        """
        if not self.is_local:
            self.put(file, name, deadline_s=deadline_s)
            return

        def copy() -> None:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "rb") as source, open(target, "wb") as written:
                shutil.copyfileobj(source, written, CHUNK_BYTES)
                written.flush()
                os.fsync(written.fileno())

        allowed_s = max(deadline_s, file.stat().st_size / MIN_BYTES_PER_S)
        try:
            # Once: a copy that was left behind would write into the next one.
            call_within(copy, time.monotonic() + allowed_s, f"write {name}")
        except TimeoutError as e:
            raise StorageError(f"{self.url}/{name}: not written within {allowed_s:.0f} s ({e})") from e

    # ------------------------------------------------------------------------------------------------------------ json

    def read_json(self, name: str) -> Json:
        """
        Raises:
            FileNotFoundError: there is none.
            DamagedFile: it is no JSON, or larger than such a file may be.
            UserError: access is denied.
            StorageError: storage fails for longer than the deadline.
        """
        data = self.read(name, max_bytes=MAX_JSON_BYTES)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise DamagedFile(f"{self.url}/{name}: not JSON ({e}); {self.mend}") from None

    def create_json(self, name: str, tree: Json) -> bool:
        return self.create(name, to_json(tree))


def to_json(tree: Json) -> bytes:
    return json.dumps(tree, ensure_ascii=False, sort_keys=True).encode()


class OtherSettings(UserError):
    """A folder was begun with other settings."""

    def __init__(
        self, url: str, differences: "Sequence[Difference]", *, name: Callable[[str], str] = str, mend: str = ""
    ) -> None:
        """
        Args:
            name: of a setting's key, what the user calls it.
            mend: what to do.
        """
        self.url, self.differences = url, differences
        shown = [f"{name(one.key)} = {_short(one.before)}, now it is {_short(one.now)}" for one in differences[:_SHOWN]]
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        mend = mend or "repeat the first command, or name a new folder"
        self.told = f"{url}: was begun with {'; with '.join(shown)}{more}"
        super().__init__(f"{self.told}; {mend}")


class Difference(NamedTuple):
    key: str
    """Of a setting, such as `filters.min_side`."""
    before: Json
    now: Json


def _short(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def claim(
    store: StageStore, name: str, version: int, settings: Json, passes: Sequence[str], *, command: str | None = None
) -> None:
    """Make `stage.json`, or see that what is there was made by an equal command.

    Args:
        command: what begins it, without secrets: for people, and compared with nothing.

    Raises:
        UserError: the folder is of another stage, version or settings, or holds other files.
    """
    # The id is drawn, so that what is made of this output can say so wherever it is moved, and whatever comes to its place.
    ours = {"stage": name, "version": version, "settings": settings, "passes": list(passes), "id": secrets.token_hex(8)}
    if command is not None:
        ours["command"] = command
    if not store.exists(STAGE):
        if others := [n for n in store.names("") if n not in ("work", "files", STAGE, SUMMARY)]:
            raise UserError(f"{store.url}: holds other files ({others[0]}); name a new folder")
        _check_exclusive(store)
        if store.create(STAGE, to_json(ours)):
            return
    check_claim(store, name, version, settings)


def check_claim(store: StageStore, name: str, version: int, settings: Json) -> None:
    """
    Raises:
        OtherSettings: `stage.json` has other settings.
        UserError: it is not there, or of another stage or version.
    """
    theirs = read_stage(store)
    if theirs["stage"] != name:
        raise UserError(f"{store.url}: is the output of `{theirs['stage']}`, not of `{name}`; name another folder")
    if theirs["version"] != version:
        raise UserError(
            f"{store.url}: was begun by version {theirs['version']} of `{name}`, this is {version}; name a new folder"
        )
    if found := list(_differences(theirs["settings"], json.loads(to_json(settings)))):
        raise OtherSettings(store.url, found)


def _differences(before: Json, now: Json, key: str = "") -> Iterator[Difference]:
    """Settings that differ, as deep as they have names."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield Difference(key, before, now)
        return
    for name in sorted({*before, *now}):
        yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)


def _check_exclusive(store: StageStore) -> None:
    """Some storage takes `mode="create"` and overwrites all the same; there two workers could publish one item."""
    name = "work/exclusive"
    store.create(name, secrets.token_bytes(16))
    if store.create(name, secrets.token_bytes(16)):
        raise UserError(f"{store.url}: this storage overwrites where it should refuse, so workers cannot share it; use S3, a "
                        "POSIX file system, or another with create-if-absent")  # fmt: skip


def read_stage(store: StageStore) -> dict[str, Json]:
    """stage.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        data = store.read(STAGE, max_bytes=MAX_JSON_BYTES)
    except FileNotFoundError:
        raise UserError(f"{store.url}: no {STAGE}; give the output folder of a `loupe data` stage") from None
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or {"stage", "version", "settings", "passes"} - tree.keys():
        raise UserError(
            f"{store.url}/{STAGE}: not ours or damaged; it cannot be mended, run the stage anew into a new folder"
        )
    if "id" not in tree:
        raise UserError(
            f"{store.url}: was written by an earlier version of Loupe, which cut its work otherwise; run "
            f"`loupe data {tree['stage']}` again, into a new folder"
        )
    return tree


def item_names(items: Sequence[Json]) -> list[str]:
    return [item["name"] for item in items]
