"""`loupe doctor`'s checks of what lies elsewhere: the run folder, datasets, frozen networks, and storage's clock. No torch."""

import os
import secrets
import tempfile
import time
from contextlib import suppress

import fsspec

from data.deadlines import call_within
from data.schema import DATASET, INDEX, MAX_DATASET_BYTES, MAX_INDEX_BYTES, parse_dataset
from data.storage import Storage, StorageError, error_class
from data.wds import index_folder
from launch.doctor.checks import GIB, MIB, Blame, Finding, disk, gib
from launch.inputs import check_local, inputs
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.folder import CheckpointFolder
from trainer.config import DatasetConfig, RunConfig, resolve_url
from trainer.errors import UserError, one_line
from trainer.run_folder import CHECKPOINTS, RunFolder, make_folder, modified

SKEW_S = 5.0
"""Leases of data stages, heartbeats and job records compare times of several machines."""
SLOW_S = 1.0
"""A small write that takes longer is worth a warning."""
LEAST_FREE_BYTES, USUAL_FREE_BYTES = 64 * MIB, 5 * GIB
_TOLD_S = 1.0
"""Storage tells times in whole seconds."""


# --------------------------------------------------------------------------------------------------------- run folder


def run_folder(url: str, *, num_bytes: int, deadline_s: float) -> list[Finding]:
    """Write `num_bytes` at random, read them back, compare, delete; and when storage says that was.

    A small write comes first: its time is the latency. What may be left behind by a write that hangs is named
    `.doctor-*.tmp`.
    """
    deadline = time.monotonic() + deadline_s
    try:
        folder = RunFolder(url)
    except (ValueError, ImportError, OSError) as e:
        return [Finding("run folder", "failed", f"{url}: {one_line(e)}", "give another --run-dir", "run")]
    step = "listed"
    try:
        home, made = call_within(lambda: _home(folder), deadline, "look at the run folder")
        small, large = f"{home}/.doctor-{secrets.token_hex(4)}.tmp", f"{home}/.doctor-{secrets.token_hex(4)}.tmp"
        fs, data = folder.fs, os.urandom(num_bytes)
        step = "written"
        before = time.time()
        latency_s = _seconds(lambda: _write(folder, small, data[:1]), deadline, step)
        after = time.time()
        write_s = _seconds(lambda: _write(folder, large, data), deadline, step)
        step = "read back"
        began = time.monotonic()
        same = call_within(lambda: fs.cat_file(large), deadline, step) == data
        read_s = time.monotonic() - began
        step = "asked for times"
        written = call_within(lambda: _modified(fs, small), deadline, step)
        step = "deleted"
        for path in (small, large):
            call_within(lambda path=path: fs.rm_file(path), deadline, step)  # type: ignore[misc]
        if made:
            call_within(lambda: fs.rmdir(home), deadline, step)
    except TimeoutError:
        figure = f"{url}: not {step} within {deadline_s:.0f} s"
        return [Finding("run folder", "failed", figure, "see to the storage, or to this machine's way to it")]
    except Exception as e:  # each storage client has errors of its own
        denied = error_class(e) in ("denied", "missing")
        mend = "check the credentials and permissions" if denied else "see to the storage"
        return [Finding("run folder", "failed", f"{url}: not {step} ({type(e).__name__}: {one_line(e)})", mend,
                        "run" if denied else "nobody")]  # fmt: skip
    mb = num_bytes / 1e6
    figure = f"{url}: {1e3 * latency_s:.0f} ms a write, {mb / write_s:.0f} MB/s written, {mb / read_s:.0f} read"
    figures = {"latency_s": latency_s, "write_mb_per_s": mb / write_s, "read_mb_per_s": mb / read_s}
    clock_finding = clock(written, before, after)
    if not same:
        mend = "this storage, or the way to it, damages data: do not train here"
        return [Finding("run folder", "failed", f"{url}: other bytes came back than were written", mend, "run",
                        figures), clock_finding]  # fmt: skip
    if latency_s > SLOW_S:
        return [Finding("run folder", "warning", figure, "storage is slow to answer", figures=figures), clock_finding]
    return [Finding("run folder", "ok", figure, figures=figures), clock_finding]


def _home(folder: RunFolder) -> tuple[str, bool]:
    """(path to write in, whether it was made for the check): a folder that is not there yet must not be left there."""
    path = folder.root
    if folder.is_local:
        while not os.path.isdir(path) and os.path.dirname(path) != path:
            path = os.path.dirname(path)
        return path, False
    existed = folder.fs.exists(path)
    make_folder(folder.fs, path)
    return path, not existed and bool(folder.fs.isdir(path))


def _write(folder: RunFolder, path: str, data: bytes) -> None:
    if not folder.is_local:
        folder.fs.pipe_file(path, data)
        return
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would be read, not the disk
    except OSError:
        # on a full disk it has taken the last bytes, which the run's records need
        with suppress(OSError):
            os.unlink(path)
        raise


def _seconds(function, deadline: float, what: str) -> float:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    call_within(function, deadline, what)
    return max(time.monotonic() - began, 1e-6)


# -------------------------------------------------------------------------------------------------------------- clock


def _modified(fs: fsspec.AbstractFileSystem, path: str) -> float | None:
    fs.invalidate_cache()
    return modified(fs, path)


