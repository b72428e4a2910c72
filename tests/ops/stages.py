"""A real data stage's command that goes on answering: an item of it is left, which another worker holds."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.stages.leases import lease_name
from data.stages.receipts import pass_folder
from tests.small_stages import ingest, item_names, raw
from trainer.config import CODE_ROOT


def broken(weights: Path | None) -> Any:
    """A detector that fails on every image."""

    def detect(image_HWC: Any) -> Any:
        raise RuntimeError("the detector is broken")

    return detect


@contextlib.contextmanager
def waiting_stage(
    tmp_path: Path, discovery: Path, *, detector: str = "tests.small_stages:everywhere"
) -> Iterator[None]:
    """`loupe data faces` of three items, two of which it does."""
    source = ingest(tmp_path / "ingested", raw(tmp_path / "raw"))
    work = tmp_path / "blurred" / pass_folder("faces")
    (work / "leases").mkdir(parents=True)
    held = json.dumps({"worker": "elsewhere", "attempt": "0", "deadline": time.time() + 600, "samples": 1})
    names = [f"{i:07d}-{name}-0000" for i, name in enumerate("abc")]
    (work / "leases" / lease_name(names[-1], 0)).write_text(held)
    with open(tmp_path / "stage.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "data", "faces", source, str(tmp_path / "blurred"), "--workers", "1",
             "--detector", detector, "--discovery-dir", str(discovery)],
            stdout=log, stderr=log, cwd=CODE_ROOT, start_new_session=True,
        )  # fmt: skip
    try:
        yield
        assert item_names(str(tmp_path / "blurred"), "faces") == names
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
