"""Checks an image for real: what its layers hold, that it trains unprivileged with a read-only root, saves and goes on.

    python -m ops.image.check IMAGE [--base BASE]

`make image-test` runs it. It needs the engine that built the image, and Loupe installed here, for the manifest.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ops.image.layers import read_image
from trainer.errors import ExitCode, UserError

UID = 1000
START_S = 300.0
"""Until a container must have trained a few steps; a machine that is busy with other things is slow."""
RUN_S = 600.0
CODE_ROOT = Path(__file__).resolve().parents[2]
STEPS = {"low_resolution": 40, "full_resolution": 4, "perceptual": 4}
SHORT = {
    **{f"phases.{name}.steps": steps for name, steps in STEPS.items()},
    "metrics.every_steps": 1, "samples.every_steps": 1000, "samples.count": 4, "samples.num_steps": 2,
    "prompt_accuracy": "null",
    # beside others on the machine, two threads that wait for one another are slower than one
    "parallel.num_threads": 1,
}  # fmt: skip


class CheckFailed(Exception):
    """What the image does is not what it must."""


@dataclass(frozen=True)
class Engine:
    """podman or docker, and the image under test."""

    words: tuple[str, ...]
    image: str
    mounts: tuple[str, ...] = ()

    def call(self, *arguments: str, timeout_s: float = RUN_S, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self.words, *arguments], capture_output=True, text=True, timeout=timeout_s)
        if ok and done.returncode:
            raise CheckFailed(
                f"{arguments[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done

    def options(self) -> list[str]:
        """Of every container: as a pod of the restricted standard, with the run folder as the one thing that stays."""
        words = [
            "--network=host", "--read-only", "--tmpfs=/tmp", "--shm-size=1g", "--cap-drop=all",
            "--security-opt=no-new-privileges", *(f"--volume={mount}" for mount in self.mounts),
        ]  # fmt: skip
        if self.words[0] == "podman":
            # podman would raise the limits, which is refused inside of another container; and it would lay writable
            # folders over /run and /var/tmp, where Kubernetes has none
            words += ["--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096", "--read-only-tmpfs=false"]
        return words

    def run(self, *command: str, options: Sequence[str] = (), ok: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call("run", "--rm", *self.options(), *options, self.image, *command, ok=ok)


def find_engine(image: str, mounts: tuple[str, ...]) -> Engine:
    """The one that has built it, by the rule of engine.sh."""
    script = f". {shlex.quote(str(CODE_ROOT / 'ops/image/engine.sh'))} && echo $ENGINE"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(done.stderr.strip())
    return Engine((done.stdout.strip(),), image, mounts)


# ---------------------------------------------------------------------------------------------------------- the checks


def check_layers(engine: Engine, base: str | None) -> None:
    """Sizes by layer; no cache, version control, secret, or file that the image's user could change."""
    num_base = 0
    if base:
        (found,) = json.loads(engine.call("image", "inspect", base).stdout)
        num_base = len(found["RootFS"]["Layers"])
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "image.tar"
        form = ("--format", "docker-archive") if engine.words[0] == "podman" else ()
        engine.call("save", *form, "--output", str(archive), engine.image)
        image = read_image(archive, num_base_layers=num_base)
    print("       MB    files  layer")
    for layer in image.layers:
        print(f"{layer.num_bytes / 1e6:9.1f}  {layer.num_files:7d}  {layer.made_by[:90]}")
    print(f"{sum(layer.num_bytes for layer in image.layers) / 1e6:9.1f}           in all")
    findings = [f"{layer.made_by[:40]}: {text}" for layer in image.layers for text in layer.findings]
    findings += image.findings
    if findings:
        rest = f"\n... and {len(findings) - 20} more" if len(findings) > 20 else ""
        raise CheckFailed("\n".join(findings[:20]) + rest)


