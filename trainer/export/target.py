"""Where an export is written: a folder of this machine or any fsspec URL. It is there whole, or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainer.errors import KEYS_MEND, UserError, one_line, storage_errors
from trainer.models.codec_files import CONFIG_FILE
from trainer.models.codec_files import WEIGHTS_FILE as AUTOENCODER_FILE
from trainer.models.latent_network_files import WEIGHTS_FILE as NETWORK_FILE
from trainer.models.latent_network_files import LatentNetworkInfo
from trainer.run_folder import make_folder

T = TypeVar("T")

RECORD = "export.json"
"""What an export of latent diffusion says of itself: where it is from, what was checked, and every file."""
LATENTS_FILE = "latents.json"
MODEL_INDEX = "model_index.json"
LAST = (MODEL_INDEX, "model.safetensors.index.json", "model.safetensors", CONFIG_FILE)
"""The first of these that an export has makes it one: whoever reads it begins there, so it is written last."""
_WITHOUT_RECORD = {CONFIG_FILE, AUTOENCODER_FILE, NETWORK_FILE, LATENTS_FILE}
"""Files of an autoencoder's or a latent network's export, in whose place a new one comes."""
_MAX_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Target:
    """A place that is free, or holds an earlier export alone."""

    url: str
    """As the user gave it."""
    fs: AbstractFileSystem
    root: str

    @property
    def folder(self) -> Path | None:
        """On this machine; None elsewhere."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None


def free_target(out: str) -> Target:
    """
    Raises:
        UserError: it cannot be opened, or holds what no export has written and replacing it would lose.
    """
    try:
        fs, root = url_to_fs(out)
        # a link stays what it is, and the export goes to where it leads: by rename it would become a folder
        if isinstance(fs, LocalFileSystem):
            root = os.path.realpath(root)
            if os.path.islink(root):
                raise UserError(f"{out}: a link that leads to itself; give another name")
        target = Target(out, fs, root.rstrip("/"))
        names = _names(target)
        known = _known(target, names)
    except storage_errors(ImportError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        keys = f"; {KEYS_MEND}" if "://" in out else ""
        raise UserError(f"{out}: cannot be written to ({one_line(e)}){keys}") from None
    foreign = sorted(names - known)
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]}, which no export writes and replacing it would lose; give another")
    if target.folder and target.folder.is_dir() and not names:
        raise UserError(f"{out}: exists and is not what an export writes; give another")
    return target


def _names(target: Target) -> set[str]:
    target.fs.invalidate_cache()
    if target.folder and target.folder.exists() and not target.folder.is_dir():
        raise UserError(f"{target.url}: is a file; an export is a folder, give another name")
    try:
        found = target.fs.find(target.root)
    except FileNotFoundError:
        return set()
    names = {path.removeprefix(target.root).lstrip("/") for path in found}
    return {name for name in names if name}


def _known(target: Target, names: set[str]) -> set[str]:
    """Files that an export, whole or interrupted, has written there."""
    if RECORD not in names:
        return _WITHOUT_RECORD if LATENTS_FILE in names or _is_latent_network(target, names) else set()
    path = f"{target.root}/{RECORD}"
    if (target.fs.size(path) or 0) > _MAX_RECORD_BYTES:
        return {RECORD}
    try:
        tree = json.loads(target.fs.cat_file(path))
        return {RECORD, *map(str, tree["files"])} if tree["format"] == "loupe-export" else {RECORD}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {RECORD}


def _is_latent_network(target: Target, names: set[str]) -> bool:
    """By its config: other libraries' models have files of the same names."""
    path = f"{target.root}/{CONFIG_FILE}"
    if CONFIG_FILE not in names or (target.fs.size(path) or 0) > _MAX_RECORD_BYTES:
        return False
    try:
        LatentNetworkInfo.model_validate_json(target.fs.cat_file(path))
    except ValueError:
        return False
    return True


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below, by its path within."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_in_place(target: Target, write: Callable[[Path], T]) -> T:
    """`write` a new folder, then put it there whole in place of an earlier one: by rename, or by an upload whose last file is
    the one that readers begin with."""
    folder = target.folder
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(dir=folder.parent if folder else None, prefix=f".{target.root.rpartition('/')[2]}-")
    )
    try:
        written = write(temporary)
        for path in (temporary, *temporary.rglob("*")):  # made for this user alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder is None:
            upload(temporary, target)
            return written
        free_target(target.url)  # what came meanwhile would be lost
        earlier = temporary.with_name(f"{temporary.name}.old")
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def upload(folder: Path, target: Target) -> None:
    """Copy a whole export to storage. Until its last file is there it is none, and an earlier one there is none any more.

    Raises:
        UserError: storage refuses it, or has another size of a file than was sent.
    """
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    last = next((name for name in LAST if name in paths), None)
    first = [RECORD] if RECORD in paths else []  # by it an interrupted upload is known for ours
    ordered = [*first, *(p for p in paths if p not in (last, RECORD)), *([last] if last else [])]
    fs, root = target.fs, target.root
    try:
        free_target(target.url)  # what came meanwhile would be lost
        earlier = _names(target)
        # while these go, the record of the export before says whose they are; then the new one's does, which goes first
        for name in sorted(earlier - {RECORD}, key=lambda name: name not in LAST):
            fs.rm_file(f"{root}/{name}")
        for name in ordered:
            path = f"{root}/{name}"
            make_folder(fs, path.rpartition("/")[0])
            fs.put_file(os.fspath(folder / name), path)
            fs.invalidate_cache()
            size, sent = fs.size(path), (folder / name).stat().st_size
            if size != sent:
                raise UserError(f"{target.url}/{name}: {size} bytes after {sent} were sent; export again")
        if RECORD in earlier and RECORD not in paths:
            fs.rm_file(f"{root}/{RECORD}")
    except storage_errors(ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{target.url}: cannot be written ({one_line(e)}); {KEYS_MEND}, then export again") from None
