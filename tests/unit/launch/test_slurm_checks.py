"""What is refused before a job is queued, from what SLURM's commands say."""

from pathlib import Path
from typing import Any

import pytest

from launch.environment import given_variables
from launch.job import JobSpec, record_job
from launch.slurm_job.checks import check_cluster, check_container, check_nodes, check_partition, check_time, gpus_in
from launch.slurm_job.options import Container, SlurmOptions
from launch.slurm_job.reports import note_asked, report_exit
from trainer.errors import UserError
from trainer.run_folder import RunFolder


def spec(**what: Any) -> JobSpec:
    return JobSpec("demo", "/r", "slurm", code_dir="/r/code", **what)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:4", 4), ("gpu:a100:8(S:0-1)", 8), ("nvme:1,gpu:h100:2(S:0),gpu:a30:1", 3), ("gpu", 1),
     ("gpu:1g.10gb:7", 7), ("shard:64", 0), ("", 0)],
)  # fmt: skip
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert gpus_in(gres) == count


NODES = "n1|gpu:a100:4(S:0)|64\nn2|gpu:a100:8(S:0-1)|128\n"


@pytest.mark.parametrize(
    ("asked", "listing", "said"),
    [
        (spec(gpus_per_node=16), NODES, "no node of this cluster has so many; n2 has 8: give that and more --nodes"),
        (spec(), "n1|(null)|64\n", "no node of this cluster has GPUs that SLURM knows of"),
        (spec(slurm=SlurmOptions("cpu")), "n1|(null)|64\n", "no node of partition cpu has GPUs"),
        (spec(gpus_per_node=8, slurm=SlurmOptions(cpus_per_task=32)), NODES, "256 cores for 8 rank(s)"),
        (spec(gpus_per_node=129, cpu=True), NODES, "129 cores"),
        (spec(nodes=3), f"{NODES}{NODES}", "--nodes 3: this cluster has 2"),  # each node in two partitions
    ],
)
def test_more_than_a_node_has(asked: JobSpec, listing: str, said: str) -> None:
    with pytest.raises(UserError) as e:
        check_nodes(asked, listing)
    assert said in str(e.value)


PARTITIONS = "low*|1:00:00\nhigh|infinite\nshort|30:00\nlong|2-12:00:00\n"


@pytest.mark.parametrize(
    ("name", "time_min", "said"),
    [
        ("nowhere", None, "--partition nowhere: not on this cluster, which has high, long, low, short"),
        ("low,nowhere", None, "--partition nowhere"),
        (None, 61, "--time: 61 minutes, and partition low lets a job run for 60"),
        ("short", 31, "partition short lets a job run for 30"),
        ("long", 3601, "partition long lets a job run for 3600"),
        ("low,short", 61, "partition low,short lets a job run for 60"),
    ],
)
def test_partitions_that_are_not_there_or_let_no_job_run_so_long(
    name: str | None, time_min: int | None, said: str
) -> None:
    with pytest.raises(UserError) as e:
        check_partition(name, PARTITIONS, time_min=time_min)
    assert said in str(e.value)


def test_partitions_that_do() -> None:
    for name, time_min in ((None, 60), ("high", 99999), ("low,high", 99999), ("long", 3600), (None, None)):
        check_partition(name, PARTITIONS, time_min=time_min)
    check_partition("any", "", time_min=9)  # sinfo is not here, or says nothing


def test_what_a_node_has_and_what_cannot_be_asked() -> None:
    check_nodes(spec(gpus_per_node=8, slurm=SlurmOptions(cpus_per_task=16)), NODES)
    check_nodes(spec(gpus_per_node=64), "")
    check_nodes(spec(cpu=True), "n1|(null)|64+\n")


def test_a_time_limit_must_hold_its_warning_and_the_warning_the_last_save(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))

    def asked(**slurm: Any) -> JobSpec:
        return JobSpec("demo", str(tmp_path), "slurm", code_dir="/c", slurm=SlurmOptions(**slurm))

    check_time(asked(time_min=3), folder)
    with pytest.raises(UserError, match="--time: 120 s are no longer"):
        check_time(asked(time_min=2), folder)
    check_time(asked(time_min=2, signal_delay_s=60), folder)
    folder.write_json("job.json", {"stop_s": 130.4})
    with pytest.raises(UserError, match=r"took 130 s to save .* give 225"):
        check_time(asked(), folder)
    check_time(asked(signal_delay_s=225), folder)
    folder.write_json("job.json", {"stop_s": 119.0})
    with pytest.raises(UserError, match=r"took 119 s to save .* with 30 s to be queued again"):
        check_time(asked(), folder)
    folder.write_json("job.json", {"stop_s": 90.0})
    check_time(asked(), folder)


