"""The check of a machine before a job's ranks start there, and which nodes a job goes on without. No torch.

It takes seconds, talks to no other node, and only what is certain ends a start: a broken or missing GPU, a disk that is full
or not there. Storage that does not answer is left to the trainer, which tries longer.
"""

import dataclasses
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.checks import (
    Check,
    Finding,
    cores,
    memory,
    packages,
    ports,
    run_checks,
    shared_memory,
    temporary_files,
)
from launch.doctor.device import devices, hardware_errors
from launch.doctor.storage import cache_disk, dataset, networks, run_folder, run_folder_disk
from trainer.config import CODE_ROOT, RunConfig, replace
from trainer.config_text import from_yaml
from trainer.discovery import listen_on
from trainer.errors import ExitCode
from trainer.run_folder import CONFIG, RunFolder

FOLDER = "doctor"
"""In the work folder: a record for each node and start."""
RECORD_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
QUICK_DEVICE_S, DEVICE_S = 120.0, 300.0
"""Mostly for the import of torch from a disk that many nodes read at a time."""
QUICK_STORAGE_S, STORAGE_S = 20.0, 120.0
HOST_S = 20.0
QUICK_BYTES, STORAGE_BYTES = 1 << 20, 64 << 20
_SLOW_DISK = "its disk hangs"


def checks_for(
    config: RunConfig | None, run_dir: str | None, *, work_dir: str | None, ranks: int, cpu: bool, quick: bool,
    devices_too: bool = True, wanted_ports: Mapping[str, tuple[str, int]] | None = None,
) -> list[Check]:  # fmt: skip
    """What applies, in the order in which it is shown.

    Args:
        config: without one, nothing that a run reads.
        run_dir: without one, no storage is written to.
        work_dir: local folder of logs and caches, the run folder where that is local.
        devices_too: start a process a device.
    """
    storage_s, device_s = (QUICK_STORAGE_S, QUICK_DEVICE_S) if quick else (STORAGE_S, DEVICE_S)

    def test_devices() -> list[Finding]:
        return devices(ranks, cpu=cpu, quick=quick, deadline_s=device_s)

    checks = [
        Check("packages", lambda: packages(CODE_ROOT / "constraints.txt"), HOST_S),
        Check("cores", lambda: cores(ranks), HOST_S),
        Check("memory", lambda: memory(ranks), HOST_S),
        Check("shared memory", shared_memory, HOST_S),
        Check("temporary files", temporary_files, HOST_S, "node", _SLOW_DISK),
    ]
    if not cpu:
        checks.append(Check("GPU errors", hardware_errors, 2 * HOST_S + 10, "node"))
    if devices_too:
        # the processes have that deadline, and can be named then; ours is later
        checks.append(Check("CPUs" if cpu else "GPUs", test_devices, device_s + 10, "node"))
    if work_dir:
        checks.append(Check("disk of the run", lambda: run_folder_disk(work_dir), HOST_S, mend=_SLOW_DISK))
    if run_dir:
        size = QUICK_BYTES if quick else STORAGE_BYTES
        checks.append(
            Check("run folder", lambda: run_folder(run_dir, num_bytes=size, deadline_s=storage_s), storage_s + 5)
        )
    if config:
        checks.append(Check("disk of the cache", lambda: cache_disk(config), HOST_S, "node", _SLOW_DISK))
        for name, source in config.data.datasets.items():
            checks.append(Check(f"dataset {name}", lambda name=name, source=source: dataset(  # type: ignore[misc]
                name, source, deadline_s=storage_s), storage_s + 5))  # fmt: skip
        checks.append(Check("frozen networks", lambda: networks(config, deadline_s=storage_s), storage_s + 5))
        wanted = dict(wanted_ports or {})
        if config.metrics.port:
            address = listen_on(config.metrics.bind_address, os.environ)
            wanted |= {f"metrics of rank {i} here": (address, config.metrics.port + i) for i in range(ranks)}
        if wanted:
            checks.append(Check("ports", lambda: ports(wanted), HOST_S))
    return checks


