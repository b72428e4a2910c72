"""`loupe data ingest` on real photos: tars, manifests and folders, local and on S3, whole, broken and interrupted."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import data.ingest.from_tars as from_tars
from data.cli import cli
from data.images import read_image
from data.ingest.examine import Filters
from data.ingest.from_urls import UrlOptions
from data.ingest.manifests import Columns, slices
from data.ingest.stage import IngestStage
from data.stages.pinned import pinned_items
from data.stages.receipts import done_receipts
from data.stages.runner import Work, Worker
from data.stages.samples import Row, open_samples, read_shard
from data.stages.store import StageStore
from tests.image_server import ImageServer, image_server
from tests.killed_ingest import die_at
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from trainer.errors import UserError

pytestmark = pytest.mark.shared


@pytest.fixture(scope="session")
def coco(shared_dir: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """139 real photos with their rows."""
    folder = shared_dir / "data/coco_open_256"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [((folder / "images" / row["file_name"]).read_bytes(), row) for row in rows]


Coco = list[tuple[bytes, dict[str, Any]]]


def write_tar(path: Path, members: list[tuple[str, bytes]], *, append: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def laion(coco: Coco, first: int = 0) -> list[tuple[str, bytes]]:
    """As img2dataset writes them."""
    members = []
    for i, (image, row) in enumerate(coco, start=first):
        about = {"url": f"https://me:secret@{row['flickr_url'][7:]}?sig=x", "caption": row["captions"][0], "key": f"{i:09d}",
                 "license": row["license"], "status": "success", "width": row["width"]}  # fmt: skip
        stem, text = f"{i:09d}", row["captions"][0].encode()
        members += [(f"{stem}.jpg", image), (f"{stem}.json", json.dumps(about).encode()), (f"{stem}.txt", text)]
    return members


def clean(texts: list[str]) -> list[str]:
    """Single spaces, as captions are kept."""
    return [" ".join(text.split()) for text in texts]


def ingest(out: str, *sources: object, **settings: Any) -> dict[str, Any]:
    """Run all of it in this process; returns summary.json's counts."""
    store = StageStore(out)
    assert Worker(IngestStage([str(s) for s in sources], **settings), store).run() == []
    counts: dict[str, Any] = store.read_json("summary.json")["counts"]
    read = counts["ingest"]
    assert read.get("read", 0) == read.get("kept", 0) + sum(n for k, n in read.items() if k.startswith("rejected/"))
    return counts


def samples_of(out: str, scratch: Path) -> list[tuple[Row, bytes]]:
    """What later stages see: duplicates left out."""
    samples = open_samples(out)
    work = Work(StageStore(out), {}, None, 0, scratch)
    return [pair for shard in samples.shards() for pair in read_shard(samples, shard, work)]


def by_key(out: str, scratch: Path) -> dict[str, tuple[Row, bytes]]:
    found = samples_of(out, scratch)
    keyed = {row.key: (row, image) for row, image in found}
    assert len(keyed) == len(found)
    return keyed


def texts(folder: str) -> str:
    """All that a stage wrote of its own words, to look for secrets in."""
    fs, root = fsspec.url_to_fs(folder)
    return "".join(fs.cat_file(p).decode() for p in fs.find(root) if p.endswith(".json"))


# ----------------------------------------------------------------------------------------------------------------- tars


