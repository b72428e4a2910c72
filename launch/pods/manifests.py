"""Kubernetes' objects for a job: the pod, the JobSet, what Volcano's job needs beyond torchx's, metrics, network. No torch.

Both kinds of job are started again as a whole: the ranks of all pods have one rendezvous. Two codes decide: what
`launch.pods.task` means by 93 (and what says that the image is not ours) ends the job, any other failure starts it again.
How often is the business of the pod of rank 0, which knows crashes from preemptions; the number here is a backstop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.discovery.snippets import pod_monitor_endpoints
from launch.pods.spec import CONTAINER, KubernetesSpec
from launch.pods.template import PodNeeds, pod_spec
from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import ExitCode

CONFIG_ENV, HOST_ENV, ATTEMPT_ENV, NODE_ENV = "LOUPE_CONFIG", "LOUPE_MAIN_HOST", "LOUPE_ATTEMPT", "LOUPE_NODE"
FINAL_CODES = (int(ExitCode.USAGE), int(ExitCode.STOP), 126, 127, 128)
"""126 to 128: the container's command is not there or cannot run. Starting again would not mend it."""
RESTARTS_AT_MOST = 1000
DONE_TTL_S = 7 * 24 * 3600
"""A finished job's objects are removed after that; the run folder stays."""


def pod_command(spec: KubernetesSpec, *, host_env: str, index: int | None = None) -> list[str]:
    """What a pod's container runs. An image without `loupe` fails at once, and for good."""
    words = [
        "loupe", "pod", "--job", spec.name, "--run-dir", spec.run_dir, "--nodes", str(spec.nodes),
        "--gpus-per-node", str(spec.gpus_per_node), "--max-restarts", str(spec.max_restarts),
        "--grace", str(spec.grace_s), "--main-host-env", host_env,
    ]  # fmt: skip
    if spec.cpu:
        words.append("--cpu")
    if not spec.preflight:
        words.append("--no-preflight")
    return words if index is None else [*words, "--index", str(index)]


