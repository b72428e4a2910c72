"""`make data-chain`: from raw tars on an S3 server to 50 training steps, with real photos, faces and a Florence-2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.florence import write_chatty_model
from trainer.config import CODE_ROOT


@pytest.mark.shared
@pytest.mark.long
def test_the_whole_chain(shared_dir: Path, tmp_path: Path) -> None:
    data, run, captioner = shared_dir / "data", tmp_path / "run", tmp_path / "florence"
    write_chatty_model(shared_dir, captioner)
    result = subprocess.run(
        [
            sys.executable, "-m", "ops.data_chain", str(data / "coco_open"), "--out", str(run),
            "--faces", str(data / "yunet/yunet_n_dynamic.onnx"), "--captioner", str(captioner),
        ],
        cwd=CODE_ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for line in ("ingest: read: 139, kept: 139", "faces: read: 139, kept: 139", "recaption: read: 139, kept: "):
        assert line in result.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 50
