"""A stage's folder at a path or any fsspec URL: what workers that never talk to one another agree by.

    stage.json              name, version and settings; made once, and refused when another command's differ
    work/PASS/items.json    what there is to do; made once, so that all workers do the same
    work/PASS/leases/       who works at what until when
    work/PASS/parts/ITEM/   receipts of what an item has so far, in order
    work/PASS/done/         receipts of whole items; a file that no receipt names is no part of the output
    work/PASS/failed/       why an attempt at an item failed
    files/PASS/             what the receipts name
    summary.json            counts of the whole stage; last

Objects are made by create-if-absent, which one of several writers wins: that alone is what makes publication exactly once.
"""

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.storage import CHUNK_BYTES, DEADLINE_S, Storage, with_retries
from trainer.errors import UserError

Json = Any

STAGE, SUMMARY = "stage.json", "summary.json"
MAX_JSON_BYTES = 256 << 20


class StageStore(Storage):
    """`Storage` with what stages need beside reading and putting files."""

    def create(self, name: str, data: bytes, *, deadline_s: float = DEADLINE_S) -> bool:
        """Make a small object unless there is one; True if it now holds `data`, which should be like no other writer's.

        Readers see it whole or not at all, and of several writers one wins.

        Raises:
            UserError: access is denied, or this storage cannot create exclusively.
            StorageError: storage fails for longer than the deadline.
        """

        def attempt(_deadline: float) -> bool:
            try:
                if self.is_local:
                    self._link(name, data)
                else:
                    self.fs.pipe_file(self.path(name), data, mode="create")
                return True
            except FileNotFoundError:
                raise UserError(f"{self.url}: there is no such bucket; make it, or mend the URL") from None
            except FileExistsError:
                # Also when the answer to our own first try was lost: then the content is ours.
                self.fs.invalidate_cache()
                try:
                    return self.fs.cat_file(self.path(name)) == data
                except FileNotFoundError:  # another's, deleted in between, as leases are
                    return False

        return with_retries(attempt, f"{self.url}/{name}", deadline_s)

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
        """Write a small object that this process alone writes."""

        def attempt(_deadline: float) -> None:
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
                return
            path = Path(self.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            self._write_through(temporary, data)
            os.replace(temporary, path)

        with_retries(attempt, f"{self.url}/{name}", deadline_s)

    def names(self, folder: str, *, deadline_s: float = DEADLINE_S) -> list[str]:
        """Names of what lies in a folder, sorted; none where there is no such folder."""

        def attempt(_deadline: float) -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.path(folder), detail=False)
            except FileNotFoundError:
                return []
            names = (path.rstrip("/").rpartition("/")[2] for path in found)
            return sorted(name for name in names if name and not name.startswith("."))

        return with_retries(attempt, f"{self.url}/{folder}", deadline_s)

    def exists(self, name: str, *, deadline_s: float = DEADLINE_S) -> bool:
        def attempt(_deadline: float) -> bool:
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(name)))

        return with_retries(attempt, f"{self.url}/{name}", deadline_s)

    def delete(self, name: str) -> None:
        """Nothing where there is no such object."""

        def attempt(_deadline: float) -> None:
            try:
                self.fs.rm_file(self.path(name))
            except FileNotFoundError:
                return

        with_retries(attempt, f"{self.url}/{name}", DEADLINE_S)

    def put_new(self, file: Path, name: str) -> None:
        """Bring a file to a name that no other writer uses; on disk before a receipt can name it."""
        if not self.is_local:
            self.put(file, name)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())

    # ------------------------------------------------------------------------------------------------------------ json

    def read_json(self, name: str) -> Json:
        """
        Raises:
            FileNotFoundError: there is none.
            UserError: it is no JSON, or larger than such a file may be.
        """
        data = self.read(name, max_bytes=MAX_JSON_BYTES)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise UserError(
                f"{self.url}/{name}: not JSON ({e}); the file is damaged, delete it and run again"
            ) from None

    def create_json(self, name: str, tree: Json) -> bool:
        return self.create(name, to_json(tree))


def to_json(tree: Json) -> bytes:
    return json.dumps(tree, ensure_ascii=False, sort_keys=True).encode()


def claim(store: StageStore, name: str, version: int, settings: Json, passes: Sequence[str]) -> None:
    """Make `stage.json`, or see that what is there was made by an equal command.

    Raises:
        UserError: the folder is of another stage, version or settings, or holds other files.
    """
    ours = {"stage": name, "version": version, "settings": settings, "passes": list(passes)}
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
        UserError: `stage.json` is not there, or of another stage, version or settings.
    """
    theirs = read_stage(store)
    if theirs["stage"] != name:
        raise UserError(f"{store.url}: is the output of `{theirs['stage']}`, not of `{name}`; name another folder")
    if theirs["version"] != version:
        raise UserError(
            f"{store.url}: was begun by version {theirs['version']} of `{name}`, this is {version}; name a new folder"
        )
    if found := _difference(theirs["settings"], json.loads(to_json(settings))):
        key, before, now = found
        raise UserError(
            f"{store.url}: was begun with {key} = {before!r}, now it is {now!r}; repeat the first command, or name a new folder"
        )


def _difference(before: Json, now: Json, key: str = "") -> tuple[str, Json, Json] | None:
    """The first setting that differs, and its two values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (key, before, now)
    found = (
        _difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        for name in sorted({*before, *now})
    )
    return next((difference for difference in found if difference), None)


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
        tree = store.read_json(STAGE)
    except FileNotFoundError:
        raise UserError(f"{store.url}: no {STAGE}; give the output folder of a `loupe data` stage") from None
    if not isinstance(tree, dict) or {"stage", "version", "settings", "passes"} - tree.keys():
        raise UserError(f"{store.url}/{STAGE}: not ours or damaged; name a new folder")
    return tree


def item_names(items: Sequence[Json]) -> list[str]:
    return [item["name"] for item in items]
