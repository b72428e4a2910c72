"""The run folder: everything a run writes, at a path or any fsspec URL. No torch.

config.yaml            the resolved config, as trained
job.json               how it was submitted, and when
code/                  snapshot of the code that runs
attempts/0000.json     one record a start: when, where, on how many ranks, how long until its first step and on what
metrics/0000.jsonl     one line an interval, one file an attempt
logs/rank-0.log        output of each process
pods/                  on Kubernetes: how each pod of an attempt ended, and when one last was alive
checkpoints/           see trainer/checkpoint
ema/                   snapshots of power-function averages, in the checkpoints' format (trainer/posthoc_ema.py)
samples/, curves.png   pictures
evaluation/            an autoencoder's figures, a file an evaluation and final.json; of latent diffusion the same of each
                       validation, validation-step-00001000.json and validation-final.json, and of each evaluation of
                       pictures, images-step-00001000.json and images-final.json
reconstructions/       what it gave back of some images, at the same steps
evaluations/           what `loupe evaluate run`, or the training itself, has measured of its pictures, a file each
bad_shards.json        shards that could not be read, and from which step on they are left out
worker_deaths/         one record for each data worker that died
hangs/                 one record for each start that a watchdog ended
goodput/               where the time went, a file a start (trainer/goodput.py)
doctor/                what the check of each machine found before a start; in the work folder
stacks/                where all threads were then, a file a start and rank
init_report.json       which weights it began with, where it was not fresh ones
summary.json           how the run ended
report.html            written by `loupe runs report`, when asked
"""

import errno
import io
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainer.checkpoint.errors import CheckpointError
from trainer.config import RunConfig, config_digest, differences_in_words
from trainer.config_text import from_yaml, to_yaml
from trainer.errors import UserError

CONFIG = "config.yaml"
JOB = "job.json"
SUMMARY = "summary.json"
BAD_SHARDS = "bad_shards.json"
CHECKPOINTS = "checkpoints"
EMA_SNAPSHOTS = "ema"
HANGS = "hangs"
GOODPUT = "goodput"
EVALUATIONS = "evaluations"
STACKS = "stacks"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss"}
_LASTING = (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError, IsADirectoryError)
_LASTING_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
"""What a folder that cannot be written says: it stays so until a person mends it."""
_MAX_DIGITS = 30
FLUSH_S = 10.0
"""Longest that a record waits for storage that cannot append, while records come."""


