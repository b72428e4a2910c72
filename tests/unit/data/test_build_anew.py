"""A build whose state no longer fits: its dataset has changed, its input was mended, or it is asked for something else."""

import json
from pathlib import Path

import pytest

from data.mdsbuild import anew
from data.reader import open_dataset
from data.stages.store import STAGE, StageStore, check_claim, read_stage
from tests.sample_stages import write_samples
from tests.unit.data.conftest import encoded, picture
from tests.unit.data.test_commands import loupe_data
from trainer.errors import UserError

SQUARES, WIDE = 4, 6


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(SQUARES + WIDE):
        image = encoded(picture(i, 40, 40 if i < SQUARES else 60))
        (folder / f"{i:02d}.jpg").write_bytes(image)
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture
def samples(photos: Path, tmp_path: Path) -> str:
    return write_samples(str(tmp_path / "samples"), sorted(photos.glob("*.jpg")))


def build(*words: object, fails: str = "") -> str:
    return loupe_data("build", *words, "--min-samples-of-a-bucket", 1, "--workers", 0, fails=fails)


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.mds"))


def test_a_dataset_that_lost_a_shard_is_built_anew(samples: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    said = build(samples, out)
    digest = said.partition("digest ")[2].split()[0]
    assert build(samples, out).splitlines()[-3:] == said.splitlines()[-3:], "again: nothing to do"
    bad = shards(out)[0]
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    loupe_data("verify", out, "--quarantine", "--workers", 1)
    left = open_dataset(str(out), name="x").num_samples
    assert left in (SQUARES, WIDE)
    why = build(samples, out, fails="is no longer what this build made")
    assert f"digest {digest}, now " in why
    assert "add --overwrite" in why
    assert "will be removed" in build(samples, out, "--overwrite", "--dry-run")
    assert open_dataset(str(out), name="x").num_samples == left, "still there"
    assert f"digest {digest}\n" in build(samples, out, "--overwrite")
    assert open_dataset(str(out), name="x").num_samples == SQUARES + WIDE
    assert "was built by this very command before" in build(samples, out, "--overwrite")
    shards(out)[0].unlink()
    build(samples, out, fails="is missing, or of another size than this build gave it; add --overwrite")
    (out / "dataset.json").unlink()
    build(samples, out, fails="its dataset is no longer there; add --overwrite")
    assert f"digest {digest}\n" in build(samples, out, "--overwrite")


def test_other_buckets_in_its_place(samples: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    build(samples, out)
    why = build(samples, out, "--buckets", "1:1,1:2", "--name", "n", fails="add --overwrite")
    assert "--buckets = '" in why
    assert "now it is '1:2,1:1'" in why
    assert "--name = 'set', now it is 'n'" in why, "all that differs is named"
    assert "bucket 1:1: 10 samples" in build(samples, out, "--buckets", "1:1,1:2", "--name", "n", "--overwrite")
    loupe_data("verify", out, "--workers", 1)


def test_an_input_that_was_mended_since(samples: str, tmp_path: Path) -> None:
    """Its shards are of new attempts then, and the plan names the old ones."""
    out = tmp_path / "set"
    work = StageStore(f"{out}.work")
    anew.note_inputs(work, [samples])
    build(samples, out)
    finished = (tmp_path / "set.work" / "summary.json").read_bytes()
    (tmp_path / "set.work" / "summary.json").unlink()
    assert anew.why_not(work, StageStore(str(out)), [samples]) is None
    summary = tmp_path / "samples" / "summary.json"
    tree = json.loads(summary.read_text())
    summary.write_text(json.dumps({**tree, "time": tree["time"] + 1}))
    build(samples, out, fails="was mended or written anew since this build began")
    (tmp_path / "set.work" / "summary.json").write_bytes(finished)
    build(samples, out)  # a build that is finished needs its input no more
    (tmp_path / "set.work" / "summary.json").unlink()
    assert "is removed, and it is built anew" in build(samples, out, "--overwrite")


def test_a_removal_that_was_stopped_is_ended(samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    said = build(samples, out)
    work = StageStore(f"{out}.work")
    removed = anew.remove_tree

    def dies(store: StageStore, name: str) -> None:
        if name.startswith("work/"):
            raise KeyboardInterrupt
        removed(store, name)

    monkeypatch.setattr(anew, "remove_tree", dies)
    with pytest.raises(KeyboardInterrupt):
        anew.begin_anew(work)
    monkeypatch.undo()
    assert anew.is_being_removed(work)
    build(samples, out, fails="was being removed to build anew, and that was stopped; add --overwrite")
    with pytest.raises(UserError, match="was begun with"):
        check_claim(work, "build", 1, {"source": samples})
    assert build(samples, out, "--overwrite").splitlines()[-1] == said.splitlines()[-1]
    assert open_dataset(str(out), name="x").num_samples == SQUARES + WIDE


def test_nobody_removes_a_build_at_work(samples: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    build(samples, out)
    work = StageStore(f"{out}.work")
    before = read_stage(work)
    lease = {"worker": "w1", "attempt": "a", "deadline": 4e9}
    work.create_json("work/shards/leases/s00000000.0000", lease)
    build(samples, out, "--order-seed", 3, "--overwrite", fails="w1 works there; stop the workers")
    assert read_stage(work) == before
    work.delete("work/shards/leases/s00000000.0000")
    build(samples, out, "--order-seed", 3, "--overwrite")
    assert read_stage(work)["id"] != before["id"]
    assert (tmp_path / "set.work" / STAGE).exists()
