"""The node's cache: bounded, never empty under a reader's feet, and nothing of a dead process is in the way."""

import errno
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

from data import cache as cache_module
from data import storage as storage_module
from data.cache import CacheFull, CacheSettings, ShardCache
from data.counts import Counts
from data.schema import Shard
from data.storage import Storage, StorageError
from trainer.errors import UserError

SIZE = 100_000
EVICTIONS = ("loupe_data_cache_evictions_total",)


class Remote:
    """Shards of 100,000 random bytes in fsspec's memory."""

    def __init__(self, name: str, count: int) -> None:
        self.url = f"memory://{name}/remote"
        self.storage = Storage(self.url)
        self.shards = []
        for i in range(count):
            data = secrets.token_bytes(SIZE)
            fsspec.filesystem("memory").pipe_file(f"/{name}/remote/{i}.mds", data)
            self.shards.append(Shard(f"{i}.mds", 1, SIZE, xxhash.xxh64_hexdigest(data), {}))


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path.name, 6)


def new_cache(tmp_path: Path, num_shards: float | None = None) -> ShardCache:
    """With room for so many shards."""
    gib = None if num_shards is None else num_shards * SIZE / 2**30
    return ShardCache(CacheSettings(str(tmp_path / "cache"), gib), Counts())


def there(tmp_path: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in (tmp_path / "cache").glob("shards/*/*.mds")}


def age(cache: ShardCache, remote: Remote, index: int, seconds: float) -> None:
    """As if the shard had been opened so long ago."""
    mark = cache.marks._file(cache.place(remote.url, remote.shards[index]))
    os.utime(mark, (time.time() - seconds,) * 2)


def test_what_was_opened_longest_ago_goes_first(tmp_path: Path, remote: Remote) -> None:
    cache = new_cache(tmp_path, 3.2)
    for i in range(3):
        assert cache.open(remote.storage, remote.shards[i])
        age(cache, remote, i, 100 - i)
    assert cache.open(remote.storage, remote.shards[0])  # used again: now 1 is the oldest
    assert cache.open(remote.storage, remote.shards[3])
    assert there(tmp_path) == {"0.mds", "2.mds", "3.mds"}
    counts = cache._counts.take()
    assert counts[EVICTIONS] == 1
    assert counts["loupe_data_cache_hits_total",] == 1
    assert counts["loupe_data_cache_misses_total",] == 4
    assert counts["loupe_data_cache_bytes",] == 3 * SIZE
    assert len(list((tmp_path / "cache" / "verified").iterdir())) == 3  # marks go with their shards


def test_what_is_open_stays(tmp_path: Path, remote: Remote) -> None:
    cache, other = new_cache(tmp_path, 2.5), new_cache(tmp_path, 2.5)
    first = cache.open(remote.storage, remote.shards[0])
    assert first
    age(cache, remote, 0, 100)
    for i in range(1, 5):
        assert other.open(remote.storage, remote.shards[i])
    assert there(tmp_path) == {"0.mds", "4.mds"}
    second = other.open(remote.storage, remote.shards[4])
    with pytest.raises(
        CacheFull, match=r"data.cache_gib: the shards in use and the next take .* may hold .*; raise it"
    ):
        cache.open(remote.storage, remote.shards[5])
    assert xxhash.xxh64_hexdigest(first.read(0, SIZE)) == remote.shards[0].hash
    assert not list((tmp_path / "cache").glob("shards/*/.*"))
    del second  # closed
    assert cache.open(remote.storage, remote.shards[5])


def test_the_count_of_bytes_is_found_again(tmp_path: Path, remote: Remote) -> None:
    cache = new_cache(tmp_path, 3.2)
    assert cache.open(remote.storage, remote.shards[0])
    (tmp_path / "cache" / ".room").write_bytes(b"%20d" % (50 * SIZE))  # of processes that were killed as they fetched
    assert cache.open(remote.storage, remote.shards[1])
    assert there(tmp_path) == {"0.mds", "1.mds"}
    assert int((tmp_path / "cache" / ".room").read_bytes()) == 2 * SIZE


