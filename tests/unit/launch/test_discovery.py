"""Which runs are live, the server that tells Prometheus, scrape configs, what is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import cli
from launch.discovery import live
from launch.discovery.live import Away, LiveRuns, live_targets
from launch.discovery.snippets import pod_monitor_endpoints, snippet
from launch.job import update_job
from launch.local import Supervisor
from tests.run_folders import make_run
from tests.unit.launch.test_local import Run, run
from trainer import discovery
from trainer.config import CODE_ROOT
from trainer.discovery import TARGETS, Target, Targets, files_in, publish
from trainer.errors import UserError
from trainer.run_folder import RunFolder

__all__ = ["run"]


def write_targets(folder: RunFolder, *addresses: str, start: int = 0, at: float | None = None, **more: Any) -> None:
    found = tuple(Target(address, "n1", str(rank)) for rank, address in enumerate(addresses or ("n1:9400",)))
    at = time.time() if at is None else at
    targets = Targets(os.path.basename(folder.url), "17", folder.url, found, start=start, time=at)
    folder.write_json(TARGETS, {**targets.as_record(), **more})


def names(runs: LiveRuns) -> list[str]:
    return [targets.run for targets in runs.look().runs]


# -------------------------------------------------------------------------------------------------------- which are live


def test_a_run_is_live_from_its_targets_to_the_end_of_its_start(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"))
    update_job(folder, submitted_at=time.time() - 60)
    assert live_targets(folder) is Away.WAITS, "its ranks do not answer yet"
    write_targets(folder, "n1:9400", "n2:9400")
    found = live_targets(folder)
    assert isinstance(found, Targets)
    assert [group["labels"]["rank"] for group in found.groups()] == ["0", "1"]
    write_targets(folder, ended=time.time())
    assert live_targets(folder) is Away.WAITS, "preempted, it waits for its next start"
    update_job(folder, submitted_at=time.time() - 3 * live.WAITS_S)
    write_targets(folder, at=time.time() - 2 * live.WAITS_S, ended=time.time() - live.WAITS_S)
    assert live_targets(folder) is Away.ENDED, "nobody waits that long"
    write_targets(folder)
    update_job(folder, restarts=[{"reason": "crash", "time": time.time() + 1}])
    assert live_targets(folder) is Away.WAITS, "the start that they are of has been killed"
    write_targets(folder, start=1, at=time.time() + 2)
    assert isinstance(live_targets(folder), Targets)
    update_job(folder, ended={"code": 93, "why": "bad data", "time": 1.0})
    assert live_targets(folder) is Away.ENDED
    update_job(folder, ended=None)
    folder.write_json("summary.json", {})
    assert live_targets(folder) is Away.ENDED


def test_one_that_was_lost_is_live_no_longer_than_its_last_sign(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"))
    write_targets(folder, at=time.time() - 7200)
    metrics = tmp_path / "r/metrics/0000.jsonl"
    os.utime(metrics, (time.time() - 60,) * 2)
    assert isinstance(live_targets(folder), Targets), "its metrics grow"
    os.utime(metrics, (time.time() - 3700,) * 2)
    assert live_targets(folder) is Away.ENDED
    assert isinstance(live_targets(folder, fresh_s=4000), Targets)


def test_looks_count_what_cannot_be_read_and_keep_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "sweep/c"):
        write_targets(make_run(str(tmp_path / name)))
    (tmp_path / "nothing").mkdir()
    make_run(str(tmp_path / "bad")).write_text(TARGETS, '{"targets": ["http://169.254.169.254/latest?x"]}')
    runs = LiveRuns([str(tmp_path)])
    first = runs.look()
    assert [targets.run for targets in first.runs] == ["a", "b", "c"]
    assert len(first.skipped) == 1
    assert first.skipped[0].startswith(f"{tmp_path}/bad: {TARGETS}: ")
    (tmp_path / "a" / TARGETS).write_text("{")
    (tmp_path / "b" / "summary.json").write_text("{}")
    assert names(runs) == ["a", "c"], "damaged for a moment, and ended"
    asked: list[str] = []
    before = live.live_targets

    def noting(folder: RunFolder, *, fresh_s: float) -> Targets | Away:
        asked.append(os.path.basename(folder.url))
        return before(folder, fresh_s=fresh_s)

    monkeypatch.setattr(live, "live_targets", noting)
    for _ in range(live.ENDED_EVERY - 2):
        runs.look()
    assert "b" not in asked, "it has ended"
    runs.look()
    assert asked.count("b") == 1, "it might have begun again"
    with pytest.raises(UserError, match="no such folder"):
        LiveRuns([f"{tmp_path}/none"]).look()


# ------------------------------------------------------------------------------------------------------------ the server


def ask(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.headers["Content-Type"], e.read().decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_answers_as_prometheus_wants_it_and_ends_at_a_signal(tmp_path: Path, number: int) -> None:
    folder = make_run(str(tmp_path / "runs/r"))
    write_targets(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "discovery", "serve", "--root", f"{tmp_path}/runs", "--port", "0", "--every", "1"],
        stdout=subprocess.PIPE, text=True, cwd=CODE_ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"targets of {tmp_path}/runs on http://127.0.0.1:")
        url = line.split(" on ")[1].strip()
        _until(lambda: ask(url)[0] == 200)
        status, kind, text = ask(url)
        assert (status, kind) == (200, "application/json")
        (group,) = json.loads(text)
        assert group["targets"] == ["n1:9400"]
        assert {k: v for k, v in group["labels"].items() if k[0] != "_"} == {
            "run": "r", "job_id": "17", "node": "n1", "rank": "0"
        }  # fmt: skip
        server = url.removesuffix("/targets")
        assert "1 live runs with 1 targets" in ask(f"{server}/-/healthy")[2]
        assert ask(f"{server}/etc/passwd")[0] == 404
        folder.write_json("summary.json", {})
        _until(lambda: ask(url)[2] == "[]")
    finally:
        process.send_signal(number)
        assert process.wait(timeout=120) == 0


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_before_the_first_look_it_does_not_say_that_there_are_none() -> None:
    from launch.discovery.server import DiscoveryServer, Looker

    looks: list[int] = []

    def look() -> live.Found:
        looks.append(len(looks))
        raise OSError("storage is away")

    said: list[str] = []
    with (
        DiscoveryServer(looker := Looker(look, every_s=0.05, say=said.append), address="127.0.0.1", port=0) as server,
        looker,
    ):
        _until(lambda: len(looks) >= 3)
        assert ask(f"http://127.0.0.1:{server.port}/targets")[0] == 503
        status, _, text = ask(f"http://127.0.0.1:{server.port}/-/healthy")
        assert (status, text) == (503, "last look failed: storage is away\n")
        assert said == ["storage is away"], "once"
        with pytest.raises(UserError, match=f"--port {server.port}: cannot listen"):
            DiscoveryServer(looker, address="127.0.0.1", port=server.port)


def test_a_root_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["discovery", "serve", "--root", f"{tmp_path}/none"])
    assert isinstance(result.exception, UserError)
    assert f"{tmp_path}/none: no such folder" in str(result.exception)


# --------------------------------------------------------------------------------------------------------------- configs


def test_show_prints_a_config_of_each_kind(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"))
    write_targets(folder, "n1:9400", "n2:9401")
    out = (
        CliRunner()
        .invoke(cli, ["discovery", "show", str(tmp_path / "r"), "--discovery-dir", "/shared/d"], catch_exceptions=False)
        .stdout
    )
    configs = list(yaml.safe_load_all(out))
    jobs = [job for config in configs for job in config["scrape_configs"]]
    assert [job["job_name"] for job in jobs] == ["loupe"] * 4
    assert jobs[0]["file_sd_configs"][0]["files"] == ["/shared/d/*.json"]
    assert jobs[1]["http_sd_configs"][0]["url"] == "http://127.0.0.1:9901/targets"
    assert jobs[2]["static_configs"][1] == {
        "targets": ["n2:9401"], "labels": {"run": "r", "job_id": "17", "node": "n1", "rank": "1"}
    }  # fmt: skip
    alone = CliRunner().invoke(
        cli, ["discovery", "show", str(tmp_path / "r"), "--kind", "static"], catch_exceptions=False
    )
    assert yaml.safe_load(alone.stdout) == configs[2]
    for words, message in (
        (["--kind", "static"], "RUN: needed"),
        (["--kind", "file"], "--discovery-dir: name the folder"),
        ([str(tmp_path / "none")], "no run there"),
    ):
        result = CliRunner().invoke(cli, ["discovery", "show", *words], env={discovery.DIR_VARIABLE: ""})
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)


def relabelled(rules: list[dict[str, Any]], meta: dict[str, str]) -> dict[str, str]:
    """What Prometheus' relabelling makes of a target: the actions replace and keep."""
    labels = dict(meta)
    for rule in rules:
        rule = {_snake(name): value for name, value in rule.items()}
        value = rule.get("separator", ";").join(labels.get(name, "") for name in rule["source_labels"])
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        if rule.get("action") == "keep":
            assert match, f"{value} is dropped by {rule}"
        elif match:
            parts = re.split(r"\$(\d)", rule.get("replacement", "$1"))  # text, number, text, number, ...
            labels[rule["target_label"]] = "".join(
                (match[int(part)] or "") if i % 2 else part for i, part in enumerate(parts)
            )
    return {name: value for name, value in labels.items() if not name.startswith("__")}


