"""`loupe data build` and `verify`, from folders as people have them to batches; and what they refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from data.batches import BatchRequest
from data.cli import cli
from data.images import read_image
from data.loader import Loader
from data.plan import MixSegment, Mixture
from data.reader import Dataset, open_dataset
from data.schema import Resize, index_digest
from data.source import Entry
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loupe_data(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def draw(path: Path, number: int, size: tuple[int, int] = (60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def request(step: int, mixture: Mixture) -> BatchRequest:
    return BatchRequest(step, step * 8, mixture.refs(step * 8, 8), 64)


def batches_of(dataset: Dataset, num_workers: int, steps: int) -> list[Any]:
    mixture = Mixture({"d": dataset.shard_sizes}, seed=0, window_shards=4, segments=[MixSegment(0, {"d": 1.0})])
    with Loader(
        {"d": dataset}, partial(request, mixture=mixture), seed=0, random_crop=True, flip_probability=0.5,
        num_workers=num_workers, prefetch_steps=2, timeout_s=60,
    ) as loader:  # fmt: skip
        return list(loader.steps(0, steps))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A metadata.jsonl with all the trouble that rows and files can be."""
    folder = tmp_path / "photos"
    for i in range(6):
        draw(folder / "images" / f"{i}.png", i)
    draw(folder / "beside.jpg", 9)
    (folder / "images" / "cut.jpg").write_bytes((folder / "beside.jpg").read_bytes()[:300])
    (folder / "images" / "words.jpg").write_text("not an image")
    (folder / "LICENSE").write_text("Do as you like.")
    rows: list[dict[str, Any]] = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(6)]
    rows += [
        {"file_name": "beside.jpg", "captions": ["one", " two  words ", ""]},
        {"file_name": "0.png", "text": "picture 0, again"},
        {"file_name": "cut.jpg", "text": "a cut file"},
        {"file_name": "words.jpg", "text": "text"},
        {"file_name": "gone.jpg", "text": "no file"},
        {"file_name": "images/1.png", "text": " "},
    ]
    write_rows(folder, rows)
    return folder


