"""What is asked of Kubernetes, checked before anything is made of it. No torch, no torchx."""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.inputs import check_local, inputs
from launch.pods.template import SHM, USER
from launch.pods.volumes import Volume
from trainer.config import RunConfig, check_layout
from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.secret_names import looks_secret

CONTAINER = "train"
MIN_GRACE_S = 60
"""Below that no save fits: Kubernetes' own default of 30 s is what lost checkpoints."""
MIN_SCRATCH = 1 << 30
OF_SCRATCH = 0.8
"""Part of /tmp that shards of remote datasets may take."""
MAX_NAME = 40
"""Longest name of a job: a pod's is that and `-train-0-1023-abcde`, and may have 63 characters."""
_LABEL = r"[a-z]([a-z0-9-]*[a-z0-9])?"
_KEY = r"([A-Za-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class KubernetesSpec:
    """Who runs what where. Validated when made."""

    name: str
    """Of the job: its pods, its service and its metrics carry it."""
    image: str
    run_dir: str
    """URL, or a path below a volume's."""
    nodes: int = 1
    """Pods."""
    gpus_per_node: int = 1
    """Ranks per pod; each has a GPU of its own unless `cpu`."""
    cpu: bool = False
    max_restarts: int = 5
    namespace: str | None = None
    queue: str | None = None
    """Volcano's queue, or Kueue's where a JobSet is rendered."""
    service_account: str | None = None
    priority_class: str | None = None
    pull_secret: str | None = None
    tolerations: Sequence[Mapping[str, str]] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    volumes: Sequence[Volume] = ()
    secrets: Sequence[str] = ()
    """Their keys become environment variables."""
    secret_mounts: Sequence[Volume] = ()
    """Secrets as files; `claim` is the Secret's name."""
    env: Mapping[str, str] = field(default_factory=dict)
    cpus_per_task: int | None = None
    mem: str | None = None
    """Per pod, as Kubernetes writes it."""
    shm: str = SHM
    scratch: str = "20Gi"
    """Of a node's disk, per pod, for /tmp."""
    gpu_resource: str = "nvidia.com/gpu"
    resources: Mapping[str, str] = field(default_factory=dict)
    """More of what device plugins give, such as rdma/hca."""
    grace_s: int = 600
    """From a pod's SIGTERM to its SIGKILL: the save must fit."""
    metrics_port: int = 9400
    """Of a pod's first rank; the next ones are its others'."""
    metrics: str = "annotations"
    network_policy: bool = True
    user: int = USER
    preflight: bool = True
    """Each pod checks its node before its ranks start."""

    def __post_init__(self) -> None:
        if not re.fullmatch(_LABEL, self.name) or len(self.name) > MAX_NAME:
            raise UserError(f"--name {self.name}: small letters, digits and -, from a letter on, at most {MAX_NAME}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", self.image):
            raise UserError(
                f"--image {self.image!r}: not the name of an image; write REGISTRY/NAME:TAG or NAME@sha256:..."
            )
        for option, count in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if count < 1:
                raise UserError(f"{option} {count}: at least 1 (ranks without a GPU: --cpu)")
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts {self.max_restarts}: 0 or more")
        if self.grace_s < MIN_GRACE_S:
            raise UserError(f"--grace {self.grace_s}: a save must fit between a pod's SIGTERM and its SIGKILL; give at "
                            f"least {MIN_GRACE_S} seconds, and more than a checkpoint of yours takes")  # fmt: skip
        if not 1024 <= self.metrics_port <= 65536 - self.gpus_per_node:
            raise UserError(f"--metrics-port {self.metrics_port}: 1024 or more (pods are no root), and room for a port "
                            "of each rank")  # fmt: skip
        if self.user < 1:
            raise UserError(f"--user {self.user}: pods do not run as root; give the image's user, 1 or more")
        if "$" in self.run_dir:
            raise UserError(f"--run-dir {self.run_dir}: Kubernetes would expand the $; take another folder")
        if re.search(r"://[^/]*:[^/]*@", self.run_dir):
            raise UserError("--run-dir: holds a password; keep it in a Secret and name that with --secret")
        if self.mem and bytes_of(self.shm) >= bytes_of(self.mem):
            raise UserError(f"--shm {self.shm}: is part of the pod's memory ({self.mem}) and would take all of it; "
                            "raise --mem or lower --shm")  # fmt: skip
        if bytes_of(self.scratch) < MIN_SCRATCH:
            raise UserError(f"--scratch {self.scratch}: at least {MIN_SCRATCH >> 30}G; compiled kernels and shards of remote "
                            "datasets lie there")  # fmt: skip
        paths = [volume.path for volume in (*self.volumes, *self.secret_mounts)]
        if len(set(paths)) < len(paths):
            raise UserError(
                f"--volume-claim, --secret-mount: two at {max(paths, key=paths.count)}; give each its own path"
            )
        for name in self.env:
            if name.startswith("LOUPE_") or name in ("HOME", "TMPDIR"):
                raise UserError(f"--env {name}: is set by the launcher; leave it out")

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "loupe", "app.kubernetes.io/instance": self.name}


# ------------------------------------------------------------------------------------------------------------ reading


def name_of(config_name: str) -> str:
    """A run's name as a job's: one that is too long keeps its beginning and gets a number for the rest."""
    name = re.sub(r"[^a-z0-9]+", "-", config_name.lower()).strip("-")
    if not re.match(r"[a-z]", name):
        name = f"run-{name}".strip("-")
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME - 9].rstrip('-')}-{hashlib.sha256(config_name.encode()).hexdigest()[:8]}"
    return name