def test_tars_from_s3_to_s3(s3: str, tmp_path: Path, coco: Coco) -> None:
    """Two sets whose tars and keys have the same names; one photo is in both."""
    fs = fsspec.filesystem("s3")
    for folder, some in (("a", coco[:40]), ("b", coco[39:80])):
        for i in (0, 1):
            half = some[i * 20 : i * 20 + 20] if i == 0 else some[20:]
            fs.put_file(str(write_tar(tmp_path / "x.tar", laion(half))), f"{s3}/raw/{folder}/{i:05d}.tar")
    out = f"{s3}/ingested"
    counts = ingest(out, f"{s3}/raw/a", f"{s3}/raw/b/*.tar")
    assert counts["ingest"] == {"read": 81, "kept": 81}
    assert counts["drops"] == {"duplicate/exact": 1}
    found = by_key(out, tmp_path)
    assert Counter(key.partition("/")[0] for key in found) == {"00000": 20, "00001": 20, "00000-2": 19, "00001-2": 21}
    assert [image for _, image in samples_of(out, tmp_path)] == [image for image, _ in coco[:80]]
    row, image = found["00000/000000003"]
    assert image == coco[3][0]
    assert row.captions == {"original": [coco[3][1]["captions"][0]]}
    assert (row.width, row.height) == Image.open(io.BytesIO(image)).size
    assert row.licence == coco[3][1]["license"]
    assert row.source == "https://" + coco[3][1]["flickr_url"][7:]
    assert "secret" not in texts(out)
    assert "sig=" not in texts(out)


