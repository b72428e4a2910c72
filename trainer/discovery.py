"""Where Prometheus finds the ranks of a run: addresses with labels, in the run folder and in a discovery folder. No torch.

In the run folder it is `metrics_targets.json`, which `loupe discovery serve` answers Prometheus from; in a discovery folder,
on a disk that Prometheus sees too, a file a run in the form of its file_sd. Both are of one start, and end with it: the
start's rank 0 takes them back, or its launcher where that was killed.
"""

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.background import Background
from trainer.errors import UserError, one_line
from trainer.urls import public_url

TARGETS = "metrics_targets.json"
"""In the run folder."""
DIR_VARIABLE = "LOUPE_DISCOVERY_DIR"
"""The discovery folder, where the config names none."""
SCRAPE_JOB = "loupe"
"""What Prometheus' scrape job should be called; dashboards and rules go by it."""
MAX_TARGETS = 65_536
"""Of a start, that are believed."""
MAX_FILE_BYTES = 32 << 20
START_LABEL = "__meta_loupe_start"
"""Each target of ours has it."""
BEAT_S = 60.0
"""So often a file is renewed."""
STORAGE_S = 20.0
"""Longest that training waits for a shared disk, or for storage at its end, to take a few hundred bytes."""
MAX_FILES = 10_000
"""Of a discovery folder, that are looked at."""
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?):([1-9]\d{0,4})")
_LABEL_CHARACTERS = 256


@dataclass(frozen=True)
class Target:
    """A process that answers /metrics."""

    address: str
    """host:port."""
    node: str
    rank: str = ""
    """Empty: it is no rank."""


@dataclass(frozen=True)
class Targets:
    """All of one start."""

    run: str
    """The last part of the run folder's name, as `loupe runs` has it."""
    job_id: str
    folder: str
    """The run folder, without credentials."""
    targets: tuple[Target, ...]
    start: int = 0
    """Number of the start."""
    time: float = 0.0
    """Unix time at which they were written."""
    scheme: str = "http"

    def as_record(self) -> dict[str, Any]:
        """What `metrics_targets.json` has."""
        return {
            "targets": [target.address for target in self.targets], "attempt": self.start, "run": self.run,
            "job_id": self.job_id, "nodes": [target.node for target in self.targets],
            "ranks": [target.rank for target in self.targets], "scheme": self.scheme, "time": self.time,
        }  # fmt: skip

    def groups(self) -> list[dict[str, Any]]:
        """As file_sd and http_sd have them: a group a target. Labels that begin with __meta_ are seen by relabelling only."""
        found = []
        for target in self.targets:
            labels = {"run": self.run, "job_id": self.job_id, "node": target.node}
            labels |= {"rank": target.rank} if target.rank else {}
            labels |= {"__scheme__": self.scheme} if self.scheme != "http" else {}
            labels |= {
                "__meta_loupe_folder": self.folder,
                START_LABEL: str(self.start),
                "__meta_loupe_time": f"{self.time:.0f}",
            }
            found.append({"targets": [target.address], "labels": labels})
        return found


def targets_of(record: Mapping[str, Any], *, run: str, folder: str) -> Targets:
    """What `metrics_targets.json` says, its values checked: whoever reads it hands it on to Prometheus.

    Args:
        run, folder: of the run folder that it lies in.

    Raises:
        UserError: it is not ours, or damaged.
    """
    addresses, nodes, ranks = record.get("targets"), record.get("nodes"), record.get("ranks")
    if not isinstance(addresses, list) or len(addresses) > MAX_TARGETS:
        raise UserError(f"{TARGETS}: no list of targets")
    if not isinstance(nodes, list) or len(nodes) != len(addresses):
        nodes = [None] * len(addresses)
    if not isinstance(ranks, list) or len(ranks) != len(addresses):
        ranks = [str(rank) for rank in range(len(addresses))]
    found = []
    for address, node, rank in zip(addresses, nodes, ranks, strict=True):
        if not is_address(address):
            raise UserError(f"{TARGETS}: {str(address)[:80]!r} is no host:port")
        found.append(Target(address, label(node) or address.rpartition(":")[0], label(rank)))
    start, at = record.get("attempt"), record.get("time")
    return Targets(
        run=run, job_id=label(record.get("job_id")) or "unknown", folder=folder, targets=tuple(found),
        start=start if isinstance(start, int) else 0,
        time=float(at) if isinstance(at, int | float) else 0.0,
        scheme="https" if record.get("scheme") == "https" else "http",
    )  # fmt: skip


