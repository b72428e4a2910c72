"""The environment of a rank."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from launch.environment import FIRST_PORT, NUM_PORTS, VARIABLES, Place, port_of_job, rank_environment, variables_of
from trainer.config import CODE_ROOT

PLACE = Place(
    rank=3, world_size=4, local_rank=1, local_world_size=2, master_addr="n1", master_port=20_000,
    code_dir=str(CODE_ROOT), work_dir="/run",
)  # fmt: skip


def test_a_data_folder_where_the_job_starts_does_not_hide_ours(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("raise SystemExit('the wrong data')")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").write_text("raise SystemExit('the wrong trainer')")
    code = "import data, trainer.config; print(data.__file__, trainer.config.__file__)"
    for command in (["-c", code], ["-m", "trainer.config_text"]):
        result = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=rank_environment(PLACE),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert str(tmp_path) not in result.stdout


def test_every_variable_has_a_reason_and_one_entry() -> None:
    assert all(len(variable.reason) > 10 for variable in VARIABLES)
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)


def test_the_users_own_value_stands_where_it_is_his_to_choose() -> None:
    inherited = {"OMP_NUM_THREADS": "7", "RANK": "99", "TORCHINDUCTOR_CACHE_DIR": "/scratch"}
    environment = rank_environment(PLACE, inherited)
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/scratch"
    assert environment["RANK"] == "3"
    assert variables_of(replace(PLACE, num_threads=2), inherited)["OMP_NUM_THREADS"] == "2", (
        "the config's word is nearer"
    )


def test_only_cpu_jobs_hide_the_gpus() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in variables_of(PLACE, {})
    assert variables_of(replace(PLACE, use_gpus=False), {})["CUDA_VISIBLE_DEVICES"] == ""


def test_ports_differ_between_jobs_and_between_restarts() -> None:
    ports = [port_of_job(job, 0) for job in range(5000, 5100)] + [port_of_job(5000, 1)]
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in ports)