def test_every_kind_of_broken_sample_is_counted(tmp_path: Path, coco: Coco) -> None:
    images = [image for image, _ in coco]
    wide = io.BytesIO()
    Image.fromarray(read_image(images[1])).resize((900, 100)).save(wide, "JPEG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    gif = io.BytesIO()
    Image.fromarray(read_image(images[2])).save(gif, "GIF")
    members = [
        ("good.jpg", images[0]), ("good.txt", b"a good one"),
        ("cut.jpg", images[3][: len(images[3]) // 2]), ("cut.txt", b"a cut file"),
        ("bomb.png", bomb.getvalue()), ("bomb.txt", b"400 megapixels"),
        ("gif.gif", gif.getvalue()), ("gif.txt", b"a moving one"),
        ("words.jpg", b"not an image"), ("words.txt", b"text, not an image"),
        ("empty.jpg", b""), ("empty.txt", b"an empty file"),
        ("wide.jpg", wide.getvalue()), ("wide.txt", b"9 to 1"),
        ("textless.jpg", images[4]),
        ("blank.jpg", images[5]), ("blank.txt", b" \n "),
        ("short.jpg", images[6]), ("short.txt", b"a"),
        ("latin.jpg", images[7]), ("latin.txt", "Stra\xdfe".encode("latin-1")),
        ("lonely.txt", b"no image"), ("lonely.json", b"{}"),
        ("good.jpg", images[8]), ("good.txt", b"the key again"),
        ("json.jpg", images[9]), ("json.json", b'{"caption": "from the json"}'),
        ("damaged.jpg", images[10]), ("damaged.json", b'{"caption": '),
        ("surrogate.jpg", images[11]), ("surrogate.json", b'{"caption": "lone \\ud800 surrogate"}'),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "raw" / "x.tar", members)
    out = str(tmp_path / "out")
    counts = ingest(out, tar, filters=Filters(max_aspect=4, min_caption=3))
    assert counts["ingest"] == {
        "read": 16, "kept": 3, "rejected/undecodable": 1, "rejected/too_many_pixels": 1, "rejected/unknown_format": 3,
        "rejected/aspect": 1, "rejected/no_caption": 4, "rejected/caption_too_short": 1, "rejected/no_image": 1,
        "rejected/repeated_key": 1,
    }  # fmt: skip
    found = by_key(out, tmp_path)
    assert {k: list(r.captions["original"]) for k, (r, _) in found.items()} == {
        "x/good": ["a good one"], "x/json": ["from the json"], "x/surrogate": ["lone ? surrogate"],
    }  # fmt: skip
    (receipt,) = done_receipts(StageStore(out), "ingest")
    named = {key: reason for key, reason, _ in receipt["parts"][0]["note"]["rejected"]}
    assert named["x/cut"] == "undecodable"
    counts = ingest(str(tmp_path / "more"), tar, filters=Filters(keep_uncaptioned=True))
    assert "rejected/no_caption" not in counts["ingest"]
    counts = ingest(str(tmp_path / "large"), tar, filters=Filters(min_side=1000))
    assert counts["ingest"]["rejected/too_small"] == 6


def test_fewer_samples_than_img2dataset_promises(tmp_path: Path, coco: Coco) -> None:
    write_tar(tmp_path / "raw" / "00000.tar", laion(coco[:5]))
    (tmp_path / "raw" / "00000.parquet").write_bytes(b"its own list, which is not ours to read")
    (tmp_path / "raw" / "00000_stats.json").write_text('{"count": 9, "successes": 7}')
    (tmp_path / "raw" / "LICENSE.txt").write_text("As you like.")
    counts = ingest(str(tmp_path / "out"), tmp_path / "raw")
    assert counts["ingest"] == {"read": 7, "kept": 5, "rejected/missing_from_tar": 2}
    assert (tmp_path / "out/notices/00000-LICENSE.txt").read_text() == "As you like."


def test_a_killed_workers_tar_is_taken_over(tmp_path: Path, coco: Coco, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out is what comes out of an undisturbed run, byte for byte; duplicates of keys across the cut included."""
    monkeypatch.setattr(from_tars, "PART_SAMPLES", 20)
    members = laion(coco)
    members[60:60] = [("../evil.jpg", b"x")]
    tar = write_tar(tmp_path / "raw.tar", [*members, *members[:6]])
    data = bytearray(tar.read_bytes())
    data[data.index(b"000000070.jpg") + 5] ^= 1
    tar.write_bytes(data)
    ingest(str(tmp_path / "whole"), tar)

    out = str(tmp_path / "out")
    context: Any = multiprocessing.get_context("spawn")
    for sample in (47, 33):  # at sample 47, and 33 samples behind where the second began
        child = context.Process(target=die_at, args=(out, str(tar), sample))
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
    parts = StageStore(out).names("work/ingest/parts/0000000-raw")
    assert len(parts) == 2 + 1
    worker = Worker(IngestStage([str(tar)]), StageStore(out), lease_s=1.0)
    assert worker.run() == []
    (receipt,) = done_receipts(StageStore(out), "ingest")
    assert len({part["worker"] for part in receipt["parts"]}) == 3
    (undisturbed,) = done_receipts(StageStore(str(tmp_path / "whole")), "ingest")
    assert receipt["counts"] == undisturbed["counts"]
    assert receipt["counts"]["rejected/repeated_key"] == 2
    facts = [
        [(p["files"][r]["xxh64"], p["cursor"]) for p in whole["parts"] for r in ("tar", "index", "hashes")]
        for whole in (receipt, undisturbed)
    ]
    assert facts[0] == facts[1]
    assert samples_of(out, tmp_path) == samples_of(str(tmp_path / "whole"), tmp_path)


def test_a_tar_that_changes_or_goes_is_told(tmp_path: Path, coco: Coco) -> None:
    tar = write_tar(tmp_path / "x.tar", laion(coco[:3]))
    out = str(tmp_path / "out")
    stage = IngestStage([str(tar)])
    store = StageStore(out)
    listing, reading = stage.passes()[:2]
    assert Worker(stage, store)._run_pass(listing) == []
    pinned_items(store, reading)
    write_tar(tar, laion(coco[:2]))
    (failure,) = Worker(stage, store).run()
    assert "x.tar: has" in failure
    assert "when it was listed" in failure


# ------------------------------------------------------------------------------------------------------------ manifests


@pytest.fixture(scope="module")
def server(shared_dir: Path) -> Iterator[ImageServer]:
    folder = shared_dir / "data/coco_open_256/images"
    with image_server({path.name: path.read_bytes() for path in sorted(folder.iterdir())[:60]}) as server:
        yield server


def rows_for(server: ImageServer, coco: Coco) -> list[dict[str, Any]]:
    known = {row["file_name"]: row for _, row in coco}
    return [
        {
            "url": server.url(name) + "?token=hidden",
            "caption": known[name]["captions"][0],
            "license": known[name]["license"],
        }
        for name in server.images
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_manifest_of_urls(
    tmp_path: Path, coco: Coco, server: ImageServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.ingest.manifests.SLICE_ROWS", 25)
    monkeypatch.setattr("data.ingest.from_urls.PART_SAMPLES", 10)
    rows: list[dict[str, Any]] = rows_for(server, coco)
    rows[4:4] = [
        {"url": server.url("html"), "caption": "an error page"},
        {"url": server.url("gone"), "caption": "gone"},
    ]
    rows += [
        {"url": "file:///etc/passwd", "caption": "a local file"}, {"url": None, "caption": "none"},
        {"url": "gopher://x/y.jpg", "caption": "a strange one"}, {"url": rows[0]["url"], "caption": ""},
    ]  # fmt: skip
    path = tmp_path / f"urls.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows) + "{not json\n")
    out = str(tmp_path / "out")
    counts = ingest(out, path, urls=UrlOptions(allow_private=True, per_host=8))
    assert counts["list"]["listed"] == counts["ingest"]["read"] == len(rows) + (kind == "jsonl")
    assert counts["ingest"] == {
        "read": len(rows) + (kind == "jsonl"), "kept": 60, "rejected/not_an_image": 1, "rejected/http_4xx": 1,
        "rejected/local_file": 1, "rejected/bad_row": 1 + (kind == "jsonl"), "rejected/bad_url": 1, "rejected/no_caption": 1,
    }  # fmt: skip
    found = by_key(out, tmp_path)
    expected = dict(zip((f"urls/{i:09d}" for i in range(len(rows))), rows, strict=True))
    for key, (row, image) in found.items():
        name = expected[key]["url"].rpartition("/")[2].partition("?")[0]
        assert image == server.images[name]
        assert row.captions["original"] == clean([expected[key]["caption"]])
        assert row.licence == expected[key]["license"]
        assert row.source == server.url(name)
    assert "hidden" not in texts(out)
    items = [receipt["counts"]["read"] for receipt in done_receipts(StageStore(out), "ingest")]
    assert items == ([25, 15, 25, 1] if kind == "parquet" else [25, 25, 17])


def test_private_addresses_are_refused_unless_allowed(tmp_path: Path, coco: Coco, server: ImageServer) -> None:
    path = tmp_path / "urls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_for(server, coco)[:5]))
    before = server.hits.total()
    counts = ingest(str(tmp_path / "out"), path)
    assert counts["ingest"] == {"read": 5, "rejected/private_address": 5}
    assert server.hits.total() == before
    assert samples_of(str(tmp_path / "out"), tmp_path) == []


def test_objects_and_local_files_of_a_manifest(s3: str, tmp_path: Path, coco: Coco) -> None:
    fs = fsspec.filesystem("s3")
    rows = []
    for image, row in coco[:6]:
        fs.pipe_file(f"{s3}/images/{row['file_name']}", image)
        rows.append({"where": f"{s3}/images/{row['file_name']}", "alt": row["captions"][1]})
    (tmp_path / "near.jpg").write_bytes(coco[7][0])
    os.mkfifo(tmp_path / "pipe.jpg")
    rows += [
        {"where": f"{s3}/images/none.jpg", "alt": "missing"}, {"where": "near.jpg", "alt": "beside the manifest"},
        {"where": f"filecache::{s3}/images/x", "alt": "a chain"}, {"where": str(tmp_path / "pipe.jpg"), "alt": "a pipe"},
    ]  # fmt: skip
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    counts = ingest(
        str(tmp_path / "out"), path, columns=Columns("where", "alt"),
        urls=UrlOptions(allow_local=True, allow_object_stores=True),
    )  # fmt: skip
    assert counts["ingest"] == {
        "read": 10, "kept": 7, "rejected/missing_file": 1, "rejected/bad_url": 1, "rejected/unreadable_file": 1,
    }  # fmt: skip
    assert [image for _, image in samples_of(str(tmp_path / "out"), tmp_path)] == [
        *(image for image, _ in coco[:6]), coco[7][0],
    ]  # fmt: skip
    refused = ingest(str(tmp_path / "refused"), path, columns=Columns("where", "alt"))
    assert refused["ingest"] == {
        "read": 10,
        "rejected/object_store": 7,
        "rejected/local_file": 2,
        "rejected/bad_url": 1,
    }
    with pytest.raises(UserError, match=r"no column url or .* but where, alt; name it with --url-column"):
        list(slices(str(path), path.stat().st_size, Columns()))


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_metadata_by_the_command(tmp_path: Path, shared_dir: Path, coco: Coco) -> None:
    """The whole folder of photos as it is, with its NOTICE; from the command, with processes."""
    out = tmp_path / "out"
    folder = shared_dir / "data/coco_open_256"
    result = CliRunner().invoke(cli, ["ingest", str(folder), str(out), "--workers", "2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "139" in result.output
    found = by_key(str(out), tmp_path)
    assert [key for key in found] == [row["file_name"] for _, row in coco]
    for image, row in coco:
        kept, kept_image = found[row["file_name"]]
        assert kept_image == image
        assert kept.captions["original"] == clean(row["captions"])
        assert kept.licence == row["license"]
        assert kept.source == row["flickr_url"]
    assert (out / "notices" / "00000-NOTICE").read_bytes() == (folder / "NOTICE").read_bytes()
    again = CliRunner().invoke(cli, ["ingest", str(folder), str(out), "--workers", "0"], catch_exceptions=False)
    assert again.exit_code == 0
    with pytest.raises(UserError, match="was begun with --min-side = 1, now it is 64"):
        CliRunner().invoke(
            cli, ["ingest", str(folder), str(out), "--workers", "0", "--min-side", "64"], catch_exceptions=False
        )


def test_classes_as_imagenet_has_them(tmp_path: Path, coco: Coco) -> None:
    classes = ("n01440764", "n02123045")
    for i, (image, _) in enumerate(coco[:6]):
        path = tmp_path / "in" / ("train" if i else "val") / classes[i % 2] / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    words = tmp_path / "words.txt"
    words.write_text("n01440764 tench, Tinca tinca\nn02123045 tabby, tabby cat\n")
    out = str(tmp_path / "out")
    command = ["ingest", str(tmp_path / "in"), out, "--workers", "0", "--class-names", str(words)]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    rows = [row for row, _ in samples_of(out, tmp_path)]
    assert [(row.key, row.class_name, row.captions["original"]) for row in rows] == [
        ("train/n01440764/2.JPEG", "n01440764", ["tench"]), ("train/n01440764/4.JPEG", "n01440764", ["tench"]),
        ("train/n02123045/1.JPEG", "n02123045", ["tabby"]), ("train/n02123045/3.JPEG", "n02123045", ["tabby"]),
        ("train/n02123045/5.JPEG", "n02123045", ["tabby"]),
    ]  # fmt: skip
    assert StageStore(out).read_json("summary.json")["counts"]["list"] == {"listed": 5, "left_out": 1}


def test_texts_on_s3_and_two_folders_with_equal_names(s3: str, tmp_path: Path, coco: Coco) -> None:
    fs = fsspec.filesystem("s3")
    for folder in ("one/set", "two/set"):
        for i, (image, row) in enumerate(coco[:4] if folder == "one/set" else coco[3:7]):
            fs.pipe_file(f"{s3}/{folder}/deep/{i}.jpg", image)
            fs.pipe_file(f"{s3}/{folder}/deep/{i}.txt", "\n".join(row["captions"]).encode())
    fs.pipe_file(f"{s3}/one/set/alone.jpg", coco[8][0])
    out = str(tmp_path / "out")
    counts = ingest(out, f"{s3}/one/set", f"{s3}/two/set")
    assert counts["ingest"] == {"read": 9, "kept": 8, "rejected/no_caption": 1}
    found = by_key(out, tmp_path)
    assert list(found) == [*(f"set/deep/{i}.jpg" for i in range(4)), *(f"set-2/deep/{i}.jpg" for i in (1, 2, 3))]
    assert found["set/deep/2.jpg"][0].captions["original"] == clean(coco[2][1]["captions"])


def test_many_files_are_many_items(tmp_path: Path, coco: Coco, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.ingest.from_folders.SLICE_FILES", 30)
    monkeypatch.setattr("data.ingest.stage.SLICE_FILES", 30)
    monkeypatch.setattr("data.ingest.from_folders._LISTED_AT_ONCE", 60)
    for i, (image, _) in enumerate(coco):
        path = tmp_path / "in" / f"class_{i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    out = str(tmp_path / "out")
    counts = ingest(out, tmp_path / "in")
    assert counts["ingest"] == {"read": 139, "kept": 139}
    assert len(list(done_receipts(StageStore(out), "ingest"))) == 5
    assert {image for _, image in samples_of(out, tmp_path)} == {image for image, _ in coco}


# ------------------------------------------------------------------------------------------------------------ duplicates


def test_copies_of_real_photos(tmp_path: Path, coco: Coco) -> None:
    """Each photo thrice: as it is, again, and re-encoded; the first stays, whichever tar it is in."""
    members: list[tuple[str, bytes]] = []
    near = 0
    from data.ingest.examine import perceptual_hash

    for i, (image, row) in enumerate(coco[:30]):
        pixels = read_image(image)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        near += perceptual_hash(pixels) == perceptual_hash(read_image(file.getvalue()))
        for copy, data in (("a", image), ("b", image), ("c", file.getvalue())):
            members += [(f"{copy}/{i:03d}.jpg", data), (f"{copy}/{i:03d}.txt", row["captions"][0].encode())]
    members.sort()
    tars = [write_tar(tmp_path / "in" / f"{i}.tar", members[i * 60 : i * 60 + 60]) for i in range(3)]
    assert near >= 25
    out = str(tmp_path / "default")
    counts = ingest(out, *tars)
    assert counts["drops"] == {"duplicate/exact": 30, "duplicate/perceptual": near}
    kept = list(by_key(out, tmp_path))
    assert kept[:30] == [f"0/a/{i:03d}" for i in range(30)]
    counts = ingest(str(tmp_path / "wider"), *tars, distance=6)
    assert counts["drops"] == {"duplicate/exact": 30, "duplicate/perceptual": 30}
    counts = ingest(str(tmp_path / "exact"), *tars, distance=None, filters=Filters(near_duplicates=False))
    assert counts["drops"] == {"duplicate/exact": 30}


# -------------------------------------------------------------------------------------------------------------- refusals


def test_what_the_command_refuses(s3: str, tmp_path: Path, coco: Coco) -> None:
    write_tar(tmp_path / "in" / "a.tar", laion(coco[:2]))
    (tmp_path / "in" / "b.jsonl").write_text('{"url": "x"}\n')
    (tmp_path / "empty").mkdir()
    for sources, message in (
        (["https://me:secret@host/x.tar"], "the URL holds credentials"),
        (["https://host/x.tar?X-Amz-Signature=abc"], "the URL holds credentials"),
        ([tmp_path / "in"], "lies in the source"),
    ):
        with pytest.raises(UserError, match=message) as e:
            CliRunner().invoke(cli, ["ingest", *map(str, sources), str(tmp_path / "in/out")], catch_exceptions=False)
        assert "secret" not in str(e.value)
        assert "abc" not in str(e.value)
    out = tmp_path / "out"
    for source, message in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "none.tar", "no such file"),
        (f"{tmp_path}/in/*", "neither tars alone nor manifests alone"),
        (f"{tmp_path}/in/*.gz", "matches nothing"),
        (f"{s3}-no-such-bucket/x", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(cli, ["ingest", str(source), str(out), "--workers", "0"], catch_exceptions=False)
        assert not out.exists()  # so that the command can be given again with the right name
    (failure,) = Worker(IngestStage([str(tmp_path / "empty")]), StageStore(str(tmp_path / "out2"))).run()
    assert "no metadata.jsonl" in failure
