"""The batch script itself, run by bash with stand-ins for SLURM's commands: what it does at its end."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.job import JobSpec
from launch.slurm_job.container import check_mounts
from launch.slurm_job.options import Container, SlurmOptions, container_of, parse_after
from launch.slurm_job.script import Job, slurm_executor
from trainer.config_text import with_overrides
from trainer.errors import UserError
from trainer.recipes import load
from trainer.run_folder import RunFolder

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
case "$*" in
*submitit*) exit "$RANKS" ;;
*launch.slurm_job.task*) [ -n "$DECISION" ] || exit 127; d="$RUN/slurm/exits/7.${SLURM_RESTART_COUNT:-0}"; mkdir -p "$d"; echo "$DECISION" > "$d/decision"; exit 1 ;;
esac
"""  # noqa: E501
SQUEUE = """#!/bin/bash
case "$*" in
*RestartCnt*) echo "${RESTARTS:-0}                   " ;;
*) echo "${STATE:-RUNNING}" ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[ -z "$REFUSED" ]
"""


def job_of(tmp_path: Path, **slurm: Any) -> Job:
    run = str(tmp_path / "r")
    options = SlurmOptions(container=Container("image"), **slurm)
    spec = JobSpec("demo", run, "slurm", nodes=2, gpus_per_node=4, code_dir=f"{run}/code", slurm=options)
    return Job(spec, load("demo"), RunFolder(run))


