"""`loupe job`: what it would queue."""

import sys

from click.testing import CliRunner

from launch.slurm_job.command import job


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


def test_a_name_is_a_files() -> None:
    result = CliRunner().invoke(job, ["--name", "../x", "--dry-run", "ls"])
    assert result.exit_code
    assert "--name ../x" in str(result.exception)
