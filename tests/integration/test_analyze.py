"""`loupe analyze latents` as a user calls it: pictures, numbers that repeat, and what bad input is told."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import cli
from launch.entry import run_command
from trainer import whole_files
from trainer.errors import UserError
from trainer.evaluate import latent_report
from trainer.evaluate.latent_report import PARTS, Analysis, claim, write
from trainer.evaluate.lpl_constants import gate_shares
from trainer.models.autoencoders import Codec

CODEC = "repo://trainer/assets/demo_autoencoder"
SMALL = ("--size", "64", "--count", "4", "--grid", "3", "--sensitivity-images", "1", "--device", "cpu")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, ["analyze", "latents", *arguments], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of different sides, one of them small, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    draw = np.random.default_rng(0)
    for name, size in (("a.png", (80, 64)), ("sub/b.JPG", (100, 120)), ("c.webp", (40, 48))):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more than this")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    return folder


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return found


def test_all_is_measured_drawn_and_written_down(
    capsys: pytest.CaptureFixture[str], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    code, text, err = call(capsys, CODEC, str(photos), "--out", str(out), *SMALL)
    assert (code, err.count("error")) == (0, 0), err
    assert sorted(p.name for p in out.iterdir()) == sorted(["analysis.json", *(f"{part}.png" for part in PARTS)])
    for part in PARTS:
        picture = Image.open(io.BytesIO((out / f"{part}.png").read_bytes()))
        assert min(picture.size) > 250
        assert len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 20

    found = read(out)
    assert sorted(found["images"]["used"]) == ["a.png", "c.webp", "sub/b.JPG"]
    assert found["images"]["enlarged"] == ["c.webp"]
    assert {s["name"]: s["reason"] for s in found["images"]["skipped"]} == {
        "broken.jpg": "undecodable", "empty.png": "unknown_format",
    }  # fmt: skip
    assert "3 (of 4 asked for), 2 skipped, 1 enlarged" in text
    assert (found["settings"]["size"], found["settings"]["seed"], found["settings"]["count"]) == (64, 0, 4)
    codec = Codec.load(CODEC)
    assert found["codec"]["url"] == CODEC
    assert found["codec"]["maps"] == {"mid": 1, "up0": 2, "up1": 4, "up2": 8, "up3": 8}
    assert found["codec"]["scaling_factor"] == pytest.approx(codec.scaling_factor, rel=1e-5)
    assert len(found["codec"]["weights_sha256"]) == 64
    assert found["versions"]["torch"] == torch.__version__
    assert [m["side"] for m in found["outliers"]["maps"]] == [8, 16, 32, 64, 64]
    assert [len(m["peak_sd_by_channel"]) for m in found["outliers"]["maps"]] == [64, 64, 64, 32, 24]
    assert np.shape(found["sensitivity"]["images"][0]["error_norm_by_position"]) == (3, 3)
    assert len(found["interpolation"]["rows"]) == 4 * 3
    assert found["amplitude"]["omega_by_map"] == [1.0, 0.5, 0.25, 0.125, 0.125]
    assert found["gate"]["bound"] == 3.0 * 64 / 512
    shares = gate_shares(3.0, 512, 64)["share_by_paradigm"]
    assert found["gate"]["share_by_paradigm"]["flow"] == pytest.approx(shares["flow"], rel=1e-5)
    assert set(PARTS) <= set(found["meaning"])

    # again, in other batches: the same images, the same noise, the same numbers
    other = tmp_path / "again"
    words = (
        CODEC,
        str(photos),
        "--out",
        str(other),
        *SMALL,
        "--batch-size",
        "2",
        "--only",
        "amplitude",
        "--only",
        "sensitivity",
    )
    assert call(capsys, *words)[0] == 0
    again = read(other)
    assert again["images"] == found["images"]
    for row, same in zip(found["amplitude"]["rows"], again["amplitude"]["rows"], strict=True):
        assert row["perturbation"] == same["perturbation"]
        for key in ("latent_mse", "term_by_map", "squared_difference_by_map"):
            assert row[key] == pytest.approx(same[key], rel=2e-3)
    for image, same in zip(found["sensitivity"]["images"], again["sensitivity"]["images"], strict=True):
        np.testing.assert_allclose(image["error_norm_by_position"], same["error_norm_by_position"], rtol=2e-3)


def test_a_dataset_serves_as_well_and_parts_can_be_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (CODEC, "repo://data/assets/emoji_64", "--out", str(tmp_path), *SMALL)
    assert call(capsys, *words, "--only", "gate", "--only", "outliers", "--tau-reference-px", "0")[0] == 0
    found = read(tmp_path)
    assert found["images"]["kind"] == "dataset"
    assert len(set(found["images"]["used"])) == 4
    assert found["gate"]["bound"] == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis.json", "gate.png", "outliers.png"]

    # an analysis is not replaced unasked; when it is, nothing of the old one stays
    code, _, err = call(capsys, *words, "--only", "gate")
    assert code == 2
    assert "has analysis.json already" in err
    assert call(capsys, *words, "--only", "gate", "--overwrite", "--seed", "1")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis.json", "gate.png"]
    assert "images" not in read(tmp_path)


@pytest.mark.shared
def test_real_photos(capsys: pytest.CaptureFixture[str], shared_dir: Path, tmp_path: Path) -> None:
    photos = str(shared_dir / "data" / "coco_open_256")
    words = (CODEC, photos, "--out", str(tmp_path), *SMALL, "--only", "interpolation")
    assert call(capsys, *words)[0] == 0
    found = read(tmp_path)
    assert len(found["images"]["used"]) == 4
    assert found["images"]["skipped"] == []
    by_method: dict[str, list[float]] = {}
    for row in found["interpolation"]["rows"]:
        by_method.setdefault(row["method"], []).append(row["latent_mse"])
    # more is lost from one scale to the next, and less in pixels than in latents
    assert all(values == sorted(values) for values in by_method.values())
    assert by_method["pixels_bilinear"][0] < min(v[0] for k, v in by_method.items() if k.startswith("latents"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codec": "nowhere"}, "nowhere/config.json: no such file"),
        ({"images": "nowhere"}, "nowhere: no such folder; give one with images"),
        ({"images": "EMPTY"}, "no images (.jpg, .jpeg, .png, .webp)"),
        ({"images": "BROKEN"}, "none of 1 images can be read; the first is x.png (unknown_format: neither JPEG"),
        ({"--size": "60"}, "--size: 60 is not a multiple of the autoencoder's downsampling, 8; take 56 or 64"),
        ({"--size": "16"}, "--size: 16 px are 2 latent pixels a side; take 32 px or more"),
        ({"--patch": "9"}, "--patch: 9 latent pixels, but 64 px are 8"),
        ({"--tau": "0"}, "--tau: 0.0 is no positive number"),
        ({"--tau": "nan"}, "--tau: nan is no positive number"),
        ({"--scale": "0.5"}, "--scale: must be larger than 1 and at most 8"),
        ({"--device": "abacus"}, "--device: 'abacus' is no device"),
        ({"--device": "cuda:99"}, "--device: cuda:99 is not there"),
        ({"--out": "s3://bucket/x"}, "--out: s3://bucket/x is no local folder"),
        ({"--out": "FILE"}, "cannot be written to"),
    ],
)
def test_bad_input_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], photos: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "BROKEN", "FILE")}
    places["EMPTY"].mkdir()
    places["BROKEN"].mkdir()
    (places["BROKEN"] / "x.png").write_bytes(b"text")
    places["FILE"].write_text("a file")
    given = {"codec": CODEC, "images": str(photos), "--size": "64", "--device": "cpu", "--out": str(tmp_path / "out")}
    given |= {key: str(places.get(value, value)) for key, value in changed.items()}
    options = [word for key, value in given.items() if key.startswith("--") for word in (key, value)]
    code, out, err = call(capsys, given["codec"], given["images"], *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out" / "analysis.json").exists()


def test_a_write_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"settings": {}, "pictures": ["gate.png", "outliers.png"]}
    write(claim(str(tmp_path), overwrite=False), Analysis(numbers, {"gate.png": b"1", "outliers.png": b"1"}))
    with pytest.raises(UserError, match="already; give another folder, or --overwrite"):
        claim(str(tmp_path), overwrite=False)

    replace = whole_files.os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "outliers.png":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(whole_files.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(claim(str(tmp_path), overwrite=True), Analysis(numbers, {"gate.png": b"2", "outliers.png": b"2"}))
    # the old numbers are gone, so no reader takes the mixture for an analysis
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gate.png", "outliers.png"]
    assert (tmp_path / "outliers.png").read_bytes() == b"1"


def test_an_autoencoder_that_overflows_is_told(photos: Path) -> None:
    codec = Codec.load(CODEC)
    vae: Any = codec.vae
    with torch.no_grad():
        vae.decoder.up_blocks[2].resnets[0].conv1.weight.fill_(3e38)
    settings = latent_report.Settings(size=64, count=2, parts=("outliers",))
    with pytest.raises(UserError, match=r"the decoder's map up2 of \S+: not finite"):
        latent_report.analyze(
            codec, latent_report.Images(str(photos)), settings, codec_url="x", device=torch.device("cpu")
        )