def is_address(value: Any) -> bool:
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    return match is not None and int(match[3]) < 65_536


def label(value: Any) -> str:
    """A label's value: text of one line and some length; empty for what is none."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    return "".join(c if c.isprintable() else "_" for c in str(value))[:_LABEL_CHARACTERS]


def listen_on(configured: str | None, environ: Mapping[str, str]) -> str:
    """The address that /metrics listens on. In a cluster's job others must reach it; elsewhere nobody need."""
    in_job = "SLURM_JOB_ID" in environ or "KUBERNETES_SERVICE_HOST" in environ
    return configured or ("0.0.0.0" if in_job else "127.0.0.1")


def address_of(bind_address: str, port: int, *, host: str) -> str:
    """Where others reach what listens there; `host`: this machine's name or address, for what listens on all of them."""
    name = host if bind_address in ("", "0.0.0.0", "::") else bind_address
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def public(url: str) -> str:
    """A run folder's URL as others may read it: without what may be a password."""
    try:
        return public_url(url)
    except UserError:
        return f"{url.partition('://')[0]}://..."


# ------------------------------------------------------------------------------------------------ the discovery folder


def discovery_dir(configured: str | None, environ: Mapping[str, str]) -> str | None:
    """The folder to write to; None: no discovery folder."""
    return configured or environ.get(DIR_VARIABLE) or None


def publish(path: str, targets: Targets, *, alone: bool = True) -> str:
    """Write the file of a start into discovery folder `path`, whole or not at all; returns the file's path.

    Args:
        alone: nothing else has this folder now, so other files of it are of jobs that are gone, and are removed.

    Raises:
        OSError: it cannot be written.
    """
    os.makedirs(path, exist_ok=True)
    file = os.path.join(path, file_name(targets.run, targets.job_id, targets.folder))
    # not *.json, which Prometheus may read at any moment; readable by its user, as the umask has it
    temporary = f"{file}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            json.dump(targets.groups(), out, indent=1)
            out.write("\n")
        os.replace(temporary, file)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    for other in files_of(path, targets.folder) if alone else ():
        if other != file:
            with suppress(FileNotFoundError):
                os.unlink(other)
    return file


def file_name(run: str, job_id: str, folder: str) -> str:
    """RUN-JOB-HASH.json. The hash is of the run folder: two folders may have one name."""
    plain = "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", text)[:100].lstrip(".") or "_" for text in (run, job_id))
    return f"{plain}-{_hash(folder)}.json"


def _hash(folder: str) -> str:
    return hashlib.sha256(folder.encode()).hexdigest()[:8]


def files_of(path: str, folder: str) -> list[str]:
    """The files in discovery folder `path` that are of run folder `folder`."""
    end = f"-{_hash(folder)}.json"
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        return sorted(entry.path for entry in entries if entry.name.endswith(end))
    return []


def withdraw(file: str, start: int) -> None:
    """Remove what `publish` wrote, unless it is a later start's by now: an earlier one may live on beside it.

    Raises:
        OSError: it cannot be removed.
    """
    with suppress(FileNotFoundError):
        groups = read_groups(file)
        if any(group["labels"].get(START_LABEL) != str(start) for group in groups):
            return
        os.unlink(file)


