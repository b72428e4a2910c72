"""`loupe doctor` and storage: a real S3 server, and one that hangs, refuses or damages; local folders."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import s3fs

from data.schema import DATASET, INDEX
from launch.doctor.checks import Finding
from launch.doctor.storage import cache_disk, clock, dataset, networks, run_folder, run_folder_disk
from tests.faulty_proxy import Fault, Proxy
from tests.s3_server import BUCKET, faulty_s3
from tests.tiny import tiny
from trainer.config import CODE_ROOT, DatasetConfig

EMOJI = CODE_ROOT / "data/assets/emoji_64"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def url(server: Proxy, tmp_path: Path) -> Iterator[str]:
    yield f"s3://{BUCKET}/{tmp_path.name}"
    server.faults.clear()
    server.released.set()
    server.released.clear()


def check(url: str, deadline_s: float = 20.0, num_bytes: int = MIB) -> list[Finding]:
    return run_folder(url, num_bytes=num_bytes, deadline_s=deadline_s)


def names(url: str) -> list[str]:
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    return [name for name in fs.find(BUCKET) if url.removeprefix("s3://") in name]


# ---------------------------------------------------------------------------------------------------------- run folder


def test_a_bucket_is_written_read_and_left_as_it_was(url: str) -> None:
    storage, clock = check(url)
    assert (storage.status, clock.status) == ("ok", "ok")
    assert storage.figures["write_mb_per_s"] > 0
    assert names(url) == []


@pytest.mark.parametrize(("method", "step"), [("PUT", "written"), ("GET", "read back"), ("DELETE", "deleted")], ids=str)
def test_storage_that_hangs_is_told_by_the_deadline(url: str, server: Proxy, method: str, step: str) -> None:
    server.faults.append(Fault("hang", ".doctor-", methods=(method,)))
    for deadline_s in (2.0, 20.0, 60.0):  # a busy machine may not come to the step within the first
        began = time.monotonic()
        found = check(url, deadline_s=deadline_s)[0]
        assert time.monotonic() - began < 3 * deadline_s + 50
        assert (found.status, found.blame) == ("failed", "nobody")
        if server.faults[0].happened:
            break
    assert f"{url}: not {step} within {deadline_s:.0f} s" in found.figure
    assert server.faults[0].happened


@pytest.mark.parametrize(("kind", "blame"), [("503", "nobody"), ("403", "run")])
def test_who_is_to_blame_for_an_error(url: str, server: Proxy, kind: str, blame: str) -> None:
    server.faults.append(Fault(kind, ".doctor-", methods=("PUT",)))  # type: ignore[arg-type]
    found = check(url)[0]
    assert (found.status, found.blame) == ("failed", blame)
    assert "not written" in found.figure


def test_a_bit_that_flips_on_the_way_is_seen(url: str, server: Proxy) -> None:
    server.faults.append(Fault("flip", ".doctor-"))
    found = check(url)[0]
    assert (found.status, found.blame) == ("failed", "run")
    assert "other bytes came back" in found.figure


def test_a_bucket_that_is_not_there(server: Proxy) -> None:
    found = check("s3://no-such-bucket-here/run")[0]
    assert (found.status, found.blame) == ("failed", "run")


def test_a_local_folder_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    storage, clock = check(str(tmp_path / "runs" / "demo"))
    assert (storage.status, clock.status) == ("ok", "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    found = check("/proc/run")[0]  # root may write everywhere but there
    assert (found.status, found.blame) in {("failed", "run"), ("failed", "nobody")}
    assert "/proc/run: not written" in found.figure
    found = check("nosuch://bucket/run")[0]
    assert (found.status, found.blame) == ("failed", "run")


def test_a_full_disk_keeps_its_last_bytes(tmp_path: Path) -> None:
    """A limit of files stands for the disk's end: what was written up to it is removed, the records of the run need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        [found] = check(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (found.status, found.blame) == ("failed", "nobody")
    assert "not written (OSError" in found.figure
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1


