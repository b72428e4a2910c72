"""Reading datasets: what is right is read, and everything else is refused in one line."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xxhash

from data import storage as storage_module
from data import verified as verified_module
from data.mds import mds
from data.reader import Dataset, open_dataset, read_image, readable
from data.schema import COLUMNS, DATASET, INDEX, Shard, index_digest
from data.shards import of_mds
from data.storage import DamagedShard, MissingShard, StorageError
from trainer.errors import UserError

from .conftest import MakeDataset


def change(folder: Path, edit: Any) -> None:
    """Edit index.json and keep dataset.json in agreement, as an attacker would."""
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))
    info = json.loads((folder / DATASET).read_text())
    info["index_digest"] = index_digest((folder / INDEX).read_bytes())
    info["num_samples"] = sum(shard["samples"] for shard in index["shards"])
    (folder / DATASET).write_text(json.dumps(info))


def describe(folder: Path) -> None:
    """A dataset.json beside an index that another program wrote; `change` completes it."""
    (folder / DATASET).write_text(json.dumps({"schema_version": 1, "name": "n", "num_samples": 1, "index_digest": ""}))


def test_samples_come_back_as_they_were(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder = make_dataset(20, shard_kib=8)
    dataset = open_dataset(str(folder), name="x")
    assert len(dataset.shard_sizes) > 2
    assert sum(dataset.shard_sizes) == dataset.num_samples == 20
    for i in (0, 7, 19):
        sample = dataset.read(i)
        assert sample.key == f"{i:04d}.jpg"
        assert sample.image == (tmp_path / "set-source" / sample.key).read_bytes()
        assert sample.texts == (f"first caption of {i}", f"second caption of {i}")
        assert sample.label == -1
        assert read_image(sample.image).shape == (40, 56, 3)
    with pytest.raises(IndexError):
        dataset.read(20)


def test_max_samples_cuts_shards_and_keeps_the_digest(make_dataset: MakeDataset) -> None:
    folder = make_dataset(20, shard_kib=8)
    whole, cut = open_dataset(str(folder), name="x"), open_dataset(str(folder), name="x", max_samples=5)
    assert cut.num_samples == sum(cut.shard_sizes) == 5
    assert len(cut.shard_sizes) == len(whole.shard_sizes)
    assert cut.digest == whole.digest
    assert cut.read(4) == whole.read(4)
    with pytest.raises(IndexError):
        cut.read(5)
    assert open_dataset(str(folder), name="x", max_samples=999).num_samples == 20


def test_pickles_small_and_reads_on(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(str(make_dataset(4)), name="x")
    sample = dataset.read(2)
    again: Dataset = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert again.read(2) == sample
    assert len(pickle.dumps(dataset)) < 5000


# --------------------------------------------------------------------------------------------------- what is refused


def test_missing_empty_and_unfinished(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset x: no index.json in .*nowhere; build one"):
        open_dataset(str(tmp_path / "nowhere"), name="x")
    folder = make_dataset(2)
    change(folder, lambda index: index.update(shards=[]))
    with pytest.raises(UserError, match="empty"):
        open_dataset(str(folder), name="x")
    (folder / DATASET).unlink()
    change_index = json.dumps({"version": 2, "shards": []})
    (folder / INDEX).write_text(change_index)
    with pytest.raises(UserError, match="empty"):
        open_dataset(str(folder), name="x")


def test_an_upload_without_its_last_file_is_not_whole(make_dataset: MakeDataset) -> None:
    folder = make_dataset(2)
    (folder / DATASET).unlink()
    with pytest.raises(UserError, match=r"no dataset.json: its upload was not finished"):
        open_dataset(str(folder), name="x")


def test_another_version_and_another_build(make_dataset: MakeDataset) -> None:
    folder = make_dataset(2)
    info = json.loads((folder / DATASET).read_text())
    (folder / DATASET).write_text(json.dumps({**info, "schema_version": 3}))
    with pytest.raises(UserError, match="schema_version is 3, this code reads 1 and 2"):
        open_dataset(str(folder), name="x")
    (folder / DATASET).write_text(json.dumps({**info, "index_digest": "0" * 32}))
    with pytest.raises(UserError, match="different builds"):
        open_dataset(str(folder), name="x")


def _rename(column: str, to: str) -> Any:
    def edit(index: dict[str, Any]) -> None:
        names = index["shards"][0]["column_names"]
        names[names.index(column)] = to

    return edit


def _encode(column: str, encoding: str) -> Any:
    def edit(index: dict[str, Any]) -> None:
        shard = index["shards"][0]
        shard["column_encodings"][shard["column_names"].index(column)] = encoding

    return edit


def _raw(**fields: Any) -> Any:
    return lambda index: index["shards"][0]["raw_data"].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_rename("image", "picture"), "no column 'image'"),
        (_encode("captions", "pkl"), "runs code when read"),
        (_encode("captions", "str"), "'captions' is encoded as 'str', expected 'json'"),
        (_raw(basename="../../etc/passwd"), "not a plain file name"),
        (_raw(basename="/etc/passwd"), "not a plain file name"),
        (_raw(basename=".."), "not a plain file name"),
        (_raw(bytes=-1), "impossible size"),
        (_raw(bytes=2**40), "impossible size"),
        (_raw(hashes={}), "has no xxh64 hash"),
        (lambda index: index["shards"][0].update(compression="zstd"), "is compressed"),
        (lambda index: index["shards"][0].update(format="csv"), "not MDS"),
        (lambda index: index["shards"].append(index["shards"][0]), "names a shard twice"),
        (lambda index: index.update(version=1), "not the index of an MDS dataset"),
    ],
)
def test_an_index_that_is_not_to_be_trusted(make_dataset: MakeDataset, edit: Any, message: str) -> None:
    folder = make_dataset(2)
    change(folder, edit)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(str(folder), name="x")
    assert "\n" not in str(error.value)


def test_an_extra_column_that_unpickles_is_refused_and_others_are_not(tmp_path: Path) -> None:
    for encoding, fits in (("pkl", False), ("ndarray:float16:4,8,8", True), ("no_such", False)):
        folder = tmp_path / encoding.partition(":")[0]
        columns = {**COLUMNS, "latents": "bytes"}
        with mds().Writer(columns=columns, out=str(folder), hashes=["xxh64"]) as writer:
            writer.write({"key": "k", "image": b"i", "captions": ["c"], "label": 1, "latents": bytes(512)})
        describe(folder)
        change(folder, _encode("latents", encoding))
        if fits:
            assert open_dataset(str(folder), name="x").read(0).texts == ("c",)
        else:
            with pytest.raises(UserError, match="latents"):
                open_dataset(str(folder), name="x")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_refused(make_dataset: MakeDataset, damage: str) -> None:
    folder = make_dataset(3)
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "flip" else data[:-10])
    message = {"flip": "its hash is not the index's", "cut": "the index says", "gone": "cannot be read"}[damage]
    with pytest.raises(UserError, match=message):
        open_dataset(str(folder), name="x").read(0)


def test_a_row_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with mds().Writer(columns=COLUMNS, out=str(folder), hashes=["xxh64"]) as writer:
        writer.write({"key": "k", "image": b"i", "captions": {"not": "a list"}, "label": 1})
    describe(folder)
    change(folder, lambda index: None)
    with pytest.raises(UserError, match=r"shard.00000.mds: sample 0 does not fit the training schema"):
        open_dataset(str(folder), name="x").read(0)


# ---------------------------------------------------------------------------------------------------------------- marks


def test_a_node_hashes_a_shard_once_until_it_changes(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(3)
    hashed: list[Path] = []
    verify_file = verified_module.verify_file

    def counted(path: Path, shard: Shard) -> None:
        hashed.append(path)
        verify_file(path, shard)

    monkeypatch.setattr(verified_module, "verify_file", counted)
    for _worker in range(3):
        open_dataset(str(folder), name="x").read(0)
    assert len(hashed) == 1
    shard = folder / "shard.00000.mds"
    times = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same modification time
    with pytest.raises(DamagedShard):
        open_dataset(str(folder), name="x").read(0)


# --------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote(make_dataset: MakeDataset, tmp_path: Path) -> str:
    folder = make_dataset(12, shard_kib=8)
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.put_file(str(file), f"/{tmp_path.name}/set/{file.name}")
    return f"memory://{tmp_path.name}/set"


def shard_0(remote: str) -> str:
    return remote.removeprefix("memory:/") + "/shard.00000.mds"


def test_remote_shards_are_cached_by_url_and_hash(remote: str, tmp_path: Path) -> None:
    cache = tmp_path / "shards-here"
    dataset = open_dataset(remote, name="x", cache_dir=str(cache))
    assert dataset.read(11).key == "0011.jpg"
    assert len(list(cache.glob("shards/*/*.mds"))) == 1  # only what was read
    assert not list(cache.glob("shards/*/*.tmp"))
    memory = fsspec.filesystem("memory")
    memory.rm_file(shard_0(remote))
    with pytest.raises(UserError, match="missing, though the index names it"):
        dataset.read(0)
    assert open_dataset(remote, name="x", cache_dir=str(cache)).read(11).key == "0011.jpg"


def test_a_cached_shard_that_rotted_is_fetched_again(remote: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    open_dataset(remote, name="x", cache_dir=str(cache)).read(0)
    (cached,) = cache.glob("shards/*/*.mds")
    cached.write_bytes(cached.read_bytes()[:-1])
    assert open_dataset(remote, name="x", cache_dir=str(cache)).read(0).key == "0000.jpg"


def test_a_damaged_remote_shard_never_gets_into_the_cache(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat_file(shard_0(remote)))
    data[100] ^= 1
    memory.pipe_file(shard_0(remote), bytes(data))
    with pytest.raises(UserError, match="hash"):
        open_dataset(remote, name="x", cache_dir=str(tmp_path / "c")).read(0)
    memory.pipe_file(shard_0(remote), bytes(data) * 2)
    with pytest.raises(UserError, match="larger than"):
        open_dataset(remote, name="x", cache_dir=str(tmp_path / "c")).read(0)
    assert not [p for p in (tmp_path / "c").rglob("*") if p.suffix in (".mds", ".tmp")]


def test_storage_that_fails_for_a_while_is_asked_again(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    memory = type(fsspec.filesystem("memory"))
    read, failures = memory.cat_file, [OSError("reset by peer"), RuntimeError("client gave up"), TimeoutError()]

    def flaky(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith(".mds") and failures:
            raise failures.pop()
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(memory, "cat_file", flaky)
    dataset = open_dataset(remote, name="x", cache_dir=str(tmp_path / "c"))
    assert dataset.read(0).key == "0000.jpg"
    assert not failures
    _, counts = dataset.news()
    assert counts["loupe_data_fetch_errors_total", "timeout"] == 1
    assert counts["loupe_data_fetch_errors_total", "server"] == 2
    assert counts["loupe_data_fetch_bytes_total",] == dataset.shards[0].num_bytes
    assert counts["loupe_data_fetch_seconds_total",] > 0


def test_storage_that_hangs_is_asked_again_and_then_given_up(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    release = threading.Event()
    memory, hanging = type(fsspec.filesystem("memory")), [True]
    read = memory.cat_file

    def hangs(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if hanging[0]:
            release.wait(60)
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(memory, "cat_file", hangs)
    for deadline_s in (1.2, 12.0, 60.0):  # a busy machine may have none left for a second attempt
        dataset = open_dataset(remote, name="x", cache_dir=str(tmp_path / "c"), deadline_s=deadline_s)
        began = time.monotonic()
        with pytest.raises(StorageError, match=rf"not read within {deadline_s:.0f} s .*no answer in time"):
            dataset.read(0)
        assert time.monotonic() - began < deadline_s + 50
        _, counts = dataset.news()
        if counts["loupe_data_fetch_errors_total", "timeout"] >= 2:
            break
    assert counts["loupe_data_fetch_errors_total", "timeout"] >= 2
    assert not [path for path in (tmp_path / "c").rglob("*.tmp")]
    hanging[0] = False
    assert dataset.read(0).key == "0000.jpg"  # it was nothing about the shard
    assert not dataset.bad_shards
    release.set()


def test_denied_is_not_asked_again(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("Forbidden")

    dataset = open_dataset(remote, name="x", cache_dir=str(tmp_path / "c"))
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", denied)
    with pytest.raises(UserError, match=r"shard.00000.mds: access denied .*check the credentials"):
        dataset.read(0)
    assert not dataset.bad_shards  # the whole run stops


def test_single_samples_by_ranges(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_dataset(remote, name="x", cache_dir=str(tmp_path / "a"))
    memory = type(fsspec.filesystem("memory"))
    read, asked = memory.cat_file, []

    def counted(self: Any, path: str, start: int = 0, end: int = 0, **kwargs: Any) -> Any:
        asked.append(end - start)
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(memory, "cat_file", counted)
    single = open_dataset(remote, name="x", cache_dir=str(tmp_path / "b"), fetch="ranges")
    sample = single.read(7)
    assert len(asked) == 2  # the shard's table of offsets, and the sample
    assert sum(asked) < single.shards[0].num_bytes / 2
    assert not (tmp_path / "b").exists()
    assert [single.read(i) for i in range(12)] == [whole.read(i) for i in range(12)]
    assert sample == whole.read(7)
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    fsspec.filesystem("memory").rm_file(shard_0(remote))
    fresh = open_dataset(remote, name="x", fetch="ranges")
    with pytest.raises(MissingShard, match="missing, though the index names it"):
        fresh.read(0)
    assert fresh.bad_shards == {0: "missing_shard"}


# ------------------------------------------------------------------------------------------------------------- bad shards


def test_a_shard_that_cannot_be_read_is_tried_once_and_told_once(make_dataset: MakeDataset) -> None:
    folder = make_dataset(12, shard_kib=8)
    dataset = open_dataset(str(folder), name="x")
    shard = folder / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DamagedShard, match="the index says"):
        dataset.read(0)
    shard.write_bytes(data)  # mended, too late for this process
    with pytest.raises(DamagedShard, match=r"left out of this run \(damaged_shard\)"):
        dataset.read(1)
    assert dataset.news()[0] == {0: "damaged_shard"}
    assert dataset.news()[0] == {}
    assert dataset.read(11).key == "0011.jpg"
    again: Dataset = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    # a process goes by what it finds out, or is told that all ranks have agreed on
    assert again.bad_shards == again.news()[0] == {}
    assert again.read(0).key == "0000.jpg"
    again.leave_out(0, "damaged_shard")
    assert again.news()[0] == {}
    assert readable(again, 0).key == f"{int(dataset.shard_sizes[0]):04d}.jpg"
    dataset.forget_bad_shards()
    assert dataset.read(0).key == "0000.jpg"


def test_a_file_that_shrinks_while_it_is_read_is_damage(make_dataset: MakeDataset) -> None:
    folder = make_dataset(3)
    dataset = open_dataset(str(folder), name="x")
    assert dataset.read(0).key == "0000.jpg"
    os.truncate(folder / "shard.00000.mds", 200)
    with pytest.raises(DamagedShard, match="the index says"):
        dataset.read(2)


# ------------------------------------------------------------------------------------------------------------------ rows


def test_rows_are_those_of_the_library(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Also with columns of other encodings and sizes in between."""
    columns = {**COLUMNS, "a_latent": "ndarray:float16:2,3", "latents": "bytes", "z": "int32"}
    folder = tmp_path / "set"
    with mds().Writer(columns=columns, out=str(folder), hashes=["xxh64"], size_limit=2000) as writer:
        for i in range(20):
            row = {"key": f"k{i}", "image": bytes([i]) * (i * 11), "captions": [f"caption {i}", "ü"], "label": i - 5}
            more = {"a_latent": np.full((2, 3), i, np.float16), "latents": bytes(i), "z": np.int32(i)}
            writer.write({**row, **more})
    describe(folder)
    change(folder, lambda index: None)
    dataset = open_dataset(str(folder), name="x")
    assert len(dataset.shards) > 2
    entries = json.loads((folder / INDEX).read_text())["shards"]
    theirs = [mds().Reader.from_json(str(folder), None, entry) for entry in entries]
    rows = [reader[i] for reader in theirs for i in range(len(reader))]
    for i, row in enumerate(rows):
        sample = dataset.read(i)
        assert (sample.key, sample.image, list(sample.texts), sample.label) == (
            row["key"], row["image"], row["captions"], row["label"],
        )  # fmt: skip
        assert sample.columns["latents"] == row["latents"]
        assert np.array_equal(np.frombuffer(sample.columns["a_latent"], np.float16).reshape(2, 3), row["a_latent"])
        assert int.from_bytes(sample.columns["z"], "little") == row["z"]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 7, "holds 7 samples, the index says 3"),
        (8, 2**32 - 1, "lead out of the file"),
        (4, 0, "lead out of the file"),
    ],
)
def test_offsets_that_lead_elsewhere(make_dataset: MakeDataset, at: int, value: int, message: str) -> None:
    """A shard with an honest hash, from a writer that is not."""
    folder = make_dataset(3)
    shard = folder / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[at : at + 4] = value.to_bytes(4, "little")
    shard.write_bytes(data)
    change(folder, _raw(hashes={"xxh64": xxhash.xxh64_hexdigest(data)}))
    with pytest.raises(DamagedShard, match=message):
        open_dataset(str(folder), name="x").read(0)


