"""Items of a stage that follows another: however the shards are cut, every sample is done once and found again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.stages.samples as samples_module
from data.encode.stage import Encode, LatentsJob
from data.faces.stage import Faces
from data.mdsbuild.sidecars import Sidecar
from data.stages.by_shard import PartsByShard
from data.stages.failed import retry_failed
from data.stages.receipts import done_receipts, part_name
from data.stages.runner import Work, Worker
from data.stages.samples import Samples, Shard, open_samples
from data.stages.store import StageStore
from tests.sample_stages import ColumnStage, SidecarStage, column_value, latents_column, read_parquets, run
from tests.small_stages import EXPECTED, PART, blur, built, faces, image, ingest, item_names, raw, stored


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.ingest.from_tars.PART_SAMPLES", PART)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return raw(tmp_path_factory.mktemp("raw"))


# ----------------------------------------------------------------------------------------------------------- the cut


@settings(max_examples=30, deadline=None)
@given(
    upstream=st.lists(st.lists(st.booleans(), max_size=12), max_size=12),
    limit=st.sampled_from([1, 2, 5, 4096]),
)
def test_items_hold_each_shard_once(
    upstream: list[list[bool]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of any items before, whose parts have files or not."""
    store = StageStore(str(tmp_path_factory.mktemp("stage")))

    def write(name: str, tree: Any) -> None:
        path = Path(store.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree))

    expected = []
    for number, has_files in enumerate(upstream):
        item = f"{number:04d}-x"
        parts: list[dict[str, Any]] = [
            {"item": item, "part": i, "files": {"tar": {}, "index": {}} if some else {}, "counts": {}, "note": None}
            for i, some in enumerate(has_files)
        ]
        for part in parts:
            write(part_name("ingest", item, part["part"]), part)
        write(f"work/ingest/done/{item}.json", {"item": item, "parts": parts})
        expected += [f"{item}-{i:04d}" for i, some in enumerate(has_files) if some]
    samples = Samples(store.url, "ingest")
    before, samples_module.ITEMS = samples_module.ITEMS, limit
    try:
        items = samples.items()
    finally:
        samples_module.ITEMS = before
    found = [[shard.name for shard in samples.shards_of(item)] for item in items]
    assert all(found)
    assert [name for names in found for name in names] == expected == [shard.name for shard in samples.shards()]
    assert len({item["name"] for item in items}) == len(items)
    assert len(items) <= limit + len(upstream)
    if len(expected) <= limit:
        assert [item["name"] for item in items] == expected
    assert all(len(json.dumps(item)) < 100 for item in items)
    # What was made of a shard is looked for where the items say, and nowhere else.
    write("work/next/items.json", items)
    by_name = {name: item["name"] for item, names in zip(items, found, strict=True) for name in names}
    parts_of = PartsByShard(store.url, "next")
    assert {name: parts_of._item_with(name) for name in expected} == by_name


def test_a_run_of_neighbours_reads_each_receipt_once(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "ITEMS", 1)
    source = ingest(tmp_path / "in", tars)
    captions = run(SidecarStage(source), str(tmp_path / "captions"))
    names = [shard.name for shard in open_samples(source).shards()]
    reads: list[str] = []
    read_json = StageStore.read_json

    def counted(self: StageStore, name: str) -> Any:
        reads.append(name)
        return read_json(self, name)

    monkeypatch.setattr(StageStore, "read_json", counted)
    parts_of = PartsByShard(captions, "recaption")
    assert [[part["note"]["shard"] for part in parts_of.of(name)] for name in names] == [[name] for name in names]
    assert reads == ["work/recaption/items.json", *(f"work/recaption/done/000000{i}-{'abc'[i]}.json" for i in range(3))]


# ------------------------------------------------------------------------------------------------- what comes out of it


