"""The run folder: everything a run writes, at a path or any fsspec URL. No torch.

config.yaml            the resolved config, as trained
job.json               how it was submitted, and when
code/                  snapshot of the code that runs
attempts/0000.json     one record a start: when, where, on how many ranks
metrics/0000.jsonl     one line an interval, one file an attempt
logs/rank-0.log        output of each process
pods/                  on Kubernetes: how each pod of an attempt ended, and when one last was alive
checkpoints/           see trainer/checkpoint
samples/, curves.png   pictures
evaluation/            an autoencoder's figures, a file an evaluation and final.json
reconstructions/       what it gave back of some images, at the same steps
bad_shards.json        shards that could not be read, and from which step on they are left out
worker_deaths/         one record for each data worker that died
hangs/                 one record for each start that a watchdog ended
doctor/                what the check of each machine found before a start; in the work folder
stacks/                where all threads were then, a file a start and rank
init_report.json       which weights it began with, where it was not fresh ones
summary.json           how the run ended
"""

import io
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainer.config import RunConfig, config_digest, differences_in_words
from trainer.config_text import from_yaml, to_yaml
from trainer.errors import UserError

CONFIG = "config.yaml"
JOB = "job.json"
SUMMARY = "summary.json"
BAD_SHARDS = "bad_shards.json"
CHECKPOINTS = "checkpoints"
HANGS = "hangs"
STACKS = "stacks"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss"}
FLUSH_S = 10.0
"""Longest that a record waits for storage that cannot append, while records come."""


def make_folder(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Where there are folders. Object stores have none, and their clients would make the bucket of a mistyped URL."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & OBJECT_STORES:
        fs.makedirs(path, exist_ok=True)


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
        tree = json.loads(self.read_text(name))
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
            raise UserError(
                f"{self.url}: holds run {found.name!r} of another config ({differences_in_words(found, config)}); "
                f"continue that one by giving its {CONFIG}, take another --run-dir, or start over with --fresh"
            )

    def claim(self, config: RunConfig) -> None:
        """Make the folder this config's, after `check`.

        Raises:
            UserError: it holds a run of another config, or cannot be written.
        """
        try:
            self.check(config)
            self.write_text(CONFIG, to_yaml(config))
        except OSError as e:
            raise UserError(f"{self.url}: the run folder cannot be written ({e}); give a writable --run-dir") from None

    def config(self) -> RunConfig:
        return from_yaml(self.read_text(CONFIG), source=f"{self.url}/{CONFIG}")

    # ------------------------------------------------------------------------------------------------- attempts

    def start_attempt(self, record: dict[str, Any]) -> int:
        """Write the record of a new start; returns its number, 0 for the first."""
        attempt = len(self.names("attempts"))
        self.write_json(f"attempts/{attempt:04d}.json", record)
        return attempt

    # -------------------------------------------------------------------------------------------------- metrics

    def metrics_writer(self, attempt: int) -> "JsonlWriter":
        return JsonlWriter(self, f"metrics/{attempt:04d}.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """One record an interval in order of steps; where an attempt repeated steps, its own stand."""
        return _by_step(record for record in self._records() if "step" in record)

    def evaluations(self) -> list[dict[str, Any]]:
        """One record an evaluation, as `metrics`: its step and its figures by name."""
        return _by_step(record["evaluation"] for record in self._records() if "evaluation" in record)

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
            yield json.loads(line)


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