def check_user(engine: Engine) -> None:
    """It is user 1000, any other number will do as well, and only /tmp can be written to."""
    folders = "/ /opt/loupe /opt/venv /etc /usr /run /var/tmp /home"
    probe = f"id -u; for d in {folders}; do if touch $d/x 2> /dev/null; then echo $d; fi; done"
    if (said := engine.run("sh", "-c", probe).stdout.split()) != [str(UID)]:
        raise CheckFailed(f"user, and what could be written to: {said}, not {UID} alone")
    # without --read-only, too, the code must not be its own to change
    writable = engine.call(
        "run", "--rm", *(w for w in engine.options() if w != "--read-only"), engine.image, "find", "/opt", "-writable",
        "!", "-type", "l",
    ).stdout  # fmt: skip
    if writable:
        raise CheckFailed(f"its user may write to {writable.split()[:5]}")
    engine.run("loupe", "recipes", "show", "demo", options=("--user", "54321:0"))


def check_locked(engine: Engine) -> None:
    """Each package in it is at the version of constraints.txt."""
    program = (
        "import json, importlib.metadata as m; "
        "print(json.dumps([(d.name, d.version.partition('+')[0]) for d in m.distributions()]))"
    )
    lines = (CODE_ROOT / "constraints.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    found = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in json.loads(engine.run("python", "-c", program).stdout)
    }
    wrong = [
        f"{name} {version} (locked: {locked.get(name, 'not at all')})"
        for name, version in sorted(found.items())
        if name not in ("loupe", "pip") and locked.get(name) != version
    ]
    if wrong:
        raise CheckFailed("not as constraints.txt has it: " + ", ".join(wrong))
    print(f"{len(found)} packages, all as constraints.txt has them")


def check_commands(engine: Engine) -> None:
    """The commands that launchers call are there, and `loupe doctor` finds the machine fit."""
    for command in (["loupe", "--version"], ["loupe", "pod", "--help"], ["python", "-m", "trainer.train", "--help"]):
        engine.run(*command)
    # a C compiler and Python's headers: what torch.compile needs
    compiled = engine.run(
        "python", "-c", "import torch; print(float(torch.compile(torch.sin)(torch.ones(8)).sum()))"
    ).stdout
    if not compiled.startswith("6.73"):
        raise CheckFailed(f"torch.compile gave {compiled!r}")
    said = engine.run("loupe", "doctor", "--cpu", "--quick", "--run-dir", "/runs/doctor", ok=False)
    if said.returncode:
        raise CheckFailed(f"loupe doctor ended with {said.returncode}:\n{said.stdout}{said.stderr}")
    print(said.stdout.rstrip())


def check_run(engine: Engine, runs: Path) -> None:
    """A rendered pod trains the demo, its metrics answer, SIGTERM saves and ends with 75; the run goes on from there."""
    port = free_port()
    container, pod = rendered_pod(engine.image, port)
    assert container["securityContext"]["readOnlyRootFilesystem"]
    user = pod["securityContext"]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    environment |= {"LOUPE_ATTEMPT": "first", "JOB_COMPLETION_INDEX": "0"}
    assert "command" not in container, "it would take the place of the image's tini"
    words = [word.replace("$$", "$") for word in container["args"]]
    began = time.monotonic()
    name = engine.call(
        "run", "--detach", *engine.options(), f"--user={user['runAsUser']}:{user['runAsGroup']}",
        *(f"--env={key}={value.replace('$$', '$')}" for key, value in environment.items()),
        engine.image, *words,
    ).stdout.strip()  # fmt: skip
    try:
        step = wait_for_step(engine, name, port, at_least=3)
        print(f"step {step:.0f} after {time.monotonic() - began:.1f} s, said by its metrics port")
        asked = time.monotonic()
        engine.call("kill", "--signal=TERM", name)
        code = int(engine.call("wait", name).stdout)
        print(f"SIGTERM: ended with {code} after {time.monotonic() - asked:.1f} s")
        if code != ExitCode.REQUEUE:
            logs = engine.call("logs", name)
            raise CheckFailed(
                f"SIGTERM: ended with {code}, not {int(ExitCode.REQUEUE)}:\n{(logs.stdout + logs.stderr)[-4000:]}"
            )
    finally:
        engine.call("rm", "--force", name, ok=False)
    saved = newest_checkpoint(runs / "demo")
    if saved < 3:
        raise CheckFailed(f"SIGTERM: the newest whole checkpoint is of step {saved}")
    done = engine.run(
        "loupe", "submit", "/runs/demo/config.yaml", "--cluster", "local", "--gpus-per-node", "1", "--cpu", "--set",
        "metrics.port=0",
    )  # fmt: skip
    last, total = newest_checkpoint(runs / "demo"), sum(STEPS.values())
    if last != total:
        raise CheckFailed(f"the run ended at step {last}, not {total}:\n{(done.stdout + done.stderr)[-4000:]}")
    first = first_step(runs / "demo")
    if first != saved + 1:
        raise CheckFailed(f"saved at step {saved}, gone on at {first}")
    print(f"saved at step {saved}, gone on at {first} in another container, done at {last}")