# -------------------------------------------------------------------------------------------------------- in the job


@dataclass(frozen=True)
class Verdict:
    code: ExitCode | None
    """With which the job's start ends here; None: go on."""
    why: str
    findings: list[Finding]

    def lines(self) -> list[str]:
        """What is worth a line in a log."""
        return [f"{f.status}: {f.name}: {f.figure}{f' ({f.mend})' if f.mend else ''}"
                for f in self.findings if f.status in ("warning", "failed")]  # fmt: skip


def judge(findings: list[Finding], node: str) -> Verdict:
    """A broken node is left out; what the run itself asks for wrongly stops it; what may pass is left to the trainer."""
    for blame, code in (("node", ExitCode.BAD_NODE), ("run", ExitCode.STOP)):
        guilty = [f for f in findings if f.status == "failed" and f.blame == blame]
        if guilty:
            why = "; ".join(f"{f.name}: {f.figure}{f' ({f.mend})' if f.mend else ''}" for f in guilty)
            return Verdict(code, f"{node} is not fit to start on: {why}" if blame == "node" else why, findings)
    return Verdict(None, "", findings)


def preflight(
    run_dir: str, work_dir: str, *, attempt: str, node: str, ranks: int, cpu: bool,
    wanted_ports: Mapping[str, tuple[str, int]] | None = None, config: RunConfig | None = None,
    records: RunFolder | None = None,
) -> Verdict:  # fmt: skip
    """Check this machine for `ranks` ranks of the run; the record goes to `doctor/ATTEMPT-NODE.json` in the work folder.

    Args:
        attempt: names the start among all of the run.
        config: of the run; absent: from the work folder.
        records: where the record goes instead.
    """
    began = time.time()
    if config is None:
        config = from_yaml(Path(work_dir, CONFIG).read_text(), source=f"{work_dir}/{CONFIG}")
    config = replace(config, init_from=None)  # gone by now, maybe, and not read by a run that goes on
    findings = run_checks(checks_for(
        config, run_dir, work_dir=work_dir, ranks=ranks, cpu=cpu, quick=True, devices_too=not cpu, wanted_ports=wanted_ports,
    ))  # fmt: skip
    verdict = judge(findings, node)
    record = {
        "node": node, "host": platform.node(), "time": began, "seconds": time.time() - began,
        "code": verdict.code, "why": verdict.why, "findings": [dataclasses.asdict(f) for f in findings],
    }  # fmt: skip
    name = f"{attempt}-{node}"
    assert RECORD_NAME.fullmatch(name), name
    try:
        (records or RunFolder(work_dir)).write_json(f"{FOLDER}/{name}.json", record)
    except OSError as e:  # a full disk, of which the findings tell
        print(f"warning: {FOLDER}/{name}.json: cannot be written ({e})", flush=True)
    return verdict


# --------------------------------------------------------------------------------------------------- nodes to leave out


def bad_nodes(work_dir: str, attempt: str) -> dict[str, str]:
    """Nodes whose check failed in this start, and why."""
    folder = RunFolder(work_dir)
    found = {}
    for name in folder.names(FOLDER):
        if name.startswith(f"{attempt}-"):
            record = folder.read_json(f"{FOLDER}/{name}")
            if record.get("code") == ExitCode.BAD_NODE:
                found[str(record["node"])] = str(record["why"])
    return found


def may_leave_out(nodes: int) -> int:
    """Nodes that a job of so many goes on without by itself; more of them point at something that they share."""
    return max(2, -(-nodes // 10))


def log_check(log: Path, node: str, verdict: Verdict) -> None:
    """Into the rank's log, where one looks for the reason; its last line is what `loupe runs` shows."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"==== {time.strftime('%Y-%m-%d %H:%M:%S %z')} check of {node} before the start", *verdict.lines()]
    if verdict.code is not None:
        lines.append(f"error: {verdict.why}")
    if len(lines) > 1:
        with open(log, "a") as file:
            file.write("\n".join(lines) + "\n")
