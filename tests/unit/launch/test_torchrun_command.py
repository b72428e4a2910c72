"""torchrun's command line, as torch's own parser takes it: which signals it passes on, how long it lets ranks save, where
they meet."""

from pathlib import Path
from typing import Any

import pytest
import submitit
from torch.distributed.run import config_from_args, get_args_parser

from launch.environment import port_of_job
from launch.slurm_job import torchrun
from launch.slurm_job.torchrun import TorchrunTask, torchrun_command


def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, job_id: str, restart: int, node: int = 0) -> Any:
    slurm = {
        "SLURM_JOB_ID": job_id, "SLURM_RESTART_COUNT": str(restart), "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SUBMITIT_EXECUTOR": "slurm",
    }  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    task = TorchrunTask(str(tmp_path), str(tmp_path), f"{tmp_path}/code", 4, True, 0)
    command = torchrun_command(task, submitit.JobEnvironment(), "127.0.0.1")
    assert command[1:3] == ["-m", "torch.distributed.run"]
    return get_args_parser().parse_args(command[3:])


def test_the_agent_outlives_slurms_warning_and_waits_for_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(tmp_path, monkeypatch, job_id="12", restart=0)
    config, _, _ = config_from_args(arguments)
    assert {"SIGTERM", "SIGUSR2"} <= set(config.signals_to_handle.split(",")), (
        "of others it dies and orphans its workers"
    )
    assert (config.shutdown_timeout or 0) >= 600, "30 s by default, then it kills ranks that save"
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 4, 0)


def test_nodes_of_a_start_meet_at_a_port_and_a_name_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = [("12", 0), ("12", 1), ("13", 0)]
    places = set()
    for job_id, restart in starts:
        ends = [parsed(tmp_path, monkeypatch, job_id=job_id, restart=restart, node=node) for node in (0, 1)]
        places.add((ends[0].rdzv_endpoint, ends[0].rdzv_id))
        assert ends[0].rdzv_endpoint == ends[1].rdzv_endpoint == f"127.0.0.1:{port_of_job(int(job_id), restart)}"
        assert ends[0].rdzv_id == ends[1].rdzv_id
        assert [end.rdzv_conf for end in ends] == ["is_host=1", "is_host=0"]
    assert len(places) == len(starts)
    assert not any(":29500" in endpoint for endpoint, _ in places)


@pytest.mark.parametrize(
    ("code", "ends_with", "stays"), [(1, 1, True), (-9, 137, True), (93, 93, False), (75, 0, False)]
)
def test_a_worker_whose_rank_has_crashed_stays_for_a_while(
    monkeypatch: pytest.MonkeyPatch, code: int, ends_with: int, stays: bool
) -> None:
    """At its end torchrun would end the other ranks, by the signal of a preemption."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    slept: list[float] = []
    monkeypatch.setattr(torchrun, "die_with_parent", lambda parent: lambda: None)
    monkeypatch.setattr(torchrun, "SignalRelay", lambda: None)
    monkeypatch.setattr(torchrun, "run_rank", lambda *_: code)
    monkeypatch.setattr(torchrun.submitit, "JobEnvironment", lambda: None)
    monkeypatch.setattr(torchrun.time, "sleep", slept.append)
    assert torchrun.main(["/r", "/r", "/c", "1", "0", "1"]) == ends_with
    assert slept == ([torchrun.CRASH_GRACE_S] if stays else [])
