"""A command as an array of equal jobs that share its work, such as a data stage's workers: on SLURM or Kubernetes. No torch."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launch.slurm_job.queue import last_line, test_only
from trainer.config import CODE_ROOT
from trainer.errors import ExitCode, UserError

SIGNAL_S = 60
"""Before its time limit a job gets SIGTERM, so that its workers give back what they hold."""


@dataclass(frozen=True)
class ArrayOptions:
    jobs: int
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    gpus_per_task: int = 0


def array_script(command: Sequence[str], *, name: str, options: ArrayOptions, code_dir: str) -> str:
    """The sbatch script. A job that ends with 75, stopped in time, is put back into the queue, unless it was cancelled."""
    asked = {
        "job-name": name,
        "array": f"0-{options.jobs - 1}",
        "ntasks": 1,
        "partition": options.partition,
        "account": options.account,
        "time": options.time_limit,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "gpus-per-task": options.gpus_per_task or None,
        "signal": f"TERM@{SIGNAL_S}",
        "output": f"{name}-%A_%a.log",
    }
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
    cpus = f" --cpus-per-task={options.cpus_per_task}" if options.cpus_per_task else ""
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "trap : TERM  # bash would die of it while the workers give back what they hold; srun passes it on",
            f"export PYTHONPATH={shlex.quote(code_dir)} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
            f"srun --kill-on-bad-exit=1{cpus} {shlex.join(command)} &",
            "wait $!  # a trap runs at once while bash waits, and only after a foreground command",
            "code=$?",
            "while kill -0 $! 2> /dev/null; do wait $!; code=$?; done",
            f'if [ "$code" -eq {int(ExitCode.REQUEUE)} ] && command -v scontrol > /dev/null; then',
            '  job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            '  [ "$(squeue --noheader --jobs "$job" --format %T)" = COMPLETING ] && exit 143  # scancel',
            '  exec scontrol requeue "$job"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def script_here(command: Sequence[str], *, name: str, options: ArrayOptions) -> str:
    """The script, for the code that runs now."""
    return array_script(command, name=name, options=options, code_dir=str(CODE_ROOT))


def submit_array(command: Sequence[str], *, name: str, options: ArrayOptions) -> str:
    """Queue it; returns the array's id. Logs go to the folder that it is submitted from.

    Raises:
        UserError: SLURM is not here, or does not take it.
    """
    for tool in ("sbatch", "srun", "squeue"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: not found; submit from a login node of the cluster, or take --cluster local")
    script = script_here(command, name=name, options=options)
    test_only(script)
    result = subprocess.run(
        ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False, env=os.environ
    )
    if result.returncode:
        raise UserError(f"sbatch: {last_line(result.stderr)}")
    return result.stdout.strip().partition(";")[0]


# ----------------------------------------------------------------------------------------------------------- Kubernetes


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim and where pods see it: at the path where it is mounted here."""

    claim: str
    path: str

    def holds(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path.rstrip('/')}/")


def parse_volume(text: str) -> Volume:
    """`CLAIM:/path`.

    Raises:
        UserError: it is not that.
    """
    claim, _, path = text.partition(":")
    plain = path.startswith("/") and os.path.normpath(path) == path and path not in ("/", "/tmp")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", claim) or not plain or ":" in path:
        raise UserError(f"--volume-claim {text}: write the name of a PersistentVolumeClaim and where it is mounted, as "
                        "CLAIM:/path")  # fmt: skip
    return Volume(claim, path)


@dataclass(frozen=True)
class PodOptions:
    image: str
    namespace: str | None = None
    secret: str | None = None
    """Whose keys become environment variables, such as those of object storage."""
    volumes: Sequence["Volume"] = ()


def job_manifest(command: Sequence[str], *, name: str, options: ArrayOptions, pod: PodOptions) -> str:
    """An Indexed Job (batch/v1) as YAML, for `kubectl create -f -`.

    A pod that is evicted, preempted or deleted does not count against the limit of failures: its work goes on in another.
    """
    resources: dict[str, Any] = {}
    if options.cpus_per_task:
        resources["cpu"] = str(options.cpus_per_task)
    if options.mem:
        resources["memory"] = _quantity(options.mem)
    limits = dict(resources)
    if options.gpus_per_task:
        limits["nvidia.com/gpu"] = str(options.gpus_per_task)
    mounts, volumes = [{"name": "scratch", "mountPath": "/tmp"}], [{"name": "scratch", "emptyDir": {}}]
    for number, volume in enumerate(pod.volumes):
        mounts.append({"name": f"claim-{number}", "mountPath": volume.path})
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": volume.claim}})
    container: dict[str, Any] = {
        "name": "worker",
        "image": pod.image,
        "command": list(command),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
    if limits:
        container["resources"] = {"requests": resources, "limits": limits}
    if pod.secret:
        container["envFrom"] = [{"secretRef": {"name": pod.secret}}]
    job: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": f"{name}-", **({"namespace": pod.namespace} if pod.namespace else {})},
        "spec": {
            "completionMode": "Indexed",
            "completions": options.jobs,
            "parallelism": options.jobs,
            "backoffLimit": 10 * options.jobs,
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": SIGNAL_S,
                    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [container],
                    "volumes": volumes,
                }
            },
        },
    }
    return str(yaml.safe_dump(job, sort_keys=False))


def _quantity(mem: str) -> str:
    """SLURM's way to write memory as Kubernetes': 16G is 16Gi.

    Raises:
        UserError: it is neither's.
    """
    match = re.fullmatch(r"(\d+)([KMGT])i?B?", mem)
    if match is None:
        raise UserError(f"--mem: {mem!r} is no amount of memory; write it as 16G")
    return f"{match[1]}{match[2]}i"
