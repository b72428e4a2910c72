"""What the commands of stages say of what was done before, is missing, has failed, or came to nothing."""

import json
from pathlib import Path

import pytest

from data.card import Card
from data.commands import progress
from data.commands.begun import option_of, public_word
from data.provenance import Record
from data.schema import DatasetInfo
from data.stages import failures
from data.stages.store import STAGE, StageStore
from data.stats import Statistics
from tests.sample_stages import write_samples
from tests.unit.data.conftest import encoded, picture
from tests.unit.data.test_commands import loupe_data

QUICK = ("--keep-near-duplicates", "--workers", 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(encoded(picture(i)))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture
def samples(photos: Path, tmp_path: Path) -> str:
    return write_samples(str(tmp_path / "samples"), sorted(photos.glob("*.jpg")))


# ------------------------------------------------------------------------------------------------------ the first command


def test_all_that_differs_is_named_by_its_options_and_the_first_command_is_told(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loupe_data("ingest", "photos", "out", *QUICK, "--min-side", 8)
    why = loupe_data("ingest", photos, tmp_path / "out", *QUICK, "--max-aspect", 3, fails="was begun with")
    assert "--max-aspect = None, now it is 3.0" in why
    assert "--min-side = 8, now it is 1" in why
    command = f"loupe data ingest {photos} {tmp_path}/out --min-side 8 --keep-near-duplicates"
    assert f"repeat the first command, `{command}`" in why
    assert command in loupe_data("stats", "out")
    assert json.loads(loupe_data("stats", "out", "--json"))["command"] == command
    monkeypatch.chdir(photos)
    loupe_data(*command.split()[2:], "--workers", 0)  # from elsewhere


def test_inputs_are_the_same_by_any_path(samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--min-samples-of-a-bucket", 1, "--workers", 0)
    loupe_data("build", "samples/", "set", *options)
    loupe_data("build", samples, tmp_path / "set", *options)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("s3://bucket/in", "s3://bucket/in"),
        ("s3://key:pass@bucket/in", "s3://bucket/in"),
        ("detailed=s3://key:pass@bucket/in", "detailed=s3://bucket/in"),
        ("https://h/x?token=abc", "https://h/x"),
        ("api_token=abc", "api_token=(hidden)"),
        ("min_score=0.5", "min_score=0.5"),
        ("{family: clip, url: 's3://key:pass@b/c'}", "(hidden)"),
        ("{family: clip, url: models/clip}", "{family: clip, url: models/clip}"),
        ("<CAPTION>", "<CAPTION>"),
    ],
)
def test_no_credential_is_kept_with_the_command(word: str, expected: str) -> None:
    assert public_word(word) == expected


def test_settings_have_the_names_of_options() -> None:
    """Of each command, every setting but those that are told in words is an option that it has."""
    for stage, keys in {
        "ingest": [
            "layout",
            "filters.min_side",
            "columns.url",
            "phash_distance",
            "allow_private",
            "class_names",
            "sources",
        ],
        "faces": ["cells", "margin", "quality", "seed", "detector.name", "detector.min_score", "input"],
        "recaption": ["model", "prompts.short", "beams", "max_new_tokens", "resize", "drop_flawed", "input"],
        "encode": ["columns.latents.resolution", "columns.latents.dtype", "columns.latents.codec", "captions"],
        "build": ["buckets.1:1", "min_samples_of_a_bucket", "shard_mib", "order_seed", "captions", "columns", "out"],
    }.items():
        text = loupe_data(stage, "--help")
        for key in keys:
            assert option_of(stage, key).split()[0] in text, (stage, key)


# ------------------------------------------------------------------------------------------------------- what is not there


def test_places_where_nothing_is(photos: Path, tmp_path: Path) -> None:
    for command in ("stats", "verify"):
        loupe_data(command, tmp_path / "mistyped", fails="mistyped: no such folder")
        why = loupe_data(command, photos, fails="holds raw images or tars, no dataset")
        assert f"`loupe data build {photos} OUT`" in why
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        loupe_data(command, empty, fails="no index.json")


def test_a_damaged_stage_json_cannot_be_mended(samples: str) -> None:
    (Path(samples) / STAGE).write_text("{")
    loupe_data("verify", samples, fails="it cannot be mended, run the stage anew into a new folder")


def test_files_without_a_row_are_counted(photos: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": f"{i}.jpg", "text": f"picture {i}"}) for i in range(2)]
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    said = loupe_data("build", photos, tmp_path / "set")
    assert "no_row: 1 image file that metadata.jsonl has no row of, not used, such as 2.jpg" in said
    assert "no_row: 1 image file" in loupe_data("build", photos, tmp_path / "other", "--dry-run")
    said = loupe_data("ingest", photos, tmp_path / "out", *QUICK)
    assert "no_row: 1" in said
    assert "kept 2, of them 2" in said


# ------------------------------------------------------------------------------------------------------ came to nothing


def test_an_output_of_nothing_is_told_and_refused_as_an_input(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = loupe_data("ingest", photos, out, *QUICK, "--min-side", 4000)
    assert f"WARNING: {out}: nothing was kept" in said
    for command in (["faces"], ["recaption", "--model", "m"], ["encode", "--codec", "c"], ["build"]):
        loupe_data(*command, out, tmp_path / "next", fails="has no samples, all were left out")
    assert "WARNING" not in loupe_data("ingest", photos, tmp_path / "some", *QUICK)


def test_what_has_begun_or_is_finished_is_told_by_a_dry_run(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "finished" not in loupe_data("ingest", photos, out, *QUICK, "--dry-run")
    loupe_data("ingest", photos, out, *QUICK)
    said = loupe_data("ingest", photos, out, *QUICK, "--dry-run")
    assert f"{out}: finished: the command would do nothing" in said
    assert "  --min-side: 1\n" in said
    (out / "summary.json").unlink()
    assert f"{out}: has begun, and would go on; " in loupe_data("ingest", photos, out, *QUICK, "--dry-run")


def test_a_dry_run_refuses_what_the_build_would(samples: str, photos: Path, tmp_path: Path) -> None:
    loupe_data("build", photos, tmp_path / "set")
    loupe_data("build", samples, tmp_path / "set", "--dry-run", fails="holds a dataset already; add --overwrite")
    assert "samples: 3" in loupe_data("build", samples, tmp_path / "set", "--dry-run", "--overwrite")


def test_what_cannot_be_submitted_is_refused_before_the_plan_is_told(photos: Path) -> None:
    from click.testing import CliRunner

    from data.cli import cli

    words = ["ingest", str(photos), "memory://out", "--cluster", "kubernetes", "--dry-run"]
    result = CliRunner().invoke(cli, words)
    assert "--image" in str(result.exception)
    assert "ingest into" not in result.output


def test_a_card_tells_what_was_given_up_where_it_tells_what_was_left_out() -> None:
    counts = {
        "list": {"listed": 3},
        "ingest": {"read": 5, "items/given_up": 2, "given_up/tars": 1, "given_up/samples": 70},
    }
    stats = Statistics()
    stats.add(key="a", width=8, height=8, num_bytes=100, kind="jpeg", captions={"original": ("x",)})
    info = DatasetInfo(name="n", num_samples=1, index_digest="0" * 32)
    told = "given up by ingest: 2 items of ingest, with 70 samples and 1 tars of them not done; named below"
    for records, expected in (([], ["nothing"]), ([Record("ingest", {}, counts)], [told])):
        (section,) = (s for s in Card(info, stats, 1, 1, records=records).sections() if s.title.startswith("Left out"))
        assert section.lines == expected


# ---------------------------------------------------------------------------------------------------------------- failed


def test_giving_up_is_offered_only_where_it_can_be(photos: Path, samples: str, tmp_path: Path) -> None:
    for command, offered in {"ingest": True, "faces": True, "recaption": True, "encode": False, "build": False}.items():
        assert ("--give-up-failed" in loupe_data(command, "--help")) == offered, command
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 1000)
    why = loupe_data("ingest", tmp_path / "bad.tar", tmp_path / "out", *QUICK, fails="1 item failed")
    assert "or with --give-up-failed" in why
    for tar in Path(samples).rglob("*.tar"):
        tar.unlink()
    why = loupe_data("build", samples, tmp_path / "set", "--workers", 0, fails="failed; mend the cause")
    assert "--give-up" not in why


def test_watching_ends_where_nobody_works(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 1000)
    out = tmp_path / "out"
    loupe_data("ingest", tmp_path / "bad.tar", out, *QUICK, fails="1 item failed")
    why = loupe_data("ingest", out, "--watch", fails="nobody works there, and 1 item failed")
    assert "--retry-failed" in why

    loupe_data("ingest", photos, tmp_path / "half", *QUICK)
    (tmp_path / "half" / "summary.json").unlink()
    between = progress._Idle(str(tmp_path / "half"))  # workers that look for work hold nothing for a while
    for _ in range(10):
        between.look(progress.Watcher(str(tmp_path / "half")).poll())
    monkeypatch.setattr(progress, "IDLE_S", 0.05)
    loupe_data("ingest", tmp_path / "half", "--watch", fails="nobody has worked there for 0 s; run its command again")
    # Whoever holds a lease works.
    store = StageStore(str(out))
    lease = {"worker": "w", "attempt": "a", "deadline": 4e9}
    (item,) = failures.listed(store, "work/ingest") or failures.listed(store, "work/list")
    store.create_json(f"work/ingest/leases/{item}.0000", lease)
    status = progress.Watcher(str(out)).poll()
    idle = progress._Idle(str(out))
    for _ in range(10):
        idle.look(status)
