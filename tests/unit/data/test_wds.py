"""WebDataset tars trained on as they are: every sample found, nothing broken passed over."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from data import storage as storage_module
from data.commands.index import index as index_command
from data.reader import open_dataset
from data.schema import INDEX
from data.storage import DamagedShard
from data.tar_index import index_tars
from trainer.errors import UserError

from .conftest import encoded, picture

Files = list[tuple[str, bytes]]


def samples(first: int, count: int, folder: str = "") -> Files:
    """As img2dataset writes them."""
    files: Files = []
    for i in range(first, first + count):
        files.append((f"{folder}{i:09d}.jpg", encoded(picture(i))))
        files.append((f"{folder}{i:09d}.json", json.dumps({"caption": f"json of {i}", "url": "x"}).encode()))
        files.append((f"{folder}{i:09d}.txt", f"caption of {i}\n".encode()))
    return files


def write_tar(path: Path, files: Files, format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_every_sample_of_every_tar(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    files = {"00000.tar": samples(0, 5), "00001.tar": samples(5, 3), "sub/00000.tar": samples(0, 2)}
    for name, content in files.items():
        write_tar(folder / name, content)
    found = index_tars(str(folder))
    assert (found.info.num_samples, found.num_tars, found.num_read, found.warnings) == (10, 3, 3, [])
    dataset = open_dataset(str(folder), name="x")
    assert dataset.shard_sizes.tolist() == [5, 3, 2]
    read = [dataset.read(i) for i in range(10)]
    expected = [(name, *row) for name, content in files.items() for row in zip(*[iter(content)] * 3, strict=True)]
    assert len({sample.key for sample in read}) == 10
    for sample, (tar, (image_name, image), _, (_, text)) in zip(read, expected, strict=True):
        assert sample.key == f"{tar}/{image_name.removesuffix('.jpg')}"
        assert sample.image == image
        assert sample.captions == {"original": (text.decode().strip(),)}
        assert sample.label == -1


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_all_formats(tmp_path: Path, format: int) -> None:
    """Long ones, those that are not ASCII, and equal base names in two folders."""
    names = ["a/0001", "b/0001", "x" * 60 + "/" + "y" * 80]
    if format != tarfile.USTAR_FORMAT:
        names += ["ü/ñ" * 60, "z" * 300]
    files = [file for name in names for file in ((f"{name}.png", encoded(picture(1), "PNG")), (f"{name}.txt", b"c"))]
    folder = tmp_path / "t"
    write_tar(folder / "0.tar", [*files, ("./d/dots.jpg", encoded(picture(2))), ("./d/dots.txt", b"dots")], format)
    index_tars(str(folder))
    dataset = open_dataset(str(folder), name="x")
    assert [dataset.read(i).key for i in range(len(dataset))] == [f"0.tar/{name}" for name in [*names, "d/dots"]]


def test_one_tar_and_an_index_elsewhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "t" / "a.tar", samples(0, 3))
    write_tar(tmp_path / "t" / "b.tar", samples(3, 3))
    index_tars(str(tmp_path / "t" / "b.tar"))
    one = open_dataset(str(tmp_path / "t" / "b.tar"), name="x")
    assert [one.read(i).key for i in range(len(one))] == [f"b.tar/{i:09d}" for i in (3, 4, 5)]
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"a.tar", "b.tar", "b.tar.index"}
    found = index_tars(str(tmp_path / "t"), str(tmp_path / "elsewhere"))
    assert found.url == str(tmp_path / "elsewhere")
    assert open_dataset(found.url, name="x").read(5).texts == ("caption of 5",)


def test_captions_labels_and_what_is_left_out(tmp_path: Path) -> None:
    jpeg = encoded(picture(0))
    files = [
        ("0.jpg", jpeg), ("0.txt", b" from the text "), ("0.json", b'{"caption": "from json"}'),
        ("1.jpg", jpeg), ("1.json", b'{"caption": "from json"}'), ("1.cls", b"7"),
        ("2.jpg", jpeg), ("2.cls", b"3\n"),
        ("3.jpg", jpeg), ("3.txt", b"  "), ("3.json", b'{"caption": null}'),
        ("4.txt", b"no image"),
        ("5.gif", b"GIF89a"), ("5.txt", b"gif"),
        ("6.jpg", b"<html>"), ("6.txt", b"not one"),
        ("7.jpg", jpeg), ("7.png", jpeg), ("7.txt", b"two"),
        ("8.jpg", jpeg), ("8.txt", b"\xff\xfe"),
        ("9.jpg", jpeg), ("9.json", b"[1"),
        ("10.jpg", jpeg), ("10.cls", b"seven"),
        ("11.jpg", jpeg), ("11.txt", b"x" * (1 << 21)),
        ("README", b"hello"), ("._hidden", b"mac"),
        ("12.JPG", jpeg), ("12.seg.png", jpeg), ("12.TXT", b"upper"),
    ]  # fmt: skip
    write_tar(tmp_path / "t" / "0.tar", files)
    found = index_tars(str(tmp_path / "t"))
    assert found.info.rejected == {
        "no_caption": 1, "no_image": 2, "unknown_format": 1, "several_images": 1, "broken_txt": 1, "broken_json": 1,
        "broken_cls": 1, "caption_too_large": 1, "no_extension": 2,
    }  # fmt: skip
    dataset = open_dataset(str(tmp_path / "t"), name="x")
    read = [dataset.read(i) for i in range(len(dataset))]
    assert [(s.key, s.texts, s.label) for s in read] == [
        ("0.tar/0", ("from the text",), -1), ("0.tar/1", ("from json",), 7), ("0.tar/2", (), 3),
        ("0.tar/12", ("upper",), -1),
    ]  # fmt: skip
    assert dataset.read_labels().tolist() == [-1, 7, 3, -1]


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "t" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (
            ("d", tarfile.DIRTYPE, ""), ("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.jpg", tarfile.LNKTYPE, "0.jpg"), ("dev.jpg", tarfile.CHRTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name, data in samples(0, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = index_tars(str(tmp_path / "t"))
    assert found.info.num_samples == 1
    assert found.info.rejected["no_file"] == 3


# -------------------------------------------------------------------------------------------------------------- broken tars


def _flip_header(data: bytearray) -> None:
    second = 512 + -(-len(encoded(picture(0))) // 512) * 512
    data[second + 10] ^= 0xFF


def _cut_in_a_member(data: bytearray) -> None:
    del data[700:]


def _no_end(data: bytearray) -> None:
    end = len(data)
    while not any(data[end - 512 : end]):
        end -= 512
    del data[end:]


def _two_in_one(data: bytearray) -> None:
    data += bytes(data)


def _one_empty_block(data: bytearray) -> None:
    data[:0] = bytes(512)


def _grown(data: bytearray) -> None:
    data += b"x" * 100


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_header, r"at byte \d{4,}: broken header"),
        (_cut_in_a_member, r"at byte 0: 000000000.jpg is cut short"),
        (_no_end, "the file ends here, without the two empty blocks that end a tar"),
        (_two_in_one, "the archive ends here, and more follows"),
        (_one_empty_block, "at byte 0: one empty block among the members"),
        (_grown, "the archive ends here, and more follows"),
    ],
)
def test_a_broken_tar_is_an_error_that_names_the_place(
    tmp_path: Path, damage: Callable[[bytearray], None], message: str
) -> None:
    path = write_tar(tmp_path / "t" / "0.tar", samples(0, 4))
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        index_tars(str(tmp_path / "t"))
    assert "0.tar" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t" / INDEX).exists()


def test_members_that_do_not_stand_together(tmp_path: Path) -> None:
    """A tar sorted by extension: readers of WebDataset would take each file for a sample."""
    files = sorted(samples(0, 3), key=lambda file: file[0].rpartition(".")[2])
    write_tar(tmp_path / "t" / "0.tar", files)
    with pytest.raises(UserError, match="the members of 000000000 do not stand together"):
        index_tars(str(tmp_path / "t"))


def test_compressed_tars_and_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar there"):
        index_tars(str(tmp_path))
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="is compressed"):
        index_tars(str(tmp_path))
    (tmp_path / "0.tar.gz").unlink()
    write_tar(tmp_path / "with space.tar", samples(0, 1))
    with pytest.raises(UserError, match="rename it"):
        index_tars(str(tmp_path))


def test_a_tar_that_changed_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_tar(folder / "0.tar", samples(0, 3))
    index_tars(str(folder))
    write_tar(folder / "0.tar", samples(3, 3))
    with pytest.raises(DamagedShard):
        open_dataset(str(folder), name="x").read(0)
    with pytest.raises(UserError, match=r"the tars have changed since they were indexed.*--overwrite"):
        index_tars(str(folder))
    index_tars(str(folder), overwrite=True)
    assert open_dataset(str(folder), name="x").read(0).texts == ("caption of 3",)


def test_an_index_is_built_on_from_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_tar(folder / "0.tar", samples(0, 3))
    assert index_tars(str(folder)).num_read == 1
    assert index_tars(str(folder)).num_read == 0
    write_tar(folder / "1.tar", samples(3, 3))
    assert index_tars(str(folder), overwrite=True).num_read == 1
    assert len(open_dataset(str(folder), name="x")) == 6


def test_counts_are_compared_with_what_the_downloader_says(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_tar(folder / "00000.tar", samples(0, 3))
    (folder / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 4}))
    (warning,) = index_tars(str(folder)).warnings
    assert warning.endswith("00000.tar: holds 3 samples, 00000_stats.json says 4")


# ----------------------------------------------------------------------------------------------------------------- untrusted


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    from data.schema import DATASET, index_digest

    tree = json.loads((folder / INDEX).read_text())
    edit(tree)
    (folder / INDEX).write_text(json.dumps(tree))
    info = json.loads((folder / DATASET).read_text())
    info["index_digest"] = index_digest((folder / INDEX).read_bytes())
    (folder / DATASET).write_text(json.dumps(info))


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["tars"][0].update(tar="../../etc/x.tar"),
        lambda tree: tree["tars"][0].update(tar="/etc/x.tar"),
        lambda tree: tree["tars"][0].update(tar="a//b.tar"),
        lambda tree: tree["tars"][0].update(samples=-1),
        lambda tree: tree["tars"][0].update(bytes=True),
        lambda tree: tree["tars"][0].update(xxh64="xyz"),
        lambda tree: tree["tars"][0]["rows"].update(bytes=1 << 60),
        lambda tree: tree["tars"][0].pop("rows"),
        lambda tree: tree.update(tars=[]),
        lambda tree: tree.update(version=2),
        lambda tree: tree["tars"].append(tree["tars"][0]),
        lambda tree: tree.update(tars_url=3),
    ],
)
def test_an_index_of_tars_that_is_not_to_be_trusted(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    folder = tmp_path / "t"
    write_tar(folder / "0.tar", samples(0, 2))
    index_tars(str(folder))
    change(folder, edit)
    with pytest.raises(UserError, match="not an index of tars"):
        open_dataset(str(folder), name="x")


def test_rows_that_lead_out_of_the_tar(tmp_path: Path) -> None:
    import xxhash

    folder = tmp_path / "t"
    write_tar(folder / "0.tar", samples(0, 2))
    index_tars(str(folder))
    file = folder / "rows" / "0.tar.rows"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-1])
    with pytest.raises(DamagedShard, match=r"rows/0.tar.rows: missing or damaged"):
        open_dataset(str(folder), name="x").read(0)
    data[0:8] = (1 << 40).to_bytes(8, "little")
    file.write_bytes(data)
    change(folder, lambda tree: tree["tars"][0]["rows"].update(xxh64=xxhash.xxh64_hexdigest(data)))
    with pytest.raises(DamagedShard, match="its rows lead out of the tar"):
        open_dataset(str(folder), name="x").read(0)


# -------------------------------------------------------------------------------------------------------------------- remote


@pytest.mark.parametrize("fetch", ["shards", "ranges"])
def test_remote_tars(tmp_path: Path, fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    for prefix in "ab":  # two datasets whose tars have equal names
        for i in range(2):
            path = write_tar(tmp_path / prefix / f"0000{i}.tar", samples(10 * ord(prefix) + 4 * i, 4))
            memory.put_file(str(path), f"/{tmp_path.name}/{prefix}/0000{i}.tar")
        index_tars(f"memory://{tmp_path.name}/{prefix}")
    for prefix in "ab":
        dataset = open_dataset(
            f"memory://{tmp_path.name}/{prefix}", name="x", cache_dir=str(tmp_path / "c"), fetch=fetch
        )
        texts = [dataset.read(i).texts[0] for i in range(8)]
        assert texts == [f"caption of {10 * ord(prefix) + i}" for i in range(8)]
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)
    memory.rm_file(f"/{tmp_path.name}/a/00001.tar")
    fresh = open_dataset(f"memory://{tmp_path.name}/a", name="x", cache_dir=str(tmp_path / "d"), fetch=fetch)
    assert fresh.read(0)
    with pytest.raises(UserError, match=r"00001.tar: missing"):
        fresh.read(7)


def test_the_command(tmp_path: Path) -> None:
    write_tar(tmp_path / "t" / "0.tar", [*samples(0, 3), ("x.txt", b"alone")])
    runner = CliRunner()
    result = runner.invoke(index_command, [str(tmp_path / "t")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "3 samples in 1 tar, " in result.output
    assert "left out: 1, no_image" in result.output
    assert "loupe data index s3://" in runner.invoke(index_command, ["--help"]).output
    os.remove(tmp_path / "t" / "rows" / "0.tar.rows.json")
    assert "read 1 of them" in runner.invoke(index_command, [str(tmp_path / "t")], catch_exceptions=False).output
