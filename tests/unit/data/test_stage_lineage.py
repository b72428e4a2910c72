"""Of what a stage's output was made: sidecars of other samples are refused. And tars that are one item together."""

import json
import shutil
from pathlib import Path

import pytest

from data.ingest.stage import IngestStage
from data.mdsbuild.sidecars import Sidecar
from data.mdsbuild.stage import BuildStage
from data.stages.failed import give_up_failed
from data.stages.receipts import done_receipts
from data.stages.runner import Worker
from data.stages.samples import Shard, open_samples
from data.stages.store import Json, StageStore, check_claim, claim
from tests.sample_stages import ColumnStage, SidecarStage, run
from tests.small_stages import EXPECTED, PART, blur, built, image, ingest, item_names, raw, stored
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.ingest.from_tars.PART_SAMPLES", PART)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return raw(tmp_path_factory.mktemp("raw"))


# -------------------------------------------------------------------------------------------------- of what it was made


def test_sidecars_of_other_samples_are_refused(tars: list[str], tmp_path: Path) -> None:
    """Keys, items and shards are called the same; only the images differ."""
    source, other = ingest(tmp_path / "in", tars), ingest(tmp_path / "other", raw(tmp_path / "raw", shift=100))
    assert list(stored(source, tmp_path)) == list(stored(other, tmp_path))
    captions = run(SidecarStage(other), str(tmp_path / "captions"))
    columns = run(ColumnStage(other), str(tmp_path / "columns"))
    with pytest.raises(
        UserError, match=rf"--captions: .*captions was made of {other} \(id .*; {source} \(id .*other samples"
    ):
        built(source, tmp_path / "x", captions=(Sidecar(captions),))
    with pytest.raises(UserError, match=r"--columns: .*columns was made of .*other \(id"):
        built(source, tmp_path / "y", columns=(Sidecar(columns),))
    # What was blurred is not what the captions of the blurred were made of.
    blurred = blur(source, tmp_path / "faces")
    late = run(SidecarStage(blurred), str(tmp_path / "late"))
    with pytest.raises(UserError, match=r"--captions: .*late was made of .*faces \(id"):
        built(source, tmp_path / "z", captions=(Sidecar(late),))


def without_first_shards(stage: "_SomeCaptions", number: int, url: str) -> str:
    """As of samples that were mended after the stage: of some shards nothing was made."""
    stage.shards = open_samples(stage.samples).shards()[number:]
    return run(stage, url)


class _SomeCaptions(SidecarStage):
    shards: list[Shard]

    def _items(self, _: StageStore) -> list[Json]:
        names = {shard.name for shard in self.shards}
        return [item for item in open_samples(self.samples).items() if item["name"] in names]


class _SomeColumns(_SomeCaptions, ColumnStage):
    pass


@pytest.mark.parametrize(("number", "expected"), [(1, PART), (6, len(EXPECTED))])
def test_samples_of_shards_without_columns_and_captions_are_counted(
    tars: list[str], tmp_path: Path, number: int, expected: int
) -> None:
    """Of one shard of six, and of all."""
    source = ingest(tmp_path / "in", tars)
    captions = without_first_shards(_SomeCaptions(source, kinds=("short", "long")), number, str(tmp_path / "captions"))
    columns = without_first_shards(_SomeColumns(source), number, str(tmp_path / "columns"))
    dataset = built(source, tmp_path, captions=(Sidecar(captions),), columns=(Sidecar(columns),))
    lacking = [row for i in range(dataset.num_samples) if not (row := dataset.read(i)).columns.get("latents")]
    assert len(lacking) == expected == sum(set(row.captions) == {"original"} for row in lacking)
    (receipt,) = done_receipts(StageStore(str(tmp_path / "work")), "windows")
    counts = {name: count for name, count in receipt["counts"].items() if name.startswith("missing/")}
    assert counts == dict.fromkeys(("missing/captions/long", "missing/captions/short", "missing/latents"), len(lacking))