def _snake(name: str) -> str:
    return {"sourceLabels": "source_labels", "targetLabel": "target_label"}.get(name, name)


POD = "__meta_kubernetes_pod"


def pod(index: int, port: str, ranks: int, *, volcano: bool = False) -> dict[str, str]:
    number = "loupe_pod_index" if volcano else "batch_kubernetes_io_job_completion_index"
    return {
        f"{POD}_annotation_loupe_run": "demo", f"{POD}_annotation_loupe_ranks_per_pod": str(ranks),
        f"{POD}_annotation_{number}": str(index), f"{POD}_label_app_kubernetes_io_name": "loupe",
        f"{POD}_label_app_kubernetes_io_instance": "demo-2", f"{POD}_node_name": "gpu-7", f"{POD}_phase": "Running",
        f"{POD}_container_port_name": port,
    }  # fmt: skip


@pytest.mark.parametrize("volcano", [False, True])
def test_pods_get_the_labels_of_all_other_targets(volcano: bool) -> None:
    about = {"run": "demo", "job_id": "demo-2", "node": "gpu-7"}
    one, *_ = pod_monitor_endpoints(nodes=12, ranks_per_pod=1, port_names=["metrics"])
    assert relabelled(one["relabelings"], pod(11, "metrics", 1, volcano=volcano)) == {**about, "rank": "11"}
    eight = pod_monitor_endpoints(
        nodes=12, ranks_per_pod=8, port_names=["metrics", *(f"metrics-{i}" for i in range(1, 8))]
    )
    ranks = [
        relabelled(endpoint["relabelings"], pod(index, endpoint["port"], 8, volcano=volcano))["rank"]
        for index in range(12)
        for endpoint in eight
    ]
    assert ranks == [str(rank) for rank in range(96)]
    (job,) = yaml.safe_load(snippet("kubernetes"))["scrape_configs"]
    rules = job["relabel_configs"]
    assert relabelled(rules, pod(11, "metrics", 1, volcano=volcano)) == {**about, "rank": "11"}
    assert relabelled(rules, pod(3, "metrics", 8, volcano=volcano))["rank"] == "3.0"
    assert relabelled(rules, pod(3, "metrics-5", 8, volcano=volcano))["rank"] == "3.5"
    assert relabelled(rules, pod(3, "metrics", 12, volcano=volcano))["rank"] == "3.0"