@pytest.mark.parametrize("limit", [4096, 4, 1])
def test_samples_and_sidecars_are_the_same_however_they_are_cut(
    tars: list[str], tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ingest, faces, captions of before and after it, columns and a build. One part of a has no file, so that its
    shards have other numbers after faces than before."""
    monkeypatch.setattr(samples_module, "ITEMS", limit)
    source = ingest(tmp_path / "in", tars)
    images = {key: image(number) for key, number in EXPECTED.items()}
    assert stored(source, tmp_path) == images
    assert item_names(source, "drops") == ["0000001-b"]
    blurred = blur(source, tmp_path / "faces")
    assert list(stored(blurred, tmp_path)) == list(images)
    names = {
        4096: ["0000000-a-0000", "0000000-a-0002", "0000001-b-0000", "0000001-b-0001", "0000001-b-0002", "0000002-c-0000"],
        4: ["0000000-a", "0000001-b-0000", "0000001-b-0002", "0000002-c"],
        1: ["0000000-a", "0000001-b", "0000002-c"],
    }  # fmt: skip
    assert item_names(blurred, "faces") == names[limit]
    early = run(SidecarStage(source, text="early"), str(tmp_path / "early"))
    late = run(SidecarStage(blurred, text="late", kinds=("long",)), str(tmp_path / "late"))
    columns = run(ColumnStage(blurred, every=2), str(tmp_path / "columns"))
    dataset = built(blurred, tmp_path, captions=(Sidecar(early), Sidecar(late)), columns=(Sidecar(columns),))
    rows = [dataset.read(i) for i in range(dataset.num_samples)]
    assert sorted(row.key for row in rows) == sorted(images)
    made = stored(blurred, tmp_path)
    for row in rows:
        assert row.image == made[row.key] != images[row.key]
        assert row.captions == {
            "original": (row.key.replace("/", " "),),
            "short": (f"early {row.key}, short",), "long": (f"late {row.key}, long",),
        }  # fmt: skip
    with_columns = {"a/0", "a/2", "a/6", "b/0", "b/2", "b/3", "b/6", "c/0"}
    assert {row.key: row.columns["latents"] for row in rows} == {
        key: column_value(key) if key in with_columns else b"" for key in images
    }
    # Nothing of it depends on the cut.
    digest = {"audit": (tmp_path / "faces/audit.png").read_bytes(), "boxes": read_parquets(blurred, "faces", "faces")}
    monkeypatch.setattr(samples_module, "ITEMS", 4096)
    again = blur(source, tmp_path / "again")
    assert stored(again, tmp_path) == made
    assert (tmp_path / "again/audit.png").read_bytes() == digest["audit"]
    assert read_parquets(again, "faces", "faces") == digest["boxes"]


def test_who_dies_between_parts_is_followed_at_the_next_shard(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "ITEMS", 1)
    source, out = ingest(tmp_path / "in", tars[1:2]), StageStore(str(tmp_path / "out"))
    stage = faces(source)
    blur_shard = Faces._of_shard
    seen: list[str] = []

    def dies(self: Faces, shard: Shard, work: Work) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(shard.name)
        return blur_shard(self, shard, work)

    with monkeypatch.context() as patch:
        patch.setattr(Faces, "_of_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            Worker(stage, out, lease_s=0.5).run()
    assert out.names("work/faces/parts/0000000-b") == ["000000.json", "000001.json"]
    assert Worker(stage, out, lease_s=0.5).run() == []
    (receipt,) = done_receipts(out, "faces")
    attempts = [part["attempt"] for part in receipt["parts"]]
    assert [part["note"]["shard"] for part in receipt["parts"]] == [*seen, "0000000-b-0002"]
    assert attempts[0] == attempts[1] != attempts[2]
    assert receipt["counts"]["read"] == 7
    assert list(stored(out.url, tmp_path)) == [f"b/{i}" for i in range(7)]


def test_a_shard_that_cannot_be_read_costs_its_item_nothing_else(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "ITEMS", 1)
    source = ingest(tmp_path / "in", tars)
    tar = Path(StageStore(source).path(open_samples(source).shards()[3].tar["name"]))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"x")
    stage, out = faces(source), StageStore(str(tmp_path / "out"))
    (failure,) = Worker(stage, out, attempts=1).run()
    assert "0000001-b/000001-tar-" in failure
    assert len(out.names("work/faces/parts/0000001-b")) == 2
    tar.write_bytes(whole)
    retry_failed(out, stage)
    assert Worker(stage, out).run() == []
    assert set(stored(out.url, tmp_path)) == set(EXPECTED)
    captions = run(SidecarStage(out.url), str(tmp_path / "captions"))
    assert {row["key"] for row in read_parquets(captions, "recaption", "captions")} == set(EXPECTED)


def mean_colours(pixels_BHWC: Any) -> Any:
    """As an autoencoder's 16 channels of 2 x 2."""
    return torch.from_numpy(pixels_BHWC).float().mean((1, 2, 3))[:, None, None, None].expand(-1, 16, 2, 2)


def test_encode_goes_on_in_the_midst_of_a_shard_of_an_item(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of two samples, of shards of three."""
    source = ingest(tmp_path / "in", tars)
    job = LatentsJob(latents_column(), lambda: mean_colours, batch_size=1)
    monkeypatch.setattr("data.encode.stage.MAX_PART_BYTES", 2 * job.column.value_bytes())
    whole = run(Encode(source, latents={"latents": job}), str(tmp_path / "whole"))
    monkeypatch.setattr(samples_module, "ITEMS", 1)
    out, make = StageStore(str(tmp_path / "out")), Encode._part
    made: list[int] = []

    def dies(self: Encode, chunk: Any, work: Work) -> Any:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(len(chunk))
        return make(self, chunk, work)

    with monkeypatch.context() as patch:
        patch.setattr(Encode, "_part", dies)
        with pytest.raises(KeyboardInterrupt):
            Worker(Encode(source, latents={"latents": job}), out, lease_s=0.5).run()
    run(Encode(source, latents={"latents": job}), out.url)
    assert item_names(out.url, "encode") == ["0000000-a", "0000001-b", "0000002-c"]
    rows = read_parquets(out.url, "encode", "columns")
    assert rows == read_parquets(whole, "encode", "columns")
    assert [row["key"] for row in rows] == list(EXPECTED)
    parts = [part for receipt in done_receipts(out, "encode") for part in receipt["parts"]]
    assert [(part["note"]["shard"][-6:], part["counts"]["kept"]) for part in parts] == [
        ("a-0000", 2), ("a-0000", 1), ("a-0002", 2), ("b-0000", 2), ("b-0000", 1), ("b-0001", 2), ("b-0002", 1),
        ("c-0000", 1),
    ]  # fmt: skip