def pod_template(
    spec: KubernetesSpec, config: RunConfig, words: Sequence[str], env: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The same pod for all kinds of job.

    Args:
        words: what its container runs.
        env: what the kind of job adds to the environment.
    """
    # Kubernetes expands $(NAME) in the values of variables; two $ are one
    settings = {CONFIG_ENV: to_yaml(config).replace("$", "$$")}
    settings |= {name: value.replace("$", "$$") for name, value in spec.env.items()}
    pod = pod_spec(PodNeeds(
        CONTAINER, spec.image, words, spec.grace_s, _resources(spec), scratch=spec.scratch, shm=spec.shm,
        env=[
            *({"name": name, "value": value} for name, value in settings.items()), _field(NODE_ENV, "spec.nodeName"), *env,
        ],
        secrets=spec.secrets, volumes=spec.volumes, secret_mounts=spec.secret_mounts, user=spec.user,
    ))  # fmt: skip
    pod["containers"][0]["ports"] = [
        {"name": _port_name(i), "containerPort": spec.metrics_port + i, "protocol": "TCP"}
        for i in range(spec.gpus_per_node)
    ]
    for key, value in (
        ("serviceAccountName", spec.service_account),
        ("priorityClassName", spec.priority_class),
        ("nodeSelector", dict(spec.node_selector)),
        ("tolerations", [dict(t) for t in spec.tolerations]),
        ("imagePullSecrets", [{"name": spec.pull_secret}] if spec.pull_secret else None),
    ):
        if value:
            pod[key] = value
    return {"metadata": {"labels": dict(spec.labels), "annotations": _annotations(spec)}, "spec": pod}


def _port_name(local_rank: int) -> str:
    return f"metrics-{local_rank}" if local_rank else "metrics"


def _resources(spec: KubernetesSpec) -> dict[str, str]:
    asked: dict[str, str] = {}
    if spec.cpus_per_task:
        asked["cpu"] = str(spec.cpus_per_task * spec.gpus_per_node)
    if spec.mem:
        asked["memory"] = spec.mem
    if not spec.cpu:
        asked[spec.gpu_resource] = str(spec.gpus_per_node)
    return asked | dict(spec.resources)


def _annotations(spec: KubernetesSpec) -> dict[str, str]:
    # a mesh's sidecar outlives the ranks, so that the pod would never end, and stands between them
    found = {"sidecar.istio.io/inject": "false"}
    # what Prometheus' relabelling makes labels of
    found |= {"loupe/run": spec.run_dir.rpartition("/")[2], "loupe/ranks-per-pod": str(spec.gpus_per_node)}
    if spec.metrics == "annotations":
        found |= {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(spec.metrics_port),
            "prometheus.io/path": "/metrics",
        }
    return found | dict(spec.annotations)


def _metadata(spec: KubernetesSpec, name: str, **labels: str) -> dict[str, Any]:
    place = {"namespace": spec.namespace} if spec.namespace else {}
    return {"name": name, **place, "labels": {**spec.labels, **labels}}


# ----------------------------------------------------------------------------------------------------------- JobSet


def jobset(spec: KubernetesSpec, config: RunConfig) -> dict[str, Any]:
    """jobset.x-k8s.io/v1alpha2. Its controller makes the headless service that gives pods their names."""
    env = [
        {"name": HOST_ENV, "value": f"{spec.name}-{CONTAINER}-0-0.{spec.name}"},
        # of the Job, which is a new one at each start, and the same for all its pods
        _from_pod(ATTEMPT_ENV, "labels", "batch.kubernetes.io/controller-uid"),
    ]
    labels = {"kueue.x-k8s.io/queue-name": spec.queue} if spec.queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(spec, spec.name, **labels),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": RESTARTS_AT_MOST,
                # pods of the start before are gone before new ones join the rendezvous
                "restartStrategy": "BlockingRecreate",
                "rules": [{"name": "stopForGood", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "ttlSecondsAfterFinished": DONE_TTL_S,
            "replicatedJobs": [
                {
                    "name": CONTAINER,
                    "replicas": 1,
                    "template": {
                        "metadata": {"labels": dict(spec.labels)},
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": spec.nodes,
                            "parallelism": spec.nodes,
                            "backoffLimit": 0,
                            "podReplacementPolicy": "Failed",
                            # What is not named here, a preemption too, fails the Job, and the JobSet starts all pods
                            # again: a pod that is replaced alone would find no rendezvous.
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": CONTAINER,
                                            "operator": "In",
                                            "values": list(FINAL_CODES),
                                        },
                                    }
                                ]
                            },
                            "template": pod_template(spec, config, pod_command(spec, host_env=HOST_ENV), env),
                        },
                    },
                }
            ],
        },
    }


def _from_pod(name: str, what: str, key: str) -> dict[str, Any]:
    return _field(name, f"metadata.{what}['{key}']")


def _field(name: str, path: str) -> dict[str, Any]:
    """A variable whose value is a field of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


# ---------------------------------------------------------------------------------------------------------- Volcano


def patch_volcano(job: dict[str, Any], spec: KubernetesSpec, config: RunConfig) -> None:
    """In place: torchx's Volcano job, with all that torchx 0.7.0 has no words for.

    Its pods have 30 s from SIGTERM to SIGKILL, no tolerations, node selectors, security context, named ports or limit of
    shared memory; its task of rank 0 believes its host to be localhost, and the others fall back on that.
    """
    host_env = f"VC_{CONTAINER}_0_HOSTS".upper()
    env = [
        _from_pod("LOUPE_GROUP", "annotations", "scheduling.k8s.io/group-name"),
        _from_pod("LOUPE_VERSION", "annotations", "volcano.sh/job-version"),
        # the group's name has the job's uid in it; the version rises with each start
        {"name": ATTEMPT_ENV, "value": "$(LOUPE_GROUP).$(LOUPE_VERSION)"},
    ]
    job["metadata"] = _metadata(spec, spec.name)
    body = job["spec"]
    assert len(body["tasks"]) == spec.nodes
    for index, task in enumerate(body["tasks"]):
        assert task["name"] == f"{CONTAINER}-{index}"
        template = pod_template(spec, config, pod_command(spec, host_env=host_env, index=index), env)
        template["metadata"]["labels"] = labels_of(task["template"]) | template["metadata"]["labels"]
        template["metadata"]["annotations"]["loupe/pod-index"] = str(index)
        task["template"] = template
        for key in ("policies", "maxRetry", "minAvailable"):
            task.pop(key, None)
    body["minAvailable"] = spec.nodes
    body["maxRetry"] = RESTARTS_AT_MOST
    body["ttlSecondsAfterFinished"] = DONE_TTL_S
    # the first that fits is taken, and a code is also a PodFailed
    body["policies"] = [
        *({"exitCode": code, "action": "TerminateJob"} for code in FINAL_CODES),
        {"event": "PodEvicted", "action": "RestartJob"},
        {"event": "PodFailed", "action": "RestartJob"},
    ]


def labels_of(pod: Any) -> dict[str, str]:
    """Of torchx's pod: `torchx list` and `torchx log` find it by them. Its app's name was drawn by lot, ours is kept."""
    return {key: value for key, value in (pod.metadata.labels or {}).items() if key.startswith("torchx.")}


# --------------------------------------------------------------------------------------------------- around the pods


def around(spec: KubernetesSpec) -> list[dict[str, Any]]:
    """What is not the job: who may talk to its pods, and who scrapes them."""
    found = []
    if spec.network_policy:
        found.append(network_policy(spec))
    if spec.metrics == "podmonitor":
        found.append(pod_monitor(spec))
    return found


def network_policy(spec: KubernetesSpec) -> dict[str, Any]:
    """The rendezvous and the collectives ask nobody who they are: only the job's own pods reach them; metrics, everybody."""
    metrics: dict[str, Any] = {"protocol": "TCP", "port": spec.metrics_port}
    if spec.gpus_per_node > 1:
        metrics["endPort"] = spec.metrics_port + spec.gpus_per_node - 1
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(spec, f"{spec.name}-loupe"),
        "spec": {
            "podSelector": {"matchLabels": dict(spec.labels)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": dict(spec.labels)}}]},
                {"ports": [metrics]},
            ],
        },
    }


def pod_monitor(spec: KubernetesSpec) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(spec, spec.name),
        "spec": {
            "selector": {"matchLabels": dict(spec.labels)},
            "jobLabel": "app.kubernetes.io/name",
            "podMetricsEndpoints": pod_monitor_endpoints(
                nodes=spec.nodes,
                ranks_per_pod=spec.gpus_per_node,
                port_names=[_port_name(i) for i in range(spec.gpus_per_node)],
            ),
        },
    }
