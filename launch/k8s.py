"""Submit a training job to Kubernetes: `python launch/k8s.py RECIPE --image ... --run-dir ...`. No torch.

By default a Volcano job through torchx. `--render` prints objects for `kubectl apply -f -` instead.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script this folder is on sys.path, where its modules would pass for top-level ones
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _here)]

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from launch.entry import run_command
from launch.job import check_folder
from launch.pods.manifests import around, jobset
from launch.pods.options import job_options, spec_of
from launch.pods.spec import KubernetesSpec, as_yaml, is_visible_here
from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import UserError, one_line
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from kubernetes.client import ApiClient
    from torchx.specs import AppDryRunInfo

EXAMPLES = """
\b
Examples:
  loupe k8s demo --cpu --image IMAGE --run-dir s3://bucket/runs/demo --secret s3-keys --dry-run
  loupe k8s imagenet_256 --nodes 4 --gpus-per-node 8 --image IMAGE --run-dir /data/runs/imagenet_256 \\
      --volume-claim training-data:/data --set data.datasets.imagenet.url=/data/imagenet ...
  loupe k8s demo --cpu --image IMAGE --run-dir s3://bucket/runs/demo --render jobset | kubectl apply -f -
"""
REQUEST_S = 60.0
"""Longest wait for an answer of the cluster's API."""


@contextmanager
def _torchx() -> Iterator[None]:
    """Imports of the extra `kubernetes`, which only the submitting side has."""
    try:
        with warnings.catch_warnings():
            # torchx 0.7.0 on retries of Volcano 1.4, which `patch_volcano` leaves to the job
            warnings.simplefilter("ignore", UserWarning)
            yield
    except ImportError as e:
        raise UserError(
            f"{e.name}: not installed; pip install -e '.[kubernetes]' in the checkout, or take --render jobset"
        ) from None


def volcano(
    spec: KubernetesSpec, config: RunConfig, client: "ApiClient | None" = None
) -> "tuple[Any, AppDryRunInfo[Any]]":
    """(torchx's scheduler, its request as it would be sent). Asks no cluster."""
    with _torchx():
        from torchx.schedulers.kubernetes_scheduler import create_scheduler

        from launch.torchx_component import app_of

        scheduler = create_scheduler("loupe", client=client)
        cfg = {
            "queue": spec.queue or "default",
            "namespace": spec.namespace,
            "service_account": spec.service_account,
            "priority_class": spec.priority_class,
        }
        return scheduler, scheduler.submit_dryrun(app_of(spec, config), {k: v for k, v in cfg.items() if v})


def rendered(kind: str, spec: KubernetesSpec, config: RunConfig) -> str:
    """The job and what goes with it, as YAML."""
    job = jobset(spec, config) if kind == "jobset" else volcano(spec, config)[1].request.resource
    return as_yaml([job, *around(spec)])


def submit(spec: KubernetesSpec, config: RunConfig) -> list[str]:
    """Create the job, then what goes with it; returns what is to be told.

    Raises:
        UserError: no cluster is reached, or it does not take the job. Nothing is created.
    """
    client, namespace = cluster(spec.namespace)
    scheduler, info = volcano(spec, config, client)
    info._cfg["namespace"] = namespace
    with _torchx():
        from kubernetes.client import CustomObjectsApi
        from kubernetes.client.rest import ApiException
        from urllib3.exceptions import HTTPError

        objects = CustomObjectsApi(client)
        notes = [*warnings_of(spec), *check_nodes(client, spec)]
        try:
            scheduler.schedule(info)
            job = objects.get_namespaced_custom_object("batch.volcano.sh", "v1alpha1", namespace, "jobs", spec.name)
        except (ApiException, HTTPError, ValueError) as e:
            raise UserError(_refusal(e, spec, namespace)) from None
        owner = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": spec.name,
                 "uid": job["metadata"]["uid"]}  # fmt: skip
        for thing in around(spec):
            thing["metadata"]["ownerReferences"] = [owner]  # it goes when the job does
            group, _, version = thing["apiVersion"].partition("/")
            plural = {"NetworkPolicy": "networkpolicies", "PodMonitor": "podmonitors"}[thing["kind"]]
            try:
                objects.create_namespaced_custom_object(group, version, namespace, plural, thing)
            except (ApiException, HTTPError) as e:
                notes.append(f"warning: the job is queued, its {thing['kind']} is not there ({_reason(e)})")
    return [*notes, f"job {spec.name} in namespace {namespace}: {spec.nodes} pod(s) x {spec.gpus_per_node}; run folder "
            f"{spec.run_dir}"]  # fmt: skip


