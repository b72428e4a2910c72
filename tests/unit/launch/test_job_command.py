"""`loupe job`: what it would queue, and its script run by bash with stand-ins for srun and apptainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import cli
from launch.slurm_job.command import job

PRINT = """#!{python}
import json, os, sys
words = sys.argv[1:]
seen = {{"program": os.path.basename(sys.argv[0]), "words": words, "cwd": os.getcwd(), "env": dict(os.environ)}}
print(json.dumps(seen), flush=True)
if "apptainer" in words:
    os.execvp("apptainer", words[words.index("apptainer"):])
"""


def script_of(*words: str) -> str:
    result = CliRunner().invoke(job, [*words[:1], "--dry-run", *words[1:]])
    assert result.exit_code == 0, result.output + str(result.exception)
    return str(result.stdout)


def test_our_commands_run_with_this_python_and_others_as_they_are() -> None:
    words = ["--gpus-per-task", "1", "--dry-run", "--", "loupe", "evaluate", "autoencoder", "a b", "--dry-run"]
    result = CliRunner().invoke(job, words)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert f"srun --kill-on-bad-exit=1 {sys.executable} -m launch.cli evaluate autoencoder 'a b' --dry-run &" in lines
    for line in ("#SBATCH --job-name=loupe-evaluate-autoencoder", "#SBATCH --array=0-0", "#SBATCH --gpus-per-task=1"):
        assert line in lines
    other = CliRunner().invoke(job, ["--array", "3", "--name", "score", "--dry-run", "bash", "x.sh", "--array"])
    assert "srun --kill-on-bad-exit=1 bash x.sh --array &" in other.output
    assert "#SBATCH --array=0-2" in other.output


def test_what_is_asked_of_slurm_arrives() -> None:
    lines = script_of(
        "--qos=high", "--account", "lab", "--partition", "gpu", "--constraint", "a100|h100", "--exclude", "n[1-3]", "--after",
        "12", "--after", "any:13_4", "--time", "1:00:00", "--", "loupe", "recipes",
    ).splitlines()  # fmt: skip
    for line in (
        "qos=high", "account=lab", "partition=gpu", "constraint='a100|h100'", "exclude='n[1-3]'", "time=1:00:00",
        "dependency=afterok:12,afterany:13_4", "kill-on-invalid-dep=yes",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    plain = script_of("--name=x", "--", "loupe", "recipes")
    assert not any(name in plain for name in ("qos", "constraint", "exclude", "dependency"))


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_command_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    monkeypatch.chdir(tmp_path)
    script = script_of(
        "--name=x", "--container", "image", "--container-runtime", runtime, "--container-mount", "/data:/d:ro", "--env",
        "GREETING=good $day", "--gpus-per-task", "1", "--code-dir", "copy", "--", "loupe", "export", "a b", "$HOME",
    )  # fmt: skip
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "apptainer"):
        (programs / name).write_text(PRINT.format(python=sys.executable))
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    result = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    calls = {call["program"]: call for call in map(json.loads, result.stdout.splitlines())}
    mounts = f"{tmp_path}:{tmp_path},{tmp_path}/copy:{tmp_path}/copy,/data:/d:ro"
    words = calls["srun"]["words"]
    if runtime == "pyxis":
        assert {f"--container-mounts={mounts}", f"--container-workdir={tmp_path}", "--container-image=image"} < {*words}
    else:
        words = calls["apptainer"]["words"]
        assert words[:7] == ["exec", "--nv", "--bind", mounts, "--pwd", str(tmp_path), "image"]
    inside = words[words.index("env") + 1 :]
    assert inside[-6:] == ["python", "-m", "launch.cli", "export", "a b", "$HOME"]
    assert {f"PYTHONPATH={tmp_path}/copy", "GREETING=good $day"} < {*inside}
    assert calls["srun"]["env"]["GREETING"] == "good $day"


def test_a_file_that_the_container_may_not_have_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("launch.slurm_job.command.OF_IMAGES", ("/usr", "/bin"))
    words = ["--dry-run", "--container", "image", "--", "ls", f"{tmp_path}/data", "/bin/sh", f"{tmp_path}/here", "/no"]
    said = CliRunner().invoke(job, words).stderr
    assert said == f"WARNING: {tmp_path}/data: not mounted in the container; add --container-mount {tmp_path}/data\n"
    assert CliRunner().invoke(job, ["--container-mount", str(tmp_path), *words]).stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "../x"], "--name ../x"),
        (["--no-copy", "--code-dir", "x"], "--no-copy: goes without --code-dir"),
        (["--container-mount", "/a"], "--container-mount: goes with --container"),
        (["--env", "AWS_SECRET_ACCESS_KEY=x"], "--env AWS_SECRET_ACCESS_KEY: looks like a secret"),
        (["--after", "first"], "--after first"),
        (["--container", "x", "--code-dir", "/a b"], "--code-dir: /a b cannot be mounted"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(job, [*words, "--dry-run", "ls"])
    assert result.exit_code
    assert said in str(result.exception)


def test_without_slurm_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(job, ["--", "loupe", "recipes"])
    assert "sbatch: not found; submit from a login node of the cluster" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_help_has_headings_and_examples() -> None:
    said = CliRunner().invoke(cli, ["job", "--help"]).output
    for part in ("SLURM:", "Container:", "Code and environment:", "loupe job --array 8 --dry-run -- bash score.sh"):
        assert part in said
