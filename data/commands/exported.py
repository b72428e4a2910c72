"""A stage's metrics while its command works: the options, /metrics, and how Prometheus finds it."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import click

from data.stages.metrics import StageMetrics
from trainer import discovery
from trainer.discovery import Target, Targets
from trainer.metric_names import BUILD, JOB
from trainer.slurm_environment import slurm_job_id
from trainer.urls import public_url

_PORTS_TRIED = 50
"""Jobs of an array may share a node."""


@dataclass(frozen=True)
class MetricsOptions:
    port: int | None
    """None: no metrics, unless there is a discovery folder."""
    bind: str | None
    discovery_dir: str | None

    @property
    def wanted(self) -> bool:
        return self.port is not None or self.discovery_dir is not None


OPTIONS = [
    click.option("--metrics-port", type=click.IntRange(0, 65535), metavar="PORT",
                 help="Answer Prometheus at http://HOST:PORT/metrics while this works, or at the next free port; 0: any."),
    click.option("--metrics-bind", metavar="ADDRESS",
                 help="Address for that; absent: all in a cluster's job, else this machine alone."),
    click.option("--discovery-dir", metavar="DIR", envvar=discovery.DIR_VARIABLE,
                 help="Folder on a disk that Prometheus sees too, to find this by; $LOUPE_DISCOVERY_DIR when absent."),
]  # fmt: skip


@contextmanager
def exported(stage: str, out: str, options: MetricsOptions) -> Iterator[StageMetrics | None]:
    """Answer /metrics; None where nobody wants them.

    Raises:
        UserError: the port cannot be had.
    """
    if not options.wanted:
        yield None
        return
    metrics = StageMetrics(stage)
    exporter = metrics.exporter
    address = discovery.listen_on(options.bind, os.environ)
    port = exporter.serve(address, options.port or 0, tries=_PORTS_TRIED)
    targets = _targets(out, discovery.address_of(address, port, host=platform.node()))
    exporter.of(BUILD).info({"version": version("loupe"), "torch": ""})
    exporter.of(JOB).info({"name": f"data {stage}", "folder": targets.folder, "host": platform.node()})
    click.echo(f"metrics on http://{targets.targets[0].address}/metrics", err=True)
    said: set[str] = set()

    def failed(what: str) -> None:
        if what not in said:
            said.add(what)
            click.echo(f"WARNING: {what}; the work goes on", err=True)

    path = options.discovery_dir and os.path.abspath(options.discovery_dir)
    file = discovery.Announcement(path, targets, alone=False, on_failure=failed) if path else None
    try:
        yield metrics
    finally:
        if file:
            file.withdraw()
        exporter.close()


def _targets(out: str, address: str) -> Targets:
    folder = public_url(out) if "://" in out else os.path.abspath(out)
    job = slurm_job_id(os.environ) or f"{platform.node()}-{os.getpid()}"
    node = os.environ.get("LOUPE_NODE") or os.environ.get("SLURMD_NODENAME") or platform.node()
    run = folder.rstrip("/").rpartition("/")[2]
    return Targets(run=run, job_id=job, folder=folder, targets=(Target(address, node),), time=time.time())


@contextmanager
def ticking(tick: Callable[[], None], *, every_s: float, wanted: bool) -> Iterator[None]:
    """Where the work is done in this very thread, nobody else looks how far it is."""
    if not wanted:
        yield
        return
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            tick()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
        tick()
