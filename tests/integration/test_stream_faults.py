"""The stream on the network's and the node's bad days: a real S3 server, and a proxy before it that spoils its answers.

Each fault is survived, or ends in a clear error by its deadline; it is counted; and the next start finds nothing in its way.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3fs

from data import cache as cache_module
from data import storage as storage_module
from data.batches import Batch, BatchRequest
from data.build import build
from data.loader import Loader, WorkerDied
from data.plan import MixSegment, Mixture
from data.reader import Dataset, StorageError, open_dataset
from data.schema import Resize
from data.source import open_source
from tests.faulty_proxy import Fault, Proxy
from tests.s3_server import BUCKET, faulty_s3
from tests.unit.data.conftest import encoded, picture
from trainer.errors import UserError

COUNT, BATCH = 60, 5
STEPS = COUNT // BATCH
ERRORS = "loupe_data_fetch_errors_total"
SHARD_WAIT = ("loupe_data_shard_wait_seconds_total",)


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in about ten shards."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(COUNT):
        (folder / f"{i:04d}.jpg").write_bytes(encoded(picture(i, 160, 200), quality=95))
        (folder / f"{i:04d}.txt").write_text(f"caption {i}")
    out = folder.parent / "built"
    with small_shards():
        build(open_source(folder), str(out), name="x", resize=Resize())
    return out


@contextmanager
def small_shards() -> Iterator[None]:
    import data.build as module

    write = module._write_shards
    module._write_shards = lambda folder, samples, shard_bytes, max_samples: write(
        folder, samples, 64 << 10, max_samples
    )
    try:
        yield
    finally:
        module._write_shards = write


@pytest.fixture
def remote(server: Proxy, local: Path, tmp_path: Path) -> Iterator[str]:
    """The dataset on S3, under a name of its own."""
    fs = s3fs.S3FileSystem()
    path = f"{BUCKET}/{tmp_path.name}"
    for file in local.iterdir():
        fs.put_file(str(file), f"{path}/{file.name}")
    server.faults.clear()
    yield f"s3://{path}"
    server.faults.clear()


def request(step: int, mixture: Mixture, pause_s: float = 0.0) -> BatchRequest:
    time.sleep(pause_s)
    return BatchRequest(step, step * BATCH, mixture.refs(step * BATCH, BATCH), 32)


def loader_of(dataset: Dataset, **options: Any) -> Loader:
    mixture = Mixture({"x": dataset.shard_sizes}, seed=3, window_shards=3, segments=[MixSegment(0, {"x": 1})])
    options = {"num_workers": 1, "prefetch_steps": 2, "timeout_s": 60.0, "prefetch_shards": 3} | options
    return Loader(
        {"x": dataset}, partial(request, mixture=mixture), seed=3, random_crop=False, flip_probability=0.0, **options
    )


def stream(remote: str, cache: Path, deadline_s: float = 45.0, **options: Any) -> list[Batch]:
    dataset = open_dataset(remote, name="x", cache_dir=str(cache), deadline_s=deadline_s)
    with loader_of(dataset, **options) as loader:
        return list(loader.steps(0, STEPS))


def counted(batches: list[Batch], *key: str) -> float:
    return sum(batch.counts.get(key, 0.0) for batch in batches)


@pytest.fixture(scope="module")
def expected(local: Path) -> list[list[str]]:
    """The keys of each batch, from local disk."""
    with loader_of(open_dataset(str(local), name="x"), num_workers=0) as loader:
        batches = list(loader.steps(0, STEPS))
    assert sorted(key for batch in batches for key in batch.keys) == [f"x/{i:04d}.jpg" for i in range(COUNT)]
    return [batch.keys for batch in batches]


def keys(batches: list[Batch]) -> list[list[str]]:
    return [batch.keys for batch in batches]


# --------------------------------------------------------------------------------------------------------------- survived


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("503", times=8), "server"),
        (Fault("cut", times=16), "server"),
        (Fault("flip", times=1), "damaged"),
        (Fault("hang", times=2), "timeout"),
    ],
    ids=["503", "cut", "flipped", "hanging"],
)
def test_what_passes_is_survived(
    server: Proxy, remote: str, expected: list[list[str]], tmp_path: Path, fault: Fault, error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.05)
    if fault.kind == "hang":  # left behind after 3 s, and asked again as often as a busy machine needs
        monkeypatch.setattr(storage_module, "ATTEMPTS_AT_HANGING", 30)
        monkeypatch.setattr(cache_module, "ATTEMPTS_AT_HANGING", 30)
    fault.happened = 0
    server.faults.append(fault)
    batches = stream(remote, tmp_path / "cache", deadline_s=90.0, num_workers=0)
    assert keys(batches) == expected
    assert fault.happened == fault.times
    errors = {key[1]: counted(batches, *key) for batch in batches for key in batch.counts if key[0] == ERRORS}
    assert set(errors) == {error}, errors
    assert not any(batch.substitutions or batch.bad_shards for batch in batches)
    assert not list((tmp_path / "cache").glob("shards/*/.*"))


def test_slow_storage_is_waited_for(server: Proxy, remote: str, expected: list[list[str]], tmp_path: Path) -> None:
    """At 200 KB/s."""
    server.faults.append(Fault("slow", amount=200_000))
    batches = stream(remote, tmp_path / "cache")
    assert keys(batches) == expected
    assert counted(batches, SHARD_WAIT[0]) > 0.5
    assert counted(batches, "loupe_data_fetch_seconds_total") > 1


def seconds_waited(remote: str, cache: Path, prefetch_shards: int) -> float:
    """Of the steps after the third, each of which takes 0.3 s besides."""
    dataset = open_dataset(remote, name="x", cache_dir=str(cache))
    total = 0.0
    with loader_of(dataset, prefetch_shards=prefetch_shards, prefetch_steps=1) as loader:
        steps = loader.steps(0, STEPS)
        for step in range(STEPS):
            began = time.monotonic()
            next(steps)
            total += time.monotonic() - began if step > 2 else 0.0
            time.sleep(0.3)
    return total


def test_late_storage_stalls_no_step_when_it_is_asked_ahead(server: Proxy, remote: str, tmp_path: Path) -> None:
    """Each answer takes 0.3 s, each step of training 0.3 s: shards come in time, if they are asked for ahead. A machine that is
    busy with other things makes steps wait too, so there are several tries."""
    server.faults.append(Fault("late", amount=0.3))
    tries = []
    for number in range(5):
        waited = {shards: seconds_waited(remote, tmp_path / f"cache-{number}-{shards}", shards) for shards in (0, 3)}
        assert waited[0] > 0.5
        tries.append(waited[3] / waited[0])
        if tries[-1] < 0.5:
            break
    assert min(tries) < 0.5


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_shard_that_stays_bad_is_left_out(
    remote: str, expected: list[list[str]], local: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.05)
    fs = s3fs.S3FileSystem()
    path = f"{remote}/shard.00002.mds"
    data = bytearray(fs.cat_file(path))
    if how == "missing":
        fs.rm_file(path)
    elif how == "truncated":
        fs.pipe_file(path, bytes(data[:-100]))
    else:
        data[len(data) // 2] ^= 4
        fs.pipe_file(path, bytes(data))
    sizes = open_dataset(str(local), name="x").shard_sizes
    bad = {f"x/{i:04d}.jpg" for i in range(int(sizes[:2].sum()), int(sizes[:3].sum()))}
    batches = stream(remote, tmp_path / "cache", num_workers=0)
    reason = "missing_shard" if how == "missing" else "damaged_shard"
    assert {shard for batch in batches for shard in batch.bad_shards.items()} == {(("x", 2), reason)}
    for batch, right in zip(batches, expected, strict=True):
        assert [a if a not in bad else "" for a in right] == [
            key if a not in bad else "" for key, a in zip(batch.keys, right, strict=True)
        ]
        assert not set(batch.keys) & bad
    assert sum(len(batch.substitutions) for batch in batches) == len(bad)
    assert (
        counted(batches, ERRORS, "missing" if how == "missing" else "damaged") >= 3
    )  # tried again before it was given up
    again = stream(remote, tmp_path / "cache", num_workers=1)
    assert keys(again) == keys(batches)  # in a process that finds out for itself
    assert not list((tmp_path / "cache").glob("shards/*/*shard.00002.mds*"))


# ----------------------------------------------------------------------------------------------------------- clear errors


def test_storage_that_hangs_for_ever_is_an_error_by_its_deadline(
    server: Proxy, remote: str, expected: list[list[str]], tmp_path: Path
) -> None:
    server.faults.append(Fault("hang"))
    began = time.monotonic()
    with pytest.raises(
        StorageError, match=r"^s3://[^\n]*shard.000\d\d.mds: not read within [13] s \(TimeoutError: [^\n]*$"
    ):
        stream(remote, tmp_path / "cache", deadline_s=3.0)
    assert time.monotonic() - began < 100
    server.faults.clear()
    server.released.set()
    assert keys(stream(remote, tmp_path / "cache")) == expected
    server.released.clear()


def test_denied_is_said_at_once(server: Proxy, remote: str, tmp_path: Path) -> None:
    server.faults.append(Fault("403"))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^[^\n]*access denied [^\n]*check the credentials and permissions$"):
        stream(remote, tmp_path / "cache", deadline_s=500.0, timeout_s=500.0)
    assert time.monotonic() - began < 3000


def first_of(steps: Any) -> None:
    with suppress(WorkerDied):
        next(steps)


def test_a_killed_worker_leaves_nothing_that_blocks_the_next_start(
    server: Proxy, remote: str, expected: list[list[str]], tmp_path: Path
) -> None:
    server.faults.append(Fault("slow", amount=3_000))
    dataset = open_dataset(remote, name="x", cache_dir=str(tmp_path / "cache"))
    with loader_of(dataset) as loader:
        steps = loader.steps(0, STEPS)
        while not list((tmp_path / "cache").glob("shards/*/.*.tmp")):
            if not loader._workers:
                threading.Thread(target=first_of, args=(steps,), daemon=True).start()
            time.sleep(0.3)
        worker = loader._workers[0]
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join(120)
    assert list((tmp_path / "cache").glob("shards/*/.*.tmp"))
    server.faults.clear()
    assert keys(stream(remote, tmp_path / "cache")) == expected
    assert not list((tmp_path / "cache").glob("shards/*/.*.tmp"))


def test_a_killed_worker_is_named(remote: str, tmp_path: Path) -> None:
    dataset = open_dataset(remote, name="x", cache_dir=str(tmp_path / "cache"))
    with loader_of(dataset, prefetch_steps=1, timeout_s=500.0) as loader:
        steps = loader.steps(0, 10_000)
        next(steps)
        os.kill(loader._workers[0].pid or 0, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=r"data worker \d+ died \(by SIGKILL"):
            list(steps)
    assert time.monotonic() - began < 300


# ----------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 KB: room for about four of the shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "none", str(folder)], capture_output=True, check=False
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(
            "no file system can be mounted here; tests/unit/data/test_cache.py has the same with a faked ENOSPC"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_gives_up_old_shards(remote: str, expected: list[list[str]], small_disk: Path) -> None:
    batches = stream(remote, small_disk, prefetch_shards=1)
    assert keys(batches) == expected
    assert counted(batches, "loupe_data_cache_evictions_total") >= 3


def test_a_disk_that_others_have_filled_is_a_clear_error(
    remote: str, expected: list[list[str]], small_disk: Path
) -> None:
    (small_disk / "theirs").write_bytes(bytes(shutil.disk_usage(small_disk).free - (40 << 10)))
    with pytest.raises(UserError, match=r"^data\.cache_(gib|dir): [^\n]*$"):
        stream(remote, small_disk, prefetch_shards=1)
    (small_disk / "theirs").unlink()
    assert keys(stream(remote, small_disk, prefetch_shards=1)) == expected


def size_if_there(file: Path) -> int:
    """A cache drops files at any moment."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_bounded_cache_stays_within_its_bound(remote: str, expected: list[list[str]], tmp_path: Path) -> None:
    bound = 4 * (64 << 10)
    dataset = open_dataset(remote, name="x", cache_dir=str(tmp_path / "cache"), cache_gib=bound / 2**30)
    seen = []
    largest = 0
    with loader_of(dataset, prefetch_shards=1) as loader:
        for batch in loader.steps(0, 2 * STEPS):
            seen.append(batch)
            largest = max(largest, sum(map(size_if_there, (tmp_path / "cache").glob("shards/*/*"))))
    assert keys(seen[:STEPS]) == expected
    assert largest <= bound
    assert counted(seen, "loupe_data_cache_evictions_total") > 5
