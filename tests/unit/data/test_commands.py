"""What users meet in `loupe data`: watching, wrong inputs, buckets that are merged away, dry runs, pods."""

import inspect
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from data.buckets import ASPECTS
from data.cli import COMMANDS, cli
from data.faces.detect import YuNet
from data.provenance import trace
from tests.sample_stages import write_samples
from tests.unit.data.conftest import encoded, picture
from trainer.errors import UserError

SHAPES = [(40, 56)] * 7 + [(40, 40)] * 4 + [(56, 40)] * 2
"""Height and width: 7 of 4:3, 4 of 1:1, 2 of 3:4."""


def loupe_data(*arguments: object, fails: str = "") -> str:
    """Its output; or the error of the user that it fails with, which must contain `fails`."""
    result: Result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if fails:
        assert isinstance(result.exception, UserError), result.output
        assert fails in str(result.exception)
        assert "\n" not in str(result.exception)
        return str(result.exception)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (height, width) in enumerate(SHAPES):
        (folder / f"{i:02d}.jpg").write_bytes(encoded(picture(i, height, width)))
        (folder / f"{i:02d}.txt").write_text(f"picture {i}\nagain {i}\n")
    return folder


@pytest.fixture
def samples(photos: Path, tmp_path: Path) -> str:
    return write_samples(str(tmp_path / "samples"), sorted(photos.glob("*.jpg")))


# ------------------------------------------------------------------------------------------------------------- watching


@pytest.mark.parametrize("command", ["ingest", "faces", "recaption", "encode", "build"])
def test_watching_needs_the_output_alone(command: str, samples: str, tmp_path: Path) -> None:
    out = samples
    if command == "build":
        (tmp_path / "set.work").symlink_to(samples)
        out = str(tmp_path / "set")
    said = loupe_data(command, out, "--watch")
    assert "ingest: 1 of 1 items, read: 13, kept: 13" in said
    # and whatever the command that began the work had said
    assert loupe_data(command, "s3://nowhere/in", out, "--workers", "3", "--watch") == said
    loupe_data(command, tmp_path / "new", "--watch", fails="nothing has begun there yet")
    result = CliRunner().invoke(cli, [command, "--watch"])
    assert result.exit_code == 2
    assert "--watch needs the folder that the stage writes to" in result.output
    assert "--workers" in loupe_data(command, "--help", "--watch")


def test_watching_a_build_by_its_work(samples: str, tmp_path: Path) -> None:
    assert "ingest: 1 of 1" in loupe_data("build", tmp_path / "set", "--watch", "--work", samples)


def test_every_command_has_examples() -> None:
    for command in COMMANDS:
        text = loupe_data(command, "--help")
        assert f"loupe data {command} " in text.partition("Examples:")[2], command


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    "command", [["faces"], ["recaption", "--model", "m"], ["encode", "--codec", "c"], ["build", "--captions"]]
)
def test_an_input_that_is_none(command: list[str], photos: Path, samples: str, tmp_path: Path) -> None:
    dataset, odd, tars = tmp_path / "dataset", tmp_path / "odd", tmp_path / "tars"
    loupe_data("build", photos, dataset)
    odd.mkdir()
    (odd / "notes.md").write_text("")
    (tars / "images").mkdir(parents=True)
    (tars / "images" / "a.tar").write_text("")
    for source, fails in {
        tmp_path / "mistyped": "no such folder; give the output of",
        photos: f"holds raw images or tars, no stage's output; run `loupe data ingest {photos} OUT` first",
        photos / "00.jpg": "holds raw images or tars",
        tars: "holds raw images or tars",
        odd: "is no stage's output (it has no stage.json)",
        dataset: "is a dataset already",
    }.items():
        words = [*command, source, samples, "x"] if command[0] == "build" else [*command, source, "x"]
        loupe_data(*words, fails=fails)
    assert not Path("x").exists()


def test_folders_without_texts(tmp_path: Path) -> None:
    flat, inside, mixed = tmp_path / "flat", tmp_path / "inside", tmp_path / "mixed"
    for folder in (flat, inside / "images", mixed, mixed / "cats"):
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (folder / f"{i}.jpg").write_bytes(encoded(picture(i)))
    out = tmp_path / "out"
    loupe_data("build", flat, out, fails="2 without text, such as 0.jpg; write metadata.jsonl")
    loupe_data("build", inside, out, fails="2 without text, such as images/0.jpg; write metadata.jsonl")
    loupe_data("build", mixed, out, fails="2 without text, such as 0.jpg")
    (flat / "captions.json").write_text("{}")
    loupe_data("build", flat, out, fails="captions.json is not read, write metadata.jsonl")
    assert not out.exists()
    said = loupe_data("ingest", flat, out, "--keep-uncaptioned", "--keep-near-duplicates", "--workers", "0")
    assert f"{out}: kept 2, of them 2 after duplicates" in said


