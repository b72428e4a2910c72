"""The pod that all our jobs on Kubernetes have, trainings and data stages: who it is, what it may do, where it may write.
No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.pods.volumes import Volume

USER = 1000
"""The image's."""
SHM = "8Gi"


@dataclass(frozen=True)
class PodNeeds:
    """One container and what it is given."""

    name: str
    """Of the container."""
    image: str
    words: Sequence[str]
    """What it runs, behind the image's own entrypoint."""
    grace_s: int
    """From SIGTERM to SIGKILL."""
    resources: Mapping[str, str] = field(default_factory=dict)
    """By name, as Kubernetes writes them."""
    scratch: str | None = None
    """What /tmp may take of the node's disk; None: it asks for no room, and may take all there is."""
    shm: str = SHM
    """What /dev/shm may take of the memory."""
    env: Sequence[Mapping[str, Any]] = ()
    secrets: Sequence[str] = ()
    """Their keys become environment variables."""
    volumes: Sequence[Volume] = ()
    secret_mounts: Sequence[Volume] = ()
    """Secrets as files; `claim` is the Secret's name."""
    user: int = USER


def pod_spec(needs: PodNeeds) -> dict[str, Any]:
    """A namespace that enforces the `restricted` Pod Security Standard takes it."""
    container: dict[str, Any] = {
        "name": needs.name,
        "image": needs.image,
        # not `command`: that would take the place of the image's tini, and a signal that comes to process 1 before it
        # listens is lost
        "args": list(needs.words),
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "TMPDIR", "value": "/tmp"}, *map(dict, needs.env)],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if resources := _resources(needs):
        container["resources"] = resources
    if needs.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in needs.secrets]
    volumes: list[dict[str, Any]] = [
        {"name": "scratch", "emptyDir": {"sizeLimit": needs.scratch} if needs.scratch else {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": needs.shm}},
    ]
    for number, volume in enumerate(needs.volumes):
        container["volumeMounts"].append({"name": f"claim-{number}", "mountPath": volume.path})
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": volume.claim}})
    for number, secret in enumerate(needs.secret_mounts):
        container["volumeMounts"].append({"name": f"secret-{number}", "mountPath": secret.path, "readOnly": True})
        volumes.append({"name": f"secret-{number}", "secret": {"secretName": secret.claim, "defaultMode": 0o440}})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": needs.grace_s,
        # pods ask nothing of Kubernetes; a cloud's identity for storage does not come with this token
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": needs.user,
            "runAsGroup": needs.user,
            "fsGroup": needs.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }


def _resources(needs: PodNeeds) -> dict[str, dict[str, str]]:
    # Without the request a pod goes to a node that has no room for its caches, and is evicted there. No limit beside it:
    # the volume has one, and only the container's own log, which Kubernetes cuts, comes on top.
    disk = {"ephemeral-storage": needs.scratch} if needs.scratch else {}
    # no limit on cores: one throttles the data workers while cores of the node lie idle
    limits = {name: amount for name, amount in needs.resources.items() if name != "cpu"}
    found = {"requests": {**needs.resources, **disk}, "limits": limits}
    return {kind: amounts for kind, amounts in found.items() if amounts}