def clock(modified: float | None, before: float, after: float) -> Finding:
    """This machine's clock against storage's: the file that storage says was written at `modified` was written between
    `before` and `after`, Unix times of this machine."""
    if modified is None:
        return Finding("clock", "not here", "this storage does not tell when a file was written")
    skew_s = 0.0
    if modified + _TOLD_S < before:
        skew_s = modified + _TOLD_S - before
    elif modified > after + _TOLD_S:
        skew_s = modified - after - _TOLD_S
    figures = {"skew_s": skew_s}
    if abs(skew_s) > SKEW_S:
        behind = "behind" if skew_s > 0 else "ahead of"
        return Finding(
            "clock", "warning", f"{abs(skew_s):.0f} s {behind} storage's", "set it: chrony or ntp", figures=figures
        )
    return Finding("clock", "ok", f"within {max(1.0, abs(skew_s)):.0f} s of storage's", figures=figures)


# --------------------------------------------------------------------------------------------------------------- disks


def run_folder_disk(path: str) -> list[Finding]:
    """Room where the run folder, or what stands in for a remote one, lies: for one more checkpoint, once there is one."""
    try:
        committed = [entry for entry in CheckpointFolder(f"{path}/{CHECKPOINTS}").entries() if entry.committed]
    except CheckpointError as e:
        return [Finding("disk of the run", "failed", one_line(e), "see to the disk", "run")]
    checkpoint = sum(committed[-1].sizes.values()) if committed else 0
    return disk(
        "disk of the run", path, least=max(LEAST_FREE_BYTES, checkpoint),
        usual=max(USUAL_FREE_BYTES, 2 * checkpoint), blame="run",
        mend="make room, or take another --run-dir; the next checkpoint must fit beside those there",
        needed_for=f"a checkpoint takes {gib(checkpoint)}" if checkpoint else "",
    )  # fmt: skip


def cache_disk(config: RunConfig) -> list[Finding]:
    """Room for shards of remote datasets; what they take already counts as room."""
    name = "disk of the cache"
    remote = [d for d in config.data.datasets.values() if "://" in resolve_url(d.url) and d.fetch == "shards"]
    if not remote:
        return [Finding(name, "not here", "no dataset is cached")]
    path, taken = _cache_path(config.data.cache_dir), 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                taken += os.lstat(os.path.join(folder, file)).st_size
            except FileNotFoundError:  # another process makes room
                continue
    wanted = int((config.data.cache_gib or 0) * GIB)
    return disk(
        name, path, least=max(0, LEAST_FREE_BYTES - taken), usual=max(LEAST_FREE_BYTES, wanted - taken), blame="node",
        mend="make room, name a larger disk by data.cache_dir, or lower data.cache_gib",
        needed_for=f"data.cache_gib asks for {gib(wanted)}, of which {gib(taken)} are there" if wanted else "",
    )  # fmt: skip


def _cache_path(configured: str | None) -> str:
    """Where the trainer keeps shards (`data.verified.cache_folder`); makes nothing."""
    if configured:
        return os.path.abspath(os.path.expanduser(configured))
    path = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "loupe")
    above = path
    while not os.path.exists(above) and os.path.dirname(above) != above:
        above = os.path.dirname(above)
    return path if os.access(above, os.W_OK) else os.path.join(tempfile.gettempdir(), f"loupe-cache-{os.getuid()}")


# ------------------------------------------------------------------------------------------------ what the run reads


def dataset(name: str, config: DatasetConfig, *, deadline_s: float) -> list[Finding]:
    """Whether dataset.json and the index can be read, and how long that takes."""
    title, field = f"dataset {name}", f"data.datasets.{name}.url"
    storage = Storage(index_folder(resolve_url(config.url)))
    began = time.monotonic()
    try:
        description = storage.read(DATASET, max_bytes=MAX_DATASET_BYTES, deadline_s=deadline_s)
        parse_dataset(description, source=f"{storage.url}/{DATASET}")
        index = storage.read(INDEX, max_bytes=MAX_INDEX_BYTES, deadline_s=deadline_s)
    except FileNotFoundError as e:
        mend = f"build it, or --set {field}=..."
        return [
            Finding(
                title, "failed", f"{field}: {storage.url} is not a dataset, or not there ({one_line(e)})", mend, "run"
            )
        ]
    except StorageError as e:
        return [
            Finding(title, "failed", f"{field}: {one_line(e)}", "see to the storage, or to this machine's way to it")
        ]
    except UserError as e:
        return [Finding(title, "failed", f"{field}: {e}", blame="run")]
    seconds = time.monotonic() - began
    figures = {"seconds": seconds, "index_bytes": float(len(index))}
    return [
        Finding(title, "ok", f"{storage.url}: index of {len(index) / 1e6:.2g} MB in {seconds:.2g} s", figures=figures)
    ]


def networks(config: RunConfig, *, deadline_s: float) -> list[Finding]:
    """Whether the frozen networks' files, and what the run begins with, are there."""
    name, wanted = "frozen networks", [item for item in inputs(config) if "index.json" not in item[2]]
    if not wanted:
        return [Finding(name, "not here", "the run reads none")]
    problems: list[tuple[str, Blame]] = []
    for field, url, files in wanted:
        try:
            _check_input(field, url, files, deadline_s)
        except StorageError as e:
            problems.append((f"{field}: {one_line(e)}", "nobody"))
        except UserError as e:
            problems.append((str(e), "run"))
    if not problems:
        return [Finding(name, "ok", f"{len(wanted)} there")]
    blame: Blame = "run" if any(blame == "run" for _, blame in problems) else "nobody"
    return [
        Finding(name, "failed", "; ".join(text for text, _ in problems), "put them there, or --set the field", blame)
    ]


def _check_input(field: str, url: str, files: tuple[str, ...], deadline_s: float) -> None:
    path = resolve_url(url)
    if "://" not in path.removeprefix("file://"):
        check_local(field, url, files)
        return
    storage = Storage(path)
    missing = [file for file in files or ("",) if not storage.exists(file, deadline_s=deadline_s)]
    if missing:
        raise UserError(f"{field}: no {f'{storage.url}/{missing[0]}'.rstrip('/')}")