def run_script(tmp_path: Path, job: Job, **environment: str) -> tuple[int, str, str]:
    """Exit code, output, and the calls of SLURM's commands but squeue."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        if name != "scontrol" or "NO_SCONTROL" not in environment:
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    for name in ("bash", "cat", "mkdir", "rm", "sed"):  # nothing else is on this node: no Python, no scontrol
        found = next(Path(place, name) for place in ("/bin", "/usr/bin") if Path(place, name).exists())
        (programs / name).symlink_to(found)
    calls = tmp_path / "calls"
    calls.touch()
    script = tmp_path / "job.sh"
    script.write_text(slurm_executor([job]).script())
    result = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, check=False, timeout=240, env={
            "PATH": str(programs), "CALLS": str(calls), "RUN": job.spec.run_dir, "SLURM_JOB_ID": "7", **environment,
        },
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr, calls.read_text()


@pytest.mark.parametrize(("restart", "code", "decides"), [("0", 143, False), ("1", 0, True)])
def test_what_is_left_of_a_start_on_a_node_that_slurm_gave_up_leaves_the_next_start_alone(
    tmp_path: Path, restart: str, code: int, decides: bool
) -> None:
    found, said, calls = run_script(
        tmp_path, job_of(tmp_path), RANKS="137", DECISION="75", RESTARTS="1", SLURM_RESTART_COUNT=restart
    )
    assert found == code
    assert ("scontrol requeue 7" in calls) == ("launch.slurm_job.task" in calls) == decides
    assert ("queued again by SLURM itself" in said) != decides


def test_a_start_of_the_same_number_before_it_leaves_it_no_reports(tmp_path: Path) -> None:
    """A cluster that has lost its state counts its jobs anew."""
    exits = tmp_path / "r/slurm/exits"
    for start in ("7.0", "7.1"):
        (exits / start).mkdir(parents=True)
        (exits / start / "rank-0.json").touch()
        (exits / start / "decision").write_text("75")
    found, said, _ = run_script(
        tmp_path, job_of(tmp_path), RANKS="9", DECISION="", SLURM_RESTART_COUNT="1", RESTARTS="1"
    )
    assert found == 9, said
    assert not list(exits.glob("7.1/*"))
    assert len(list(exits.glob("7.0/*"))) == 2


@pytest.mark.parametrize(
    ("ranks", "decision", "environment", "code", "requeued"),
    [
        ("75", "75", {}, 0, True),
        ("0", "0", {}, 0, False),
        ("137", "75", {}, 0, True),  # a crash within the budget
        ("137", "93", {}, 93, False),
        ("75", "", {}, 0, True),  # no Python here: rank 0's own word
        ("9", "", {}, 9, False),
        ("75", "75", {"STATE": "COMPLETING"}, 143, False),  # scancel
        ("75", "75", {"NO_SCONTROL": "1"}, 75, False),
        ("75", "75", {"REFUSED": "1"}, 75, True),
    ],
)
def test_the_end_of_a_job_in_a_container(
    tmp_path: Path, ranks: str, decision: str, environment: dict[str, str], code: int, requeued: bool
) -> None:
    found, said, calls = run_script(tmp_path, job_of(tmp_path), RANKS=ranks, DECISION=decision, **environment)
    assert found == code, said
    assert ("scontrol requeue 7" in calls) == requeued
    end = next(line for line in calls.splitlines() if "launch.slurm_job.task" in line)
    assert "--ntasks=1" in end
    assert {"--overlap", "--immediate=60"} <= set(end.split()), "a step that cannot be killed holds the cores"
    assert "--container-image=image" in end
    assert end.endswith(f"-m launch.slurm_job.task {tmp_path}/r {tmp_path}/r 8 5 {ranks}")
    if "NO_SCONTROL" in environment:
        assert "RequeueExit=75" in said
    if "REFUSED" in environment:
        assert "SLURM does not requeue job 7" in said


def test_a_job_of_a_chain_is_not_requeued_and_not_by_its_exit_code_either(tmp_path: Path) -> None:
    code, _, calls = run_script(tmp_path, job_of(tmp_path, chain=2), RANKS="75", DECISION="75")
    assert code == 1
    assert "scontrol" not in calls


def test_an_arrays_script_takes_its_own_place_and_name(tmp_path: Path) -> None:
    jobs = []
    for name in ("a b", "c"):
        run = str(tmp_path / name)
        spec = JobSpec("demo", run, "slurm", code_dir=f"{run}/code", slurm=SlurmOptions(container=Container("image")))
        jobs.append(Job(spec, load("demo"), RunFolder(run)))
        Path(run, "slurm").mkdir(parents=True)
    script = slurm_executor(jobs, array_dir=str(tmp_path / "array"), at_once=1).script()
    assert "#SBATCH --array=0-1%1" in script
    setup = script[script.index("# setup") : script.index("# command")]
    result = subprocess.run(
        ["bash", "-c", setup + '\necho "$job $run_dir $PYTHONPATH"'], check=True, capture_output=True,
        env={**os.environ, "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "10"},
    )  # fmt: skip
    assert result.stdout == b""
    said = (tmp_path / "a b" / "slurm" / "9_0_0_log.out").read_text()
    assert said == f"9_0 {tmp_path}/a b {tmp_path}/a b/code\n"


def asked(job: Job, **how: Any) -> list[str]:
    lines = slurm_executor([job], **how).script().splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


def test_options_as_sbatch_has_them(tmp_path: Path) -> None:
    job = job_of(tmp_path, after=(parse_after("12"), parse_after("any:13_2")), launcher="torchrun", cpus_per_task=3)
    found = asked(job)
    for line in (
        "dependency=afterok:12,afterany:13_2",
        "kill-on-invalid-dep=yes",
        "ntasks-per-node=1",
        "cpus-per-task=12",
    ):
        assert line in found
    chained = job_of(tmp_path, chain=1)
    assert "no-requeue" in asked(chained)
    assert "requeue" not in asked(chained)
    assert "dependency=singleton" in asked(chained, successor=True)
    (name,) = [line for line in asked(chained) if line.startswith("job-name=")]
    assert name.startswith("job-name=demo-"), "jobs of another run of this name do not hold it up"


def test_a_container_gets_the_run_the_code_and_local_data(tmp_path: Path) -> None:
    config = with_overrides(load("demo"), ["data.datasets.emoji.url=/data/emoji"])
    container = Container("/images/x.sif", "apptainer", ("/scratch:/tmp",))
    spec = JobSpec("demo", "s3://bucket/r", "slurm", code_dir="/shared/code", slurm=SlurmOptions(container=container))
    script = slurm_executor([Job(spec, config, RunFolder("memory://r"))]).script()
    mounts = '"$work_dir:$work_dir,$code_dir:$code_dir,/scratch:/tmp,/data/emoji:/data/emoji:ro"'
    assert f'apptainer exec --nv --bind {mounts} --pwd "$code_dir" /images/x.sif env ' in script
    assert "work_dir=/shared/code-work" in script


@pytest.mark.parametrize(
    ("overrides", "mounts", "code_dir", "said"),
    [
        ((), (), "/shared/code", None),
        (("data.cache_dir=/scratch/shards",), (), "/shared/code", None),  # a dataset of the code's own needs no cache
        (("data.cache_dir=/scratch/shards", "data.datasets.emoji.url=s3://bucket/emoji"), (), "/shared/code",
         "data.cache_dir: /scratch/shards is not mounted in the container"),
        (("data.cache_dir=/scratch/shards", "data.datasets.emoji.url=s3://bucket/emoji"), ("/scratch",), "/shared/code", None),
        (("data.cache_dir=/scratch/shards", "data.datasets.emoji.url=s3://bucket/emoji"), ("/other:/scratch/shards",),
         "/shared/code", None),
        (("data.cache_dir=/tmp/shards", "data.datasets.emoji.url=s3://bucket/emoji"), (), "/shared/code", None),
        (("data.cache_dir=/tmpshards", "data.datasets.emoji.url=s3://bucket/emoji"), (), "/shared/code", "data.cache_dir"),
        (("data.datasets.emoji.url='/data/two, sets'",), (), "/shared/code", "data.datasets.emoji.url: /data/two, sets cannot"),
        ((), (), "/shared/a:b", "--code-dir: /shared/a:b cannot be mounted"),
    ],
)  # fmt: skip
def test_what_a_container_would_not_see(
    overrides: tuple[str, ...], mounts: tuple[str, ...], code_dir: str, said: str | None
) -> None:
    config, container = with_overrides(load("demo"), overrides), Container("image", mounts=mounts)
    if said is None:
        check_mounts(container, config, code_dir=code_dir, work_dir="/shared/run")
        return
    with pytest.raises(UserError) as e:
        check_mounts(container, config, code_dir=code_dir, work_dir="/shared/run")
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("image", "mounts", "said"),
    [
        ("a b", (), "not the name of an image"),
        ("docker://user:secret@registry/x", (), "holds a password"),
        ("x", ("relative",), "--container-mount relative"),
        ("x", ("/a:/b:rx",), "--container-mount /a:/b:rx"),
        ("x", ("/a$(id):/b",), "--container-mount"),
        (None, ("/a",), "goes with --container"),
    ],
)
def test_containers_that_are_none(image: str | None, mounts: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as e:
        container_of(image, "pyxis", mounts, "python")
    assert said in str(e.value)


def test_what_to_wait_for() -> None:
    for text in ("", "first", "12,13", "notok:12", "12;ls"):
        with pytest.raises(UserError, match="--after"):
            parse_after(text)
