"""The README's way to train on one's own captioned photos: build, then submit, with real photos."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import TINY
from trainer.config import CODE_ROOT


@pytest.mark.shared
@pytest.mark.slow
def test_photos_are_built_and_trained_on(shared_dir: Path, tmp_path: Path) -> None:
    def call(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=CODE_ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    photos, run = tmp_path / "photos", tmp_path / "run"
    call("-m", "launch.cli", "data", "build", str(shared_dir / "data" / "coco_open_256"), str(photos))
    settings = [word for override in (*TINY, f"data.datasets.photos.url={photos}") for word in ("--set", override)]
    call("launch/slurm.py", "photos", "--cluster", "local", "--cpu", "--run-dir", str(run), *settings)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["images_seen"]) == ("done", 160)
    assert "lpl" in summary["phases"][-1]["losses_last"]
