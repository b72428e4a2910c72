"""The files of a frozen text encoder: where its config, weights and tokenizer lie, fetched to this machine where they
are remote. Nothing is built or unpickled here.

A folder is laid out as transformers writes one, or as a diffusers pipeline: weights in `text_encoder`, tokenizer in
`tokenizer`. Remote files are kept in the cache folder under what storage says of them (size, hash or time), so that a
changed file is fetched anew and a node's processes fetch each file once.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainer.config import EncoderConfig, resolve_url
from trainer.errors import UserError, one_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
"""What the index may name: a file beside it."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILE = "tokenizer.json"
CLIP_FILES = ("vocab.json", "merges.txt")
SLOW_TOKENIZERS = ("spiece.model", "tokenizer.model")
OPTIONAL_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 256 << 20
MAX_WEIGHTS_BYTES = 64 << 30
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder's files, all on this machine."""

    where: str
    """The folder of the weights as the user knows it, for messages."""
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tokenizer: Path
    """Folder with the tokenizer's files under their usual names."""
    has_fast_tokenizer: bool
    """It has `tokenizer.json`; otherwise CLIP's `vocab.json` and `merges.txt`."""


def encoder_files(encoder: EncoderConfig, field: str) -> EncoderFiles:
    """Find an encoder's files, and fetch those that are remote.

    Args:
        field: name of the encoder's section in the config, such as `task.text.encoders.0`.

    Raises:
        UserError: a file is missing, too large, damaged, or a pickle; the message names it.
    """
    try:
        fs, root = url_to_fs(resolve_url(encoder.url))
    except (ValueError, ImportError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{field}.url: {encoder.url} cannot be opened ({one_line(e)})") from None
    reader = FileReader(fs, f"{field}.url")
    weights = _subfolder(root, encoder.weights_folder, f"{field}.weights_folder")
    tokenizer = _subfolder(root, encoder.tokenizer_folder, f"{field}.tokenizer_folder")

    if reader.size(f"{weights}/{CONFIG_FILE}") is None:
        raise UserError(
            f"{field}.url: {weights}/{CONFIG_FILE}: no such file; give the folder of a transformers text encoder, or "
            "the diffusers pipeline's with weights_folder: text_encoder"
        )
    config = reader.json(f"{weights}/{CONFIG_FILE}", MAX_CONFIG_BYTES)
    names = weight_files(reader, weights)
    tokenizer_names = tokenizer_files(reader, tokenizer, encoder.family, f"{field}.tokenizer_folder")
    if isinstance(fs, LocalFileSystem):
        paths, tokenizer_path = [Path(weights, name) for name in names], Path(tokenizer)
    else:
        paths = fetch(reader, weights, names, MAX_WEIGHTS_BYTES)
        tokenizer_path = fetch(reader, tokenizer, tokenizer_names, MAX_TOKENIZER_BYTES)[0].parent
    return EncoderFiles(weights, config, tuple(paths), tokenizer_path, TOKENIZER_FILE in tokenizer_names)


# ------------------------------------------------------------------------------------------------------- what is there


class FileReader:
    """Looks at and reads files of one file system; failures of storage become `UserError`s that name the field."""

    def __init__(self, fs: AbstractFileSystem, field: str) -> None:
        """`field`: what gave the URL, a field of the config or an option."""
        self.fs, self.field = fs, field

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            info = self.fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise UserError(f"{self.field}: {path}: cannot be read ({one_line(e)})") from None
        return int(info["size"] or 0) if info["type"] == "file" else None

    def bounded_size(self, path: str, max_bytes: int) -> int:
        size = self.size(path)
        if size is None:
            raise UserError(f"{self.field}: {path}: no such file; copy the encoder's folder again")
        if size > max_bytes:
            raise UserError(f"{self.field}: {path}: {size} bytes, more than {max_bytes}; is it an encoder's?")
        return size

    def json(self, path: str, max_bytes: int) -> dict[str, Any]:
        self.bounded_size(path, max_bytes)
        try:
            value = json.loads(self.fs.cat_file(path))
        except OSError as e:
            raise UserError(f"{self.field}: {path}: cannot be read ({one_line(e)})") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{self.field}: {path}: not JSON ({one_line(e)}); copy it again") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.field}: {path}: holds a {type(value).__name__}, not an object; copy it again")
        return value


