"""`loupe data verify`: damage of each kind is found, repaired from a mirror, or set aside; of datasets and stages' outputs."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from data.buckets import ASPECTS
from data.build import build as build_folder
from data.cli import cli
from data.mds import mds
from data.mdsbuild.stage import BuildStage
from data.reader import open_dataset
from data.schema import COLUMNS, DatasetInfo, Resize, index_digest
from data.source import open_source
from data.verify import KEYS, _Keys, verify
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from tests.sample_stages import PhotoStage, run
from tests.unit.data.conftest import encoded, picture
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what is damaged is fetched again."""
    monkeypatch.setattr("data.storage._FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two shapes and three classes in some ten shards."""
    folder = tmp_path_factory.mktemp("built")
    for i in range(60):
        path = folder / "source" / f"c{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        wide = i % 2 == 0
        pixels = np.random.default_rng(i).integers(
            0, 255, (150 if wide else 300, 300 if wide else 150, 3), dtype=np.uint8
        )
        from PIL import Image

        Image.fromarray(pixels).save(path)
    build_folder(
        open_source(folder / "source"), str(folder / "set"), name="set", resize=Resize(), shard_mib=1, aspects=ASPECTS
    )
    return folder / "set"


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "set")
    return tmp_path / "set"


def loupe_data(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def shards(dataset: Path) -> list[Path]:
    return sorted(dataset.glob("*.mds"))


def test_a_whole_dataset(dataset: Path) -> None:
    info = open_dataset(str(dataset), name="x").info
    assert [b.name for b in info.buckets] == ["1:2", "2:1"]
    assert len(shards(dataset)) > 8
    for options in (["--workers", 1], ["--workers", 1, "--sample", 7]):
        result = loupe_data("verify", dataset, *options)
        assert result.exit_code == 0, result.output
        assert "whole; 60 samples" in result.output
        decoded = "7" if "--sample" in options else "60"
        assert f"{decoded} images decoded" in result.output


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_is_found_and_repaired_from_a_mirror(dataset: Path, built: Path, workers: int) -> None:
    files = shards(dataset)
    flip(files[1], 5000)
    files[3].unlink()
    files[4].write_bytes(files[4].read_bytes()[:-10])
    result = loupe_data("verify", dataset, "--workers", workers)
    assert result.exit_code == 1
    assert "3 failures" in result.output
    assert all(files[i].name in result.output for i in (1, 3, 4))
    with pytest.raises(UserError, match="is the dataset itself"):
        loupe_data("verify", dataset, "--workers", 1, "--repair", dataset)
    result = loupe_data("verify", dataset, "--workers", 1, "--repair", built)
    assert result.exit_code == 0, result.output
    assert result.output.count("repaired: ") == 3
    assert {p.name: p.read_bytes() for p in dataset.iterdir()} == {p.name: p.read_bytes() for p in built.iterdir()}


def test_a_mirror_with_the_same_damage_repairs_nothing(dataset: Path, built: Path, tmp_path: Path) -> None:
    flip(shards(dataset)[2])
    shutil.copytree(dataset, tmp_path / "mirror")
    result = loupe_data("verify", dataset, "--workers", 1, "--repair", tmp_path / "mirror")
    assert result.exit_code == 1
    assert "repaired" not in result.output
    assert "its hash is not the index's" in result.output


def test_damaged_shards_are_set_aside_on_request(dataset: Path) -> None:
    before = open_dataset(str(dataset), name="x")
    samples = [before.read(i) for i in range(60)]
    sizes = before.shard_sizes.tolist()
    files = shards(dataset)
    second = before.info.buckets[1].first_shard
    gone = [0, *range(second, second + 1)]
    for number in gone:
        flip(files[number], 600)
    result = loupe_data("verify", dataset, "--workers", 1, "--quarantine")
    assert result.exit_code == 0, result.output
    after = open_dataset(str(dataset), name="x")
    assert f"quarantined: 2 shards; the dataset's digest is now {after.digest}" in result.output
    assert after.digest != before.digest
    ends = np.cumsum(sizes)
    kept = [i for i in range(60) if int(np.searchsorted(ends, i, side="right")) not in gone]
    assert [after.read(i).key for i in range(after.num_samples)] == [samples[i].key for i in kept]
    assert after.read_labels().tolist() == [samples[i].label for i in kept]
    assert [b.num_shards for b in after.info.buckets] == [b.num_shards - 1 for b in before.info.buckets]
    assert after.info.rejected["quarantined"] == 60 - len(kept)
    names = {p.name for p in (dataset / "quarantine").iterdir()}
    assert names == {
        files[0].name, files[second].name, f"{before.digest}.index.json", f"{before.digest}.dataset.json",
    }  # fmt: skip
    assert loupe_data("verify", dataset, "--workers", 1).exit_code == 0

    # And back: the mirror's copy under the old index.
    for name in ("index.json", "dataset.json"):
        (dataset / name).write_bytes((dataset / "quarantine" / f"{before.digest}.{name}").read_bytes())
    assert open_dataset(str(dataset), name="x").digest == before.digest


def test_a_bucket_that_loses_all_of_its_shards_goes(dataset: Path) -> None:
    info = open_dataset(str(dataset), name="x").info
    for file in shards(dataset)[: info.buckets[0].num_shards]:
        file.unlink()
    assert loupe_data("verify", dataset, "--workers", 1, "--quarantine").exit_code == 0
    after = open_dataset(str(dataset), name="x").info
    assert [(b.name, b.first_shard) for b in after.buckets] == [("2:1", 0)]
    for file in shards(dataset):
        file.unlink()
    with pytest.raises(UserError, match="nothing would be left"):
        loupe_data("verify", dataset, "--workers", 1, "--quarantine")
    assert open_dataset(str(dataset), name="x").digest == after.digest


def test_labels(dataset: Path) -> None:
    whole = (dataset / "labels.i32").read_bytes()
    flip(dataset / "labels.i32", 8)
    result = loupe_data("verify", dataset, "--workers", 1)
    assert result.exit_code == 1
    assert "labels.i32: is damaged" in result.output
    result = loupe_data("verify", dataset, "--workers", 1, "--repair", dataset.parent / "nowhere")
    assert result.exit_code == 0, result.output
    assert "repaired: the file of labels" in result.output
    assert (dataset / "labels.i32").read_bytes() == whole

    # A file of labels of its own hash, which says other things than the shards.
    import xxhash

    labels = np.frombuffer(whole, dtype="<i4").copy()
    labels[[3, 9]] = (labels[[3, 9]] + 1) % 3
    (dataset / "labels.i32").write_bytes(labels.tobytes())
    edit(dataset, labels_xxh64=xxhash.xxh64(labels.tobytes()).hexdigest())
    result = loupe_data("verify", dataset, "--workers", 1)
    assert result.exit_code == 1
    assert "differs from the shards in 2 rows, the first is row 3" in result.output


def edit(dataset: Path, **changes: Any) -> None:
    file = dataset / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_image_in_the_wrong_bucket(dataset: Path) -> None:
    info = json.loads((dataset / "dataset.json").read_text())
    first, second = info["buckets"]
    wide = {**first, "name": "2:1", "aspect": 2.0}
    tall = {**second, "name": "1:2", "aspect": 0.5}
    middle = {"name": "1:1", "aspect": 1.0, "first_shard": 1, "num_shards": first["num_shards"] - 1}
    edit(dataset, buckets=[{**wide, "num_shards": 1}, middle, tall])
    result = loupe_data("verify", dataset, "--workers", 1)
    assert result.exit_code == 1
    assert "150 x 300 px stands in the bucket 2:1" in result.output


def test_what_is_denied_is_not_called_damaged(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.verify_shard as module

    def denied(*_: object) -> None:
        raise UserError("access denied")

    monkeypatch.setattr(module, "_local", denied)
    with pytest.raises(UserError, match="access denied"):
        loupe_data("verify", dataset, "--workers", 1, "--quarantine")
    assert not (dataset / "quarantine").exists()


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    """A dataset of whole shards with equal keys, bad labels, captions that are none and images that are none."""
    good = encoded(picture(0))
    rows: list[dict[str, Any]] = [
        {"key": "a", "image": good, "captions": ["x"], "label": 0},
        {"key": "b", "image": good, "captions": {"odd": ["x"]}, "label": 1},
        {"key": "c", "image": good[:200], "captions": ["x"], "label": 5},
        {"key": "d", "image": good, "captions": 7, "label": 0},
        {"key": "a", "image": good, "captions": [], "label": -1},
    ]
    writer = mds().Writer(columns=COLUMNS, out=str(tmp_path / "set"), hashes=["xxh64"])
    for row in rows:
        writer.write(row)
    writer.finish()
    index = (tmp_path / "set" / "index.json").read_bytes()
    info = DatasetInfo(name="n", num_samples=5, index_digest=index_digest(index), class_names=("p", "q"))
    (tmp_path / "set" / "dataset.json").write_text(info.model_dump_json())
    texts = [str(f) for f in verify(str(tmp_path / "set")).failures]
    assert len(texts) == 5
    assert any("b: has captions of kind 'odd'" in t for t in texts)
    assert any("c: label 5 is none of the 2 classes" in t for t in texts)
    assert any("c: undecodable" in t for t in texts)
    assert any("sample 3: does not fit the training schema" in t for t in texts)
    assert any("sample 0 and shard.00000.mds sample 4 have the same key" in t for t in texts)


def test_equal_keys_are_found_over_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.verify as module

    monkeypatch.setattr(module, "PARTITION_BYTES", 10_000)
    hashes = np.random.default_rng(0).integers(1, 2**63, 5000).astype(np.uint64)
    hashes[4321], hashes[17] = hashes[5], hashes[4000]
    keys = _Keys(tmp_path, len(hashes))
    for first in range(0, 5000, 500):
        keys.add(hashes[first : first + 500], first)
    assert sorted(keys.twice()) == [(5, 4321), (17, 4000)]
    assert len(list(tmp_path.glob("keys.*"))) == 5000 * KEYS.itemsize // 10_000


@pytest.mark.shared
def test_on_s3(s3: str, shared_dir: Path, tmp_path: Path) -> None:
    """Found, repaired and set aside there too, and nothing of it stays on this disk."""
    source = run(PhotoStage(str(shared_dir / "data" / "coco_open_256")), str(tmp_path / "in"))
    run(BuildStage(source, str(tmp_path / "set"), "n", ASPECTS, shard_mib=1, min_samples=1), str(tmp_path / "work"))
    fs = fsspec.filesystem("s3")
    url = f"{s3}/verify/set"
    fs.put(str(tmp_path / "set"), url, recursive=True)
    names = [p.name for p in shards(tmp_path / "set")]
    damaged = bytearray(fs.cat_file(f"{url}/{names[1]}"))
    damaged[300] ^= 1
    fs.pipe_file(f"{url}/{names[1]}", bytes(damaged))
    fs.rm_file(f"{url}/{names[2]}")
    result = loupe_data("verify", url, "--workers", 1, "--sample", 5)
    assert result.exit_code == 1
    assert "2 failures" in result.output
    result = loupe_data("verify", url, "--workers", 1, "--sample", 5, "--repair", tmp_path / "set")
    assert result.exit_code == 0, result.output
    fs.pipe_file(f"{url}/{names[0]}", bytes(damaged))
    result = loupe_data("verify", url, "--workers", 1, "--sample", 5, "--quarantine")
    assert result.exit_code == 0, result.output
    assert fs.exists(f"{url}/quarantine/{names[0]}")
    assert not fs.exists(f"{url}/{names[0]}")
    assert loupe_data("verify", url, "--workers", 1, "--sample", 0).exit_code == 0
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.mds"))


@pytest.mark.shared
@pytest.mark.parametrize("damage", ["flip", "gone", "short", "name", "counts"])
def test_of_a_stage(shared_dir: Path, tmp_path: Path, damage: str) -> None:
    url = run(PhotoStage(str(shared_dir / "data" / "coco_open_256")), str(tmp_path / "in"))
    result = loupe_data("verify", url)
    assert result.exit_code == 0
    assert "output of `ingest`, whole; 14 files" in result.output
    tar = sorted((tmp_path / "in" / "files").rglob("*.tar"))[2]
    receipt = tmp_path / "in" / "work" / "ingest" / "done" / "i0040.json"
    if damage == "flip":
        flip(tar, 9000)
    elif damage == "gone":
        tar.unlink()
    elif damage == "short":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "name":
        receipt.write_text(receipt.read_text().replace("files/ingest/i0040/0000", "files/../../../etc/passwd"))
    else:
        tree = json.loads(receipt.read_text())
        tree["counts"]["kept"] += 1
        receipt.write_text(json.dumps(tree))
    result = loupe_data("verify", url)
    assert result.exit_code == 1
    assert {
        "flip": "its hash is not the receipt's",
        "gone": "is missing, though a receipt names it",
        "short": "its receipt says",
        "name": "is no name of a file of",
        "counts": "its counts are not the sum of its parts'",
    }[damage] in result.output
    with pytest.raises(UserError, match="--repair: is for datasets"):
        loupe_data("verify", url, "--repair", tmp_path)