# ---------------------------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize(
    ("offset_s", "status", "said"),
    [
        (0, "ok", ""),
        (-4.5, "ok", ""),
        (30, "warning", "29 s behind storage's"),
        (-3600, "warning", "ahead of storage's"),
    ],
)
def test_clocks_that_differ(offset_s: float, status: str, said: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    found = clock(now + offset_s, now, now + 0.2)
    assert found.status == status
    assert said in found.figure


def test_storage_that_tells_no_time() -> None:
    assert clock(None, 0.0, 1.0).status == "not here"


# ---------------------------------------------------------------------------------------------------------------- disks


def test_the_next_checkpoint_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoints/step-00000005-0123abcd"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMIT").write_text("{}")
    with open(checkpoint / "shard", "wb") as file:
        file.truncate(64 << 20)
    assert "a checkpoint takes 64 MiB" in run_folder_disk(str(tmp_path))[0].figure
    with open(checkpoint / "shard", "wb") as file:
        file.truncate(2 * os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize)  # sparse: takes no room
    found = run_folder_disk(str(tmp_path))[0]
    assert (found.status, found.blame) == ("failed", "run")


def test_the_cache_counts_what_it_holds(tmp_path: Path) -> None:
    free_gib = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / (1 << 30)
    remote = ("data.datasets.emoji.url=s3://bucket/emoji", f"data.cache_dir={tmp_path}/cache")
    assert cache_disk(tiny())[0].status == "not here"
    found = cache_disk(tiny(*remote, f"data.cache_gib={free_gib + 10}"))[0]
    assert found.status == "warning"
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / "shard", "wb") as file:
        file.truncate(11 << 30)
    assert cache_disk(tiny(*remote, f"data.cache_gib={free_gib + 10}"))[0].status == "ok"


# ------------------------------------------------------------------------------------------------- what the run reads


def uploaded(url: str) -> DatasetConfig:
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    for name in (DATASET, INDEX):
        fs.pipe_file(f"{url}/{name}", (EMOJI / name).read_bytes())
    return DatasetConfig(url=url)


def test_a_dataset_is_read_where_it_is(url: str, server: Proxy) -> None:
    config = uploaded(url)
    found = dataset("emoji", config, deadline_s=120)[0]
    assert found.status == "ok"
    assert found.figures["index_bytes"] == (EMOJI / INDEX).stat().st_size
    server.faults.append(Fault("hang", INDEX))
    found = dataset("emoji", config, deadline_s=2)[0]
    assert (found.status, found.blame) == ("failed", "nobody")
    assert "data.datasets.emoji.url" in found.figure
    server.faults[:] = [Fault("403", DATASET)]
    found = dataset("emoji", config, deadline_s=120)[0]
    assert (found.status, found.blame) == ("failed", "run")
    assert "access denied" in found.figure


def test_a_dataset_that_is_none(tmp_path: Path) -> None:
    found = dataset("emoji", DatasetConfig(url=str(tmp_path)), deadline_s=120)[0]
    assert (found.status, found.blame) == ("failed", "run")
    (tmp_path / DATASET).write_text("[]")
    found = dataset("emoji", DatasetConfig(url=str(tmp_path)), deadline_s=120)[0]
    assert (found.status, found.blame) == ("failed", "run")


def test_frozen_networks(url: str, tmp_path: Path) -> None:
    assert networks(tiny(), deadline_s=120)[0].status == "ok"
    for codec in (f"{tmp_path}/none", f"{url}/none"):
        found = networks(tiny(f"task.codec.url={codec}"), deadline_s=120)[0]
        assert (found.status, found.blame) == ("failed", "run")
        assert "task.codec.url" in found.figure
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{url}/codec/config.json", b"{}")
    assert networks(tiny(f"task.codec.url={url}/codec"), deadline_s=120)[0].status == "ok"