def make_folder(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Where there are folders. Object stores have none, and their clients would make the bucket of a mistyped URL."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & OBJECT_STORES:
        fs.makedirs(path, exist_ok=True)


def parse_json(text: str | bytes) -> Any:
    """A record, which may be damaged or not ours.

    Raises:
        ValueError: it is no JSON, or has numbers of which no double can be made.
        RecursionError: it is too deep.
    """
    return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def modified(fs: fsspec.AbstractFileSystem, path: str) -> float | None:
    """Unix time of a file's last change; None where the storage keeps no times."""
    try:
        found = fs.modified(path)
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(found, datetime):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


class OtherConfig(UserError):
    """A run folder is another config's.

    Args:
        differences: in words.
    """

    def __init__(self, message: str, differences: str) -> None:
        super().__init__(message)
        self.differences = differences


class RunFolder:
    """Paths below are relative to the folder. A write is whole or absent: local files are renamed into place, and
    object stores publish an object only when its upload is complete."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs: fsspec.AbstractFileSystem
        self.fs, self.root = url_to_fs(self.url)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def read_text(self, name: str) -> str:
        return str(self.fs.cat_file(self.path(name)).decode())

    def read_json(self, name: str) -> dict[str, Any]:
        tree = parse_json(self.read_text(name))
        if not isinstance(tree, dict):
            raise UserError(f"{self.url}/{name}: not a JSON object; the file is not ours or is damaged")
        return tree

    def write_bytes(self, name: str, data: bytes) -> None:
        path = self.path(name)
        make_folder(self.fs, os.path.dirname(path))
        if self.is_local:
            temporary = f"{path}.{secrets.token_hex(4)}.tmp"
            self.fs.pipe_file(temporary, data)
            os.replace(temporary, path)
        else:
            self.fs.pipe_file(path, data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, tree: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(tree, indent=1) + "\n")

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in `folder`; empty where there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (os.path.basename(entry.rstrip("/")) for entry in entries)
        return sorted(name for name in names if not name.endswith(".tmp"))

    # --------------------------------------------------------------------------------------------------- config

    def check(self, config: RunConfig) -> None:
        """Confirm that the folder is free or already this config's; writes nothing.

        Raises:
            UserError: it holds a run of another config.
        """
        if not self.exists(CONFIG):
            return
        found = self.config()
        if config_digest(found) != config_digest(config):
            differences = differences_in_words(found, config)
            raise OtherConfig(
                f"{self.url}: holds run {found.name!r} of another config ({differences}); "
                f"continue that one by giving its {CONFIG}, take another --run-dir, or start over with --fresh",
                differences,
            )

    def claim(self, config: RunConfig) -> None:
        """Make the folder this config's, after `check`.

        Raises:
            UserError: it holds a run of another config, or cannot be written.
            OSError: storage did not answer, or not as it should: a later try may go well.
        """
        try:
            self.check(config)
            self.write_text(CONFIG, to_yaml(config))
        except OSError as e:
            if not isinstance(e, _LASTING) and e.errno not in _LASTING_CODES:
                raise
            raise UserError(f"{self.url}: the run folder cannot be written ({e}); give a writable --run-dir") from None

    def config(self) -> RunConfig:
        return from_yaml(self.read_text(CONFIG), source=f"{self.url}/{CONFIG}")

    # ------------------------------------------------------------------------------------------------- attempts

    def start_attempt(self, record: dict[str, Any]) -> int:
        """Write the record of a new start; returns its number, 0 for the first."""
        attempt = len(self.names("attempts"))
        self.write_json(f"attempts/{attempt:04d}.json", record)
        return attempt

    def check_newest(self, attempt: int) -> None:
        """Refuse what only the newest start may do. An older one may live on beside it: on a node that SLURM took for lost.

        Raises:
            CheckpointError: another has started since.
        """
        newest = len(self.names("attempts")) - 1
        if newest > attempt:
            raise CheckpointError(
                f"{self.url}: start {newest} goes on with this run; start {attempt}, this one, must end"
            )

    def add_to_attempt(self, attempt: int, **facts: Any) -> None:
        """What became known later of a start."""
        name = f"attempts/{attempt:04d}.json"
        self.write_json(name, {**self.read_json(name), **facts})

    # -------------------------------------------------------------------------------------------------- metrics

    def metrics_writer(self, attempt: int) -> "JsonlWriter":
        return JsonlWriter(self, f"metrics/{attempt:04d}.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """One record an interval in order of steps; where an attempt repeated steps, its own stand."""
        return _by_step(record for record in self._records() if "step" in record)

    def evaluations(self) -> list[dict[str, Any]]:
        """One record an evaluation, as `metrics`: its step and its figures by name."""
        return _by_step(record["evaluation"] for record in self._records() if "evaluation" in record)

    def validations(self) -> list[dict[str, Any]]:
        """One record a validation, as `metrics`: its step, and each term's values by noise level."""
        return _by_step(record["validation"] for record in self._records() if "validation" in record)

    def last_step_record(self, name: str, max_bytes: int) -> dict[str, Any] | None:
        """The newest record of a step within the last bytes of a metrics file; lines that a full disk, or a kill, has damaged
        are passed over. None where there is none."""
        try:
            size = int(self.fs.size(self.path(name)) or 0)
            data = bytes(self.fs.cat_file(self.path(name), start=max(0, size - max_bytes), end=size)) if size else b""
        except FileNotFoundError:
            return None
        # the first line may have lost its head, the last is being written
        for line in reversed(data.split(b"\n")[1 if size > max_bytes else 0 : -1]):
            try:
                record = parse_json(line) if line else None
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                return record
        return None

    def _records(self) -> Iterator[dict[str, Any]]:
        for name in self.names("metrics"):
            yield from _jsonl(self.read_text(f"metrics/{name}"))


def _by_step(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def _jsonl(text: str) -> Iterator[dict[str, Any]]:
    *lines, _cut = text.split("\n")
    for line in lines:  # what follows the last newline is a line that a kill cut short, or empty
        if line:
            yield parse_json(line)


class JsonlWriter:
    """Appends records as lines. Where the file system cannot append, the whole file is written at each flush: when asked,
    and with a record when the last is some seconds old."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._lines = io.StringIO()
        self._flushed = time.monotonic()
        self._file: Any = None
        if folder.is_local:
            path = folder.path(name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.write(line)
            if time.monotonic() - self._flushed >= FLUSH_S:
                self.flush()

    def flush(self) -> None:
        if not self._file:
            self._folder.write_text(self._name, self._lines.getvalue())
            self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
