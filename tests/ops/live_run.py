"""A real run of two ranks under the launcher's supervisor, in a process of its own: tests watch and strike it as it trains."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.console import PlainDisplay
from launch.job import JobSpec, process_start, record_job
from launch.local import Supervisor
from launch.ranks import log_path
from tests.tiny import tiny
from trainer.config import CODE_ROOT
from trainer.config_text import from_yaml, to_yaml
from trainer.run_folder import CONFIG, RunFolder

ONE_PHASE = "phases=[{name: only, steps: 100000, resolution: 32, batch_size: 8, learning_rate: 1e-4}]"
"""For as long as a test looks."""
SETTINGS = ("data.num_workers=0", "metrics.count_flops=true")
RANKS = 2


@dataclass
class LiveRun:
    """Its targets are in `discovery`; `run` is the folder's name."""

    folder: RunFolder
    discovery: Path
    process: "subprocess.Popen[bytes]"

    @property
    def run(self) -> str:
        return self.folder.url.rpartition("/")[2]

    def strike(self, **faults: str) -> None:
        """`rank_1="slow"`: from its next step on, until struck by something else, or by nothing."""
        path = faults_of(Path(self.folder.url))
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({name.removeprefix("rank_"): fault for name, fault in faults.items()}))
        temporary.rename(path)

    def records(self) -> list[dict[str, Any]]:
        return [record for record in self.folder.metrics() if "step" in record]

    def await_step(self, step: int, within_s: float = 120.0) -> None:
        self.until(lambda: any(record["step"] >= step for record in self.records()), f"step {step}", within_s)

    def until(self, condition: Callable[[], Any], what: str, within_s: float = 120.0) -> Any:
        end = time.monotonic() + within_s
        while not (found := condition()):
            assert time.monotonic() < end, f"{what}: not within {within_s} s\n{self.log()}"
            time.sleep(0.1)
        return found

    def pids(self) -> dict[int, int]:
        """Rank -> process, of those that live."""
        found = {}
        for pid in _children(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks = [word for word in words if word.startswith(b"RANK=")]
                if ranks and "struck_rank" in Path(f"/proc/{pid}/cmdline").read_text():
                    found[int(ranks[0].removeprefix(b"RANK="))] = pid
        return found

    def workers(self, rank: int) -> list[int]:
        """Processes of a rank that load its data: what its fork server has forked."""
        return [pid for server in _children(self.pids()[rank]) for pid in _children(server)]

    def log(self) -> str:
        found = [
            Path(self.folder.url).parent / f"{self.run}.log",
            *(log_path(self.folder.url, r) for r in range(RANKS)),
        ]
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in found if path.exists())

    def stop(self) -> None:
        """As Ctrl-C does; what does not end by itself is killed."""
        for pid in self.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.strike()
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=20)


def _children(parent: int) -> list[int]:
    """Of all of its threads."""
    with contextlib.suppress(OSError):
        lists = [path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children")]
        return [int(pid) for text in lists for pid in text.split()]
    return []


def faults_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.faults.json")


@contextlib.contextmanager
def live_run(
    where: Path, name: str, *overrides: str, max_restarts: int = 100, discovery: Path | None = None
) -> Iterator[LiveRun]:
    """tests/tiny.py's run with `overrides`, in a folder `name` of `where`; it is stopped at the end.
    One that is there already is resumed."""
    path, discovery = where / name, discovery or where / "discovery"
    path.mkdir(parents=True, exist_ok=True)
    discovery.mkdir(exist_ok=True)
    (path / CONFIG).write_text(to_yaml(tiny(*SETTINGS, f"metrics.discovery_dir={discovery}", *overrides)))
    command = [sys.executable, "-m", "tests.ops.live_run", "--run-dir", str(path), "--max-restarts", str(max_restarts)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(where / f"{name}.log", "ab") as log:
        process = subprocess.Popen(command, cwd=CODE_ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)
    run = LiveRun(RunFolder(str(path)), discovery, process)
    try:
        yield run
    finally:
        run.stop()


def main() -> int:
    """Supervise the run in a folder that has its config."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    options = parser.parse_args()
    path = Path(options.run_dir)
    folder = RunFolder(options.run_dir)
    spec = JobSpec(
        "demo", options.run_dir, "local", gpus_per_node=RANKS, cpu=True, code_dir=str(CODE_ROOT),
        max_restarts=options.max_restarts,
    )  # fmt: skip
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    command = [sys.executable, "-m", "tests.ops.struck_rank", "--config", str(path / CONFIG), "--run-dir", str(path),
               "--faults", str(faults_of(path))]  # fmt: skip
    display = PlainDisplay(lambda text: print(text, flush=True))
    config = from_yaml((path / CONFIG).read_text(), source=CONFIG)
    return Supervisor(spec, config, folder, display, command=command, backoff_s=0.01, crash_grace_s=2).run()


if __name__ == "__main__":
    sys.exit(main())