def cluster(namespace: str | None) -> "tuple[ApiClient, str]":
    """(client of the current context, the namespace to take).

    Raises:
        UserError: there is no kubeconfig.
    """
    with _torchx():
        from kubernetes import client, config

        class Bounded(client.ApiClient):
            """Every request with a deadline: torchx gives none."""

            def request(self, *args: Any, **kwargs: Any) -> Any:
                kwargs["_request_timeout"] = kwargs.get("_request_timeout") or REQUEST_S
                return super().request(*args, **kwargs)

        settings = client.Configuration()
        try:
            config.load_kube_config(client_configuration=settings)
            active = config.list_kube_config_contexts()[1]
        except config.ConfigException as e:
            raise UserError(
                f"kubeconfig: {one_line(e)}; set KUBECONFIG, or print the job with --render jobset"
            ) from None
        settings.retries = 1
        return Bounded(settings), namespace or active["context"].get("namespace") or "default"


def check_nodes(client: "ApiClient", spec: KubernetesSpec) -> list[str]:
    """Whether any node could ever hold a pod; returns warnings.

    Raises:
        UserError: there are nodes with GPUs, none with so many; or the cluster does not answer.
    """
    from kubernetes.client import CoreV1Api
    from kubernetes.client.rest import ApiException
    from urllib3.exceptions import HTTPError

    try:
        nodes = CoreV1Api(client).list_node().items
    except ApiException as e:
        if e.status == 403:  # who may submit need not be allowed to look at nodes
            return []
        raise UserError(f"cluster: {_reason(e)}") from None
    except HTTPError as e:
        raise UserError(f"cluster: does not answer ({_reason(e)}); check the kubeconfig's context") from None
    if spec.cpu:
        return []
    most = max((int(node.status.allocatable.get(spec.gpu_resource, 0)) for node in nodes), default=0)
    if 0 < most < spec.gpus_per_node:
        raise UserError(f"--gpus-per-node {spec.gpus_per_node}: no node has so many, the largest has {most} "
                        f"{spec.gpu_resource}; take more --nodes of {most}")  # fmt: skip
    if not most:
        return [f"warning: no node has {spec.gpu_resource} now; the job waits until one comes (see --gpu-resource)"]
    return []


def warnings_of(spec: KubernetesSpec) -> list[str]:
    """Of what the job does not ask for, and should."""
    missing = [
        option for option, value in (("--cpus-per-task", spec.cpus_per_task), ("--mem", spec.mem)) if value is None
    ]
    if not missing:
        return []
    return [f"warning: no {' and no '.join(missing)}: the pods may come to a node that has none left, and are the first to be "
            "ended where it runs short"]  # fmt: skip


def _check_storage(spec: KubernetesSpec, config: RunConfig) -> None:
    """Raises UserError: the run folder is another run's, a live job's, or cannot be looked at."""
    mend = "set the storage keys here too, or add --skip-storage-check"
    check_folder(RunFolder(spec.run_dir), config, fresh=False, mend=mend)


def _reason(error: Exception) -> str:
    return f"{getattr(error, 'status', '')} {getattr(error, 'reason', None) or one_line(error)}".strip()


def _refusal(error: Exception, spec: KubernetesSpec, namespace: str) -> str:
    status = getattr(error, "status", None)
    if isinstance(error, ValueError) or status == 409:  # torchx' word for a conflict
        return (f"--name {spec.name}: a job of that name is there; `kubectl -n {namespace} delete job.batch.volcano.sh "
                f"{spec.name}` first (it saves), or take another --name")  # fmt: skip
    if status == 404:
        return f"cluster: has no Volcano, or no namespace {namespace}; install it, or take --render jobset"
    if status == 403:
        return f"cluster: you may not create Volcano jobs in namespace {namespace}; give another, or ask for the role"
    return f"cluster: does not take the job ({_reason(error)})"


@click.command(epilog=EXAMPLES, context_settings={"max_content_width": 120, "show_default": True})
@job_options
@click.option("--render", type=click.Choice(["jobset", "volcano"]),
              help="Print the objects as YAML, for `kubectl apply -f -`; ask no cluster.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="As --render volcano (or what --render says), with the config as a comment behind it.")  # fmt: skip
@click.option("--skip-storage-check", is_flag=True, help="Do not look at the run folder, which only pods can reach.")
def main(render: str | None, dry_run: bool, skip_storage_check: bool, **options: Any) -> int:
    """Train RECIPE on Kubernetes: a recipe's name (see `loupe recipes`), or the config.yaml of an earlier run.

    The same job again, once it has ended or was deleted, goes on from the newest checkpoint.
    """
    spec, config = spec_of(**options)
    if not skip_storage_check and is_visible_here(spec):
        _check_storage(spec, config)
    if render or dry_run:
        for warning in warnings_of(spec):
            click.echo(warning, err=True)
        click.echo(rendered(render or "volcano", spec, config), nl=False)
        if dry_run:
            click.echo(
                "".join(f"# {line}\n" for line in (f"{spec.run_dir}/config.yaml", *to_yaml(config).splitlines())),
                nl=False,
            )
        return 0
    for note in submit(spec, config):
        click.echo(note, err=note.startswith("warning"))
    click.echo(f"follow it with: kubectl logs -f -l app.kubernetes.io/instance={spec.name} --prefix")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, prog_name="launch/k8s.py"))
