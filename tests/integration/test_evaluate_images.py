"""`loupe evaluate images` and `loupe evaluate run` as a user calls them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.reader import open_dataset
from launch.cli import cli
from launch.entry import run_command
from tests.feature_networks import OURS, Blocks
from tests.image_sets import SIDE, drawn, written
from tests.sampling_runs import CLASSES, run_of
from trainer.config import resolve_url
from trainer.errors import ExitCode
from trainer.evaluate import metrics
from trainer.evaluate.features.weights import sha256_of
from trainer.models.efficientnet import features_of, load_efficientnet_lite0

EMOJI = "repo://data/assets/emoji_64"
LITE0 = "data/efficientnet_lite0/efficientnet-lite0-57934424.pth"


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run_command(cli, ["evaluate", *words], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return str(written(folder / "made", drawn(70, 2))), str(written(folder / "real", drawn(80, 1)))


def test_images(capsys: pytest.CaptureFixture[str], sets: tuple[str, str], tmp_path: Path) -> None:
    words = ["images", *sets, "--network", OURS, "--resamples", "20", "--cache", str(tmp_path / "cache")]
    code, out, err = call(capsys, *words, "--out", str(tmp_path / "a"), "--dry-run")
    assert (code, err) == (0, "")
    assert "70 of 70 generated images, 80 of 80 real ones, at 20 px" in out
    assert "would measure fid, kid, precision, recall, density, coverage, spectrum" in out
    assert not list(tmp_path.iterdir())

    code, out, err = call(capsys, *words, "--out", str(tmp_path / "a"))
    assert code == 0
    # its 48 features of 70 images
    assert err.count("warning") == 1
    assert "fd_blocks: about" in err
    found = read(tmp_path / "a")
    assert f"definition {found['definition']}" in out
    assert f"{found['figures']['fd_blocks']['value']:.4g}" in out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "evaluation.json",
        "nearest.png",
        "rows",
        "spectrum.png",
    ]
    assert found["settings"] == {
        "size": SIDE, "resize": "training", "metrics": [], "count": 70, "reference_count": 80, "seed": 0,
        "batch_size": 32, "resamples": 20, "allow_few": False,
    }  # fmt: skip
    assert {"pillow", "opencv-python-headless", "simplejpeg", "torch", "loupe"} <= set(found["versions"])
    assert found["networks"][0]["preprocessing"] == "means of 4 x 4 blocks, in [0, 1]"

    written_ns = (tmp_path / "a/evaluation.json").stat().st_mtime_ns
    code, out, _ = call(capsys, *words, "--out", str(tmp_path / "a"), "--batch-size", "16")
    assert code == 0
    assert "has this evaluation already; --overwrite makes it anew" in out
    assert f"{found['figures']['fd_blocks']['value']:.4g}" in out
    code, _, err = call(capsys, *words, "--out", str(tmp_path / "a"), "--seed", "3", "--metrics", "kid", "--dry-run")
    assert code == 2
    assert "has an evaluation already, with other metrics, seed; give another folder, or --overwrite" in err
    code, _, err = call(capsys, "images", sets[1], sets[1], *words[3:], "--out", str(tmp_path / "a"))
    assert code == 2
    assert "with other generated images; give another folder, or --overwrite" in err
    assert (tmp_path / "a/evaluation.json").stat().st_mtime_ns == written_ns
    assert call(capsys, *words, "--out", str(tmp_path / "a"), "--overwrite", "--metrics", "kid, spectrum")[0] == 0
    assert set(read(tmp_path / "a")["figures"]) == {
        "kd_blocks", "spectrum", "spectrum_low", "spectrum_mid", "spectrum_high", "spectrum_high_signed",
    }  # fmt: skip

    def refused(message: str, *more: str) -> None:
        code, _, err = call(capsys, *words, "--out", str(tmp_path / "b"), *more)
        assert (code, len(err.splitlines())) == (2, 1)
        assert message in err

    refused("--metrics: beauty is none; take fid", "--metrics", "beauty")
    refused("--metrics: clip_score needs --network clip=FOLDER", "--metrics", "clip_score")
    refused("--network: inception needs its weights", "--network", "inception")
    judged = sorted((tmp_path / "cache").iterdir())
    for more in ((), ("--dry-run",)):  # counted before a network sees an image
        refused("30 generated and 80 real images for 48 features", "--count", "30", "--resize", "bicubic", *more)
    assert sorted((tmp_path / "cache").iterdir()) == judged
    assert not (tmp_path / "b").exists(), "refused, it leaves nothing"
    (tmp_path / "b").mkdir()
    refused("--cache: s3://b is no local folder", "--cache", "s3://b")
    assert (tmp_path / "b").exists(), "it was there"
    few = ("--count", "90", "--reference-count", "90", "--metrics", "kid", "--resamples", "0")
    code, _, err = call(capsys, *words, *few, "--out", str(tmp_path / "c"))
    assert code == 0
    assert f"--count 90: {sets[0]} has 70 images, and all of them are taken" in err
    assert f"--reference-count 90: {sets[1]} has 80 images, and all of them are taken" in err
    taken = read(tmp_path / "c")["settings"]
    assert (taken["count"], taken["reference_count"]) == (70, 80)
    code, _, err = call(capsys, "images", str(tmp_path / "none"), sets[1], "--out", str(tmp_path / "b"))
    assert code == 2
    assert "no such folder" in err


@pytest.mark.shared
def test_real_photos_by_efficientnet(capsys: pytest.CaptureFixture[str], shared_dir: Path, tmp_path: Path) -> None:
    """The distance is that of features of decoded photos, by Pillow alone; and the second evaluation asks the network about
    none of the real images."""
    photos = [
        Image.open(p).convert("RGB") for p in sorted((shared_dir / "data/trashnet_256/images").rglob("*.jpg"))[:24:2]
    ]
    waste = written(tmp_path / "waste", [np.asarray(photo) for photo in photos])
    coco = sorted((shared_dir / "data/coco_open_256/images").iterdir())[:10]
    (tmp_path / "coco").mkdir()
    for path in coco:
        (tmp_path / "coco" / path.name).write_bytes(path.read_bytes())
    weights = shared_dir / LITE0
    words = ["images", str(waste), str(tmp_path / "coco"), "--allow-few", "--resize", "bicubic", "--size", "256"]
    words += [
        "--cache",
        str(tmp_path / "cache"),
        "--metrics",
        "fid,spectrum",
        "--network",
        f"efficientnet_lite0={weights}",
    ]
    words += ["--network-sha256", f"efficientnet_lite0={sha256_of(weights)}", "--resamples", "0", "--batch-size", "8"]
    assert call(capsys, *words, "--out", str(tmp_path / "a"))[0] == 0
    found = read(tmp_path / "a")
    network = load_efficientnet_lite0(str(weights))

    def squares(images: list[Image.Image]) -> np.ndarray[Any, Any]:
        cut = [i.crop(((i.width - s) // 2, (i.height - s) // 2, (i.width + s) // 2, (i.height + s) // 2))
               for i in images for s in [min(i.size)]]  # fmt: skip
        return np.stack([np.asarray(i.resize((256, 256), Image.Resampling.BICUBIC)) for i in cut])

    a, b = squares(photos), squares([Image.open(p).convert("RGB") for p in coco])
    expected = metrics.frechet_distance(features_of(network, a).numpy(), features_of(network, b).numpy())
    # two JPEG decoders differ by a level here and there
    assert found["figures"]["fd_efficientnet_lite0"]["value"] == pytest.approx(expected, rel=2e-3)
    assert found["networks"][0]["sha256"] == sha256_of(weights)
    assert not found["reference"]["efficientnet_lite0"]["was_there"]
    assert call(capsys, *words, "--out", str(tmp_path / "b"))[0] == 0
    again = read(tmp_path / "b")
    assert again["reference"]["efficientnet_lite0"]["was_there"]
    assert again["figures"] == found["figures"]


def test_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "task.text.max_bytes=12")
    words = ["run", str(run), "--reference", EMOJI, "--count", "10", "--reference-count", "60", "--allow-few"]
    words += [
        "--size",
        "32",
        "--steps",
        "2",
        "--network",
        OURS,
        "--resamples",
        "20",
        "--cache",
        str(tmp_path / "cache"),
    ]
    out = tmp_path / "out"
    code, said, err = call(capsys, *words, "--out", str(out), "--dry-run")
    assert (code, err, out.exists()) == (0, "", False)
    assert "would draw 10 of 10 pictures" in said
    assert "would measure fid, kid" in said
    code, _, err = call(capsys, *(word for word in words if word != "--allow-few"), "--out", str(out))
    assert (code, (out / "samples").exists()) == (2, False), "before a picture is drawn"
    assert "10 generated and 60 real images for 48 features" in err
    code, said, _ = call(capsys, *words, "--out", str(out))
    assert code == 0
    found = read(out)
    assert (found["kind"], found["generated"]["kind"], found["generated"]["used"], found["real"]["used"]) == (
        "run", "samples", 10, 60,
    )  # fmt: skip
    assert found["model"]["identity"]["settings"]["steps"] == 2
    assert (found["model"]["identity"]["step"], found["model"]["identity"]["weights"]) == (7, "ema")
    prompts = [json.loads(line)["prompt"] for line in (out / "prompts.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (out / "samples/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert len(set(prompts)) > 8
    recorded = list((run / "evaluations").iterdir())
    assert [f"{run}/evaluations/{p.name}" in said for p in recorded] == [True]
    told = json.loads(recorded[0].read_text())
    assert told["figures"] == found["figures"]
    assert (found["settings"]["count"], found["settings"]["reference_count"]) == (10, 60)
    assert found["prompts"] == {
        "pictures": 10,
        "different": len(set(prompts)),
        "most_repeated": 1 + 10 - len(set(prompts)),
    }
    assert (told["step"], told["definition"]) == (7, found["definition"])
    assert told["truncated"] == sum(row["truncated"] for row in rows) == sum(len(p.encode()) > 12 for p in prompts) > 0

    # measured as a folder of samples it has the same figures; killed midway it goes on without drawing again
    assert call(capsys, "images", str(out / "samples"), EMOJI, "--out", str(tmp_path / "e"), "--reference-count", "60",
                "--allow-few", "--network", OURS, "--resamples", "20", "--cache", str(tmp_path / "cache"))[0] == 0  # fmt: skip
    assert read(tmp_path / "e")["figures"] == found["figures"]
    before = {p.name: p.stat().st_mtime_ns for p in (out / "samples/images").iterdir()}
    (out / "evaluation.json").unlink()
    code, said, _ = call(capsys, *words, "--out", str(out))
    assert code == 0
    assert "10 of 10 pictures are there" in said
    assert {p.name: p.stat().st_mtime_ns for p in (out / "samples/images").iterdir()} == before
    recorded = list((run / "evaluations").iterdir())
    assert len(recorded) == 1
    recorded[0].unlink()  # ended before it was recorded
    code, said, _ = call(capsys, *words, "--out", str(out))
    assert code == 0
    assert "has this evaluation already" in said
    assert list((run / "evaluations").iterdir()) == recorded
    code, _, err = call(capsys, *words, "--out", str(out), "--metrics", "spectrum")
    assert code == 2
    assert "has an evaluation already, with other metrics; give another folder, or --overwrite" in err

    code, _, err = call(
        capsys, "run", str(run), "--reference", str(out / "samples/images"), "--out", str(tmp_path / "x")
    )
    assert code == 2
    assert "00000000.png has no caption; give --prompts FILE" in err


def test_a_run_by_its_name_draws_captions_again_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_of(tmp_path / "runs/first", "data.datasets.emoji.max_samples=4")
    words = ["run", "first", "--root", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--size", "32"]
    words += ["--steps", "1", "--count", "6", "--reference-count", "9", "--resamples", "0"]
    code, _, err = call(capsys, *words, "--out", str(tmp_path / "out"))
    assert code == 0
    assert f"--count 6: {EMOJI} has 4 images, and what they show is drawn 1 to 2 times each" in err
    assert f"--reference-count 9: {EMOJI} has 4 images, and all of them are taken" in err
    found = read(tmp_path / "out")
    assert (found["settings"]["count"], found["settings"]["reference_count"]) == (6, 4)
    assert found["prompts"] == {"pictures": 6, "different": 4, "most_repeated": 2}
    assert list((tmp_path / "runs/first/evaluations").iterdir())


def test_a_refused_evaluation_leaves_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    words = ["run", str(run), "--reference", EMOJI, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    (tmp_path / "classes.json").write_text("[0, 1, 2, 3]")
    (tmp_path / "words.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    for message, more in (
        ("--prompts: class 0 for a model that takes captions", ("--prompts", str(tmp_path / "classes.json"))),
        ("w.safetensors", ("--prompts", str(tmp_path / "words.txt"), "--weights", str(tmp_path / "w.safetensors"))),
    ):
        code, _, err = call(capsys, *words, "--reference-count", "20", *more)
        assert (code, (tmp_path / "out").exists()) == (2, False), err
        assert message in err


@pytest.mark.parametrize(
    ("held_out", "count"), [("", 6), ("validation={dataset: {url: repo://data/assets/emoji_64, max_samples: 5}}", 5)]
)
def test_without_a_reference_it_is_the_runs_own(
    held_out: str, count: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", "data.datasets.emoji.max_samples=6", *filter(None, [held_out]))
    words = ["run", str(run), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--size", "32"]
    assert call(capsys, *words, "--steps", "1", "--resamples", "5")[0] == 0
    found = read(tmp_path / "out")
    assert (found["generated"]["used"], found["real"]["used"], found["real"]["found"]) == (count, count, count)
    assert found["real"]["url"] == EMOJI
    dataset = open_dataset(resolve_url(EMOJI), name="emoji")
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert prompts == [dataset.read(k).texts[0] for k in range(count)]


def test_a_run_of_classes_is_drawn_by_labels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", CLASSES)
    words = ["run", str(run), "--reference", EMOJI, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    words += ["--size", "32", "--steps", "1", "--reference-count", "20", "--no-record"]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "has no class; give --prompts FILE" in err
    (tmp_path / "classes.jsonl").write_text("0\n3\n1\n2\n")
    assert call(capsys, *words, "--prompts", str(tmp_path / "classes.jsonl"))[0] == 0
    rows = (tmp_path / "out/samples/samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["class"] for row in rows] == [0, 3, 1, 2]
    assert not (run / "evaluations").exists()


def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], sets: tuple[str, str], tmp_path: Path
) -> None:
    words = ["images", *sets, "--network", OURS, "--out", str(tmp_path / "a"), "--cache", str(tmp_path / "cache")]
    words += ["--resamples", "0", "--batch-size", "64"]
    right = Blocks.features

    def killed(self: Blocks, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return right(self, pixels_BCHW)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "features", killed)
        code, out, err = call(capsys, *words)
    assert (code, out, err) == (int(ExitCode.REQUEUE), "stopped; the same command goes on\n", "")
    assert not (tmp_path / "a/evaluation.json").exists()
    assert len(list((tmp_path / "cache").glob("blocks-*/parts/*.npz"))) == 1
    assert call(capsys, *words)[0] == 0
    assert read(tmp_path / "a")["figures"]["fd_blocks"]["value"] > 0
