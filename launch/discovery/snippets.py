"""What to put into prometheus.yml so that it finds runs. No torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from trainer.discovery import SCRAPE_JOB, Targets

KINDS = ("file", "http", "static", "kubernetes")
INTERVAL = "15s"
_POD = "__meta_kubernetes_pod"
POD_INDEX = (f"{_POD}_annotation_batch_kubernetes_io_job_completion_index", f"{_POD}_annotation_loupe_pod_index")
"""Which of the job's pods: an Indexed Job says it, as JobSet's are, and of Volcano's we do."""


def pod_monitor_endpoints(*, nodes: int, ranks_per_pod: int, port_names: Sequence[str]) -> list[dict[str, Any]]:
    """A PodMonitor's `podMetricsEndpoints`, one for each port of a pod, with the labels of all other kinds of discovery."""
    facts = [
        {"sourceLabels": [f"{_POD}_annotation_loupe_run"], "targetLabel": "run"},
        {"sourceLabels": [f"{_POD}_label_app_kubernetes_io_instance"], "targetLabel": "job_id"},
        {"sourceLabels": [f"{_POD}_node_name"], "targetLabel": "node"},
    ]
    found = []
    for local_rank, name in enumerate(port_names):
        rank = {"sourceLabels": list(POD_INDEX), "separator": "", "targetLabel": "rank"}
        if ranks_per_pod == 1:
            rules = [{**rank, "regex": r"(\d+)", "replacement": "$1"}]
        else:  # relabelling cannot multiply
            rules = [
                {**rank, "regex": str(pod), "replacement": str(pod * ranks_per_pod + local_rank)}
                for pod in range(nodes)
            ]
        found.append({"port": name, "path": "/metrics", "interval": INTERVAL, "relabelings": [*facts, *rules]})
    return found


def snippet(kind: str, *, discovery_dir: str = "", url: str = "", targets: Sequence[Targets] = ()) -> str:
    """`scrape_configs` with one job, as YAML.

    Args:
        discovery_dir: of kind `file`, the folder.
        url: of kind `http`, what `loupe discovery serve` answers at.
        targets: of kind `static`.
    """
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "file": lambda: {"file_sd_configs": [{"files": [f"{discovery_dir}/*.json"], "refresh_interval": INTERVAL}]},
        "http": lambda: {"http_sd_configs": [{"url": url, "refresh_interval": "30s"}]},
        "static": lambda: {"static_configs": [_plain(group) for one in targets for group in one.groups()]},
        "kubernetes": _kubernetes,
    }
    job = {"job_name": SCRAPE_JOB, "scrape_interval": INTERVAL, **jobs[kind]()}
    return str(yaml.safe_dump({"scrape_configs": [job]}, sort_keys=False, width=120))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only relabelling sees."""
    labels = {name: value for name, value in group["labels"].items() if not name.startswith("__meta_")}
    return {"targets": group["targets"], "labels": labels}


def _kubernetes() -> dict[str, Any]:
    """Every port of a pod is a target of its own, so all ranks are found, whatever their number."""
    port = f"{_POD}_container_port_name"
    number = {"source_labels": [*POD_INDEX, f"{_POD}_annotation_loupe_ranks_per_pod", port], "target_label": "rank"}
    return {
        "kubernetes_sd_configs": [{"role": "pod"}],
        "relabel_configs": [
            {"source_labels": [f"{_POD}_label_app_kubernetes_io_name"], "regex": "loupe", "action": "keep"},
            {"source_labels": [port], "regex": r"metrics(-\d+)?", "action": "keep"},
            {"source_labels": [f"{_POD}_phase"], "regex": "Running", "action": "keep"},
            {"source_labels": [f"{_POD}_annotation_loupe_run"], "target_label": "run"},
            {"source_labels": [f"{_POD}_label_app_kubernetes_io_instance"], "target_label": "job_id"},
            {"source_labels": [f"{_POD}_node_name"], "target_label": "node"},
            # relabelling cannot multiply: of pods with several ranks it is POD.RANK-IN-POD
            {**number, "regex": r"(\d*);(\d*);1;metrics", "replacement": "$1$2"},
            {**number, "regex": r"(\d*);(\d*);(?:[02-9]|\d{2,});metrics", "replacement": "$1$2.0"},
            {**number, "regex": r"(\d*);(\d*);\d+;metrics-(\d+)", "replacement": "$1$2.$3"},
        ],
    }