def test_ingest_tells_what_copies_leave(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("x", "y"):
        (photos / f"{name}.jpg").write_bytes((photos / "03.jpg").read_bytes())
        (photos / f"{name}.txt").write_text("a copy")
    said = loupe_data("ingest", photos, out, "--keep-near-duplicates", "--workers", "0")
    assert f"{out}: kept 15, of them 13 after duplicates" in said
    assert json.loads((out / "summary.json").read_text())["samples"] == {"kept": 15, "after_duplicates": 13}
    assert "kept 15, of them 13 after duplicates" in loupe_data("ingest", out, "--watch")
    assert trace(str(out))[0].facts["samples"]["after_duplicates"] == 13


# -------------------------------------------------------------------------------------------------------------- buckets


def test_buckets_that_are_merged_away_are_told(samples: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    dry = loupe_data("build", samples, out, "--min-samples-of-a-bucket", "3", "--dry-run")
    assert "buckets: 3:4 2, 1:1 4, 4:3 7\n" in dry
    assert "WARNING: --min-samples-of-a-bucket 3: smaller buckets would be merged, 3:4 into 1:1;" in dry
    assert not out.exists()
    said = loupe_data("build", samples, out, "--min-samples-of-a-bucket", "3", "--workers", "0")
    assert "  bucket 1:1: 6 samples in 1 shard\n  bucket 4:3: 7 samples in 1 shard\n" in said
    assert "WARNING: buckets with fewer than 3 samples (--min-samples-of-a-bucket)" in said
    assert "the 2 samples of 3:4 stand in 1:1" in said
    assert f"look at {out}/README.md, {out}/card.html, {out}/samples.png" in said
    apart = loupe_data("build", samples, tmp_path / "apart", "--min-samples-of-a-bucket", "1", "--workers", "0")
    assert "bucket 3:4: 2 samples" in apart
    assert "WARNING" not in apart


def test_a_card_has_the_digest_that_commands_tell(samples: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    said = loupe_data("build", samples, out, "--min-samples-of-a-bucket", "1", "--workers", "0")
    digest = said.partition("digest ")[2].split()[0]
    assert f"| digest | {digest} |" in (out / "README.md").read_text()
    assert f"digest {digest}" in loupe_data("verify", out, "--workers", "1")
    assert json.loads(loupe_data("stats", out, "--json"))["digest"] == digest


def test_a_folder_looked_at_before_it_is_built(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    (photos / "99.jpg").write_bytes(encoded(picture(99)))
    dry = loupe_data("build", photos, out, "--buckets", "default", "--dry-run")
    assert "14 images, 13 of them with a file and captions, 26 captions" in dry
    assert "buckets: 3:4 2, 1:1 4, 4:3 7\n" in dry
    assert "buckets: none" in loupe_data("build", photos, out, "--dry-run")
    assert not out.exists()
    said = loupe_data("build", photos, out, "--buckets", "default")
    assert [line for line in said.splitlines() if "bucket" in line] == [
        "  bucket 3:4: 2 samples in 1 shard", "  bucket 1:1: 4 samples in 1 shard", "  bucket 4:3: 7 samples in 1 shard",
    ]  # fmt: skip
    loupe_data("build", photos, out, "--dry-run", fails="holds a dataset already")
    assert "14 images" in loupe_data("build", photos, out, "--overwrite", "--dry-run", "--max-samples", "5")


def test_threads_make_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for workers in (0, 4):
        loupe_data("build", photos, tmp_path / f"{workers}", "--name", "n", "--size", "32", "--workers", workers)
    files = [{p.name: p.read_bytes() for p in (tmp_path / str(w)).iterdir()} for w in (0, 4)]
    assert files[0] == files[1]


def test_estimates_are_of_all(monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path) -> None:
    """Where only some are looked at: scaled, and so said."""
    from data import survey
    from data.source import open_source

    monkeypatch.setattr(survey, "IMAGES", 6)
    found = survey.survey_folder(open_source(photos), ASPECTS)
    assert not found.exact
    assert abs(sum(found.by_bucket.values()) - len(SHAPES)) <= 2
    assert set(+Counter(found.by_bucket)) <= {"3:4", "1:1", "4:3"}
    assert "4:3 about" in loupe_data("build", photos, tmp_path / "o", "--buckets", "default", "--dry-run")


# ------------------------------------------------------------------------------------------------------------- detector


def test_help_lists_the_detectors_options() -> None:
    text = loupe_data("faces", "--help")
    for option in list(inspect.signature(YuNet).parameters.values())[1:]:
        value = json.dumps(option.default, separators=(",", ":"))
        assert f"\n  {option.name}={value} " in text


@pytest.mark.parametrize(
    ("option", "fails"),
    [
        (
            "min_scor=0.5",
            "--detector-option min_scor: yunet has no such option; it has min_score=0.6, long_sides=[320,1024], ",
        ),
        ("min_score=high", "--detector-option min_score=high: is no number between 0 and 1"),
        ("min_score=true", "min_score=True: is no number"),
        ("long_sides=320", "--detector-option long_sides=320: write a list of pixels"),
        ('long_sides=["a"]', "--detector-option long_sides: 'a' is no whole number of pixels from 32 to 4096"),
        ("overlap=3", "--detector-option overlap=3: is no number between 0 and 1"),
        ("max_enlarge=[]", "--detector-option max_enlarge=[]: is no number"),
        ("weights=1", "--detector-option weights: yunet has no such option"),
        ("min_score", "--detector-option min_score: write name=value"),
        ("min_score=0.5", "--weights: YuNet needs its weights"),
    ],
)
def test_wrong_options_of_a_detector(option: str, fails: str, samples: str, tmp_path: Path) -> None:
    loupe_data("faces", samples, tmp_path / "out", "--detector-option", option, fails=fails)
    assert not (tmp_path / "out").exists()


@pytest.mark.shared
def test_captions_as_long_as_the_model_can_write(shared_dir: Path, samples: str, tmp_path: Path) -> None:
    from data.recaption.model import choose_new_tokens

    model = shared_dir / "data" / "florence2_tiny_scratch"
    assert json.loads((model / "config.json").read_text())["text_config"]["max_position_embeddings"] == 128
    assert choose_new_tokens(None, model) == 127
    assert choose_new_tokens(100, model) == 100
    dry = loupe_data("recaption", samples, tmp_path / "out", "--model", model, "--device", "cpu", "--dry-run")
    assert "--max-new-tokens: 127" in dry
    loupe_data("recaption", samples, tmp_path / "out", "--model", model, "--max-new-tokens", "128",
               fails="--max-new-tokens 128: the model has positions for 127")  # fmt: skip
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- pods


def test_pods_are_given_no_folders_that_they_cannot_see(samples: str, photos: Path, tmp_path: Path) -> None:
    pods = ["--cluster", "kubernetes", "--image", "i", "--array", "3"]
    out = tmp_path / "out"
    loupe_data(
        "ingest", photos, out, *pods, fails=f"SOURCE: {photos} is a folder of this machine, which pods do not see"
    )
    loupe_data("ingest", photos, "memory://out", *pods, fails=f"SOURCE: {photos} is a folder")
    loupe_data("ingest", photos, out, *pods, "--volume-claim", f"set:{photos}", fails=f"OUT: {out} is a folder")
    loupe_data("build", samples, "memory://set", *pods, "--volume-claim", f"v:{samples}",
               "--work", out, fails=f"--work: {out} is")  # fmt: skip
    for wrong in ("x", "X:/a", "x:a", "x:/", "x:/tmp", "x:/a/../b", "x:/a:ro"):
        loupe_data("ingest", photos, out, *pods, "--volume-claim", wrong, fails=f"--volume-claim {wrong}: write")
    job = yaml.safe_load(loupe_data("ingest", photos, out, *pods, "--volume-claim", f"set:{tmp_path}"))
    pod = job["spec"]["template"]["spec"]
    assert pod["volumes"][2] == {"name": "claim-0", "persistentVolumeClaim": {"claimName": "set"}}
    assert pod["containers"][0]["volumeMounts"][2] == {"name": "claim-0", "mountPath": str(tmp_path)}
    assert pod["containers"][0]["args"][-3:] == ["ingest", str(photos), str(out)]
    assert not out.exists()


@pytest.mark.parametrize("cluster", ["kubernetes", "slurm"])
def test_a_folder_of_other_settings_is_given_to_no_cluster(cluster: str, photos: Path, tmp_path: Path) -> None:
    loupe_data("ingest", photos, tmp_path / "out", "--workers", "0", "--keep-near-duplicates")
    loupe_data(
        "ingest", photos, tmp_path / "out", "--min-side", "64", "--keep-near-duplicates", "--cluster", cluster, "--image", "i",
        "--volume-claim", f"set:{tmp_path}", fails="was begun with --min-side = 1, now it is 64",
    )  # fmt: skip
