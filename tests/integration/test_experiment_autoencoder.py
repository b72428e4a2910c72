"""`loupe experiment autoencoder` from photos to its report, in seconds a process: real runs, exports, evaluations, pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from trainer.config import CODE_ROOT
from trainer.recipes.autoencoder_experiment import SMOKE

STEPS = 24
ALL_STEPS = SMOKE.low_steps + STEPS


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.timeout(1500)
def test_the_smallest_experiment(tmp_path: Path, shared_dir: Path) -> None:
    """Stopped while it trains, it goes on; what is done is not done again; the report is of what is there."""
    data, out, report = shared_dir / "data", tmp_path / "out", tmp_path / "report"
    photos = tmp_path / "some photos"
    (photos / "class").mkdir(parents=True)
    for path in sorted((data / "coco_open_256/images").glob("*.jpg"))[:40]:
        (photos / "class" / path.name).write_bytes(path.read_bytes())
    command = [
        sys.executable, "-m", "launch.cli", "experiment", "autoencoder", "--smoke", "--steps", str(STEPS),
        "--only", "kl", "--only", "lpl", "--photos", str(photos),
        "--out", str(out), "--report", str(report), "--ceiling-codec", str(data / "taef2"),
        "--features-weights", str(data / "efficientnet_lite0/efficientnet-lite0-57934424.pth"),
        "--lpips-weights", str(data / "stlpips/alex_shift_tolerant.pth"),
    ]  # fmt: skip

    first = subprocess.Popen(command, cwd=CODE_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in out.glob("runs/kl/metrics/*.jsonl")):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    told, _ = first.communicate(timeout=300)
    assert first.returncode == 75, told
    assert "stopped; the same command goes on from here" in told
    assert not (out / "runs/kl/summary.json").exists()
    assert not report.exists()

    def run() -> str:
        done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, check=False, timeout=1000)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run()
    assert json.loads((out / "runs/kl/summary.json").read_text())["steps"] == ALL_STEPS
    assert len(list((out / "runs/kl/attempts").iterdir())) == 2, "it went on where it was stopped"

    figures = json.loads((report / "autoencoder.json").read_text())
    assert set(figures["runs"]) == {"kl", "lpl"}
    assert set(figures["baselines"]) == {"kl_8bit", "thumbnail_kl", "thumbnail_vq", "webp_kl", "webp_vq", "ceiling"}
    assert str(tmp_path) not in (report / "autoencoder.json").read_text(), "a report names no folder of the machine"
    evaluated = [figures["runs"]["kl"]["evaluation"], *figures["baselines"].values()]
    assert {found["count"] for found in evaluated} == {6}, "all are of the same held-out photos"
    kl, rounded = evaluated[0], figures["baselines"]["kl_8bit"]
    assert rounded["psnr_db"] != kl["psnr_db"]
    assert rounded["psnr_db"] == pytest.approx(kl["psnr_db"], abs=0.3), "8 bits take little away"
    last = figures["runs"]["kl"]["while_training"][-1]
    assert last["step"] == ALL_STEPS
    assert kl["psnr_db"] == pytest.approx(last["psnr_db"], abs=0.05), "the export in float16 is what was trained"
    bits = {name: figures["baselines"][name]["bits"] for name in ("kl_8bit", "thumbnail_kl", "webp_kl")}
    assert bits["kl_8bit"] == 4 * 8 * 8 * 8
    assert bits["thumbnail_kl"] == 9 * 9 * 24
    assert bits["webp_kl"] <= 2048
    assert figures["baselines"]["ceiling"]["psnr_db"] > figures["baselines"]["thumbnail_kl"]["psnr_db"]
    assert figures["runs"]["lpl"]["summary"]["phases"][0]["losses_last"]["lpl"] > 0

    page = (report / "autoencoder.md").read_text()
    assert f"| KL, latents in 8 bits | 256 | 2048 | {rounded['psnr_db']:.2f} |" in page
    assert "## LPL on the KL model" in page
    assert f"{figures['photos']['heldout']} held-out images" in page
    for name in ("reconstructions.png", "curves.png", "decoder_maps.png"):
        assert f"autoencoder/{name}" in page
        Image.open(report / "autoencoder" / name).verify()

    made = {path: path.stat().st_mtime_ns for path in [*out.glob("evaluations/*/*"), *out.glob("runs/*/summary.json")]}
    run()
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what is done is not done again"

    again = subprocess.run(
        [*command, "--ablation-steps", "3"], cwd=CODE_ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "holds an experiment with another size" in again.stderr