def test_a_build_does_not_go_on_with_an_input_that_was_written_anew(tars: list[str], tmp_path: Path) -> None:
    source = ingest(tmp_path / "in", tars)
    captions = run(SidecarStage(source), str(tmp_path / "captions"))
    out = str(tmp_path / "set")

    def build() -> BuildStage:
        return BuildStage(source, out, "x", {}, min_samples=1, captions=(Sidecar(captions),))

    work = StageStore(str(tmp_path / "work"))
    claim(work, "build", 1, build().settings(), [])
    check_claim(work, "build", 1, build().settings())
    shutil.rmtree(captions)
    run(SidecarStage(source, text="anew"), captions)
    with pytest.raises(UserError, match="was begun with captions"):
        check_claim(work, "build", 1, build().settings())
    shutil.rmtree(source)
    ingest(tmp_path / "in", raw(tmp_path / "raw", shift=100))
    with pytest.raises(UserError, match=r"was begun with .*made_of"):
        check_claim(work, "build", 1, build().settings())


def test_what_is_moved_is_known_and_what_is_written_anew_is_not(tars: list[str], tmp_path: Path) -> None:
    source = ingest(tmp_path / "in", tars)
    captions = run(SidecarStage(source), str(tmp_path / "captions"))
    shutil.move(source, tmp_path / "moved")
    shutil.move(captions, tmp_path / "away")
    dataset = built(str(tmp_path / "moved"), tmp_path / "x", captions=(Sidecar(str(tmp_path / "away")),))
    assert all("short" in dataset.read(i).captions for i in range(dataset.num_samples))
    ingest(tmp_path / "in", raw(tmp_path / "raw", shift=100))
    with pytest.raises(UserError, match="holds other samples"):
        built(source, tmp_path / "y", captions=(Sidecar(str(tmp_path / "away")),))
    with pytest.raises(UserError, match="was begun with made_of"):
        run(SidecarStage(source), str(tmp_path / "away"))


def test_what_an_earlier_version_has_written_is_refused(tars: list[str], tmp_path: Path) -> None:
    source = ingest(tmp_path / "in", tars[2:])
    file = tmp_path / "in" / "stage.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({**tree, "version": 1}))
    with pytest.raises(UserError, match="was begun by version 1 of `ingest`, this is 2; name a new folder"):
        ingest(tmp_path / "in", tars[2:])
    del tree["id"]
    file.write_text(json.dumps(tree))
    for refused in (lambda: open_samples(source), lambda: ingest(tmp_path / "in", tars[2:])):
        with pytest.raises(UserError, match=r"by an earlier version of Loupe.* run `loupe data ingest` again"):
            refused()


# ------------------------------------------------------------------------------------------------- many tars are an item


def test_tars_of_one_item_are_as_tars_of_their_own(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = [str(Path(tars[0]).parent)]
    alone = ingest(tmp_path / "alone", folder)
    monkeypatch.setattr("data.ingest.stage.TAR_ITEMS", 2)
    put, puts = StageStore.put_new, []

    def dies(self: StageStore, file: Path, name: str) -> None:
        puts.append(name)
        if len([p for p in puts if p.startswith("files/ingest/0000000-a") and p.endswith(".tar")]) == 4:
            raise KeyboardInterrupt
        put(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(StageStore, "put_new", dies)
        with pytest.raises(KeyboardInterrupt):
            Worker(IngestStage(folder), StageStore(str(tmp_path / "out")), lease_s=0.5).run()
    assert len(StageStore(str(tmp_path / "out")).names("work/ingest/parts/0000000-a")) >= 4
    assert Worker(IngestStage(folder), StageStore(str(tmp_path / "out")), lease_s=0.5).run() == []
    together = str(tmp_path / "out")
    assert item_names(together, "ingest") == ["0000000-a", "0000001-c"]
    assert stored(together, tmp_path) == stored(alone, tmp_path)
    counts = [StageStore(url).read_json("summary.json")["counts"] for url in (alone, together)]
    assert counts[0] == counts[1]
    assert counts[0]["drops"] == {"duplicate/exact": 1}


def test_a_tar_that_is_none_costs_its_item_nothing_else(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.ingest.stage.TAR_ITEMS", 1)
    raw(tmp_path / "raw")
    bad = tmp_path / "raw" / "aa.tar"
    bad.write_bytes(b"\x1f\x8b" + bytes(5000))
    stage, store = IngestStage([str(bad.parent)]), StageStore(str(tmp_path / "out"))
    (failure,) = Worker(stage, store).run()
    assert f"{bad}: is compressed with gzip" in failure
    assert [one.item for one in give_up_failed(store, stage)] == ["0000000-a"]
    assert Worker(stage, store).run() == []
    assert {key: image(number) for key, number in EXPECTED.items()} == stored(store.url, tmp_path)
