"""Kubernetes' objects: valid by the published schemas, strictly; what they say; what is refused before there are any."""

import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch.entry import run_command
from launch.k8s import main
from launch.pods.spec import MAX_NAME, bytes_of, name_of, quantity, toleration
from launch.pods.task import pod
from tests.kubernetes import environment_of, validate_custom
from trainer.config import CODE_ROOT
from trainer.config_text import from_yaml, with_overrides
from trainer.errors import UserError
from trainer.recipes import load

Command = Callable[..., tuple[int, str, str]]
URL = ("--run-dir", "memory://runs/k8s-demo")
FULL = (
    *URL, "--nodes", "4", "--gpus-per-node", "4", "--namespace", "ml", "--queue", "research", "--priority-class", "low",
    "--service-account", "trainer", "--pull-secret", "registry", "--toleration", "nvidia.com/gpu=present:NoSchedule",
    "--toleration", "spot", "--node-selector", "pool=h100", "--annotation", "team=vision", "--volume-claim", "data:/data",
    "--secret", "s3-keys", "--secret-mount", "gcs:/var/secrets/gcs", "--env", "NCCL_DEBUG=INFO", "--env", "PRICE=$5$(X)",
    "--cpus-per-task", "12", "--mem", "512G", "--shm", "64G", "--scratch", "500G", "--resource", "rdma/hca=8", "--grace", "900",
    "--metrics", "podmonitor",
)  # fmt: skip
KINDS = ("jobset", "volcano")
REMOTE = ("--set", "data.datasets.emoji.url=s3://bucket/emoji")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command(main, ["demo", "--image", "ghcr.io/loupe/loupe:1", *arguments], prog_name="launch/k8s.py")
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def objects(command: Command, kind: str, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = command(*arguments, "--render", kind)
    assert code == 0, err
    return list(yaml.safe_load_all(out))


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    if job["kind"] == "JobSet":
        return [job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]]
    return [task["template"] for task in job["spec"]["tasks"]]


def validate(resources: list[dict[str, Any]], schemas: Path) -> None:
    for resource in resources:
        if resource["kind"] == "NetworkPolicy":
            kubernetes_validate.validate(resource, "1.30", strict=True)
        else:
            validate_custom(resource, schemas)
    for template in templates(resources[0]):
        pod_of = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        kubernetes_validate.validate(pod_of, "1.30", strict=True)
    if resources[0]["kind"] == "JobSet":
        job = {"apiVersion": "batch/v1", "kind": "Job", **resources[0]["spec"]["replicatedJobs"][0]["template"]}
        kubernetes_validate.validate(job, "1.30", strict=True)


@pytest.mark.shared
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [FULL, (*URL, "--cpu")], ids=["full", "least"])
def test_objects_are_valid_by_the_published_schemas(
    command: Command, shared_dir: Path, kind: str, arguments: tuple[str, ...]
) -> None:
    found = objects(command, kind, *arguments)
    assert len(found) == (3 if arguments is FULL else 2)
    validate(found, shared_dir / "data/kubernetes_schemas")