@pytest.mark.parametrize("kind", ["jobset", "volcano"])
def test_manifests_have_what_the_rules_look_at(kind: str) -> None:
    words = ["demo", "--image", "i", "--run-dir", "s3://bucket/runs/my run", "--cpu", "--nodes", "2", "--gpus-per-node", "4",
             "--metrics", "podmonitor", "--skip-storage-check", "--render", kind]  # fmt: skip
    result = CliRunner().invoke(cli, ["k8s", *words], catch_exceptions=False)
    objects = {tree["kind"]: tree for tree in yaml.safe_load_all(result.stdout)}
    monitor = objects["PodMonitor"]["spec"]
    if kind == "jobset":
        template = objects["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        template["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] = "1"  # as the controller does
    else:
        template = objects["Job"]["spec"]["tasks"][1]["template"]
    meta = {f"{POD}_node_name": "gpu-7"}
    for of in ("annotation", "label"):
        for name, value in template["metadata"][f"{of}s"].items():
            meta[f"{POD}_{of}_{re.sub('[^a-zA-Z0-9_]', '_', name)}"] = value
    ports = [port["name"] for port in template["spec"]["containers"][0]["ports"]]
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ports
    found = [relabelled(endpoint["relabelings"], meta) for endpoint in monitor["podMetricsEndpoints"]]
    assert [labels["rank"] for labels in found] == ["4", "5", "6", "7"]
    assert found[0] == {"run": "my run", "job_id": "demo", "node": "gpu-7", "rank": "4"}
    assert monitor["jobLabel"] in template["metadata"]["labels"]
    assert template["metadata"]["labels"][monitor["jobLabel"]] == discovery.SCRAPE_JOB


