"""A data stage's workers as an Indexed Job of Kubernetes. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.pods.spec import as_yaml, bytes_of, quantity
from launch.pods.template import SHM, PodNeeds, pod_spec
from launch.pods.volumes import Volume

GRACE_S = 60
"""Upon SIGTERM workers give back what they hold."""


@dataclass(frozen=True)
class StageJob:
    image: str
    pods: int
    """All run the same command and share its work."""
    cpus_per_task: int | None = None
    mem: str | None = None
    gpus_per_task: int = 0
    namespace: str | None = None
    secret: str | None = None
    """Whose keys become environment variables, such as those of object storage."""
    volumes: Sequence[Volume] = ()
    metrics_port: int | None = None
    """Where each pod answers Prometheus; None: none does."""
    output: str = ""
    """The last part of the name of where it writes to, of which Prometheus' relabelling makes the label `run`."""


def job_manifest(command: Sequence[str], *, name: str, job: StageJob) -> str:
    """An Indexed Job (batch/v1) as YAML, for `kubectl create -f -`.

    A pod that is evicted, preempted or deleted does not count against the limit of failures: its work goes on in another.

    Raises:
        UserError: `mem` is no amount of memory.
    """
    resources, shm = {}, SHM
    if job.cpus_per_task:
        resources["cpu"] = str(job.cpus_per_task)
    if job.mem:
        resources["memory"] = quantity("--mem", job.mem)
        half_mib = bytes_of(resources["memory"]) // 2 >> 20
        if half_mib << 20 < bytes_of(SHM):
            shm = f"{max(1, half_mib)}Mi"
    if job.gpus_per_task:
        resources["nvidia.com/gpu"] = str(job.gpus_per_task)
    # Kubernetes expands $(NAME) in words; two $ are one
    words = [word.replace("$", "$$") for word in command]
    needs = PodNeeds(
        "worker", job.image, words, GRACE_S, resources, shm=shm, secrets=[job.secret] if job.secret else [],
        volumes=job.volumes,
    )  # fmt: skip
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    template: dict[str, Any] = {"spec": pod_spec(needs)}
    if job.metrics_port:
        template["spec"]["containers"][0]["ports"] = [
            {"name": "metrics", "containerPort": job.metrics_port, "protocol": "TCP"}
        ]
        template["metadata"] = {
            "labels": {"app.kubernetes.io/name": "loupe", "app.kubernetes.io/instance": name},
            "annotations": {"loupe/run": job.output, "loupe/ranks-per-pod": "1"},
        }
    return as_yaml([{
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": f"{name}-", **({"namespace": job.namespace} if job.namespace else {})},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.pods,
            "parallelism": job.pods,
            "backoffLimit": 10 * job.pods,
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [disrupted]}]},
            "template": template,
        },
    }])  # fmt: skip
