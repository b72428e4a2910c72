"""The options of a Kubernetes job on the command line, for `launch/k8s.py` and the torchx component. No torch."""

import os
import re
from collections.abc import Callable
from typing import Any

import click

from launch.job import load_config, profiled
from launch.pods.spec import (
    KubernetesSpec,
    caches_in_scratch,
    check,
    environment,
    name_of,
    pairs,
    quantity,
    scratch_gib,
    secret_name,
    toleration,
)
from launch.pods.volumes import Volume, parse_volume
from trainer.config import RunConfig
from trainer.config_text import with_overrides
from trainer.errors import UserError
from trainer.run_folder import CONFIG

OPTIONS = [
    click.argument("recipe"),
    click.option("--image", metavar="NAME", required=True, help="The container, best by its digest: NAME@sha256:..."),
    click.option("--run-dir", metavar="URL|PATH", show_default=False,
                 help="The run folder: a URL, or a path below a --volume-claim.  [required, but for a run's config.yaml]"),
    click.option("--nodes", default=1, help="Pods."),
    click.option("--gpus-per-node", default=1, help="Ranks per pod, a GPU each."),
    click.option("--cpu", is_flag=True, help="Ranks without GPUs."),
    click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE",
                 help="Change a field of the config, such as phases.0.batch_size=64. Repeatable."),
    click.option("--profile", is_flag=True, help="Trace some steps of each start, into the run folder's profile/."),
    click.option("--name", help="Of the job.  [default: the config's name]", show_default=False),
    click.option(
        "--max-restarts", default=5, help="Crashes that are answered by a restart, in 24 hours of training; not preemptions."
    ),
    click.option("--namespace", help="Kubernetes' namespace; absent: the current one."),
    click.option("--queue", help="Volcano's queue (default), or Kueue's where a JobSet is rendered."),
    click.option("--priority-class", metavar="NAME", help="PriorityClass of the pods."),
    click.option("--service-account", metavar="NAME", help="Of the pods, where it is their identity for storage."),
    click.option("--pull-secret", metavar="NAME", help="Secret of the image's registry."),
    click.option("--toleration", "tolerations", multiple=True, metavar="TAINT",
                 help="A taint to tolerate, KEY[=VALUE][:EFFECT]. Repeatable."),
    click.option("--node-selector", "node_selectors", multiple=True, metavar="KEY=VALUE", help="Repeatable."),
    click.option("--annotation", "annotations", multiple=True, metavar="KEY=VALUE", help="Of the pods. Repeatable."),
    click.option("--volume-claim", "volumes", multiple=True, metavar="CLAIM:/PATH",
                 help="Mount a PersistentVolumeClaim; of several pods, one with ReadWriteMany. Repeatable."),
    click.option("--secret", "secrets", multiple=True, metavar="NAME",
                 help="Its keys become environment variables, such as storage credentials. Repeatable."),
    click.option("--secret-mount", "secret_mounts", multiple=True, metavar="NAME:/PATH",
                 help="Its keys become files. Repeatable."),
    click.option("--env", "env", multiple=True, metavar="NAME=VALUE", help="Not for secrets. Repeatable."),
    click.option("--cpus-per-task", type=click.IntRange(min=1), help="Cores per rank."),
    click.option("--mem", help="Memory per pod, such as 64G."),
    click.option("--shm", default="8G", help="Of that, at most for /dev/shm: the data workers' batches."),
    click.option("--scratch", default="20G",
                 help="Of its node's disk, per pod, for /tmp: compiled kernels, and shards of remote datasets."),
    click.option("--gpu-resource", default="nvidia.com/gpu", metavar="NAME", help="What a GPU is called here."),
    click.option("--resource", "resources", multiple=True, metavar="NAME=COUNT",
                 help="More per pod, such as rdma/hca=8. Repeatable."),
    click.option("--grace", "grace_s", default=600, type=int, metavar="SECONDS",
                 help="From a pod's SIGTERM to its SIGKILL; a save must fit."),
    click.option("--metrics-port", default=9400, help="Of a pod's first rank; its others have the next ones."),
    click.option("--metrics", type=click.Choice(["annotations", "podmonitor", "none"]), default="annotations",
                 help="How Prometheus finds the pods."),
    click.option("--network-policy/--no-network-policy", default=True,
                 help="Only the job's own pods may reach its rendezvous."),
    click.option("--no-preflight", is_flag=True, help="Start without the check of each pod's node."),
    click.option("--user", default=1000, help="The image's user, by number."),
]  # fmt: skip


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them, in this order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def spec_of(
    recipe: str, run_dir: str | None, overrides: tuple[str, ...], profile: bool, name: str | None, tolerations: tuple[str, ...],
    node_selectors: tuple[str, ...], annotations: tuple[str, ...], volumes: tuple[str, ...], secrets: tuple[str, ...],
    secret_mounts: tuple[str, ...], env: tuple[str, ...], mem: str | None, shm: str, scratch: str, resources: tuple[str, ...],
    metrics_port: int, no_preflight: bool, **rest: Any,
) -> tuple[KubernetesSpec, RunConfig]:  # fmt: skip
    """The job, and its config as pods get it: metrics where others reach them.

    Raises:
        UserError: anything that can be refused from here.
    """
    config = load_config(recipe, profiled(overrides) if profile else overrides)
    config = with_overrides(config, ["metrics.bind_address=0.0.0.0", f"metrics.port={metrics_port}"])
    scratch = quantity("--scratch", scratch)
    if config.data.cache_gib is None and caches_in_scratch(config):
        config = with_overrides(config, [f"data.cache_gib={scratch_gib(scratch):g}"])
    if run_dir is None and os.path.basename(recipe) == CONFIG:
        run_dir = os.path.dirname(recipe)
    if not run_dir:
        raise UserError("--run-dir: needed, a URL that pods can write, or a path below a --volume-claim")
    if "://" not in run_dir and not run_dir.startswith("/"):
        raise UserError(f"--run-dir {run_dir}: pods have no such folder; give a URL, or an absolute path below a "
                        "--volume-claim")  # fmt: skip
    spec = KubernetesSpec(
        name=name or name_of(config.name), run_dir=run_dir.rstrip("/"), tolerations=[toleration(t) for t in tolerations],
        node_selector=pairs("--node-selector", node_selectors), annotations=pairs("--annotation", annotations),
        volumes=[parse_volume(text) for text in volumes], secrets=[secret_name(text) for text in secrets],
        secret_mounts=[_secret_mount(text) for text in secret_mounts], env=environment(env),
        mem=quantity("--mem", mem) if mem else None, shm=quantity("--shm", shm), scratch=scratch,
        resources=_counts(resources), metrics_port=metrics_port, preflight=not no_preflight, **rest,
    )  # fmt: skip
    check(spec, config)
    return spec, config


def _secret_mount(text: str) -> Volume:
    try:
        return parse_volume(text)
    except UserError:
        raise UserError(
            f"--secret-mount {text}: write the name of a Secret and where its files go, as NAME:/path"
        ) from None


def _counts(texts: tuple[str, ...]) -> dict[str, str]:
    found = pairs("--resource", texts)
    for name, count in found.items():
        if not re.fullmatch(r"[1-9]\d*", count) or name in ("cpu", "memory"):
            raise UserError(
                f"--resource {name}={count}: NAME=COUNT of a device; cores and memory are --cpus-per-task and --mem"
            )
    return found