def test_pods_of_a_data_stage_are_found_where_they_answer() -> None:
    from launch.pods.stage_job import StageJob, job_manifest

    job = StageJob("image", 3, metrics_port=9410, output="captions")
    template = yaml.safe_load(job_manifest(["loupe"], name="loupe-recaption", job=job))["spec"]["template"]
    (port,) = template["spec"]["containers"][0]["ports"]
    assert (port["name"], port["containerPort"]) == ("metrics", 9410)
    assert template["metadata"]["annotations"]["loupe/run"] == "captions"
    silent = yaml.safe_load(job_manifest(["loupe"], name="x", job=StageJob("image", 3)))["spec"]["template"]
    assert "metadata" not in silent
    assert "ports" not in silent["spec"]["containers"][0]


# --------------------------------------------------------------------------------------------------- what is left behind


def test_prune_removes_what_nobody_renews(tmp_path: Path) -> None:
    path = str(tmp_path)
    ranks = (Target("n1:1", "n1", "0"),)
    dead, living = (publish(path, Targets(name, "1", f"/runs/{name}", ranks)) for name in ("dead", "living"))
    os.utime(dead, (0, 0))
    other = tmp_path / "other-0123abcd.json"
    other.write_text('{"not": "ours"}')
    os.utime(other, (0, 0))
    nodes = tmp_path / "node-exporters-deadbeef.json"
    nodes.write_text('[{"targets": ["n1:9100"], "labels": {"job": "node"}}]')
    os.utime(nodes, (0, 0))
    words = ["discovery", "prune", "--discovery-dir", path]
    rehearsed = CliRunner().invoke(cli, [*words, "--dry-run"], catch_exceptions=False)
    assert "would remove dead-1-" in rehearsed.stdout
    assert os.path.exists(dead)
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert f"{path}: 1 removed, 3 kept" in done.stdout
    assert "kept other-0123abcd.json: other-0123abcd.json: not a file of targets" in done.output
    assert "kept node-exporters-deadbeef.json: another program's" in done.output
    assert sorted(files_in(path)) == sorted([living, str(other), str(nodes)])


@pytest.mark.usefixtures("run")
def test_the_supervisor_takes_back_what_a_killed_rank_could_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "discovery"
    monkeypatch.setenv(discovery.DIR_VARIABLE, str(path))
    mine = Targets(tmp_path.name, "1", str(tmp_path), (Target("127.0.0.1:1", "n1", "0"),))
    theirs = publish(str(path), Targets("other", "1", "/runs/other", mine.targets))
    seen: list[int] = []
    attempt = Supervisor._attempt

    def attempted(self: Supervisor, number: int) -> Any:
        publish(str(path), mine)  # as rank 0 does
        seen.append(len(list(files_in(str(path)))))
        result = attempt(self, number)
        seen.append(len(list(files_in(str(path)))))
        return result

    monkeypatch.setattr(Supervisor, "_attempt", attempted)
    code, _ = run("--script", "0:3:0:kill")
    assert code == 0
    assert seen == [2, 1, 2, 1], "at each end, before the next start"
    assert list(files_in(str(path))) == [theirs]
