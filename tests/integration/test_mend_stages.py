"""Damaged and impossible parts of real stages' work: what `loupe data verify --quarantine` and `--give-up-failed` leave."""

import gzip
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data.card import told
from data.cli import cli
from data.mend_stage import mend
from data.provenance import trace
from data.stages.receipts import GIVEN_UP, done_receipts
from data.stages.runner import Worker
from data.stages.samples import open_samples
from data.stages.store import SUMMARY, StageStore
from data.verify_stage import verify_stage
from tests.counting_stage import CountingStage, expected, published
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from trainer.errors import UserError


def loupe_data(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def pack(photos: Path, folder: Path, count: int, tars: int) -> Path:
    """`count` of the photos, the last of them once more under another name, so that there is a duplicate."""
    folder.mkdir()
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()][:count]
    rows.append(rows[0])
    for number in range(tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i, row in list(enumerate(rows))[number::tars]:
                for suffix, data in (
                    (".jpg", (photos / "images" / row["file_name"]).read_bytes()),
                    (".txt", f"photo {i}".encode()),
                ):
                    member = tarfile.TarInfo(f"{i:04d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    return folder


def samples(url: Path) -> dict[str, bytes]:
    """Key to image, of what the next stage would read."""
    store, found = StageStore(str(url)), {}
    opened = open_samples(str(url))
    for shard in opened.shards():
        with tarfile.open(store.path(shard.tar["name"])) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    about = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    image = tar.getmember(member.name.removesuffix(".json") + ".jpg")
                    found[about["key"]] = tar.extractfile(image).read()  # type: ignore[union-attr]
    return found


def tars(out: Path, pass_name: str) -> list[Path]:
    return sorted((out / "files" / pass_name).rglob("*.tar"))


@pytest.mark.shared
def test_a_damaged_tar_of_ingest_and_of_faces_is_made_anew(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.ingest.from_tars.PART_SAMPLES", 8)
    pack(shared_dir / "data/coco_open_256", tmp_path / "raw", 40, 2)
    out, blurred = tmp_path / "ingested", tmp_path / "blurred"
    steps = {
        "ingest": ["ingest", tmp_path / "raw", out, "--workers", 0],
        "faces": ["faces", out, blurred, "--workers", 0, "--weights", shared_dir / "data/yunet/yunet_n_dynamic.onnx"],
    }
    for name, command in steps.items():
        url = {"ingest": out, "faces": blurred}[name]
        assert loupe_data(*command).exit_code == 0
        before, summary = samples(url), StageStore(str(url)).read_json(SUMMARY)
        assert len(before) == (41 if name == "ingest" else 40)
        damaged, lost = tars(url, name)[1], tars(url, name)[4]
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 4
        damaged.write_bytes(content)
        lost.unlink()

        result = loupe_data("verify", url)
        assert result.exit_code == 1
        assert f"mend it with `loupe data verify {url} --quarantine`, then run `loupe data {name} " in result.output
        result = loupe_data("verify", url, "--quarantine")
        assert result.exit_code == 0, result.output
        assert f"quarantined: quarantine/{damaged.relative_to(url)}" in result.output
        assert f"is not finished now; run `loupe data {name} " in result.output
        assert ("all of plan, drops" in result.output) == (name == "ingest")
        assert (url / "quarantine" / damaged.relative_to(url)).read_bytes() == content
        with pytest.raises(UserError, match="is not finished there; run it again"):
            open_samples(str(url))

        untouched = {path: path.stat().st_mtime_ns for path in tars(url, name)}
        assert loupe_data(*command).exit_code == 0
        result = loupe_data("verify", url)
        assert "whole; " in result.output, result.output
        assert samples(url) == before
        again = StageStore(str(url)).read_json(SUMMARY)
        assert again["counts"] == summary["counts"]
        assert again.get("faces") == summary.get("faces")
        assert sum(path in untouched and path.stat().st_mtime_ns == untouched[path] for path in tars(url, name)) >= 2


@pytest.mark.shared
def test_a_source_that_is_no_tar_is_given_up_and_told_everywhere(shared_dir: Path, tmp_path: Path) -> None:
    raw, out, blurred = (
        pack(shared_dir / "data/coco_open_256", tmp_path / "raw", 12, 2),
        tmp_path / "in",
        tmp_path / "blurred",
    )
    whole = raw / "00001.tar"
    whole.write_bytes(gzip.compress(whole.read_bytes()))
    command = ["ingest", raw, out, "--workers", 0]
    for more in ([], ["--retry-failed"]):
        result = loupe_data(*command, *more)
        assert isinstance(result.exception, UserError)
        assert "--retry-failed, or with --give-up-failed" in str(result.exception)
        assert "00001.tar: is compressed with gzip, so nobody can begin in its midst; decompress it first (gunzip)" in (
            result.output
        )
    result = loupe_data(*command, "--retry-failed", "--give-up-failed")
    assert "give one of them" in str(result.exception)
    result = loupe_data(*command, "--give-up-failed")
    assert result.exit_code == 0, result.output
    assert "given up: ingest 0000001-00001: " in result.output
    summary = StageStore(str(out)).read_json(SUMMARY)
    assert summary["counts"]["ingest"] == {"kept": 7, "read": 7, GIVEN_UP: 1, "given_up/tars": 1}
    assert "gunzip" in summary["given_up"]["ingest"]["0000001-00001"]
    result = loupe_data(*command)
    assert "given up: ingest 0000001-00001: " in result.output, "and again, whenever it is asked for"
    assert loupe_data("verify", out).exit_code == 0
    weights = shared_dir / "data/yunet/yunet_n_dynamic.onnx"
    assert loupe_data("faces", out, blurred, "--workers", 0, "--weights", weights).exit_code == 0
    assert set(samples(blurred)) == set(samples(out)) - {"00000/0012"}, "a copy of the first"
    assert len(samples(out)) == 7
    (record,) = trace(str(out))
    assert any("given up of ingest: 0000001-00001: " in line and "gunzip" in line for line in told(record))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "folder", "*.tar.gz", "beside"])
def test_compressed_tars_are_told_before_anything_begins(tmp_path: Path, name: str) -> None:
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    source = tmp_path / ("x.tgz" if name == "x.tgz" else "in/x.tar.gz")
    source.parent.mkdir(exist_ok=True)
    source.write_bytes(gzip.compress(content.getvalue()))
    if name == "beside":
        (tmp_path / "in/y.tar").write_bytes(content.getvalue())
    asked = {"folder": source.parent, "beside": source.parent, "*.tar.gz": source.parent / name}.get(name, source)
    result = loupe_data("ingest", asked, tmp_path / "out", "--workers", 0)
    assert isinstance(result.exception, UserError)
    assert "is compressed with gzip, so nobody can begin in its midst; decompress it first (gunzip)" in str(
        result.exception
    )
    assert not (tmp_path / "out").exists()


def test_on_s3(s3: str) -> None:
    """Moving, forgetting a pass, and listing there."""
    url, stage = f"{s3}/mend/out", CountingStage(items=3, samples=12)
    store = StageStore(url)
    Worker(stage, store).run()
    receipts = list(done_receipts(store, "count"))
    first, second = (receipts[i]["parts"][1]["files"]["numbers"]["name"] for i in (0, 2))
    store.replace(first, b"bad")
    store.delete(second)
    done = mend(url, verify_stage(url))
    assert done is not None
    assert done.items == {"count": ["i000", "i002"]}
    assert done.parts == 4
    assert store.read(f"quarantine/{first}", max_bytes=100) == b"bad"
    assert not store.exists(first)
    assert not store.exists(SUMMARY)
    assert not store.names("work/sum")
    assert not store.names("files/sum")
    assert Worker(stage, store).run() == []
    assert published(store) == expected(stage)
    assert verify_stage(url).failures == []
