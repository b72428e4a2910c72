"""What a start runs on, for attempts/NNNN.json: code, packages, driver, machines, the job. Never secrets: of the environment's
variables only those listed here, and of those none that looks like one."""

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import CODE_ROOT
from trainer.parallel.world import World
from trainer.secret_names import looks_secret
from trainer.slurm_environment import slurm_job_id

MAX_HOSTS = 1024
"""Listed; of more, only how many."""
MAX_VALUE_CHARS = 500
MAX_PACKAGES = 500
_MAX_FILE_BYTES = 1 << 20
_SNAPSHOT = "SNAPSHOT.json"
"""What launch/snapshot.py writes beside the copy of the code."""
_LOCKED = "constraints.txt"
_DRIVER = "/proc/driver/nvidia/version"

JOB_VARIABLES = (
    "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_QOS", "SLURM_JOB_ACCOUNT", "SLURM_RESTART_COUNT",
    "LOUPE_ATTEMPT", "LOUPE_GROUP", "LOUPE_VERSION", "LOUPE_NODE", "JOB_COMPLETION_INDEX", "HOSTNAME",
)  # fmt: skip
"""Which job, attempt and machine this is, as SLURM and the pods' manifests say it."""
SETTINGS = re.compile(
    r"(NCCL|GLOO|UCX|FI|OMP|MKL|CUDA|TORCH|TORCHINDUCTOR|TRITON|PYTORCH|CUBLAS|CUDNN|NVIDIA)_[A-Z0-9_]+"
    r"|HF_HUB_OFFLINE|LOUPE_DEVICE|AWS_MAX_ATTEMPTS|AWS_REGION|AWS_DEFAULT_REGION|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_PORT"
)
"""Names of the variables that change how a rank computes or talks."""


@dataclass(frozen=True)
class Machine:
    """Of one rank."""

    host: str
    device: str
    """Name of its GPU; `cpu` without one."""


def machine_of(device: torch.device) -> Machine:
    return Machine(platform.node(), torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")


def start_record(world: World, machines: Sequence[Machine], environ: Mapping[str, str]) -> dict[str, Any]:
    """All that attempts/NNNN.json says at first.

    Args:
        machines: of all ranks, in their order.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "time": time.time(),
        "host": platform.node(),
        "pid": os.getpid(),
        "world_size": world.size,
        "device": str(world.device),
        "job_id": slurm_job_id(environ),
        "loupe": importlib.metadata.version("loupe"),
        "torch": torch.__version__,
        "command": without_secrets(sys.argv),
        "code": code_state(CODE_ROOT),
        "versions": {**versions, **_of_gpus(world.device)},
        "packages": packages(CODE_ROOT),
        "system": {"platform": platform.platform(), "cores": os.cpu_count()},
        **hosts(machines),
        **variables(environ),
    }


def _of_gpus(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {
        "driver": _driver(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver(path: str = _DRIVER) -> str | None:
    """`580.65.06`; None where the system does not say."""
    try:
        match = re.search(
            r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", Path(path).read_text(encoding="ascii", errors="replace")
        )
    except OSError:
        return None
    return match[1] if match else None


def hosts(machines: Sequence[Machine]) -> dict[str, Any]:
    """Host names in the order of ranks, how many there are, and the devices: each kind with its number."""
    names = list(dict.fromkeys(machine.host for machine in machines))
    return {
        "hosts": names[:MAX_HOSTS], "num_hosts": len(names), "devices": dict(Counter(machine.device for machine in machines)),
    }  # fmt: skip


def code_state(root: Path) -> dict[str, Any] | None:
    """From which state of git the code was copied; None where it is no copy of ours."""
    try:
        with open(root / _SNAPSHOT, "rb") as file:
            tree = json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tree, dict):
        return None
    untracked = tree.get("untracked")
    state = {name: tree.get(name) for name in ("source", "commit", "dirty", "taken_at")}
    return {**state, "untracked": len(untracked) if isinstance(untracked, list) else 0}


def packages(root: Path) -> dict[str, str]:
    """Versions of what is installed, of the packages that `constraints.txt` names; of all where it is not there."""
    try:
        lines = (root / _LOCKED).read_text(encoding="utf-8").splitlines()
    except OSError:
        names = sorted({str(found.name) for found in importlib.metadata.distributions()})
    else:
        matches = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in lines)
        names = [match[0] for match in matches if match]
    found = {}
    for name in names[:MAX_PACKAGES]:
        try:
            found[name] = _version(name)
        except importlib.metadata.PackageNotFoundError:
            # of an extra that is not installed
            continue
    return found


def _version(name: str) -> str:
    """As `importlib.metadata.version`, which parses all of a description that may be a book: of all packages half a second."""
    distribution = importlib.metadata.distribution(name)
    headers = (distribution.read_text("METADATA") or "").partition("\n\n")[0]
    match = re.search(r"^Version:[ \t]*(\S+)", headers, re.MULTILINE)
    return match[1] if match else distribution.version


def variables(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """`job` and `settings`: the listed variables that are set, cut to a length, without those that look like secrets."""
    fit = {
        name: value[:MAX_VALUE_CHARS]
        for name, value in sorted(environ.items())
        if value and not looks_secret(name, value)
    }
    return {
        "job": {name: fit[name] for name in JOB_VARIABLES if name in fit},
        "settings": {name: value for name, value in fit.items() if SETTINGS.fullmatch(name)},
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line, in which what looks like a secret is left out."""
    kept, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        # options are written with -, variables with _
        secret = looks_secret(name.replace("-", "_").rstrip("_"), argument)
        kept.append("..." if secret or hide else argument[:MAX_VALUE_CHARS])
        # the value of `--password VALUE` is the next word
        hide = secret and argument.startswith("-") and not equals
    return kept
