"""What sources are taken for, how they are cut, and files read by ranges from storage that misbehaves."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data.ahead import in_order
from data.ingest import manifests
from data.ingest.class_names import read_class_names
from data.ingest.examine import Filters
from data.ingest.expand import expand
from data.ingest.from_urls import UrlOptions
from data.ingest.manifests import Columns, read_slice, slices
from data.ingest.ranges import RangeReader, TooLarge, read_object
from data.ingest.stage import IngestStage
from data.source import open_source
from data.stages.runner import Worker
from data.stages.store import StageStore
from data.storage import StorageError
from tests.unit.data.conftest import encoded, picture
from trainer.errors import UserError


class Unsteady(MemoryFileSystem):
    """Storage that answers with half of what was asked, or never."""

    protocol = "unsteady"
    store: dict[str, Any] = {}  # noqa: RUF012  as MemoryFileSystem's
    halved = 0
    hangs = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("unsteady://").lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        if type(self).hangs:
            time.sleep(600)
        data: bytes = super().cat_file(path, start, end, **more)
        if type(self).halved:
            type(self).halved -= 1
            return data[: len(data) // 2]
        return data


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    monkeypatch.setattr(Unsteady, "hangs", False)
    Unsteady().pipe_file("/x", bytes(range(256)) * 40)
    return "unsteady://x"


def test_ranges_are_whole_whatever_comes(unsteady: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unsteady, "halved", 2)
    monkeypatch.setattr("data.storage._FIRST_PAUSE_S", 0.01)
    reader = RangeReader(unsteady, range_bytes=1000)
    data = bytes(range(256)) * 40
    assert reader.read(0, 3000) == data[:3000]
    assert Unsteady.halved == 0
    assert reader.read(9000, 9999) == data[9000:]  # forwards, over ranges that were never asked for
    assert reader.read(2500, 10) == data[2500:2510]
    assert reader.read(len(data), 5) == b""


def test_storage_that_hangs_is_given_up(unsteady: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unsteady, "hangs", True)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"not read within .*no answer in time"):
        RangeReader(unsteady, deadline_s=0.5).read(0, 10)
    assert time.monotonic() - began < 300


def test_sizes_are_looked_at_before_reading(unsteady: str) -> None:
    with pytest.raises(TooLarge):
        read_object(Unsteady(), "/x", 1000)
    assert len(read_object(Unsteady(), "/x", 10240)) == 10240
    with pytest.raises(UserError, match="had 5 when it was listed"):
        RangeReader(unsteady, num_bytes=5)
    with pytest.raises(UserError, match="no such file"):
        RangeReader("unsteady://none")


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\r\n\n" + b"x" * 50 + b"\nlast")
    found = list(RangeReader(str(path), range_bytes=7).lines(0, 20))
    assert found == [(0, b"one"), (5, b""), (6, None), (57, b"last")]


def test_in_order_is_in_order() -> None:
    def slow_first(i: int) -> int:
        time.sleep(0.1 if i == 0 else 0)
        return i * i

    done = [(i, future.result()) for i, future in in_order(slow_first, range(20), threads=4, ahead=6)]
    assert done == [(i, i * i) for i in range(20)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_slices_together_are_the_manifest(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "SLICE_ROWS", 30)
    rows = [{"URL": f"http://h/{i}", "TEXT": f"text  {i}", "LICENSE": "?" if i % 2 else None} for i in range(205)]
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    size = path.stat().st_size
    parts = list(slices(str(path), size, Columns()))
    assert max(part["rows"] for part in parts) == 30
    found = [row for part in reversed(parts) for row in reversed(read_slice(str(path), size, part, Columns()))][::-1]
    assert [(row.number, row.url, row.captions, row.licence) for row in found] == [
        (i, row["URL"], (f"text {i}",), row["LICENSE"]) for i, row in enumerate(rows)
    ]
    with pytest.raises(UserError, match="when it was listed"):
        read_slice(str(path), size - 1, parts[0], Columns())


def test_a_machine_without_network_drops_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(json.dumps({"url": f"http://host{i}.invalid/x.jpg", "text": "x"}) + "\n" for i in range(25))
    )
    (failure,) = Worker(IngestStage([str(path)], urls=UrlOptions(attempts=1)), StageStore(str(tmp_path / "out"))).run()
    assert "none of 25 hosts answers" in failure


def test_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names"
    for text in (
        "n1 tench, Tinca tinca\nn2\tgreat_white shark\n\n",
        '{"n1": "tench", "n2": "great white shark"}',
    ):
        path.write_text(text)
        assert read_class_names(path) == {"n1": "tench", "n2": "great white shark"}
    path.write_text('{"0": ["n1", "tench"]}')
    assert read_class_names(path) == {"n1": "tench", "0": "tench"}
    for text, message in (
        ("n1\n", ":1: has no words"),
        ("", "names no class"),
        ("{", "not JSON"),
        ('{"a": 1}', "neither a text"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_class_names(path)


def test_what_a_folder_is_taken_for(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "metadata.jsonl").write_text("{}")
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("0.tar", "1.tar", "0.parquet", "0_stats.json", "LICENSE"):
        (tars / name).write_bytes(b"")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("0.parquet", "1.jsonl"):
        (lists / name).write_bytes(b"")
    units = expand([str(tmp_path / name) for name in ("photos", "tars", "lists")], "auto")
    assert [unit["kind"] for unit in units] == ["folder", "tars", "manifest", "manifest"]
    assert [tar["prefix"] for tar in units[1]["tars"]] == ["0", "1"]
    assert units[1]["tars"][0]["stats"].endswith("0_stats.json")
    assert "stats" not in units[1]["tars"][1]
    assert units[1]["notices"] == ["LICENSE"]
    assert [unit["prefix"] for unit in units if unit["kind"] == "manifest"] == ["0-2", "1-2"]
    assert [unit["kind"] for unit in expand([str(tars)], "manifest")] == ["manifest"]
    assert expand([f"{tmp_path}/**/*.tar"], "auto")[0]["tars"][1]["url"] == str(tars / "1.tar")


def test_a_folder_that_changes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.ingest.from_folders._LISTED_AT_ONCE", 2)
    for i in range(5):
        path = tmp_path / "in" / "a" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
    stage, store = IngestStage([str(tmp_path / "in")], filters=Filters()), StageStore(str(tmp_path / "out"))
    listing = stage.passes()[0]
    item = {"name": "00000-folder", **listing.items(store)[0]}
    from data.stages.runner import Work

    parts = list(listing.parts(Work(store, item, None, 0, tmp_path)))
    assert len(parts) == 3
    again = list(listing.parts(Work(store, item, parts[0].cursor, 1, tmp_path)))
    assert [part.cursor for part in again] == [part.cursor for part in parts[1:]]
    (tmp_path / "in/a/00.jpg").write_bytes(encoded(picture(9)))
    with pytest.raises(UserError, match="has changed since its first 2 images"):
        list(listing.parts(Work(store, item, parts[0].cursor, 1, tmp_path)))


def test_pipes_are_no_images(tmp_path: Path) -> None:
    import os

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(encoded(picture(0)))
    os.mkfifo(tmp_path / "a" / "1.jpg")
    assert [entry.key for entry in open_source(tmp_path).entries] == ["a/0.jpg"]
