"""A real Prometheus finds ranks and data stages, by a discovery folder and by `loupe discovery serve`, and loses them again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data.stages.receipts import pass_folder
from launch.discovery.snippets import KINDS, snippet
from tests.prometheus_server import Prometheus, Servers, servers
from tests.run_folders import make_run
from tests.s3_server import s3
from trainer import metric_names
from trainer.config import CODE_ROOT
from trainer.discovery import TARGETS, Announcement, Target, Targets
from trainer.exporter import Exporter
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.ops
__all__ = ["s3", "servers"]
WAIT_S = 60.0


@pytest.fixture
def ranks() -> Iterator[tuple[Target, ...]]:
    """Two that answer."""
    exporters = [Exporter(metric_names.OF_RANK_0), Exporter(metric_names.OF_EVERY_RANK)]
    found = []
    for rank, exporter in enumerate(exporters):
        port = exporter.serve("127.0.0.1", 0)
        exporter.of(metric_names.OWN_RATIO).set(1 + rank)
        found.append(Target(f"127.0.0.1:{port}", f"n{rank}", str(rank)))
    exporters[0].of(metric_names.STEP).set(7)
    exporters[1].of(metric_names.STEP).set(7)
    yield tuple(found)
    for exporter in exporters:
        exporter.close()


def started(servers: Servers, config: str) -> Prometheus:
    """With a config as `loupe discovery show` prints it, but that it looks more often."""
    tree = yaml.safe_load(config.replace("15s", "1s").replace("30s", "1s"))
    return servers.prometheus(tree)


def check_found(prometheus: Prometheus, run: str, job_id: str) -> None:
    prometheus.until(lambda: len(prometheus.query("up == 1")) == 2, "two ranks that answer", WAIT_S)
    found = {series.labels["rank"]: series for series in prometheus.query("loupe_rank_own_ratio")}
    assert {rank: series.value for rank, series in found.items()} == {"0": 1.0, "1": 2.0}
    labels = {k: v for k, v in found["1"].labels.items() if k not in ("__name__", "instance")}
    assert labels == {"job": "loupe", "run": run, "job_id": job_id, "node": "n1", "rank": "1"}
    assert [series.labels["rank"] for series in prometheus.query("loupe_step == 7")] == ["0"], "the run's, once"


def check_gone(prometheus: Prometheus) -> None:
    prometheus.until(lambda: not prometheus.targets(), "targets that are dropped", WAIT_S)
    prometheus.until(lambda: not prometheus.query('{run!=""}'), "series that have ended", WAIT_S)


def test_by_a_discovery_folder(servers: Servers, tmp_path: Path, ranks: tuple[Target, ...]) -> None:
    path = str(tmp_path / "discovery")
    prometheus = started(servers, snippet("file", discovery_dir=path))
    assert prometheus.targets() == []
    targets = Targets("demo", "4711_3", "/runs/demo", ranks, time=time.time())
    announcement = Announcement(path, targets, alone=True, on_failure=pytest.fail)
    check_found(prometheus, "demo", "4711_3")
    announcement.withdraw()
    check_gone(prometheus)


@pytest.mark.slow_ops
def test_by_the_server_for_runs_on_object_storage(
    servers: Servers, s3: str, tmp_path: Path, ranks: tuple[Target, ...]
) -> None:
    folder = make_run(f"{s3}/runs/demo")
    targets = Targets("demo", "17", folder.url, ranks, time=time.time())
    folder.write_json(TARGETS, targets.as_record())
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "discovery", "serve", "--root", f"{s3}/runs", "--port", "0", "--every", "1"],
        stdout=subprocess.PIPE, text=True, cwd=CODE_ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].strip()
        prometheus = started(servers, snippet("http", url=url))
        check_found(prometheus, "demo", "17")
        folder.write_json(TARGETS, {**targets.as_record(), "ended": time.time()})
        check_gone(prometheus)
    finally:
        process.terminate()
        assert process.wait(timeout=120) == 0


@pytest.mark.slow_ops
def test_a_data_stage_tells_how_far_all_of_its_workers_are(servers: Servers, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for i in range(60):
        (tmp_path / f"src/{i % 6}").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"src/{i % 6}/{i}.png")
    (tmp_path / "src/0/broken.png").write_bytes(b"none")
    path = str(tmp_path / "discovery")
    prometheus = started(servers, snippet("file", discovery_dir=path))
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "data", "ingest", f"{tmp_path}/src", f"{tmp_path}/ingested", "--workers", "1",
         "--min-side", "16", "--discovery-dir", path],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=CODE_ROOT,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("metrics on http://127.0.0.1:")
        leases = tmp_path / "ingested" / pass_folder("ingest") / "leases"
        prometheus.until(lambda: leases.is_dir() and os.listdir(leases), "work that has begun")
        worker = next(
            pid for pid in children_of(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
        )
        # held up, as it would be over in a moment
        os.kill(worker, signal.SIGSTOP)
        working = 'loupe_data_stage_items{state="working", pass="ingest"}'
        prometheus.until(lambda: prometheus.query(f"{working} == 1"), "an item in work")
        states = prometheus.query('sum by (pass) (loupe_data_stage_items{pass=~"list|ingest"})')
        assert {series.labels["pass"]: series.value for series in states} == {"list": 1.0, "ingest": 1.0}
        assert prometheus.value('loupe_data_stage_items{state="done", pass="list"}') == 1
        assert prometheus.value("loupe_data_stage_workers") == 1
        (series,) = prometheus.query(working)
        assert series.labels["run"] == "ingested"
        assert series.labels["stage"] == "ingest"
        assert "rank" not in series.labels
        assert not prometheus.query("loupe_last_step_timestamp_seconds"), "nothing of a run that trains"
        os.kill(worker, signal.SIGCONT)
    finally:
        if sys.exc_info()[0]:
            process.kill()
        process.communicate(timeout=120)
    assert process.returncode == 0
    check_gone(prometheus)
    assert os.listdir(path) == []


def children_of(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.parametrize("kind", KINDS)
def test_promtool_takes_what_is_printed(tmp_path: Path, kind: str) -> None:
    targets = [Targets("demo", "1", "/runs/demo", (Target("n1:9400", "n1", "0"),))]
    config = tmp_path / "prometheus.yml"
    text = snippet(kind, discovery_dir=str(tmp_path), url="http://127.0.0.1:9901/targets", targets=targets)
    # Debian builds it without Kubernetes; the relabelling is its own all the same
    config.write_text(text.replace("kubernetes_sd_configs:\n  - role: pod", "static_configs:\n  - targets: [a:1]"))
    result = subprocess.run(
        ["promtool", "check", "config", str(config)], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_run_folder_is_enough_for_a_static_config(
    servers: Servers, tmp_path: Path, ranks: tuple[Target, ...]
) -> None:
    folder = make_run(str(tmp_path / "demo"))
    folder.write_json(TARGETS, Targets("demo", "17", folder.url, ranks, time=time.time()).as_record())
    printed = subprocess.run(
        [sys.executable, "-m", "launch.cli", "discovery", "show", RunFolder(folder.url).url, "--kind", "static"],
        capture_output=True, text=True, check=True, cwd=CODE_ROOT, timeout=240,
    ).stdout  # fmt: skip
    check_found(started(servers, printed), "demo", "17")
