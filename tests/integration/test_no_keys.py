"""Commands about runs in a bucket, given in a shell that has no keys for it: one line, and what to set."""

import os
import subprocess
import sys
from pathlib import Path

from trainer.config import CODE_ROOT

URL = "s3://no-such-bucket-of-ours/runs/first"
COMMANDS = [
    ["runs", "--root", "s3://no-such-bucket-of-ours/runs"],
    *([["runs", name, URL] for name in ("show", "logs", "cancel", "resume", "watch")]),
    ["runs", "export", URL, "out"],
    ["doctor", f"{URL}/config.yaml", "--cpu", "--quick"],
    ["submit", f"{URL}/config.yaml", "--cluster", "local"],
    ["k8s", f"{URL}/config.yaml", "--image", "i", "--dry-run"],
]
SCRIPT = """
import sys
from launch.cli import cli
from launch.entry import run_command
for arguments in {commands!r}:
    print(arguments[:2], file=sys.stderr, flush=True)
    print("code", run_command(cli, arguments, prog_name="loupe"), file=sys.stderr, flush=True)
"""


def test_without_keys_each_command_says_so_in_one_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LOUPE_"))}
    environment |= {
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "none"), "PYTHONPATH": str(CODE_ROOT),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(commands=COMMANDS)], env=environment, cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    assert len(lines) == 3 * len(COMMANDS), result.stderr
    for said, code in zip(lines[1::3], lines[2::3], strict=True):
        assert code == "code 2"
        assert said.startswith("error: s3://no-such-bucket-of-ours/runs")
        assert "Unable to locate credentials" in said
        assert "AWS_ACCESS_KEY_ID" in said