def test_metadata_to_samples(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = loupe_data("build", photos, out)
    assert result.exit_code == 0
    dataset = open_dataset(str(out), name="p")
    samples = [dataset.read(i) for i in range(dataset.num_samples)]
    assert [s.key for s in samples] == [*(f"{i}.png" for i in range(6)), "beside.jpg"]
    assert samples[0].texts == ("picture 0", "picture 0, again")
    assert samples[6].texts == ("one", "two words")
    assert samples[3].image == (photos / "images" / "3.png").read_bytes()
    assert (out / "LICENSE").read_text() == dataset.info.notice == "Do as you like."
    assert dataset.info.rejected == {"undecodable": 1, "unknown_format": 1, "missing_file": 1, "no_caption": 1}
    assert dataset.info.merged_rows == 1
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {row["file_name"]: row["reason"] for row in listed} == {
        "cut.jpg": "undecodable",
        "words.jpg": "unknown_format",
        "gone.jpg": "missing_file",
        "images/1.png": "no_caption",
    }
    assert "rejected: 1 image, undecodable" in result.output
    assert "  cut.jpg: undecodable" in result.output
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert loupe_data("verify", out).exit_code == 0


def test_two_builds_are_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        loupe_data("build", photos, tmp_path / out, "--size", 32, "--format", "webp", "--order-seed", 3, "--name", "n")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("image_format", ["keep", "jpeg", "webp"])
def test_size_and_format(photos: Path, tmp_path: Path, image_format: str) -> None:
    out = tmp_path / "out"
    loupe_data("build", photos, out, "--size", 32, "--format", image_format, "--quality", 95)
    dataset = open_dataset(str(out), name="p")
    heads = {"keep": b"\x89PNG", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}
    for i in range(6):
        image = dataset.read(i).image
        assert image.startswith(heads[image_format])
        original = np.array(Image.open(photos / "images" / f"{i}.png").resize((48, 32), Image.Resampling.BOX))
        assert np.abs(read_image(image).astype(float) - original).mean() < 8
    assert (dataset.info.resize.short_side, dataset.info.resize.format) == (32, image_format)


def test_texts_and_class_folders(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    for i in range(3):
        draw(texts / "deep" / f"{i}.webp", i)
    (texts / "deep" / "0.txt").write_text("a first line\nand another\n")
    (texts / "deep" / "1.txt").write_text("\n")
    loupe_data("build", texts, tmp_path / "t")
    dataset = open_dataset(str(tmp_path / "t"), name="t")
    assert dataset.num_samples == 1
    assert dataset.read(0).texts == ("a first line", "and another")
    assert dataset.info.rejected == {"no_caption": 2}

    classes = tmp_path / "classes"
    for i, name in enumerate(["red_panda", "cat", "cat"]):
        draw(classes / name / f"{i}.png", i)
    loupe_data("build", classes, tmp_path / "c")
    dataset = open_dataset(str(tmp_path / "c"), name="c")
    assert dataset.class_names == ("cat", "red_panda")
    assert [(s.texts, s.label) for s in map(dataset.read, range(3))] == [
        (("cat",), 0), (("cat",), 0), (("red panda",), 1),
    ]  # fmt: skip


def test_order_shards_and_max_samples(tmp_path: Path) -> None:
    source = tmp_path / "many"
    write_rows(source, [{"file_name": f"{i:02d}.png", "text": "x", "label": i % 3} for i in range(30)])
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 255, (150, 150, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{i:02d}.png")
    loupe_data("build", source, tmp_path / "a", "--order-seed", 1, "--shard-mib", 1)
    loupe_data("build", source, tmp_path / "b", "--order-seed", 1, "--max-samples", 7)
    a, b = open_dataset(str(tmp_path / "a"), name="a"), open_dataset(str(tmp_path / "b"), name="b")
    assert len(a.shard_sizes) == 2
    keys = [a.read(i).key for i in range(30)]
    assert sorted(keys) == [f"{i:02d}.png" for i in range(30)] != keys
    assert [b.read(i).key for i in range(b.num_samples)] == keys[:7]
    assert a.read(0).label == int(keys[0][:2]) % 3


def test_buckets_labels_and_card_of_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "classes"
    shapes = [(60, 40), (40, 60), (50, 50), (58, 42)]
    for i in range(24):
        draw(source / f"c{i % 3}" / f"{i:02d}.png", i, shapes[i % 4])
    out = tmp_path / "out"
    result = loupe_data("build", source, out, "--buckets", "2:3,1:1,3:2", "--order-seed", 5)
    for line in ("2:3: 6 samples in 1 shard", "1:1: 6 samples in 1 shard", "3:2: 12 samples in 1 shard"):
        assert f"  bucket {line}\n" in result.output
    dataset = open_dataset(str(out), name="x")
    samples = [dataset.read(i) for i in range(24)]
    found = [read_image(s.image).shape[:2] for s in samples]
    # 58 x 42 is nearer to 3:2 than to 1:1: |log 1.38 - log 1.5| < |log 1.38|.
    assert found[:6] == [(60, 40)] * 6
    assert found[6:12] == [(50, 50)] * 6
    assert Counter(found[12:]) == {(40, 60): 6, (42, 58): 6}
    assert [(b.name, b.first_shard, b.num_shards) for b in dataset.info.buckets] == [
        ("2:3", 0, 1),
        ("1:1", 1, 1),
        ("3:2", 2, 1),
    ]
    assert dataset.read_labels().tolist() == [s.label for s in samples] == [int(s.key[1]) for s in samples]
    card = (out / "README.md").read_text()
    assert "| 3:2 | 12 | 50.0% |" in card
    assert "| c0 | 8 | 33.3% |" in card
    assert read_image((out / "samples.png").read_bytes()).shape == (3 * 96, 8 * 96, 3)
    assert loupe_data("verify", out).exit_code == 0
    told = json.loads(loupe_data("stats", out, "--json").output)
    assert told["statistics"]["classes"] == {"c0": 8, "c1": 8, "c2": 8}

    # Without what the build has counted: the same, from the samples themselves.
    (out / "stats.json").unlink()
    again = json.loads(loupe_data("stats", out, "--json").output)
    for tree in (told, again):
        del tree["statistics"]["licences"]
    assert again == told
    some = json.loads(loupe_data("stats", out, "--json", "--sample", 5).output)["statistics"]
    assert some["of"] == 24
    assert 0 < some["samples"] <= 5


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "../secret.jpg", "text": "x"}], r"metadata.jsonl:1: file_name '../secret.jpg' leads out"),
        ([{"file_name": "/etc/passwd", "text": "x"}], "leads out"),
        ([{"file_name": "a/../../b.jpg", "text": "x"}], "leads out"),
        ([{"text": "x"}], "metadata.jsonl:1: no file_name"),
        ([{"file_name": "a.jpg", "captions": [1]}], "captions must be a list of texts"),
        ([{"file_name": "a.jpg", "text": "x", "label": -1}], "label -1"),
        ([{"file_name": "a.jpg", "label": 1}, {"file_name": "b.jpg", "label": "x"}], "names in some rows"),
        ([{"file_name": "a.jpg", "label": 1}, {"file_name": "a.jpg", "label": 2}], "label 2 of a.jpg is 1"),
        ([], "no rows"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    draw(tmp_path / "secret.jpg", 0)
    write_rows(tmp_path / "source", rows)
    with pytest.raises(UserError, match=message) as error:
        loupe_data("build", tmp_path / "source", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_lines_that_are_not_json(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n\n{broken\n')
    with pytest.raises(UserError, match=r"metadata.jsonl:3: not JSON"):
        loupe_data("build", source, tmp_path / "out")


def test_sources_without_images(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        loupe_data("build", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no metadata.jsonl and no .jpg"):
        loupe_data("build", tmp_path / "empty", tmp_path / "out")
    write_rows(tmp_path / "all-bad", [{"file_name": "gone.jpg", "text": "x"}])
    with pytest.raises(UserError, match=r"no usable image .all 1 rejected, the first as missing_file"):
        loupe_data("build", tmp_path / "all-bad", tmp_path / "out")
    draw(tmp_path / "stray" / "a.jpg", 0)
    with pytest.raises(UserError, match=r"1 without text, such as a.jpg"):
        loupe_data("build", tmp_path / "stray", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_is_not_replaced_unasked_and_only_if_it_is_a_dataset(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loupe_data("build", photos, out, "--max-samples", 2)
    before = files(out)
    with pytest.raises(UserError, match="--overwrite"):
        loupe_data("build", photos, out)
    assert files(out) == before
    loupe_data("build", photos, out, "--overwrite")
    assert open_dataset(str(out), name="p").num_samples == 7

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="holds other files"):
        loupe_data("build", photos, home, "--overwrite")
    assert (home / "thesis.tex").exists()
    with pytest.raises(UserError, match="overlaps"):
        loupe_data("build", photos, photos / "out")
    with pytest.raises(UserError, match="overlaps"):
        loupe_data("build", photos, tmp_path, "--overwrite")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        loupe_data("build", photos, tmp_path / "file")


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    pixels = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    (source / "class").mkdir(parents=True)
    Image.fromarray(pixels).save(source / "class" / "000.png")
    for i in range(1, 400):
        os.link(source / "class" / "000.png", source / "class" / f"{i:03d}.png")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data.cli import cli; cli()"
    arguments = [sys.executable, "-c", code, "build", str(source), str(tmp_path / "out"), "--shard-mib", "1"]
    build = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob(".out.*.tmp/shard.00002.mds")):
            assert build.poll() is None, "the build ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        build.send_signal(signal.SIGKILL)
        build.wait()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out.*.tmp")
    with pytest.raises(UserError, match=r"no index.json"):
        open_dataset(str(left), name="x")


def test_an_error_half_way_removes_what_was_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data.build

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data.build, "publish", interrupted)
    assert loupe_data("build", photos, tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# ------------------------------------------------------------------------------------------------------ verify, remote


@pytest.mark.parametrize("damage", ["hash", "gone", "image", "count"])
def test_verify_finds_damage(photos: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.build

    if damage == "image":
        original = data.build._sample

        def cut(entry: Entry, resize: Resize) -> dict[str, Any]:
            row = original(entry, resize)
            return {**row, "image": row["image"][: len(row["image"]) // 2]}

        monkeypatch.setattr(data.build, "_sample", cut)
    out = tmp_path / "out"
    loupe_data("build", photos, out)
    shard = out / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    if damage == "hash":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "gone":
        shard.unlink()
    elif damage == "count":
        index = json.loads((out / "index.json").read_text())
        index["shards"][0]["samples"] = 5
        (out / "index.json").write_text(json.dumps(index))
        info = json.loads((out / "dataset.json").read_text())
        info.update(num_samples=5, index_digest=index_digest((out / "index.json").read_bytes()))
        (out / "dataset.json").write_text(json.dumps(info))
    result = loupe_data("verify", out)
    assert result.exit_code == 1
    assert {
        "hash": "its hash is not the index's",
        "gone": "cannot be read",
        "image": "7 failures",
        "count": "holds 7 samples, the index says 5",
    }[damage] in result.output


def test_remote_build_publishes_last_what_opens_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/set"
    sent: list[str] = []
    put_file = type(memory).put_file

    def put(self: Any, local: str, remote: str, **options: Any) -> None:
        sent.append(remote.rpartition("/")[2])
        put_file(self, local, remote, **options)

    monkeypatch.setattr(type(memory), "put_file", put)
    assert loupe_data("build", photos, url).exit_code == 0
    assert sent[-2:] == ["index.json", "dataset.json"]
    assert "shard.00000.mds" in sent[:-2]
    assert loupe_data("verify", url).exit_code == 0
    with pytest.raises(UserError, match="--overwrite"):
        loupe_data("build", photos, url)
    loupe_data("build", photos, url, "--overwrite", "--max-samples", 2)
    assert open_dataset(url, name="x", cache_dir=str(tmp_path / "c")).num_samples == 2


def test_help_has_examples() -> None:
    for command in ("build", "verify"):
        result = loupe_data(command, "--help")
        assert result.exit_code == 0
        assert f"loupe data {command} " in result.output.partition("Examples:")[2]


# ----------------------------------------------------------------------------------------------------------- real data


def test_the_shipped_emoji_are_whole() -> None:
    folder = ROOT / "data" / "assets" / "emoji_64"
    assert loupe_data("verify", folder).exit_code == 0
    dataset = open_dataset(str(folder), name="emoji", max_samples=96)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 3.8e6
    captions = [dataset.read(i).texts[0] for i in range(96)]
    assert all(caption.startswith("a 3d emoji of ") for caption in captions)
    assert len(set(captions)) == 96
    assert read_image(dataset.read(0).image).shape == (64, 64, 3)
    assert sum("keycap" in caption or "o’clock" in caption for caption in captions) < 10
    assert "MIT" in (folder / "NOTICE").read_text()
    assert dataset.info.notice == (folder / "NOTICE").read_text().strip()


@pytest.mark.shared
def test_the_shipped_emoji_are_what_the_command_builds(shared_dir: Path, tmp_path: Path) -> None:
    shipped = ROOT / "data" / "assets" / "emoji_64"
    line = next(
        line for line in (shipped.parent / "README.md").read_text().splitlines() if "loupe data build" in line
    ).split()
    options = line[line.index("data/assets/emoji_64") + 1 :]
    loupe_data("build", shared_dir / "data" / line[3], tmp_path / "emoji_64", *options)
    built, have = open_dataset(str(tmp_path / "emoji_64"), name="built"), open_dataset(str(shipped), name="shipped")
    exclude = {"index_digest", "schema_version"}  # the shipped one is of version 1
    assert built.info.model_dump(exclude=exclude) == have.info.model_dump(exclude=exclude)
    for i in range(0, have.num_samples, 7):
        ours, theirs = built.read(i), have.read(i)
        assert (ours.key, ours.texts) == (theirs.key, theirs.texts)
        # Not the bytes: encoders differ in a bit between versions and processors.
        assert np.abs(read_image(ours.image).astype(int) - read_image(theirs.image)).mean() < 1


@pytest.mark.shared
def test_photos_with_five_captions_each(shared_dir: Path, tmp_path: Path) -> None:
    result = loupe_data("build", shared_dir / "data" / "coco_open_256", tmp_path / "coco", "--shard-mib", 1)
    assert result.exit_code == 0
    dataset = open_dataset(str(tmp_path / "coco"), name="coco")
    assert dataset.num_samples == 139
    assert len(dataset.shard_sizes) > 1
    assert Counter(len(dataset.read(i).texts) for i in range(139))[5] >= 130
    batches = batches_of(dataset, num_workers=1, steps=20)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:139])) == 139
    assert all(batch.images_BCHW.shape == (8, 3, 64, 64) and not batch.substitutions for batch in batches)
    assert 60 < np.mean([batch.images_BCHW.float().mean() for batch in batches]) < 190


@pytest.mark.shared
def test_class_folders_of_photos(shared_dir: Path, tmp_path: Path) -> None:
    """TrashNet twice: by its metadata.jsonl, and as bare class folders."""
    trash = shared_dir / "data" / "trashnet_256"
    loupe_data("build", trash, tmp_path / "rows", "--order-seed", 0, "--max-samples", 60)
    rows = open_dataset(str(tmp_path / "rows"), name="rows")
    assert rows.class_names == ("cardboard", "glass", "metal", "paper", "plastic", "trash")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "images").symlink_to(trash / "images")
    for name in rows.class_names:
        (bare / name).mkdir()
        for image in sorted((trash / "images" / name).iterdir())[:5]:
            (bare / name / image.name).symlink_to(image)
    (bare / "images").unlink()
    loupe_data("build", bare, tmp_path / "folders", "--size", 64)
    folders = open_dataset(str(tmp_path / "folders"), name="folders")
    assert folders.class_names == rows.class_names
    assert Counter(folders.read(i).label for i in range(30)) == dict.fromkeys(range(6), 5)
    for batch in (*batches_of(rows, 0, 2), *batches_of(folders, 0, 2)):
        for key, label in zip(batch.keys, batch.labels_B.tolist(), strict=True):
            assert key.removeprefix("d/").startswith(rows.class_names[label])