def test_a_save_that_did_not_fit_before_the_limit_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the job is left then that could tell how long it took."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder, run = RunFolder(str(tmp_path)), str(tmp_path)
    options = SlurmOptions(signal_delay_s=90)
    record_job(folder, JobSpec("demo", run, "slurm", code_dir="/c", slurm=options), job_id="7", signal_delay_s=90)

    def check(delay_s: int) -> None:
        check_time(JobSpec("demo", run, "slurm", code_dir="/c", slurm=SlurmOptions(signal_delay_s=delay_s)), folder)

    note_asked(run, "SIGTERM")
    check(90)
    note_asked(run, "SIGUSR2")
    with pytest.raises(UserError, match="did not fit into 90 s before the time limit; give 180"):
        check(90)
    check(91)
    decision = tmp_path / "slurm/exits/7.1/decision"
    decision.write_text("143\n")
    with pytest.raises(UserError, match="did not fit"):
        check(90)
    report_exit(run, 0, 75, stop_requested=True)
    check(90)
    report_exit(run, 0, -9, stop_requested=True)
    with pytest.raises(UserError, match="did not fit"):
        check(90)
    decision.write_text("75")
    check(90)
    decision.rename(tmp_path / "slurm/exits/decision")
    with pytest.raises(UserError, match="did not fit"):
        check(90)
    later = tmp_path / "slurm/exits/7.2"
    later.mkdir()
    (later / "decision").write_text("0")
    check(90)
    (later / "decision").unlink()
    record_job(folder, JobSpec("demo", run, "slurm", code_dir="/c", slurm=options), job_id="8", signal_delay_s=90)
    check(90)


def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    program = tmp_path / "bin" / name
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_a_job_to_wait_for_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = (
        'case "$*" in *12*) echo 12 ;; *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;; esac'
    )
    runtime(tmp_path, monkeypatch, "squeue", squeue)
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    options = SlurmOptions(after=("afterok:12", "afterany:99"))
    assert check_cluster(spec(cpu=True, slurm=options)) == [
        "--after 99: SLURM knows no such job (any more), so it is not waited for"
    ]


def test_an_image_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Container("/x.sif", "apptainer")
    monkeypatch.setenv("PATH", str(tmp_path))
    (warning,) = check_container(image)
    assert "nodes must have it" in warning
    runtime(tmp_path, monkeypatch, "apptainer", "echo torch submitit")
    with pytest.raises(UserError, match="its python lacks torch, submitit"):
        check_container(image)
    (tmp_path / "bin/apptainer").write_text("#!/bin/bash\necho FATAL: could not open image >&2; exit 255\n")
    with pytest.raises(UserError, match=r"python does not run in it \(.*could not open image"):
        check_container(image)
    (tmp_path / "bin/apptainer").write_text("#!/bin/bash\n")
    assert check_container(image) == []


def test_pyxis_is_told_by_sruns_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(tmp_path, monkeypatch, "srun", "echo '  --container-image=IMAGE  [pyxis] the image'")
    assert check_container(Container("ubuntu")) == []
    (tmp_path / "bin/srun").write_text("#!/bin/bash\necho '  --nodes=N'\n")
    with pytest.raises(UserError, match="this SLURM has no pyxis; take --container-runtime apptainer"):
        check_container(Container("ubuntu"))


def test_variables_are_given_and_secrets_are_not() -> None:
    assert given_variables(["NCCL_DEBUG=INFO", "X=a=b c"]) == {"NCCL_DEBUG": "INFO", "X": "a=b c"}
    for text, said in (
        ("AWS_SECRET_ACCESS_KEY=hunter2", "export it in the shell"),
        ("HF_TOKEN", "export it in the shell"),
        ("NCCL_DEBUG", "NAME=VALUE"),
        ("1X=2", "NAME=VALUE"),
        ("RANK=0", "set by the launcher"),
        ("SLURM_JOB_ID=1", "set by the launcher"),
        ("X=a\nb", "one line"),
    ):
        with pytest.raises(UserError) as e:
            given_variables([text])
        assert said in str(e.value)
        assert "hunter2" not in str(e.value)
