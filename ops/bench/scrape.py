"""What a real Prometheus takes for a large run: so many simulated ranks, scraped as prometheus.yml says.

    python -m ops.bench.scrape [--ranks 1000] [--processes 4] [--interval-s 15] [--rounds 6]

Each rank is an exporter of ours at an address of its own, with all series that a real rank has (rank 0 the run's too, that of a
long run with everything in it); a few processes hold them all, so their answers are slower than those of ranks that have a
machine each. The rules of ops/prometheus are evaluated meanwhile. Needs Debian's prometheus.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

from ops.prometheus.render import RULES
from trainer import metric_names
from trainer.discovery import Target, Targets, publish
from trainer.exporter import Exporter
from trainer.metric_names import Metric

READY_S = 120.0
GROWS_S = 1.0
PARTS = ("import", "ranks", "data", "model", "restore", "first_batch", "compile", "first_step")
LABELS = {
    "state": metric_names.GOODPUT_STATES, "stage": (*metric_names.STAGES, "total"), "stat": ("min", "mean", "max"),
    "bin": tuple(str(n) for n in range(8)),
    "term": ("loss", "denoising", "lpl", "gate", "lpl_mid", *sorted(metric_names.DETAILS)),
    "part": PARTS, "source": ("table",), "phase": ("low_resolution", "full_resolution", "perceptual"),
    "reason": ("preempted", "crash", "hang"), "operation": ("save", "restore"), "metric": ("psnr_db", "ssim", "lpips"),
    "sink": ("tensorboard", "wandb"), "error": metric_names.FETCH_ERROR_KINDS,
}  # fmt: skip
"""Values that a run may well have."""


def series_of(metric: Metric) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for label in metric.labels:
        found = [(*begun, value) for begun in found for value in LABELS[label]]
    return found


def move(exporter: Exporter, metrics: tuple[Metric, ...], by: float) -> None:
    """As training does: every figure changes."""
    for metric in metrics:
        for labels in series_of(metric):
            series = exporter.of(metric, *labels)
            if metric.kind == "counter":
                series.inc(by)
            elif metric.kind == "histogram":
                series.observe(by)
            elif metric.kind == "gauge":
                series.set(time.time() if "timestamp" in metric.name else by)


def ranks(first: int, count: int, pipe: Connection) -> None:
    """A process with so many ranks: sends their ports, and then changes their figures until told to end."""
    exporters = []
    for rank in range(first, first + count):
        metrics = metric_names.OF_RANK_0 if rank == 0 else metric_names.OF_EVERY_RANK
        exporter = Exporter(metrics)
        exporter.of(metric_names.JOB).info(
            {
                "recipe": "t2i",
                "cluster": "slurm",
                "start": "0",
                "host": f"n{rank // 8}",
                "folder": "s3://bucket/runs/t2i",
                "name": "t2i",
            }
        )
        exporter.of(metric_names.BUILD).info({"version": "0.1.0", "torch": "2.0"})
        move(exporter, tuple(metrics), 0.1)
        exporters.append((exporter, tuple(metrics), exporter.serve("127.0.0.1", 0)))
    pipe.send([port for _, _, port in exporters])
    while not pipe.poll(GROWS_S):
        for exporter, metrics, _ in exporters:
            move(exporter, metrics, 0.1)


class Server:
    """Prometheus in a folder."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        (folder / "discovery").mkdir(exist_ok=True)
        every = f"{round(1000 * interval_s)}ms"
        config = {
            "global": {"scrape_interval": every, "scrape_timeout": f"{round(1000 * min(10, interval_s))}ms",
                       "evaluation_interval": every},
            "rule_files": [str(path) for path in RULES],
            "scrape_configs": [
                {"job_name": "loupe", "sample_limit": 5000,
                 "file_sd_configs": [{"files": [f"{folder}/discovery/*.json"], "refresh_interval": "5s"}]},
            ],
        }  # fmt: skip
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with open(folder / "log.txt", "wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return [(one["metric"], float(one["value"][1])) for one in found["data"]["result"]]

    def figure(self, expression: str) -> float:
        found = self.ask(expression)
        return found[0][1] if found else math.nan

    def memory_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rules_seconds(self) -> float:
        """What the last evaluation of all groups took."""
        with urllib.request.urlopen(f"{self.url}/api/v1/rules", timeout=60) as answer:
            groups = json.load(answer)["data"]["groups"]
        return math.fsum(group["evaluationTime"] for group in groups)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def simulated(stack: ExitStack, number: int, processes: int) -> list[int]:
    """Ports of all ranks."""
    context = multiprocessing.get_context("spawn")
    ports: list[int] = []
    begun = []
    for i in range(processes):
        first, end = number * i // processes, number * (i + 1) // processes
        ours, theirs = context.Pipe()
        process = context.Process(target=ranks, args=(first, end - first, theirs))
        process.start()
        begun.append((process, ours))

        def end_it(process: Any = process, ours: Connection = ours) -> None:
            ours.send("end")
            process.join(30)

        stack.callback(end_it)
    for process, pipe in begun:
        if not pipe.poll(READY_S):
            raise SystemExit(f"no ports from process {process.pid} in {READY_S:.0f} s")
        ports += pipe.recv()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--interval-s", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=6, help="scrapes of each rank, after the first")
    options = parser.parse_args()
    if not shutil.which("prometheus"):
        raise SystemExit("prometheus is not installed: apt install prometheus")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        ports = simulated(stack, options.ranks, options.processes)
        folder = Path(name)
        server = Server(folder, options.interval_s)
        stack.callback(server.stop)
        targets = tuple(Target(f"127.0.0.1:{port}", f"n{rank // 8}", str(rank)) for rank, port in enumerate(ports))
        publish(str(folder / "discovery"), Targets("t2i", "4711", "s3://bucket/runs/t2i", targets, time=time.time()))
        end = time.monotonic() + READY_S + 2 * options.interval_s
        while time.monotonic() < end:
            time.sleep(1)
            try:
                if server.figure("count(up == 1)") == options.ranks:
                    break
            except OSError:
                continue
        else:
            raise SystemExit(f"not all ranks answer: {server.figure('count(up == 1)'):.0f} of {options.ranks}")
        cpu, at = server.cpu_seconds(), time.monotonic()
        time.sleep(options.rounds * options.interval_s)
        window = f"{math.ceil(options.rounds * options.interval_s)}s"
        share = (server.cpu_seconds() - cpu) / (time.monotonic() - at)
        durations = [value for _, value in server.ask(f"avg_over_time(scrape_duration_seconds[{window}])")]
        samples = {labels["rank"]: value for labels, value in server.ask("scrape_samples_scraped")}
        quantiles = statistics.quantiles(durations, n=100, method="inclusive")
        everything = server.figure('count({__name__!=""})')
        up = server.figure(f"avg(avg_over_time(up[{window}]))")
        print(f"ranks {options.ranks}, every {options.interval_s:g} s, {options.rounds} rounds")
        print(f"series: rank 0 {samples['0']:.0f}, another {statistics.median(samples.values()):.0f}, "
              f"all {sum(samples.values()):.0f}; with Prometheus' own and the rules' {everything:.0f}")  # fmt: skip
        print(f"scrape: p50 {1000 * quantiles[49]:.1f} ms, p99 {1000 * quantiles[98]:.1f} ms, "
              f"longest {1000 * max(durations):.1f} ms; answered {up:.2%}")  # fmt: skip
        print(f"all ranks: {sum(durations):.2f} s of scraping each {options.interval_s:g} s, side by side; "
              f"rules {server.rules_seconds():.3f} s")  # fmt: skip
        print(f"Prometheus: {server.memory_bytes() / 2**20:.0f} MiB, {share:.1%} of a core")


if __name__ == "__main__":
    main()