# ------------------------------------------------------------------------------------------------------------- helpers


def rendered_pod(image: str, port: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(container, pod) of the demo's JobSet, as `launch/k8s.py` renders it."""
    words = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    text = subprocess.run(
        [sys.executable, "-m", "launch.k8s", "demo", "--cpu", "--image", image, "--run-dir", "/runs/demo",
         "--volume-claim", "runs:/runs", "--metrics-port", str(port), "--skip-storage-check", "--render", "jobset", *words],
        check=True, stdout=subprocess.PIPE, text=True, timeout=120, cwd=CODE_ROOT,
    ).stdout  # fmt: skip
    (job,) = (found for found in yaml.safe_load_all(text) if found["kind"] == "JobSet")
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return container, pod


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for_step(engine: Engine, name: str, port: int, *, at_least: int) -> float:
    """What the metrics port says, asked from outside of the container."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                found = re.search(r"^loupe_step(?:\{[^}]*\})? (\S+)$", answer.read().decode(), re.MULTILINE)
            if found and float(found[1]) >= at_least:
                return float(found[1])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # not yet
        if engine.call("inspect", "--format", "{{.State.Running}}", name).stdout.strip() != "true":
            break
        time.sleep(1.0)
    logs = engine.call("logs", name)
    raise CheckFailed(f"port {port} never told of step {at_least}:\n{(logs.stdout + logs.stderr)[-4000:]}")


def newest_checkpoint(run: Path) -> int:
    """Step of the newest one with a COMMIT; 0: none."""
    return max((int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/step-*/COMMIT")), default=0)


def first_step(run: Path) -> int:
    """Of the newest start, as its metrics tell."""
    newest = max((run / "metrics").glob("*.jsonl"))
    return int(json.loads(newest.read_text().splitlines()[0])["step"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.image.check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image")
    parser.add_argument(
        "--base", help="what it was built on; its layers are measured, not judged. [default: all are judged]"
    )
    options = parser.parse_args(arguments)
    runs = Path(tempfile.mkdtemp(prefix="loupe-image-"))
    try:
        runs.chmod(0o777)  # the container's user is nobody here
        engine = find_engine(options.image, (f"{runs}:/runs",))
        for name, check in (
            ("layers", lambda: check_layers(engine, options.base)),
            ("user", lambda: check_user(engine)),
            ("packages", lambda: check_locked(engine)),
            ("commands", lambda: check_commands(engine)),
            ("a run", lambda: check_run(engine, runs)),
        ):
            began = time.monotonic()
            print(f"-- {name}", flush=True)
            check()
            print(f"   ok, {time.monotonic() - began:.0f} s", flush=True)
    except (CheckFailed, UserError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        if os.getuid() == 0:
            shutil.rmtree(runs)
        else:
            print(f"{runs}: the container's files, yours to delete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
