"""`loupe evaluate autoencoder` as a user calls it: numbers that repeat, a picture, and what bad input is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import cli
from launch.entry import run_command
from tests.numerics.lpips_reference import random_weights
from tests.unit.trainer.test_reconstruction_measures import vq_codec
from trainer.errors import UserError
from trainer.evaluate import reconstruction_report
from trainer.evaluate.chosen_images import Images
from trainer.models.autoencoders import Codec
from trainer.models.efficientnet import EfficientNetLite0

CODEC, EMOJI = "repo://trainer/assets/demo_autoencoder", "repo://data/assets/emoji_64"
FEATURES, ALEX = "data/efficientnet_lite0/efficientnet-lite0-57934424.pth", "data/stlpips/alex_shift_tolerant.pth"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, ["evaluate", "autoencoder", *arguments], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / "features.pth")
    torch.save(random_weights("alex"), folder / "alex.pth")
    return {"FEATURES": str(folder / "features.pth"), "ALEX": str(folder / "alex.pth")}


def test_the_shipped_autoencoder_on_the_shipped_emoji(
    capsys: pytest.CaptureFixture[str], weights: dict[str, str], tmp_path: Path
) -> None:
    words = [CODEC, EMOJI, "--size", "64", "--count", "10", "--device", "cpu", "--seed", "3"]
    judges = ["--lpips-network", "alex", "--lpips-weights", weights["ALEX"], "--features-weights", weights["FEATURES"]]
    code, out, err = call(capsys, *words, *judges, "--out", str(tmp_path / "a"))
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["evaluation.json", "reconstructions.png"]
    assert Image.open(tmp_path / "a" / "reconstructions.png").size == (8 * 132 + 4, 3 * 150)
    found = read(tmp_path / "a")
    assert 24 < found["psnr_db"] < 32
    assert found["psnr_pooled_db"] < found["psnr_db"]
    assert 0.7 < found["ssim"] < 0.97
    assert found["lpips"] > 0
    assert found["frechet"] > 0
    assert found["codebook"] is None
    # shift and scale of its own config are of all emoji
    assert found["latents"]["shift_factor"] == pytest.approx(found["codec"]["shift_factor"], abs=0.3)
    assert found["latents"]["scaling_factor"] == pytest.approx(found["codec"]["scaling_factor"], rel=0.1)
    assert len(found["latents"]["mean"]) == len(found["latents"]["std"]) == 4
    assert set(found["outliers"]) == {"mid", "up0", "up1", "up2", "up3"}
    assert (found["count"], found["size"], len(found["images"]["used"])) == (10, 64, 10)
    assert found["judges"] == {"lpips": "alex", "features": "efficientnet_lite0"}
    assert "without" not in out
    assert f"PSNR {found['psnr_db']:.2f} dB" in out

    # the same again, whatever the batch; and what was not asked for is null, and said
    code, out, _ = call(capsys, *words, "--batch-size", "3", "--out", str(tmp_path / "b"))
    again = read(tmp_path / "b")
    assert again["psnr_db"] == pytest.approx(found["psnr_db"], rel=1e-5)
    assert again["latents"]["std"] == pytest.approx(found["latents"]["std"], rel=1e-5)
    assert again["images"]["used"] == found["images"]["used"]
    assert (again["lpips"], again["frechet"]) == (None, None)
    assert "without LPIPS: no --lpips-weights" in out
    assert "without the Frechet distance: no --features-weights" in out

    code, _, err = call(capsys, *words, "--out", str(tmp_path / "b"))
    assert code == 2
    assert "has evaluation.json already; give another folder, or --overwrite" in err
    assert call(capsys, *words, "--out", str(tmp_path / "b"), "--overwrite", "--count", "2")[0] == 0
    assert read(tmp_path / "b")["count"] == 2


def test_a_vq_model_has_its_codebook_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    vq_codec().vae.save_pretrained(tmp_path / "vq")
    words = (
        str(tmp_path / "vq"),
        EMOJI,
        "--out",
        str(tmp_path / "out"),
        "--size",
        "32",
        "--count",
        "4",
        "--device",
        "cpu",
    )
    assert call(capsys, *words)[0] == 0
    book = read(tmp_path / "out")["codebook"]
    assert book["num_codes"] == 32
    assert 1 <= book["perplexity"] <= 32 * book["usage"]


def test_a_dry_run_checks_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (
        CODEC,
        EMOJI,
        "--out",
        str(tmp_path / "out"),
        "--size",
        "64",
        "--count",
        "5",
        "--device",
        "cpu",
        "--dry-run",
    )
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert "AutoencoderKL, 5 of 1854 images at 64 px, on cpu" in out
    assert f"would write {tmp_path / 'out' / 'evaluation.json'}" in out
    assert not (tmp_path / "out").exists()
    assert call(capsys, *words, "--features-weights", "/nowhere")[0] == 2


@pytest.mark.shared
def test_real_photos_with_real_judges(capsys: pytest.CaptureFixture[str], shared_dir: Path, tmp_path: Path) -> None:
    words = [CODEC, str(shared_dir / "data" / "coco_open_256"), "--size", "64", "--count", "12", "--device", "cpu"]
    judges = ["--lpips-network", "alex_shift_tolerant", "--lpips-weights", str(shared_dir / ALEX)]
    judges += ["--features-weights", str(shared_dir / FEATURES)]
    assert call(capsys, *words, *judges, "--out", str(tmp_path / "photos"))[0] == 0
    words[1] = EMOJI
    assert call(capsys, *words, *judges, "--out", str(tmp_path / "emoji"))[0] == 0
    photos, emoji = read(tmp_path / "photos"), read(tmp_path / "emoji")
    # it has seen emoji alone
    assert photos["psnr_db"] < emoji["psnr_db"] - 2
    assert photos["ssim"] < emoji["ssim"]
    assert photos["images"]["skipped"] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codec": "nowhere"}, "nowhere/config.json: no such file"),
        ({"images": "nowhere"}, "nowhere: no such folder; give one with images"),
        ({"images": "EMPTY"}, "no images (.jpg, .jpeg, .png, .webp)"),
        ({"images": "BROKEN"}, "none of 1 images can be read; the first is x.png"),
        ({"images": "ONE"}, "1 image can be read, and an evaluation needs 2; give more"),
        ({"--size": "60"}, "--size: 60 is not a multiple of the autoencoder's downsampling, 8; take 56 or 64"),
        ({"--size": "8"}, "--size: 8 px, and SSIM's window has 11; take more"),
        ({"--size": "24", "--lpips-network": "alex", "--lpips-weights": "ALEX"}, "--size: 24 px, and LPIPS of alex needs 31"),
        ({"--lpips-weights": "/nowhere/w.pth"}, "--lpips-weights: no /nowhere/w.pth; give a file with LPIPS weights"),
        ({"--lpips-weights": "FEATURES"}, "not the weights of network vgg16"),
        ({"--lpips-network": "alex_shift_tolerant", "--lpips-weights": "ALEX"}, "not the weights of network alex_shift"),
        ({"--lpips-network": "alex_shift_tolerant"}, "--lpips-weights: absent; give the checkpoint of alex_shift_tolerant"),
        ({"--lpips-heads": "ALEX"}, "--lpips-heads: goes with --lpips-weights"),
        ({"--features-weights": "ALEX"}, "alex.pth: not EfficientNet-Lite0's weights"),
        ({"--features-weights": "/nowhere/f.pth"}, "--features-weights: /nowhere/f.pth: no such file"),
        ({"--device": "cuda:99"}, "--device: cuda:99 is not there"),
        ({"--out": "s3://bucket/x"}, "--out: s3://bucket/x is no local folder"),
        ({"--out": "FILE"}, "cannot be written to"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], weights: dict[str, str], tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "BROKEN", "ONE", "FILE")}
    for name in ("EMPTY", "BROKEN", "ONE"):
        places[name].mkdir()
    (places["BROKEN"] / "x.png").write_bytes(b"text")
    (places["ONE"] / "x.png").write_bytes(b"text")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(places["ONE"] / "y.png")
    places["FILE"].write_text("a file")
    given = {
        "codec": CODEC,
        "images": EMOJI,
        "--size": "64",
        "--count": "2",
        "--device": "cpu",
        "--out": str(tmp_path / "out"),
    }
    given |= {key: weights.get(value, str(places.get(value, value))) for key, value in changed.items()}
    options = [word for key, value in given.items() if key.startswith("--") for word in (key, value)]
    code, _, err = call(capsys, given["codec"], given["images"], *options)
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_an_autoencoder_that_overflows_is_told() -> None:
    codec = Codec.load(CODEC)
    vae: Any = codec.vae
    with torch.no_grad():
        vae.decoder.conv_out.weight.fill_(3e38)
    settings = reconstruction_report.Settings(size=64, count=2)
    with pytest.raises(UserError, match="x: 2 of 2 reconstructions are not finite"):
        reconstruction_report.evaluate(
            codec, Images(EMOJI), settings, reconstruction_report.load_judges(settings), codec_url="x",
            device=torch.device("cpu"),
        )  # fmt: skip