def _subfolder(root: str, name: str, field: str) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        raise UserError(f"{field}: {name} leads out of the encoder's folder; give a folder within it")
    return "/".join([root.rstrip("/"), *parts])


def weight_files(reader: FileReader, folder: str) -> list[str]:
    """Names of the safetensors files: the one, or those that the index names."""
    field = reader.field
    if reader.size(f"{folder}/{WEIGHTS_FILE}") is not None:
        names = [WEIGHTS_FILE]
    elif reader.size(f"{folder}/{INDEX_FILE}") is not None:
        weight_map = reader.json(f"{folder}/{INDEX_FILE}", MAX_TOKENIZER_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{field}: {folder}/{INDEX_FILE}: has no weight_map; copy it again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not SHARD_NAME.fullmatch(name):
                raise UserError(f"{field}: {folder}/{INDEX_FILE}: names {name!r}, which is no safetensors file "
                                "beside it; copy it again")  # fmt: skip
    else:
        pickle = next((name for name in PICKLES if reader.size(f"{folder}/{name}") is not None), None)
        found = f"{pickle} is a pickle, which is never read" if pickle else "there are no weights"
        raise UserError(f"{field}: {folder}/{WEIGHTS_FILE}: no such file, {found}; convert the encoder to "
                        "safetensors (load it where you trust it, then save_pretrained)")  # fmt: skip
    for name in names:
        reader.bounded_size(f"{folder}/{name}", MAX_WEIGHTS_BYTES)
    return names


def tokenizer_files(reader: FileReader, folder: str, family: str, field: str) -> list[str]:
    """Names of the tokenizer's files; `field` gave their folder."""

    def there(name: str) -> bool:
        return reader.size(f"{folder}/{name}") is not None

    if there(TOKENIZER_FILE):
        needed = [TOKENIZER_FILE]
    elif family == "clip" and all(map(there, CLIP_FILES)):
        needed = list(CLIP_FILES)
    else:
        slow = next((name for name in SLOW_TOKENIZERS if there(name)), None)
        hint = f"convert {slow} (AutoTokenizer.from_pretrained, then save_pretrained)" if slow else (
            "give the tokenizer's folder as tokenizer_folder")  # fmt: skip
        wanted = f"{TOKENIZER_FILE}, or {' and '.join(CLIP_FILES)}" if family == "clip" else TOKENIZER_FILE
        raise UserError(f"{field}: {folder}: has no {wanted}; {hint}")
    names = [*needed, *filter(there, OPTIONAL_TOKENIZER_FILES)]
    for name in names:
        reader.bounded_size(f"{folder}/{name}", MAX_TOKENIZER_BYTES)
    return names


# ------------------------------------------------------------------------------------------------------------ fetching


def fetch(reader: FileReader, folder: str, names: Sequence[str], max_bytes: int) -> list[Path]:
    """Copies of a folder's files in the cache, one folder for each state of what is remote."""
    state = [(f"{folder}/{name}", reader.fs.ukey(f"{folder}/{name}")) for name in names]
    digest = hashlib.blake2b(repr((reader.fs.protocol, state)).encode(), digest_size=12).hexdigest()
    target = cache_folder(reader.field) / "text_encoders" / digest
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # a node's processes fetch a file once; the kernel releases it on death
            for name in names:
                if not (target / name).exists():
                    _fetch_file(reader, f"{folder}/{name}", target / name, max_bytes)
    except OSError as e:
        raise UserError(f"{reader.field}: {folder}: cannot be fetched into {target} ({one_line(e)})") from None
    return [target / name for name in names]


def _fetch_file(reader: FileReader, path: str, target: Path, max_bytes: int) -> None:
    """Shown under its name only when it is complete."""
    expected, copied = reader.bounded_size(path, max_bytes), 0
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file, reader.fs.open(path, "rb") as remote:
            while chunk := remote.read(_CHUNK_BYTES):
                copied += len(chunk)
                if copied > expected:
                    break
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if copied != expected:
            raise OSError(f"{path} has another size than the {expected} bytes that storage says; try again")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def cache_folder(field: str) -> Path:
    """`$XDG_CACHE_HOME/loupe` or `~/.cache/loupe`, beside the cached shards; a temporary folder where that is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loupe"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:  # containers often run with a home that is read-only, or none
        writable = False
    if writable:
        return folder
    folder = Path(tempfile.gettempdir()) / f"loupe-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # in /tmp someone else could have made it, and could swap what it holds
        raise UserError(f"{field}: {folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    return folder