@pytest.mark.shared
@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_sees_a_misspelt_field(command: Command, shared_dir: Path, kind: str) -> None:
    schemas = shared_dir / "data/kubernetes_schemas"
    found = objects(command, kind, *FULL)
    templates(found[0])[0]["spec"]["terminationGracePeriod"] = 900
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(found, schemas)
    found = objects(command, kind, *FULL)
    found[0]["spec"]["maxRetries"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validate(found, schemas)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_are_what_a_restricted_namespace_takes(command: Command, kind: str) -> None:
    for template in templates(objects(command, kind, *FULL)[0]):
        spec = template["spec"]
        (container,) = spec["containers"]
        assert not any("hostPath" in volume for volume in spec["volumes"])
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000, "kubelets cannot tell of a name whether it is root"
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(spec)
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/dev/shm", "/data"}


@pytest.mark.parametrize("kind", KINDS)
def test_options_arrive(command: Command, kind: str) -> None:
    job, policy, monitor = objects(command, kind, *FULL)
    assert {thing["metadata"]["namespace"] for thing in (job, policy, monitor)} == {"ml"}
    template = templates(job)[0]
    spec, container = template["spec"], template["spec"]["containers"][0]
    assert spec["terminationGracePeriodSeconds"] == 900
    assert spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]
    assert (spec["nodeSelector"], spec["serviceAccountName"]) == ({"pool": "h100"}, "trainer")
    assert spec["priorityClassName"] == "low"
    assert container["resources"]["limits"] == {"memory": "512Gi", "nvidia.com/gpu": "4", "rdma/hca": "8"}
    assert container["resources"]["requests"] == {
        "cpu": "48", "memory": "512Gi", "nvidia.com/gpu": "4", "rdma/hca": "8", "ephemeral-storage": "500Gi",
    }  # fmt: skip
    scratch = next(volume for volume in spec["volumes"] if volume["name"] == "scratch")
    assert scratch["emptyDir"] == {"sizeLimit": "500Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert [(port["name"], port["containerPort"]) for port in container["ports"]] == [
        ("metrics", 9400), ("metrics-1", 9401), ("metrics-2", 9402), ("metrics-3", 9403),
    ]  # fmt: skip
    assert [e["port"] for e in monitor["spec"]["podMetricsEndpoints"]] == [
        "metrics",
        "metrics-1",
        "metrics-2",
        "metrics-3",
    ]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    inside, metrics = policy["spec"]["ingress"]
    assert inside["from"][0]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert metrics["ports"] == [{"protocol": "TCP", "port": 9400, "endPort": 9403}]
    queue = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] if kind == "jobset" else job["spec"]["queue"]
    assert queue == "research"


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_arrives_whatever_is_in_it(command: Command, kind: str) -> None:
    prompts = 'samples.prompts=["for $5 a $(piece)", "$$"]'
    container = templates(objects(command, kind, *FULL, "--set", prompts)[0])[0]["spec"]["containers"][0]
    given = {"LOUPE_GROUP": "g", "LOUPE_VERSION": "3", "LOUPE_ATTEMPT": "uid", "LOUPE_NODE": "n7"}
    variables = environment_of(container, given)
    config = from_yaml(variables["LOUPE_CONFIG"], source="the pod")
    assert config == with_overrides(load("demo"), [prompts, "metrics.bind_address=0.0.0.0", "metrics.port=9400"])
    assert variables["PRICE"] == "$5$(X)"
    assert variables["LOUPE_ATTEMPT"] == ("uid" if kind == "jobset" else "g.3")


def test_the_shard_cache_stays_within_the_pods_disk(command: Command) -> None:
    def cache_gib(*arguments: str) -> float | None:
        container = templates(objects(command, "jobset", *URL, "--cpu", *arguments)[0])[0]["spec"]["containers"][0]
        (text,) = (v["value"] for v in container["env"] if v["name"] == "LOUPE_CONFIG")
        return from_yaml(text.replace("$$", "$"), source="the pod").data.cache_gib

    assert cache_gib() is None, "nothing of it is remote"
    assert cache_gib(*REMOTE) == 16.0
    assert cache_gib(*REMOTE, "--scratch", "500G") == 400.0
    assert cache_gib(*REMOTE, "--set", "data.cache_gib=5") == 5.0
    elsewhere = ("--set", "data.cache_dir=/cache", "--volume-claim", "c:/cache")
    assert cache_gib(*REMOTE, *elsewhere) is None, "80 % of that disk, as everywhere"
    assert cache_gib(*REMOTE, *elsewhere, "--set", "data.cache_gib=900") == 900.0