def test_the_default_bound_is_a_share_of_the_free_disk(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    assert new_cache(tmp_path).limit_bytes() == pytest.approx(0.8 * disk.f_bavail * disk.f_frsize, rel=0.05)


# ------------------------------------------------------------------------------------------------------------ many processes


def register_slow() -> None:
    """A local folder that is no local file system to us, and takes its time."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Slow(DirFileSystem):  # type: ignore[misc]
        protocol = "slow"

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(path="/", fs=LocalFileSystem())

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(path).removeprefix("slow://")

        def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            return super().cat_file(path, *args, **kwargs)

    fsspec.register_implementation("slow", Slow, clobber=True)


def slow_worker(name: str, folder: str, out: Any) -> None:
    register_slow()
    storage = Storage(f"slow://{name}")
    assert not storage.is_local
    cache = ShardCache(CacheSettings(folder), Counts())
    for path in sorted(Path(name).iterdir()):
        held = cache.open(storage, Shard(path.name, 1, SIZE, xxhash.xxh64_hexdigest(path.read_bytes()), {}))
        assert held
        assert held.read(0, SIZE) == path.read_bytes()
    out.put(cache._counts.take().get(("loupe_data_cache_misses_total",), 0.0))


def test_a_node_fetches_each_shard_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.mds").write_bytes(secrets.token_bytes(SIZE))
    context = multiprocessing.get_context("spawn")
    out: Any = context.Queue()
    workers = [context.Process(target=slow_worker, args=(str(source), str(tmp_path / "cache"), out)) for _ in range(3)]
    for worker in workers:
        worker.start()
    fetched = [out.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert sum(fetched) == 4
    assert there(tmp_path) == {"0.mds", "1.mds", "2.mds", "3.mds"}


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tests.unit.data.test_cache import *
register_slow()
from fsspec import get_filesystem_class
cls = get_filesystem_class("slow")
def hang(self, path, *args, **kwargs):
    print("fetching", flush=True)
    time.sleep(600)
cls.cat_file = hang
source = Path(sys.argv[2])
cache = ShardCache(CacheSettings(sys.argv[3]), Counts())
held = Path(sys.argv[3]) / "held"
(path,) = source.iterdir()
cache.open(Storage(f"slow://{source}"), Shard(path.name, 1, SIZE, xxhash.xxh64_hexdigest(path.read_bytes()), {}))
"""


def test_a_killed_fetch_blocks_nobody_and_is_swept(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    (source / "a.mds").write_bytes(data := secrets.token_bytes(SIZE))
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, root, str(source), str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    try:
        assert process.stdout
        assert process.stdout.readline() == "fetching\n"
        shard = Shard("a.mds", 1, SIZE, xxhash.xxh64_hexdigest(data), {})
        register_slow()
        cache, storage = new_cache(tmp_path), Storage(f"slow://{source}")
        (temporary,) = folder.glob("shards/*/.*.tmp")
        assert cache.open(storage, shard, wait=False) is None  # the living are left alone, and not waited for
        assert temporary.exists()
        began = time.monotonic()
        with pytest.raises(StorageError, match="another process has been fetching it for 0 s"):
            cache.open(storage, shard, deadline_s=0.2)
        assert time.monotonic() - began < 300
        process.send_signal(signal.SIGKILL)
        process.wait()
        abandoned = temporary.with_name(".another.mds.tmp")
        abandoned.write_bytes(b"half")
        new_cache(tmp_path).sweep()
        assert not abandoned.exists()
        assert not temporary.exists()
        held = cache.open(storage, shard, deadline_s=300)
        assert held
        assert held.read(0, SIZE) == data
    finally:
        process.kill()
        process.wait()


def test_a_fetch_that_is_waited_for_becomes_a_hit(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads of one process, such as a worker and its prefetcher."""
    memory = type(fsspec.filesystem("memory"))
    read, asked = memory.cat_file, []

    def slow(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(path)
        time.sleep(0.3)
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(memory, "cat_file", slow)
    cache = new_cache(tmp_path)
    thread = threading.Thread(target=cache.open, args=(remote.storage, remote.shards[0]))
    thread.start()
    while not asked:
        time.sleep(0.01)
    assert cache.open(remote.storage, remote.shards[0])
    thread.join()
    assert len(asked) == 1


# ----------------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_is_survived_where_shards_can_go(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC from the operating system's write: first while two shards lie there, then always."""
    cache = new_cache(tmp_path)
    for i in range(2):
        assert cache.open(remote.storage, remote.shards[i])
        age(cache, remote, i, 100 - i)
    write, room_for = os.pwrite, [1]

    def full(descriptor: int, data: Any, position: int) -> int:
        if len(data) == SIZE and len(there(tmp_path)) > room_for[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, position)

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    assert cache.open(remote.storage, remote.shards[2])
    assert there(tmp_path) == {"1.mds", "2.mds"}
    room_for[0] = -1
    with pytest.raises(UserError, match=r"data.cache_dir: .*cannot be written \(No space left on device\); free space"):
        cache.open(remote.storage, remote.shards[3])
    assert there(tmp_path) == set()  # all that could go has gone
    assert not list((tmp_path / "cache").glob("shards/*/.*.tmp"))


def test_a_shard_that_rots_in_the_cache_is_counted_and_fetched_anew(tmp_path: Path, remote: Remote) -> None:
    cache = new_cache(tmp_path)
    assert cache.open(remote.storage, remote.shards[0])
    path = cache.place(remote.url, remote.shards[0])
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    held = cache.open(remote.storage, remote.shards[0])
    assert held
    assert xxhash.xxh64_hexdigest(held.read(0, SIZE)) == remote.shards[0].hash
    assert cache._counts.take()["loupe_data_fetch_errors_total", "damaged"] == 1


def test_links_in_the_cache_are_not_followed(tmp_path: Path, remote: Remote) -> None:
    cache = new_cache(tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = cache.place(remote.url, remote.shards[0])
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.tmp").symlink_to(victim)
    assert cache.open(remote.storage, remote.shards[0])
    path.with_name(f".{path.name}.tmp").symlink_to(victim)
    path.unlink()
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        cache.open(remote.storage, remote.shards[0])
    assert victim.read_bytes() == b"precious"


def test_pauses_between_tries_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many nodes that lost one storage must not come back all at once."""
    paused: list[list[float]] = []
    monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: paused[-1].append(seconds))
    for _ in range(2):
        paused.append([])
        tries = [OSError("gone")] * 5

        def attempt(_deadline: float, tries: list[OSError] = tries) -> str:
            if tries:
                raise tries.pop()
            return "done"

        assert storage_module.with_retries(attempt, "x", 1000.0) == "done"
    assert paused[0] != paused[1]
    for pauses in paused:
        for i, pause in enumerate(pauses):
            assert 0.25 * 2**i <= pause <= 0.75 * 2**i