def withdraw_all(path: str, folder: str) -> list[str]:
    """Remove a run's files, as its launcher does once no process of it lives; returns their paths.

    Raises:
        OSError: one cannot be removed.
    """
    removed = []
    for file in files_of(path, folder):
        with suppress(FileNotFoundError):
            os.unlink(file)
            removed.append(file)
    return removed


class Announcement:
    """A file in a discovery folder that a thread renews until it is withdrawn, so that files of the dead are told apart; one
    that is gone is written again."""

    def __init__(self, path: str, targets: Targets, *, alone: bool, on_failure: Callable[[str], None]) -> None:
        """Write it; a folder that does not answer holds nobody up.

        Args:
            alone: as `publish` has it.
            on_failure: told in words what went wrong, at each try; from a thread.
        """
        self._path, self._targets, self._alone, self._on_failure = path, targets, alone, on_failure
        self._file: str | None = None
        self._end = threading.Event()
        self._writing = False
        self._write()
        threading.Thread(target=self._renew, name="discovery", daemon=True).start()

    def _write(self) -> None:
        def write() -> None:
            try:
                if not os.path.isabs(self._path):
                    raise OSError("not a whole path on a disk")
                self._file = publish(self._path, self._targets, alone=self._alone)
                if self._end.is_set():  # while a disk held this up
                    withdraw(self._file, self._targets.start)
            finally:
                self._writing = False

        self._writing = True
        if trouble := in_time(write):
            self._on_failure(f"Prometheus does not find this by {self._path}: {trouble}")

    def _renew(self) -> None:
        while not self._end.wait(BEAT_S):
            if self._writing:  # a disk that hangs gets no second thread
                continue
            try:
                os.utime(self._file or "")
            except OSError:
                self._write()

    def withdraw(self) -> None:
        self._end.set()
        file, start = self._file, self._targets.start
        if file and (trouble := in_time(lambda: withdraw(file, start))):
            self._on_failure(f"{file} is left behind ({trouble}); `loupe discovery prune` removes it")


def after_the_ranks(configured: str | None, folder: str) -> str | None:
    """For launchers, after all processes of a start have ended, however: take back what was killed before it could. Returns
    what went wrong, in words: no launcher ends for that."""
    path = discovery_dir(configured, os.environ)
    trouble = in_time(lambda: withdraw_all(path, public(folder))) if path else None
    return (
        f"the run's file in {path} is left behind ({trouble}); `loupe discovery prune` removes it" if trouble else None
    )


def in_time(work: Callable[[], object], *, seconds: float = STORAGE_S) -> str | None:
    """Do what may hang; returns why it was not done, in words."""
    background = Background[object]("discovery")
    background.start(work)
    background.wait(seconds)
    if background.running:
        return f"it does not answer within {seconds:.0f} s"
    try:
        background.collect()
    except Exception as e:  # each storage client has errors of its own
        return one_line(e)
    return None


def files_in(path: str) -> Iterator[str]:
    """The targets files in a discovery folder; of other programs' files, some.

    Raises:
        UserError: it cannot be listed, or holds too many.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(path) if re.search(r"-[0-9a-f]{8}\.json$", entry.name))
    except OSError as e:
        raise UserError(f"{path}: cannot be listed ({one_line(e)}); name the discovery folder") from None
    if len(names) > MAX_FILES:
        raise UserError(f"{path}: holds {len(names)} files, {MAX_FILES} at most are read; is it a discovery folder?")
    for name in names:
        yield os.path.join(path, name)


def read_groups(file: str) -> list[dict[str, Any]]:
    """
    Raises:
        UserError: it is not a targets file.
        OSError: it cannot be read.
    """
    with open(file, "rb") as source:
        data = source.read(MAX_FILE_BYTES + 1)
    try:
        groups = json.loads(data[:MAX_FILE_BYTES]) if len(data) <= MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        groups = None
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise UserError(f"{Path(file).name}: not a file of targets")
    return groups


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("targets"), list) and isinstance(group.get("labels"), dict)
