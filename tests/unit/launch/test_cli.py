"""The `loupe` command."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.cli import SUBCOMMANDS, cli
from launch.entry import run_command
from trainer.recipes import RECIPES, load
from trainer.run_folder import RunFolder


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, list(arguments), prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_imports_neither_torch_nor_any_subcommand() -> None:
    code = (
        "import sys\n"
        "from launch.cli import cli\n"
        "cli.main(['--help'], prog_name='loupe', standalone_mode=False)\n"
        "for name in ('torch', 'numpy', 'pydantic', 'submitit', 'launch.slurm', 'data.cli'):\n"
        "    assert name not in sys.modules, name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in SUBCOMMANDS)


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert len(out.splitlines()) == len(RECIPES)
    assert all(len(line.split(maxsplit=1)) == 2 for line in out.splitlines())


def test_a_recipe_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "recipes", "show", "demo", "--set", "seed=5")
    assert yaml.safe_load(out)["seed"] == 5
    code, _, err = call(capsys, "recipes", "show", "nope")
    assert code == 2
    assert err.startswith("error: no recipe 'nope'")


def test_a_run_is_shown_and_watched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    folder.claim(load("demo"))
    folder.write_json("attempts/0000.json", {})
    record = {"step": 10, "total_steps": 20, "phase": "low", "images_per_s": 3.0, "time": time.time(),
              "loss": {"denoising": 0.25}}  # fmt: skip
    folder.write_text("metrics/0000.jsonl", json.dumps(record) + "\n")
    restarts = [{"reason": "preempted"}, {"reason": "crash"}, {"reason": "preempted"}]
    ended = {"code": 0, "why": "done", "time": 0}
    folder.write_json("job.json", {"cluster": "local", "pid": 1, "host": "x", "restarts": restarts, "ended": ended})
    code, out, _ = call(capsys, "runs", "show", str(tmp_path / "r"))
    assert code == 0
    for part in ("state:         done", "10 of 20", "denoising 0.25", "preempted 2, crash 1", "starts:        1"):
        assert part in out
    code, out, _ = call(capsys, "runs", "watch", str(tmp_path / "r"))
    assert code == 0
    assert "step 10/20" in out
    assert "done" in out.splitlines()
    folder.write_json("job.json", {"cluster": "local", "pid": 1, "host": "x", "restarts": [], "ended": None})
    assert "state:         lost (" in call(capsys, "runs", "show", str(tmp_path / "r"))[1]


def test_a_folder_without_a_run_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for action in ("show", "watch"):
        code, _, err = call(capsys, "runs", action, str(tmp_path))
        assert code == 2
        assert err.startswith(f"error: {tmp_path}: no run there (no config.yaml); give a run folder such as runs/demo")
        assert err.count("\n") == 1


def test_a_typing_error_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "submitt")
    assert code == 2
    assert "No such command" in err
