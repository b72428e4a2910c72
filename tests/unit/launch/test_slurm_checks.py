"""What is refused before a job is queued, from what SLURM's commands say."""

from pathlib import Path
from typing import Any

import pytest

from launch.environment import given_variables
from launch.job import JobSpec
from launch.slurm_job.checks import check_cluster, check_container, check_nodes, check_time, gpus_in
from launch.slurm_job.options import Container, SlurmOptions
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
    ],
)
def test_more_than_a_node_has(asked: JobSpec, listing: str, said: str) -> None:
    with pytest.raises(UserError) as e:
        check_nodes(asked, listing)
    assert said in str(e.value)


def test_what_a_node_has_and_what_cannot_be_asked() -> None:
    check_nodes(spec(gpus_per_node=8, slurm=SlurmOptions(cpus_per_task=16)), NODES)
    check_nodes(spec(gpus_per_node=64), "")
    check_nodes(spec(cpu=True), "n1|(null)|64+\n")


def test_a_time_limit_must_hold_its_warning_and_the_warning_the_last_save(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    check_time(SlurmOptions(time_min=3), folder)
    with pytest.raises(UserError, match="--time: 120 s are no longer"):
        check_time(SlurmOptions(time_min=2), folder)
    check_time(SlurmOptions(time_min=2, signal_delay_s=60), folder)
    folder.write_json("job.json", {"stop_s": 130.4})
    with pytest.raises(UserError, match=r"took 130 s to save .* give 225"):
        check_time(SlurmOptions(), folder)
    check_time(SlurmOptions(signal_delay_s=225), folder)


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
