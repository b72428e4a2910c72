"""A start tells where its ranks answer, until it ends; a discovery folder that fails costs it a counter and a line."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import tiny
from trainer import metric_names, serving
from trainer.discovery import TARGETS, files_in
from trainer.errors import ExitCode
from trainer.exporter import Exporter
from trainer.preemption import StopRequest
from trainer.run_folder import JOB, RunFolder
from trainer.serving import Serving, job_id_of
from trainer.start_times import StartTimes

if TYPE_CHECKING:
    from trainer.parallel.world import World

SHORT = ("phases.low_resolution.steps=1", "phases.full_resolution.steps=1", "phases.perceptual.steps=1")


def test_a_start_is_told_and_taken_back(alone: "World", tmp_path: Path) -> None:
    folder, exporter = RunFolder(str(tmp_path / "runs/r")), Exporter()
    folder.write_json(
        JOB, {"cluster": "local", "recipe": "demo", "host": "n1", "pid": 7, "ended": None, "restarts": []}
    )
    start = Serving(tiny(f"metrics.discovery_dir={tmp_path}/d"), folder, alone, 4, exporter)
    record = folder.read_json(TARGETS)
    assert (record["run"], record["job_id"], record["attempt"], record["ranks"]) == ("r", "n1-7", 4, ["0"])
    (file,) = files_in(f"{tmp_path}/d")
    (group,) = json.loads(Path(file).read_text())
    assert group["targets"] == record["targets"]
    assert group["labels"]["__meta_loupe_start"] == "4"
    facts = {"name": "demo", "recipe": "demo", "cluster": "local", "start": "4", "folder": folder.url}
    assert facts.items() <= _job(exporter).items()
    start.withdraw()
    assert list(files_in(f"{tmp_path}/d")) == []
    assert folder.read_json(TARGETS)["ended"] == pytest.approx(time.time(), abs=60)


def _job(exporter: Exporter) -> dict[str, str]:
    (family,) = [family for family in exporter.registry.collect() if family.name == "loupe_job"]
    return dict(family.samples[0].labels)


def test_an_earlier_start_does_not_end_a_later_one(alone: "World", tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    earlier = Serving(tiny(f"metrics.discovery_dir={tmp_path}/d"), folder, alone, 0, Exporter())
    later = Serving(tiny(f"metrics.discovery_dir={tmp_path}/d"), folder, alone, 1, Exporter())
    (file,) = files_in(f"{tmp_path}/d")
    earlier.withdraw()
    assert "ended" not in folder.read_json(TARGETS)
    assert os.path.exists(file)
    later.withdraw()


def test_training_goes_on_without_a_discovery_folder(
    alone: "World", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.run import Run
    from trainer.watchdog import Watchdog

    (tmp_path / "file").touch()
    config = tiny(*SHORT, f"metrics.discovery_dir={tmp_path}/file")
    run = Run(config, RunFolder(str(tmp_path / "r")), alone, StopRequest(), Watchdog(None, None), StartTimes())
    assert run.train() is ExitCode.DONE
    assert run.exporter.total(metric_names.DISCOVERY_FAILURES) == 1
    said = capsys.readouterr().out
    assert f"WARNING: Prometheus does not find this by {tmp_path}/file: " in said
    assert "training goes on" in said
    assert "ended" in run.folder.read_json(TARGETS)


@pytest.mark.parametrize(
    ("job", "environ", "expected"),
    [
        ({"cluster": "local", "host": "n1", "pid": 7}, {"SLURM_JOB_ID": "12"}, "12"),
        ({}, {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}, "12_1"),
        ({"cluster": "kubernetes", "job": "demo-2", "ended": None}, {}, "demo-2"),
        ({"cluster": "local", "host": "n1", "pid": 7, "ended": None}, {}, "n1-7"),
        ({"cluster": "local", "host": "n1", "pid": 7, "ended": {"code": 0}}, {}, "here-{pid}"),
        ({}, {}, "here-{pid}"),
    ],
)
def test_what_a_job_is_called(
    monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], environ: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(serving.platform, "node", lambda: "here")
    assert job_id_of(job, environ) == expected.format(pid=os.getpid())


def test_the_cluster_names_nodes_and_a_pod_is_reached_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.platform, "node", lambda: "localhost")
    for name in ("LOUPE_NODE", "SLURMD_NODENAME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert (serving.node_here(), serving.host_here()) == ("localhost", "localhost")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert (serving.node_here(), serving.host_here()) == ("n7", "127.0.0.1")
    monkeypatch.setenv("LOUPE_NODE", "gpu-7")
    assert serving.node_here() == "gpu-7"
