"""Which images are held out: by hand, and that none is trained on."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from data.cli import cli
from data.reader import open_dataset
from data.source import open_source
from data.split import heldout_counts, source_names, split
from launch.entry import run_command
from trainer.errors import UserError


def folder_of(root: Path, name: str, count: int, *, first: int = 0) -> Path:
    """Images of one colour each, no two alike, in two classes."""
    folder = root / name
    for i in range(first, first + count):
        path = folder / f"class{i % 2}" / f"{name}{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 10, 3), [i, first // 7, len(name)], np.uint8)).save(path)
    (folder / "LICENSE").write_text(f"of {name}")
    return folder


def test_counts_follow_the_square_root_of_the_sizes() -> None:
    assert heldout_counts([139, 2527], 96) == [18, 78]  # 11.79 and 50.27 of 62.06
    assert heldout_counts([400, 100], 30) == [20, 10]
    assert heldout_counts([4, 10_000], 90) == [2, 88], "at most half of a folder; the rest is the other's"
    assert heldout_counts([7], 3) == [3]


def test_more_than_half_is_refused() -> None:
    with pytest.raises(UserError, match="--heldout: 6 of 11 images"):
        heldout_counts([10, 1], 6)


def test_no_image_is_in_both_and_the_choice_is_of_the_names_alone(tmp_path: Path) -> None:
    sources = [open_source(folder_of(tmp_path, "few", 12)), open_source(folder_of(tmp_path, "many", 48, first=100))]
    training, held, twins = split(sources, 9)
    assert twins == 0
    assert [len(source.entries) for source in training] == [9, 42]
    names = {entry.key for entry in held.entries}
    assert len(names) == 9
    for source, name in zip(training, ("few", "many"), strict=True):
        assert not {f"{name}/{entry.key}" for entry in source.entries} & names
    assert {entry.label for entry in held.entries} == {-1}, "labels of different folders are not the same classes"
    assert {entry.label for entry in training[0].entries} == {0, 1}
    _, held_again, _ = split(sources[::-1], 9)
    assert {entry.key for entry in held_again.entries} == names
    folder_of(tmp_path, "many", 3, first=148)
    grown = {e.key for e in split([sources[0], open_source(tmp_path / "many")], 9)[1].entries}
    assert len(grown & names) >= 6, "a few more photos change a few of the choice"


def test_an_image_equal_to_one_held_out_is_not_trained_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "photos", 10)
    _, held, _ = split([open_source(folder)], 3)
    twin = held.entries[0].path
    assert twin is not None
    (folder / "class0" / "another-name.png").write_bytes(twin.read_bytes())
    training, held, twins = split([open_source(folder)], 3)
    contents = [entry.path.read_bytes() for entry in held.entries if entry.path]
    assert twin.read_bytes() in contents, "the twin's name would have to be chosen in its place"
    assert twins == 1
    assert all(entry.path and entry.path.read_bytes() not in contents for entry in training[0].entries)


def test_names_are_fit_for_files_and_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "my photos", tmp_path / "b" / "my photos", tmp_path / "x.y"]
    sources = []
    for path in paths:
        folder_of(path.parent, path.name, 2)
        sources.append(open_source(path))
    assert source_names(sources) == ["my_photos", "my_photos-2", "x_y"]


def test_the_command_builds_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, many, out = folder_of(tmp_path, "few", 12), folder_of(tmp_path, "many", 48, first=100), tmp_path / "out"
    arguments = ["split", str(few), str(many), str(out), "--heldout", "9", "--size", "8"]
    assert run_command(cli, arguments, prog_name="loupe") == 0, capsys.readouterr()
    expected = {"heldout": 9, "train": {"few": {"images": 9}, "many": {"images": 42}}, "twins": 0}
    assert json.loads((out / "split.json").read_text()) == expected
    held = open_dataset(str(out / "heldout"), name="heldout")
    trained = [open_dataset(str(out / "train" / name), name=name) for name in ("few", "many")]
    images = [{d.read(i).image for i in range(d.num_samples)} for d in (held, *trained)]
    assert [len(found) for found in images] == [9, 9, 42]
    assert not images[0] & (images[1] | images[2])
    notices = {path.name: path.read_text() for path in (out / "heldout").glob("*LICENSE")}
    assert notices == {"few-LICENSE": "of few", "many-LICENSE": "of many"}
    assert run_command(cli, arguments, prog_name="loupe") == 2, "it is there already"


def test_a_url_is_not_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = folder_of(tmp_path, "photos", 12)
    arguments = ["split", str(photos), "memory://of-split", "--heldout", "4"]
    assert run_command(cli, arguments, prog_name="loupe") == 0, capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["photos"], "nothing on this disk"
    files = fsspec.filesystem("memory")
    assert json.loads(files.cat_file("/of-split/split.json"))["heldout"] == 4
    assert {"/of-split/heldout/index.json", "/of-split/train/photos/index.json"} <= set(files.find("/of-split"))


def test_an_earlier_split_is_not_mixed_with_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = folder_of(tmp_path, "one", 12), folder_of(tmp_path, "two", 12), tmp_path / "out"
    assert run_command(cli, ["split", str(one), str(out), "--heldout", "4"], prog_name="loupe") == 0
    before = sorted(str(path) for path in out.rglob("*"))
    assert run_command(cli, ["split", str(two), str(out), "--heldout", "4"], prog_name="loupe") == 2
    assert "holds a split already; add --overwrite" in capsys.readouterr().err
    assert run_command(cli, ["split", str(two), str(out), "--heldout", "4", "--overwrite"], prog_name="loupe") == 2
    assert "train/one: of another split" in capsys.readouterr().err
    assert sorted(str(path) for path in out.rglob("*")) == before
    assert run_command(cli, ["split", str(one), str(out), "--heldout", "3", "--overwrite"], prog_name="loupe") == 0
    assert json.loads((out / "split.json").read_text())["heldout"] == 3


def test_what_is_rejected_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = folder_of(tmp_path, "photos", 12)
    (photos / "class0" / "broken.png").write_bytes(b"no image")
    assert run_command(cli, ["split", str(photos), str(tmp_path / "out"), "--heldout", "2"], prog_name="loupe") == 0
    assert "class0/broken.png: " in capsys.readouterr().out
