"""What a start records of its surroundings; and that no secret is in it."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from launch import snapshot
from trainer import environment_record
from trainer.config import CODE_ROOT
from trainer.environment_record import (
    MAX_HOSTS,
    MAX_VALUE_CHARS,
    Machine,
    code_state,
    hosts,
    machine_of,
    packages,
    start_record,
    variables,
    without_secrets,
)

if TYPE_CHECKING:
    from trainer.parallel.world import World

SECRET = "hunter2-do-not-tell"
ENVIRON = {
    "SLURM_JOB_ID": "123", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_RESTART_COUNT": "2", "JOB_COMPLETION_INDEX": "0", "LOUPE_ATTEMPT": "group.2", "NCCL_DEBUG": "WARN",
    "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "0,1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_TOPO_FILE": "x" * 10_000, "TORCH_EMPTY": "",
    # none of these
    "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ACCESS_KEY_ID": SECRET, "WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "HOME": SECRET,
    "MY_NOTES": SECRET, "NCCL_PASSWORD": SECRET, "TORCH_AUTH_TOKEN": SECRET, "LOUPE_METRICS_PASSWORD": SECRET,
    "TORCHINDUCTOR_REMOTE": f"redis://user:{SECRET}@cache:1234/0", "CUDA_CACHE_PATH": f"https://h/x?sig={SECRET}",
    "SLURM_JOB_NAME": f"https://me:{SECRET}@host/",
}  # fmt: skip


def test_a_record_of_a_start(alone: "World", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["train", "--run-dir", f"s3://key:{SECRET}@bucket/run", f"--password={SECRET}", "--config", "c.yaml"],
    )
    machines = [machine_of(alone.device)] * 2
    record = json.loads(json.dumps(start_record(alone, machines, ENVIRON)))
    assert SECRET not in json.dumps(record)
    assert record["command"] == ["train", "--run-dir", "...", "...", "--config", "c.yaml"]
    # what was there before
    assert {"time", "host", "pid", "world_size", "device", "job_id", "loupe", "torch"} <= set(record)
    assert record["job_id"] == "120_3"
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"]["torch"] == record["torch"] == torch.__version__
    assert record["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert record["devices"] == {machine_of(alone.device).device: 2}
    assert record["hosts"] == [record["host"]]
    assert record["job"]["SLURM_JOB_NODELIST"] == "n[1-4]"
    assert "SLURM_JOB_NAME" not in record["job"]
    assert set(record["settings"]) == {
        "NCCL_DEBUG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_TOPO_FILE",
    }  # fmt: skip
    assert len(json.dumps(record)) < 64 << 10


def test_values_and_hosts_are_bounded() -> None:
    assert len(variables(ENVIRON)["settings"]["NCCL_TOPO_FILE"]) == MAX_VALUE_CHARS
    machines = [Machine(f"n{rank // 8}", "H100" if rank else "A100") for rank in range(8 * (MAX_HOSTS + 5))]
    found = hosts(machines)
    assert (len(found["hosts"]), found["num_hosts"]) == (MAX_HOSTS, MAX_HOSTS + 5)
    assert found["hosts"][:3] == ["n0", "n1", "n2"]
    assert found["devices"] == {"A100": 1, "H100": 8 * (MAX_HOSTS + 5) - 1}


def test_the_state_of_the_code_is_the_snapshots(tmp_path: Path) -> None:
    assert environment_record._SNAPSHOT == snapshot.RECORD
    taken = snapshot.take(tmp_path / "code", root=CODE_ROOT)
    state = code_state(tmp_path / "code")
    assert state is not None
    assert (state["commit"], state["dirty"], state["source"]) == (taken.commit, taken.dirty, taken.source)
    assert state["untracked"] == len(taken.untracked)
    assert code_state(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"untracked": 3}'], ids=range(4))
def test_a_damaged_snapshot_stops_no_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "SNAPSHOT.json").write_text(text)
    assert code_state(tmp_path) in (
        None,
        {"source": None, "commit": None, "dirty": None, "taken_at": None, "untracked": 0},
    )


def test_packages_are_the_locked_ones_or_all(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# locked\nnumpy==1.0\nno-such-package==2 ; extra\n\npytest>=1\n")
    assert packages(tmp_path) == {name: importlib.metadata.version(name) for name in ("numpy", "pytest")}
    everything = packages(tmp_path / "none")
    assert {"numpy", "torch", "pytest"} <= set(everything)


def test_the_driver_says_its_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    for text, expected in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n",
         "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n",
         "580.65.06"),
        ("something else 1.2", None),
    ):  # fmt: skip
        file.write_text(text)
        assert environment_record._driver(str(file)) == expected
    assert environment_record._driver(str(tmp_path / "none")) is None


def test_an_options_value_may_be_the_next_word() -> None:
    words = ["--api-key=x", "--access-key", "x", "--steps", "5", "--password", "x", "--keyword", "y"]
    assert without_secrets(words) == ["...", "...", "...", "--steps", "5", "...", "...", "--keyword", "y"]


def test_command_lines_without_secrets() -> None:
    assert without_secrets(["a", "--token=x", "TOKEN=x", "s3://b/c", "s3://u:p@b/c", "y" * 1000]) == [
        "a", "...", "...", "s3://b/c", "...", "y" * MAX_VALUE_CHARS,
    ]  # fmt: skip
