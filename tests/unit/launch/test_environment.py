"""The environment of a rank."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.environment import (
    FIRST_PORT,
    NUM_PORTS,
    VARIABLES,
    Place,
    given_variables,
    port_of_job,
    rank_environment,
    variables_of,
)
from launch.pods.spec import environment as of_pods
from trainer.config import CODE_ROOT
from trainer.errors import UserError

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


@pytest.mark.parametrize(
    "text",
    [
        "AZURE_STORAGE_CONNECTION_STRING=x", "AZURE_STORAGE_ACCOUNT_KEY=x", "AZURE_STORAGE_KEY=x", "DB_PASS=x",
        "SSH_PASSPHRASE=x", "AZURE_STORAGE_SAS=x", "SENTRY_DSN=x", "WANDB_API_KEY=x", "PGPASSWORD=x", "HF_TOKEN=x",
        "HTTPS_PROXY=http://u:p@proxy:3128", "REMOTE=https://ghp_abc@github.com/x", "A=Protocol=https;AccountKey=x",
        "DATA=https://host/blob?sv=2024&sig=x",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_stands_in_no_script(text: str) -> None:
    with pytest.raises(UserError, match="looks like a secret") as e:
        given_variables([text])
    assert text.partition("=")[2] not in str(e.value).replace("export", "")
    with pytest.raises(UserError, match="--secret"):
        of_pods([text])


@pytest.mark.parametrize(
    "text",
    ["NCCL_DEBUG=INFO", "HTTPS_PROXY=http://proxy:3128", "BYPASS_CACHE=1", "COMPASS=n", "SASL_MECHANISM=x", "KEYBOARD=us",
     "MAIL=a@b.c", "URL=http://host/x?signed=no"],
)  # fmt: skip
def test_what_is_no_secret_is_taken(text: str) -> None:
    assert [*given_variables([text]).values(), *of_pods([text]).values()] == [text.partition("=")[2]] * 2


def test_ports_differ_between_jobs_and_between_restarts() -> None:
    ports = [port_of_job(job, 0) for job in range(5000, 5100)] + [port_of_job(5000, 1)]
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in ports)
    of_neighbours = {port_of_job(job, restart) for job in (100, 101, 102) for restart in range(20)}
    assert len(of_neighbours) == 60, "jobs of an array may share a node, and be started again as often as they like"


def test_compiled_kernels_are_kept_with_the_run_for_its_next_start() -> None:
    ours = variables_of(PLACE, {})
    again = variables_of(replace(PLACE, rank=0, local_rank=0, master_addr="n7", master_port=20_001), {})
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(ours[name]).is_relative_to(PLACE.work_dir), (
            "torch's own default is below /tmp, and gone with the node"
        )
        assert ours[name] == again[name]
