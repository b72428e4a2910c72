"""`loupe experiment lpl`: its runs, what they are measured by, and a report. No torch: runs are processes of their own."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from launch.experiments.jobs import (
    START_S,
    claim,
    config_file,
    estimate,
    export,
    file_option,
    run_and_report,
    run_module,
    tell_missing,
    there,
    training,
    weights_options,
    write_page,
)
from launch.experiments.queue import Job, Stage
from trainer.config import RunConfig
from trainer.config_text import suggest, to_yaml
from trainer.errors import UserError
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
from trainer.run_folder import RunFolder

STEP_S = 0.012
"""Seconds on one core, about, of the baseline's step, per image: for the estimate before a run has ended; a tiny model's are
less."""
LATENT_STEP_S = 0.008
"""An image of the latent network's training."""
SAMPLE_S, EVALUATE_S = 0.006, 24.0
"""Of an image and sampling step with guidance; and of an evaluation, beside its sampling."""

LATENT_NETWORK = "latent-network"
"""Below the experiment's folder, where it trains one itself."""


@click.command("lpl", context_settings={"show_default": True})
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

    \b
    Examples:
      loupe experiment lpl --dry-run
      loupe experiment lpl --smoke --out runs/smoke
      loupe experiment lpl --report-only
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
    chosen, left_out = _chosen(
        variants(file_option("--lpips-weights", lpips_weights), latent_network), names, latent_network
    )
    runs = list(planned_runs(size, chosen, str(folder / "runs"), paradigms or tuple(PARADIGMS)))
    if class_images is not None and not any("latent_network" in v.needs for v in chosen):
        class_images = None
    given = {"--features-weights": features_weights, "--lpips-weights": lpips_weights}
    if dry_run:
        tell_missing(given)
        return _tell_plan(runs, size, left_out, workers)
    jobs: list[Job] = []
    if not report_only:
        _prepare(folder, runs, chosen, size, weights_options(given))
        jobs = _jobs(folder, runs, size)
        if class_images is not None:
            _put_latent_network(jobs, folder, _latent_network(folder, class_images, size), size)
    return run_and_report(
        folder, jobs, workers=workers, left_out=left_out,
        report=lambda: write_page("trainer.experiments.report", folder, report, "lpl.md"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the plan


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
    click.echo(estimate(len(runs), total, workers))
    return 0


def _prepare(
    folder: Path, runs: Sequence[PlannedRun], chosen: Sequence[Variant], size: Size, weights: dict[str, str]
) -> None:
    """Raises:
    UserError: the folder holds runs of other sizes.
    """
    about = {
        "variants": {v.name: {"label": v.label, "group": v.group} for v in chosen},
        "runs": [{"name": r.name, "variant": r.variant, "paradigm": r.paradigm, "seed": r.seed} for r in runs],
    }
    claim(folder, {"size": asdict(size), **weights}, [run.config for run in runs], about)


def _jobs(folder: Path, runs: Sequence[PlannedRun], size: Size) -> list[Job]:
    evaluate = [sys.executable, "-m", "trainer.experiments.evaluate", str(folder)]
    measured = Stage("measuring the real images", [*evaluate, "reference"], there(folder / "reference.json"), 40.0)
    jobs = [Job("reference", [measured], str(folder / "reference"))]
    for run in runs:
        training_s, evaluating_s = _estimates(run, size)
        stages = [
            training(folder, run.name, training_s),
            Stage(
                "evaluation", [*evaluate, run.name], there(folder / "evaluations" / f"{run.name}.json"), evaluating_s
            ),
        ]
        jobs.append(Job(run.name, stages, str(folder / "runs" / run.name), after=("reference", *run.after)))
    return jobs


def _latent_network(folder: Path, class_images: str, size: Size) -> RunConfig:
    """The run that trains one, on a dataset built from the images.

    Raises:
        UserError: the images cannot be built into a dataset of classes.
    """
    dataset = folder / "classes"
    if not (dataset / "dataset.json").exists():
        click.echo(f"building a dataset of {class_images}")
        built = ["data", "build", class_images, str(dataset), "--size", str(RESOLUTION), "--overwrite"]
        if run_module("launch.cli", *built):
            raise UserError(f"--class-images {class_images}: no dataset could be built of it; see above")
    class_names = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["class_names"]
    if not class_names:
        raise UserError(f"--class-images {class_images}: its images have no classes; sort them into a folder per class")
    config = latent_network_run(size, str(dataset), len(class_names))
    RunFolder(str(folder / "runs" / config.name)).check(config)
    config_file(folder, config.name).write_text(to_yaml(config), encoding="utf-8")
    return config


def _put_latent_network(jobs: list[Job], folder: Path, config: RunConfig, size: Size) -> None:
    """First, and before the runs that need it."""
    run_dir, out = folder / "runs" / config.name, folder / LATENT_NETWORK
    share = 0.1 if size.tiny_model else 1.0
    images = sum(phase.steps * phase.batch_size for phase in config.phases)
    stages = [
        training(folder, config.name, START_S + share * LATENT_STEP_S * images),
        export(run_dir, out),
    ]
    for job in jobs:
        if "-latent_lpips-" in job.name:
            job.after = (*job.after, config.name)
    jobs.insert(1, Job(config.name, stages, str(run_dir)))