@pytest.mark.parametrize("kind", KINDS)
def test_process_1_is_the_images_own(command: Command, kind: str) -> None:
    """A `command` would take tini's place, and a SIGTERM that came while Python imports would be lost."""
    for template in templates(objects(command, kind, *FULL)[0]):
        (container,) = template["spec"]["containers"]
        assert "command" not in container
        assert container["args"][:2] == ["loupe", "pod"]


def test_a_job_that_asks_for_no_cores_or_memory_is_warned_of(command: Command) -> None:
    code, out, err = command(*URL, "--cpu", "--render", "jobset")
    assert code == 0
    assert err.startswith("warning: no --cpus-per-task and no --mem: ")
    assert "warning" not in out
    assert command(*FULL, "--render", "jobset")[2] == ""


def test_what_ends_a_job_and_what_starts_it_again(command: Command) -> None:
    body = objects(command, "volcano", *FULL)[0]["spec"]
    assert body["policies"][-2:] == [
        {"event": "PodEvicted", "action": "RestartJob"}, {"event": "PodFailed", "action": "RestartJob"},
    ]  # fmt: skip
    assert {p["exitCode"] for p in body["policies"][:-2] if p["action"] == "TerminateJob"} == {2, 93, 126, 127, 128}
    assert body["minAvailable"] == 4
    assert all({"policies", "maxRetry"}.isdisjoint(task) for task in body["tasks"]), "a task's own would come first"
    body = objects(command, "jobset", *FULL)[0]["spec"]
    job = body["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 93, 126, 127, 128])
    assert body["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert body["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (4, 4, 0)


def test_nobody_falls_back_on_localhost(command: Command) -> None:
    assert "localhost" not in command(*FULL, "--render", "volcano")[1]
    commands = [t["spec"]["containers"][0]["args"] for t in templates(objects(command, "volcano", *FULL)[0])]
    assert [words[-2:] for words in commands] == [["--index", str(i)] for i in range(4)]
    assert all(words[words.index("--main-host-env") + 1] == "VC_TRAIN_0_HOSTS" for words in commands)
    (template,) = templates(objects(command, "jobset", *FULL)[0])
    host = next(v["value"] for v in template["spec"]["containers"][0]["env"] if v["name"] == "LOUPE_MAIN_HOST")
    assert host == "demo-train-0-0.demo", "JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN"


def test_a_dry_run_prints_objects_and_config_and_no_secret(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    code, out, _ = command(*FULL, "--dry-run")
    assert code == 0
    assert "kind: Job" in out
    assert "# name: demo" in out
    assert "hunter2" not in out
    assert len(list(yaml.safe_load_all(out))) == 3, "the config is a comment: the whole can still be applied"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--run-dir: needed"),
        (("--run-dir", "runs/demo"), "pods have no such folder"),
        (("--run-dir", "/data/runs/demo"), "--run-dir: /data/runs/demo is a path of this machine"),
        (("--run-dir", "/database/demo", "--volume-claim", "data:/data"), "is a path of this machine"),
        ((*URL, "--set", "data.datasets.emoji.url=my-data"), "data.datasets.emoji.url: "),
        ((*URL, "--set", "data.cache_dir=/var/cache"), "data.cache_dir: /var/cache"),
        ((*URL, "--grace", "30"), "--grace 30: a save must fit"),
        ((*URL, "--name", "Demo_1"), "--name Demo_1"),
        ((*URL, "--env", "HF_TOKEN=abc"), "--env HF_TOKEN: would stand in the manifest"),
        ((*URL, "--env", "LOUPE_CONFIG=x"), "--env LOUPE_CONFIG: is set by the launcher"),
        (("--run-dir", "s3://key:secret@bucket/x"), "holds a password"),
        ((*URL, "--mem", "8G"), "--shm 8Gi: is part of the pod's memory"),
        ((*URL, "--mem", "lots"), "--mem lots"),
        ((*URL, "--scratch", "500M"), "--scratch 500Mi: at least 1G"),
        ((*URL, *REMOTE, "--set", "data.cache_gib=100"), "of which shards may take 80%; lower it, give --scratch 125G"),
        ((*URL, "--toleration", "gpu:Never"), "--toleration gpu:Never"),
        ((*URL, "--node-selector", "pool"), "--node-selector pool: write it as KEY=VALUE"),
        ((*URL, "--gpus-per-node", "0"), "--gpus-per-node 0"),
        ((*URL, "--volume-claim", "a:/data", "--volume-claim", "b:/data"), "two at /data"),
        ((*URL, "--user", "0"), "--user 0"),
        ((*URL, "--metrics-port", "80"), "--metrics-port 80"),
        ((*URL, "--resource", "cpu=3"), "--resource cpu=3"),
        ((*URL, "--set", "no.such=1"), "no"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_renders_nothing(command: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = command(*arguments, "--render", "jobset")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_storage_that_only_pods_reach(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    code, out, err = command("--run-dir", "s3://bucket/runs/demo", "--render", "jobset")
    assert (code, out) == (2, "")
    assert "--skip-storage-check" in err
    assert err.count("\n") == 1
    assert command("--run-dir", "s3://bucket/runs/demo", "--render", "jobset", "--skip-storage-check")[0] == 0


def test_a_password_of_the_url_is_not_shown(command: Command) -> None:
    assert "hunter2" not in "".join(map(str, command("--run-dir", "s3://me:hunter2@bucket/x", "--dry-run")))


def test_names_and_amounts() -> None:
    assert name_of("imagenet_256 (v2)") == "imagenet-256-v2"
    assert name_of("3d") == "run-3d"
    long = [name_of("x" * 50 + end) for end in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) <= MAX_NAME
    assert [quantity("--mem", text) for text in ("16G", "16Gi", "16GiB")] == ["16Gi"] * 3
    assert bytes_of("2Gi") == 2**31
    assert toleration("a.b/c:NoExecute") == {"key": "a.b/c", "operator": "Exists", "effect": "NoExecute"}
    with pytest.raises(UserError, match="write a taint"):
        toleration("=x")


def test_torchx_runs_the_component_as_it_is(command: Command) -> None:
    """Plain `torchx run --dryrun` makes the very job that we submit."""
    # torchx refuses an option that comes twice, unless its value is written to it
    joined = [f"{option}={value}" for option, value in zip(FULL[::2], FULL[1::2], strict=True)]
    words = ["demo", "--image", "ghcr.io/loupe/loupe:1", *joined]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("torchx")), "run", "--dryrun", "--workspace", "",
         "-s", "kubernetes", "-cfg", "queue=research,namespace=ml,priority_class=low,service_account=trainer",
         str(CODE_ROOT / "launch/torchx_component.py") + ":train", "--", *words],
        capture_output=True, text=True, check=False, timeout=120, cwd="/",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout.partition("=== SCHEDULER REQUEST ===")[2]
    assert yaml.safe_load(printed) == objects(command, "volcano", *FULL)[0]


def test_without_torchx_the_error_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchx"] + ["launch.torchx_component"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchx", None)
    code, out, err = command(*URL, "--cpu", "--render", "volcano")
    assert (code, out) == (2, "")
    assert "pip install -e '.[kubernetes]' in the checkout" in err
    assert command(*URL, "--cpu", "--render", "jobset")[0] == 0, "a JobSet needs no torchx"


def test_a_pod_that_lacks_its_host_does_not_train_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("VC_TRAIN_0_HOSTS", raising=False)
    words = ["--job", "demo", "--run-dir", str(tmp_path), "--nodes", "2", "--gpus-per-node", "1", "--max-restarts", "5",
             "--grace", "600", "--main-host-env", "VC_TRAIN_0_HOSTS", "--cpu", "--index", "1", "--attempt", "a"]  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        assert run_command(pod, words, prog_name="loupe pod") == 93
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "VC_TRAIN_0_HOSTS: not set" in capsys.readouterr().err
