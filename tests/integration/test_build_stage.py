"""`loupe data build` of stages' outputs: real photos in tars to a dataset, by many workers, killed ones among them."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from data.buckets import ASPECTS, nearest
from data.cli import cli
from data.images import read_image
from data.mdsbuild.sidecars import Sidecar
from data.mdsbuild.stage import BuildStage
from data.reader import Dataset, open_dataset
from data.stages.leases import Lease
from data.stages.receipts import done_receipts
from data.stages.runner import Worker
from data.stages.store import StageStore
from data.stages.workers import run_workers
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from tests.sample_stages import ColumnStage, PhotoStage, SidecarStage, column_value, photos, run
from trainer.errors import UserError

pytestmark = pytest.mark.shared


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(shared_dir: Path) -> Path:
    return shared_dir / "data" / "coco_open_256"


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """139 photos in seven tars."""
    return run(PhotoStage(str(folder)), str(tmp_path_factory.mktemp("photos") / "ingested"))


@pytest.fixture(scope="module")
def undisturbed(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of `source` with the usual settings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(stage(source, folder / "set"), str(folder / "work"))
    return folder / "set"


def loupe_data(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def stage(source: str, out: object, **options: Any) -> BuildStage:
    return BuildStage(source, str(out), "photos", ASPECTS, **{"shard_mib": 1, "min_samples": 1, **options})


def rows(dataset: Dataset) -> list[Any]:
    return [dataset.read(i) for i in range(dataset.num_samples)]


def work(url: str, build: BuildStage) -> Dataset:
    run(build, url)
    return open_dataset(build.out, name="x")


def test_photos_to_a_dataset_in_one_command(source: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--shard-mib", 1, "--min-samples-of-a-bucket", 5, "--workers", 0]
    result = loupe_data("build", source, out, *options)
    assert result.exit_code == 0
    dataset = open_dataset(str(out), name="x")
    assert f"{out}: 139 samples in {len(dataset.shards)} shards" in result.output
    samples = rows(dataset)
    by_name = {row["file_name"]: row for row in photos(folder)}
    assert sorted(s.key for s in samples) == sorted(by_name)
    for sample in samples:
        row = by_name[sample.key]
        assert sample.image == (folder / "images" / sample.key).read_bytes()
        assert sample.captions == {"original": tuple(row["captions"])}
        number = int(sample.key[:12])
        names = dataset.class_names or ()
        assert sample.label == (names.index(f"class {number % 3}") if number % 4 == 0 else -1)
    assert dataset.read_labels().tolist() == [s.label for s in samples]

    # Buckets: shards of one follow one another, and each image is in the nearest, but for the small ones' images.
    first = 0
    for bucket in dataset.info.buckets:
        assert bucket.first_shard == first
        first += bucket.num_shards
        start, stop = (int(dataset.shard_sizes[:n].sum()) for n in (bucket.first_shard, first))
        kept = {b.name for b in dataset.info.buckets}
        found = [nearest(*reversed(read_image(s.image).shape[:2])) for s in samples[start:stop]]
        assert {name for name in found if name in kept} == {bucket.name}
        assert stop - start >= 5
    assert first == len(dataset.shards)
    counts = Counter(nearest(*reversed(read_image(s.image).shape[:2])) for s in samples)
    assert {b.name for b in dataset.info.buckets} == {name for name, count in counts.items() if count >= 5}

    # What lay side by side in the source comes apart.
    order = [row["file_name"] for row in photos(folder)]
    tar = [order.index(s.key) // 20 for s in samples]
    assert np.mean([a == b for a, b in pairwise(tar)]) < 0.35

    info = dataset.info
    assert info.licences == Counter(row["license"] for row in by_name.values())
    assert info.rejected == {"too_small": 7}
    assert info.notice == (folder / "NOTICE").read_text().strip()
    assert (out / "NOTICE").read_bytes() == (folder / "NOTICE").read_bytes()
    page = (out / "card.html").read_text()
    assert "139" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.partition("<h2>Notice</h2>")[0].replace("https://", "").replace("http://images", "")
    assert read_image((out / "samples.png").read_bytes()).shape == (576, 768, 3)
    assert sorted(p.name for p in out.iterdir() if not p.name.endswith(".mds")) == [
        "NOTICE", "README.md", "card.html", "dataset.json", "index.json", "labels.i32", "samples.png", "stats.json",
    ]  # fmt: skip
    told = json.loads(loupe_data("stats", out, "--json").output)
    assert sum(bucket["samples"] for bucket in told["buckets"]) == told["statistics"]["samples"] == 139
    told = json.loads(loupe_data("stats", source, "--json").output)
    assert told["counts"]["ingest"]["kept"] == told["statistics"]["samples"] == 139
    for url in (out, f"{out}.work", source):
        result = loupe_data("verify", url, "--workers", 1)
        assert result.exit_code == 0, result.output

    # Again: nothing is done, and nothing else may be built there.
    assert loupe_data("build", source, out, *options).exit_code == 0
    with pytest.raises(UserError, match="was begun with --shard-mib = 1, now it is 2; add --overwrite"):
        loupe_data("build", source, out, "--workers", 0, "--shard-mib", 2, "--min-samples-of-a-bucket", 5)


def test_equal_settings_give_equal_bytes_and_seeds_another_order(
    source: str, undisturbed: Path, tmp_path: Path
) -> None:
    run(stage(source, tmp_path / "b"), f"{tmp_path}/b.work")
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (undisturbed, tmp_path / "b")]
    different = {name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name)}
    assert different == {"README.md", "card.html"}  # they tell where the dataset was built
    other = work(f"{tmp_path}/c.work", stage(source, tmp_path / "c", order_seed=1))
    keys = [s.key for s in rows(open_dataset(str(undisturbed), name="x"))]
    assert [s.key for s in rows(other)] != keys
    assert sorted(s.key for s in rows(other)) == sorted(keys)


def test_captions_are_joined_and_duplicates_left_out(folder: Path, tmp_path: Path) -> None:
    source = run(PhotoStage(str(folder), drop_every=10), str(tmp_path / "in"))
    short = run(SidecarStage(source, kinds=("short",), every=2), str(tmp_path / "short"))
    many = run(SidecarStage(source, text="better", kinds=("short", "long")), str(tmp_path / "many"))
    build = stage(source, tmp_path / "out", captions=(Sidecar(short, "terse"), Sidecar(many)))
    dataset = work(f"{tmp_path}/work", build)
    names = [row["file_name"] for row in photos(folder)]
    samples = rows(dataset)
    assert sorted(s.key for s in samples) == sorted(name for i, name in enumerate(names) if i % 10)
    assert dataset.info.rejected == {"duplicate_exact": 14, "too_small": 7}
    assert dataset.info.caption_kinds == ("original", "long", "short", "terse")
    for sample in samples:
        assert sample.captions["short"] == (f"better {sample.key}, short",)
        assert sample.captions["long"] == (f"better {sample.key}, long",)
        assert len(sample.captions["original"]) >= 5
    terse = sum("terse" in s.captions for s in samples)
    assert 50 < terse < 80
    assert f"{terse} texts of {terse} samples, {125 - terse} have none" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(AssertionError, match="which cannot all be called one"):
        run(stage(source, tmp_path / "no", captions=(Sidecar(many, "one"),)), f"{tmp_path}/no.work")


@pytest.mark.parametrize(("window_shards", "slice_rows"), [(64, 4096), (2, 8)])
def test_columns_are_stored_with_their_samples(
    source: str, folder: Path, tmp_path: Path, window_shards: int, slice_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several windows, cut into slices smaller than a shard."""
    monkeypatch.setattr("data.mdsbuild.windows.WINDOW_SHARDS", window_shards)
    monkeypatch.setattr("data.mdsbuild.windows.SLICE_ROWS", slice_rows)
    columns = run(ColumnStage(source, every=3), str(tmp_path / "columns"))
    dataset = work(f"{tmp_path}/work", stage(source, tmp_path / "out", columns=(Sidecar(columns),)))
    assert dataset.info.columns["latents"]["channels"] == 16
    found = rows(dataset)
    stored = [s for s in found if s.columns["latents"]]
    assert sorted(s.key for s in found) == sorted(row["file_name"] for row in photos(folder))
    assert all(s.image == (folder / "images" / s.key).read_bytes() for s in found)
    assert dataset.read_labels().tolist() == [s.label for s in found]
    assert all((s.label >= 0) == (int(s.key[:12]) % 4 == 0) for s in found)
    assert 139 / 3 - 1 < len(stored) < 139 / 3 + 7
    assert all(s.columns["latents"] == column_value(s.key) for s in stored)
    assert loupe_data("verify", tmp_path / "out", "--workers", 1).exit_code == 0
    receipts = list(done_receipts(StageStore(f"{tmp_path}/work"), "windows"))
    assert len(receipts) == -(-7 // window_shards)
    assert sum(r["counts"]["missing/latents"] for r in receipts) == 139 - len(stored)
    other = run(ColumnStage(source, text="other"), str(tmp_path / "other"))
    with pytest.raises(AssertionError, match="the latents are of another image than the one to be stored"):
        run(stage(source, tmp_path / "no", columns=(Sidecar(other),)), f"{tmp_path}/no.work")


def test_sources_and_sidecars_that_are_none(source: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size: is for folders"):
        loupe_data("build", source, tmp_path / "o", "--size", 64)
    with pytest.raises(UserError, match="--captions: is for the output of a stage"):
        loupe_data("build", folder, tmp_path / "o", "--captions", "x")
    with pytest.raises(UserError, match="no such folder; give the output of `loupe data ingest`"):
        loupe_data("build", f"memory://{tmp_path.name}/nothing", tmp_path / "o")
    with pytest.raises(UserError, match=r"--captions: .* is the output of `ingest`, give that of `recaption`"):
        loupe_data("build", source, tmp_path / "o", "--captions", source, "--workers", 0)
    with pytest.raises(UserError, match="overlaps the source"):
        loupe_data("build", source, f"{source}/set", "--workers", 0)
    with pytest.raises(UserError, match="overlaps --work"):
        loupe_data("build", source, tmp_path / "o", "--work", tmp_path / "o" / "work", "--workers", 0)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="holds other files"):
        loupe_data("build", source, tmp_path / "home", "--workers", 0)
    assert not (tmp_path / "o").exists()


def test_a_dataset_is_replaced_only_when_asked_and_at_the_end(source: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert loupe_data("build", folder, out, "--max-samples", 3).exit_code == 0
    with pytest.raises(UserError, match="--overwrite"):
        loupe_data("build", source, out, "--workers", 0)
    store = StageStore(f"{out}.work")
    build = stage(source, out, overwrite=True)
    worker = Worker(build, store)
    for one_pass in build.passes()[:3]:  # up to the last
        assert not worker._run_pass(one_pass)
    assert len(list(out.glob("shard.000*.mds"))) > 5
    assert open_dataset(str(out), name="x").num_samples == 3
    loupe_data("verify", out, "--workers", 1)
    run(build, store.url)
    assert open_dataset(str(out), name="x").num_samples == 139
    assert not (out / "shard.00000.mds").exists()


def test_a_damaged_source_is_an_error_that_names_the_sample(folder: Path, tmp_path: Path) -> None:
    source = run(PhotoStage(str(folder)), str(tmp_path / "in"))
    tar = sorted((tmp_path / "in").rglob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    failures = Worker(stage(source, tmp_path / "out"), StageStore(f"{tmp_path}/work")).run()
    assert len(failures) == 1
    assert "is not the image that was put there" in failures[0]
    with pytest.raises(UserError, match=r"no index\.json"):
        open_dataset(str(tmp_path / "out"), name="x")
    result = loupe_data("verify", source)
    assert result.exit_code == 1
    assert "its hash is not the receipt's" in result.output


# --------------------------------------------------------------------------------------------------------- many workers


def test_killed_workers_lose_and_repeat_nothing(
    source: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are killed for good while they write shards, each after another shard is there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, work_url = tmp_path / "out", f"{tmp_path}/work"
    build = stage(source, out)
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        shards = Path(work_url) / "work" / "shards"
        while not ended.wait(0.05) and len(killed) < 3:
            at_work = list((shards / "leases").glob("*")) if shards.exists() else []
            if len(list((shards / "done").glob("*"))) < len(killed) or not at_work:
                continue
            for child in multiprocessing.active_children():
                assert child.pid
                os.kill(child.pid, signal.SIGKILL)
                killed.append(child.pid)
                break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        failures = run_workers(build, work_url, workers=2, lease_s=2.0)
    finally:
        ended.set()
        thread.join()
    assert not failures
    assert killed
    dataset = open_dataset(str(out), name="x")
    keys = Counter(s.key for s in rows(dataset))
    assert len(keys) == 139
    assert set(keys.values()) == {1}
    assert {p.name for p in out.glob("*.mds")} == {shard.name for shard in dataset.shards}
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert open_dataset(str(undisturbed), name="x").digest == dataset.digest


def test_a_worker_that_wakes_too_late_changes_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stops for longer than its lease right before it would publish; another does its item."""
    import data.mdsbuild.shards as module

    put, late = module.put_whole, threading.Event()
    blocked: list[str] = []

    def slow(storage: Any, file: Path, name: str) -> None:
        if threading.current_thread().name == "late" and not blocked:
            blocked.append(name)
            assert late.wait(240)
        put(storage, file, name)

    monkeypatch.setattr(module, "put_whole", slow)
    url = f"{tmp_path}/work"
    workers = [Worker(stage(source, tmp_path / "out"), StageStore(url), lease_s=1.0) for _ in range(2)]
    thread = threading.Thread(target=workers[0].run, name="late")
    thread.start()
    deadline = time.monotonic() + 240
    while not blocked:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    leases = Path(url) / "work" / "shards" / "leases"
    held = {lease: json.loads(lease.read_text()) for lease in leases.glob("*")}
    content = Lease.content

    def expired(self: Lease) -> bytes:
        tree = json.loads(content(self))
        return json.dumps({**tree, "deadline": 0.0} if tree["attempt"] in attempts else tree).encode()

    # as if its machine had stopped: what it holds has expired, and its renewals, which go on here, do not change that
    attempts = {tree["attempt"] for tree in held.values()}
    monkeypatch.setattr(Lease, "content", expired)
    for lease, tree in held.items():
        lease.write_text(json.dumps({**tree, "deadline": 0.0}))
    workers[1].run()
    late.set()
    thread.join(240)
    assert not thread.is_alive()
    dataset = open_dataset(str(tmp_path / "out"), name="x")
    assert Counter(Counter(s.key for s in rows(dataset)).values()) == {1: 139}


# --------------------------------------------------------------------------------------------------------------- remote


def test_from_s3_to_s3(s3: str, source: str, folder: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    fs.put(source, f"{s3}/ingested", recursive=True)
    url, out = f"{s3}/ingested", f"{s3}/sets/photos"
    result = loupe_data("build", url, out, "--shard-mib", 1, "--workers", 0)
    assert result.exit_code == 0, result.output
    dataset = open_dataset(out, name="x", cache_dir=str(tmp_path / "shards"))
    assert sorted(s.key for s in rows(dataset)) == sorted(row["file_name"] for row in photos(folder))
    assert [f for f in fs.ls(out, detail=False) if "write-test" in f] == []
    result = loupe_data("verify", out, "--workers", 1, "--sample", 20)
    assert result.exit_code == 0, result.output
    assert " images decoded" in result.output
    assert loupe_data("verify", url, "--workers", 4).exit_code == 0


def test_a_mistyped_bucket_is_an_error_and_is_not_made(s3: str, source: str, folder: Path) -> None:
    fs = fsspec.filesystem("s3")
    for where, options in ((source, ["--workers", 0]), (folder, [])):
        with pytest.raises(UserError, match="no such bucket"):
            loupe_data("build", where, "s3://lope-tests/set", *options)
        with pytest.raises(UserError, match="no such bucket"):
            loupe_data("build", where, "s3://lope-tests", *options)
    fs.invalidate_cache()
    assert not fs.exists("lope-tests")