def quantity(option: str, text: str) -> str:
    """64G, 64Gi or 64GiB as Kubernetes' 64Gi.

    Raises:
        UserError: it is no amount of memory.
    """
    match = re.fullmatch(r"([1-9]\d*)([KMGT])(i?B?)", text)
    if match is None:
        raise UserError(f"{option} {text}: no amount of memory; write it as 64G")
    return f"{match[1]}{match[2]}i"


def bytes_of(amount: str) -> int:
    """Of what `quantity` writes."""
    match = re.fullmatch(r"(\d+)([KMGT]?)i?", amount)
    assert match is not None, amount
    return int(match[1]) * _UNITS[match[2]]


def pairs(option: str, texts: Sequence[str], *, key: str = _KEY) -> dict[str, str]:
    """KEY=VALUE, several.

    Raises:
        UserError: one that is none, or a key twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(key, name):
            raise UserError(f"{option} {text}: write it as KEY=VALUE")
        if name in found:
            raise UserError(f"{option} {name}: given twice")
        found[name] = value
    return found


def environment(texts: Sequence[str]) -> dict[str, str]:
    """Raises UserError for what looks like a secret: a manifest is no place for it."""
    found = pairs("--env", texts, key=r"[A-Za-z_][A-Za-z0-9_]*")
    for name, value in found.items():
        if looks_secret(name, value):
            raise UserError(f"--env {name}: would stand in the manifest for all to read; put it into a Secret and name that "
                            "with --secret")  # fmt: skip
    return found


def toleration(text: str) -> dict[str, str]:
    """A taint in kubectl's notation, KEY[=VALUE][:EFFECT], as what tolerates it.

    Raises:
        UserError: it is not that.
    """
    match = re.fullmatch(rf"(?P<key>{_KEY})(=(?P<value>[A-Za-z0-9._-]*))?(:(?P<effect>[A-Za-z]+))?", text)
    if match is None or match["effect"] not in (None, *_EFFECTS):
        raise UserError(
            f"--toleration {text}: write a taint as KEY[=VALUE][:EFFECT], EFFECT one of {', '.join(_EFFECTS)}"
        )
    found = {"key": match["key"], "operator": "Exists" if match["value"] is None else "Equal"}
    if match["value"] is not None:
        found["value"] = match["value"]
    if match["effect"]:
        found["effect"] = match["effect"]
    return found


def secret_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", text):
        raise UserError(f"--secret {text}: not the name of a Secret; its keys become the pods' environment")
    return text


# ---------------------------------------------------------------------------------------------------- can pods see it?


def check(spec: KubernetesSpec, config: RunConfig) -> None:
    """Everything that can be refused from here.

    Raises:
        UserError: layout; a run folder, dataset, codec or cache that pods cannot see or write.
    """
    check_layout(config, spec.world_size)
    if RunFolder(spec.run_dir).is_local:
        _check_visible("--run-dir", spec.run_dir.removeprefix("file://"), spec)
    for where, url, files in inputs(config):
        if url.startswith("repo://"):
            check_local(where, url, files)
        elif "://" not in url or url.startswith("file://"):
            volume = _check_visible(where, url.removeprefix("file://"), spec)
            if os.path.isdir(volume.path):
                check_local(where, url, files)
    cache, wanted = config.data.cache_dir, config.data.cache_gib or 0.0
    if cache and not _is_in_tmp(cache):
        _check_visible("data.cache_dir", cache, spec)
    if caches_in_scratch(config) and wanted > scratch_gib(spec.scratch):
        raise UserError(f"data.cache_gib: {wanted:g} GiB do not fit into a pod's /tmp, --scratch {spec.scratch}, of which "
                        f"shards may take {OF_SCRATCH:.0%}; lower it, give --scratch {math.ceil(wanted / OF_SCRATCH)}G, or put "
                        "data.cache_dir on a --volume-claim")  # fmt: skip


def caches_in_scratch(config: RunConfig) -> bool:
    """Whether shards of datasets are fetched from elsewhere into a pod's /tmp."""
    cache = config.data.cache_dir
    urls = (dataset.url for dataset in config.data.datasets.values())
    is_cached = any("://" in url and not url.startswith(("file://", "repo://")) for url in urls)
    return is_cached and (cache is None or _is_in_tmp(cache))


def _is_in_tmp(path: str) -> bool:
    return path == "/tmp" or path.startswith("/tmp/")


def scratch_gib(scratch: str) -> float:
    """What shards may take of it. By itself the cache would take 80 % of the node's disk, and the pod would be evicted."""
    return bytes_of(scratch) / 2**30 * OF_SCRATCH


def _check_visible(where: str, path: str, spec: KubernetesSpec) -> Volume:
    for volume in spec.volumes:
        if volume.holds(path):
            return volume
    raise UserError(f"{where}: {path} is a path of this machine, which pods do not see; give a URL, or mount its "
                    "PersistentVolumeClaim with --volume-claim CLAIM:/path")  # fmt: skip


def is_visible_here(spec: KubernetesSpec) -> bool:
    """Whether this machine can look into the run folder: at a URL, or where the volume is mounted here as well."""
    if not RunFolder(spec.run_dir).is_local:
        return True
    return any(volume.holds(spec.run_dir) and os.path.isdir(volume.path) for volume in spec.volumes)


def as_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """Kubernetes' objects, for `kubectl apply -f -`. Texts of several lines stand as such."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, explicit_start=True, width=1_000))