def test_an_index_of_many_shards_is_small(tmp_path: Path) -> None:
    """400,000 shards, as of 300 million samples."""
    entry = {
        "column_names": list(COLUMNS),
        "column_encodings": list(COLUMNS.values()),
        "column_sizes": [None] * 3 + [8],
    }
    shards = [Shard(f"shard.{i:06d}.mds", 750, 64 << 20, f"{i:016x}", {**entry}) for i in range(20_000)]
    table = of_mds(shards)
    assert len(pickle.dumps(table)) < 60 * len(shards)
    assert table[1234] == shards[1234]
    assert [shard.name for shard in table[5:7]] == ["shard.000005.mds", "shard.000006.mds"]


def test_a_cache_folder_that_cannot_be_made_is_named(make_dataset: MakeDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dataset = open_dataset(str(make_dataset(2)), name="x", cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data.cache_dir: .*name a writable folder"):
        dataset.read(0)


def test_the_format_needs_no_torch() -> None:
    code = "import sys; from data.mds import mds; mds(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_a_writer_ends_without_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = mds().Writer(columns={"x": "bytes"}, out=str(tmp_path / "set"), hashes=["xxh64"], size_limit=3000)
    theirs = sys.modules["streaming.base.format.base.writer"]
    monkeypatch.setattr(theirs, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    monkeypatch.setattr(writer.cloud_writer, "upload_file", lambda name: time.sleep(0.01))  # so that some are waiting
    for _ in range(100):
        writer.write({"x": bytes(2000)})
    writer.finish()
    assert len(json.loads((tmp_path / "set" / INDEX).read_text())["shards"]) == 100
