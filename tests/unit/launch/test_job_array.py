"""A data stage's workers as an array of jobs: SLURM's script, Kubernetes' manifest, and the command line that both run."""

import shlex
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from data.commands.stage import StageOptions, command_line, stage_options
from launch.pods.stage_job import StageJob, job_manifest
from launch.pods.template import PodNeeds, pod_spec
from launch.pods.volumes import Volume
from launch.slurm_job.array import ArrayOptions, array_script
from trainer.errors import UserError

COMMAND = ["python", "-m", "launch.cli", "data", "ingest", "s3://bucket/raw tars", "s3://bucket/out"]


def test_the_script_asks_for_what_was_said_and_nothing_else() -> None:
    script = array_script(
        COMMAND, name="loupe-ingest", options=ArrayOptions(16, partition="cpu", mem="8G"), code_dir="/code"
    )
    asked = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert set(asked) == {
        "job-name=loupe-ingest", "array=0-15", "ntasks=1", "partition=cpu", "mem=8G", "signal=TERM@60",
        "output=loupe-ingest-%A_%a.log", "open-mode=append", "requeue",
    }  # fmt: skip
    assert f"srun --kill-on-bad-exit=1 {shlex.join(COMMAND)} &" in script.splitlines()


def test_the_manifest_is_an_indexed_job_that_outlives_evictions() -> None:
    text = job_manifest(
        [*COMMAND, "$(HOME)"], name="loupe-ingest",
        job=StageJob("registry/loupe:1", 8, 4, "16G", 1, namespace="data", secret="s3-keys", volumes=[Volume("set", "/set")]),
    )  # fmt: skip
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 8, 8)
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in spec[
        "podFailurePolicy"
    ]["rules"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    (container,) = pod["containers"]
    assert container["args"] == [*COMMAND, "$$(HOME)"]
    assert container["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    # nothing in a stage's pod is otherwise than in a training's
    asked = {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    same = pod_spec(PodNeeds("worker", "registry/loupe:1", container["args"], 60, asked, secrets=["s3-keys"],
                             volumes=[Volume("set", "/set")]))  # fmt: skip
    assert pod == same
    kubernetes_validate.validate(job, "1.30", strict=True)


def test_a_stages_shared_memory_leaves_room_for_its_workers() -> None:
    def shm(mem: str | None) -> dict[str, str]:
        job = yaml.safe_load(job_manifest(COMMAND, name="x", job=StageJob("image", 1, mem=mem)))
        volumes = job["spec"]["template"]["spec"]["volumes"]
        (found,) = (volume["emptyDir"] for volume in volumes if volume["name"] == "shm")
        return dict(found)

    assert shm("4G") == {"medium": "Memory", "sizeLimit": "2048Mi"}
    assert shm("64G") == shm(None) == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_memory_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="--mem lots: no amount of memory"):
        job_manifest(COMMAND, name="x", job=StageJob("image", 1, mem="lots"))


@click.group()
def loupe() -> None:
    pass


@loupe.group()
def data() -> None:
    pass


@data.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("out")
@click.option("--prompt", "prompts", multiple=True)
@click.option("--side", type=int, default=64)
@click.option("--keep/--no-keep", default=True)
@stage_options
def stage(options: StageOptions, **values: Any) -> None:
    click.echo(shlex.join(command_line(click.get_current_context())))
    click.echo(repr((sorted(values.items()), options.workers, options.watch)))


@pytest.mark.parametrize(
    "words",
    [
        "a b out",
        "a out --prompt '<A B>' --prompt C --side 32 --no-keep --workers 7",
        "'with space' out --watch --cluster slurm --array 4 --partition gpu --mem 1G",
    ],
)
def test_jobs_run_the_same_command_without_where_it_runs(words: str) -> None:
    first = CliRunner().invoke(loupe, ["data", "stage", *shlex.split(words)])
    assert first.exit_code == 0, first.output
    line, meaning = first.output.splitlines()
    again = CliRunner().invoke(loupe, shlex.split(line))
    assert again.output.splitlines() == [line, meaning]
    for place in ("--cluster", "--array", "--partition", "--mem"):
        assert place not in line
