"""A start's /metrics: which address each rank answers at, and where Prometheus finds them, until the start ends."""

import os
import platform
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trainer import discovery, metric_names
from trainer.config import BasicAuthConfig, MetricsConfig, RunConfig
from trainer.discovery import Target, Targets
from trainer.errors import UserError, one_line
from trainer.exporter import Exporter
from trainer.metrics_server import Access
from trainer.parallel.world import World
from trainer.run_folder import JOB, RunFolder
from trainer.slurm_environment import slurm_job_id

_PORTS_TRIED = 50
_MAX_PASSWORD_BYTES = 4096
_NODE_VARIABLES = ("LOUPE_NODE", "SLURMD_NODENAME")
"""What the cluster calls this machine: its host name, seen from a pod, is the pod's."""


class Serving:
    """Use from all ranks together; rank 0 tells others of them."""

    def __init__(self, config: RunConfig, folder: RunFolder, world: World, attempt: int, exporter: Exporter) -> None:
        """Answer /metrics, and say where. A collective.

        Raises:
            UserError: the address or port cannot be had.
            OSError: the run folder does not take the targets; object stores' clients raise what they like.
        """
        self._config, self._folder, self._world, self._attempt = config, folder, world, attempt
        self._exporter = exporter
        self._file: discovery.Announcement | None = None
        self._said = ""
        settings = config.metrics
        address = discovery.listen_on(settings.bind_address, os.environ)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        wanted = settings.port + local_rank if settings.port else 0
        port = exporter.serve(address, wanted, access=access_of(settings, os.environ), tries=_PORTS_TRIED)
        here = discovery.address_of(address, port, host=host_here())
        found = world.gather((here, node_here(), wanted if wanted and port != wanted else 0))
        job = self._job() if world.is_main else {}
        about = world.broadcast({"job_id": job_id_of(job, os.environ), **_facts(job)} if world.is_main else {})
        self.targets = Targets(
            run=folder.url.rpartition("/")[2], job_id=about.pop("job_id"), folder=discovery.public(folder.url),
            targets=tuple(Target(where, node, str(rank)) for rank, (where, node, _) in enumerate(found)),
            start=attempt, time=time.time(), scheme="https" if settings.tls else "http",
        )  # fmt: skip
        exporter.of(metric_names.JOB).info(
            {
                "name": config.name,
                "folder": self.targets.folder,
                "start": str(attempt),
                "host": platform.node(),
                **about,
            }
        )
        if world.is_main:
            folder.write_json(discovery.TARGETS, self.targets.as_record())
            print(f"metrics of rank 0 on {self.targets.scheme}://{found[0][0]}/metrics", flush=True)
            for rank, (where, _, taken) in enumerate(found):
                if taken:
                    print(f"WARNING: metrics.port: {taken} is taken, rank {rank} answers at {where}", flush=True)
            self._publish()

    def _job(self) -> dict[str, Any]:
        return self._folder.read_json(JOB) if self._folder.exists(JOB) else {}

    def _publish(self) -> None:
        path = discovery.discovery_dir(self._config.metrics.discovery_dir, os.environ)
        if path is None:
            return

        self._file = discovery.Announcement(path, self.targets, alone=True, on_failure=self._count_failure)

    def _count_failure(self, what: str) -> None:
        self._exporter.of(metric_names.DISCOVERY_FAILURES).inc()
        if what != self._said:  # once a minute it would bury what matters
            self._said = what
            print(f"WARNING: {what}; training goes on", flush=True)

    def withdraw(self) -> None:
        """The start is at its end, on all ways that this process still goes: nobody need ask for its metrics any more."""
        if not self._world.is_main:
            return
        if self._file:
            self._file.withdraw()
        discovery.in_time(self._say_ended)  # where that fails, other records tell, a little later

    def _say_ended(self) -> None:
        """Unless it is a later start's record by now: an earlier one may live on beside it."""
        record = self._folder.read_json(discovery.TARGETS)
        if record.get("attempt") == self._attempt:
            self._folder.write_json(discovery.TARGETS, {**record, "ended": time.time()})


def host_here() -> str:
    """What others reach this machine by. A pod's name means nothing outside of its namespace."""
    name = platform.node()
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        with suppress(OSError):
            return socket.gethostbyname(name)
    return name


def node_here() -> str:
    return next((os.environ[name] for name in _NODE_VARIABLES if os.environ.get(name)), platform.node())


def job_id_of(job: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """SLURM's number, the Kubernetes job's name, or the process that supervises or is the run.

    Args:
        job: `job.json`, empty where there is none.
    """
    if slurm := slurm_job_id(environ):
        return slurm
    if job.get("ended") is None and job.get("cluster") == "kubernetes":
        return str(job.get("job"))
    if job.get("ended") is None and job.get("cluster") == "local":
        return f"{job.get('host')}-{job.get('pid')}"
    return f"{platform.node()}-{os.getpid()}"


def _facts(job: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(job.get(name) or "unknown") for name in ("recipe", "cluster")}


def access_of(config: MetricsConfig, environ: Mapping[str, str]) -> Access:
    """
    Raises:
        UserError: a file or variable that the config names is not there.
    """
    tls = config.tls
    for field, path in (
        (("certificate", tls.certificate), ("key", tls.key), ("client_ca", tls.client_ca)) if tls else ()
    ):
        if path is not None and not os.access(path, os.R_OK):
            raise UserError(f"metrics.tls.{field}: {path} cannot be read on this machine; name a PEM file")
    return Access(
        certificate=tls.certificate if tls else None, key=tls.key if tls else None,
        client_ca=tls.client_ca if tls else None,
        login=f"{config.auth.username}:{_password(config.auth, environ)}".encode() if config.auth else None,
    )  # fmt: skip


def _password(auth: BasicAuthConfig, environ: Mapping[str, str]) -> str:
    if auth.password_variable is not None:
        found, where = environ.get(auth.password_variable, ""), f"password_variable: ${auth.password_variable}"
    else:
        assert auth.password_file is not None
        where = f"password_file: {auth.password_file}"
        try:
            with open(auth.password_file, "rb") as file:
                found = file.read(_MAX_PASSWORD_BYTES).decode().partition("\n")[0].strip("\r")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"metrics.auth.{where} cannot be read ({one_line(e)}); it holds one line") from None
    if not found:
        raise UserError(f"metrics.auth.{where} is empty; without a password leave metrics.auth out")
    return found
