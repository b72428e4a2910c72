"""`loupe experiment autoencoder`: its data, its runs, what they are measured by, and a report. No torch: runs are processes of
their own."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from launch.experiments.jobs import (
    START_S,
    check_plan,
    claim,
    counted,
    estimate,
    export,
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
from trainer.errors import UserError
from trainer.recipes.autoencoder_experiment import (
    FULL,
    KL,
    LPIPS_NETWORK,
    SMOKE,
    Photos,
    Size,
    Variant,
    chosen,
    config_of,
)

STEP_S = 0.2
"""Seconds on one core, about, of a step, per image of 128 px: for the estimate before a run has ended."""
LPL_STEP_S = 0.15
"""The same of latent diffusion with LPL."""
EVALUATE_S = 0.25
"""An image."""
THREADS_SHARE = 0.9
"""Of a further thread, what it is worth."""
BASELINES = ("thumbnail_kl", "thumbnail_vq", "webp_kl", "webp_vq")
LEFT_OUT_CEILING = {"ceiling": "it needs --ceiling-codec"}


@click.command("autoencoder", context_settings={"show_default": True})
@click.option("--photos", multiple=True, metavar="FOLDER", help="Images as `loupe data build` takes them. Repeatable.")
@click.option("--features-weights", metavar="FILE", help="EfficientNet-Lite0's weights, for the Frechet distance.")
@click.option(
    "--lpips-weights", metavar="FILE", help="Shift-tolerant LPIPS's weights, AlexNet; for training and measuring."
)
@click.option("--ceiling-codec", metavar="FOLDER",
              help="A pre-trained autoencoder to compare with: a diffusers folder, or TAEF2's two files.")  # fmt: skip
@click.option(
    "--out", default="runs/experiment-autoencoder", metavar="FOLDER", help="Of the runs; what is done stays done."
)
@click.option("--report", "report_dir", default=None, metavar="FOLDER", help="Of the report; [default: OUT/report]")
@click.option("--workers", type=click.IntRange(1), default=2, help="Cores; each run takes one.")
@click.option(
    "--steps", type=click.IntRange(2), help=f"Of the two long runs at full resolution; [default: {FULL.steps}]"
)
@click.option(
    "--ablation-steps",
    type=click.IntRange(2),
    help=f"Of each short run at full resolution; [default: {FULL.ablation_steps}]",
)
@click.option("--only", "names", multiple=True, metavar="NAME", help="Run these alone; repeatable. [default: all]")
@click.option("--smoke", is_flag=True, help="Seconds instead of hours; the figures mean nothing.")
@click.option("--dry-run", is_flag=True, help="Say which runs there would be and how long they take; start none.")
@click.option("--report-only", is_flag=True, help="Write the report of what is there; start no run.")
def autoencoder(
    photos: tuple[str, ...], features_weights: str | None, lpips_weights: str | None, ceiling_codec: str | None, out: str,
    report_dir: str | None, workers: int, steps: int | None, ablation_steps: int | None, names: tuple[str, ...], smoke: bool,
    dry_run: bool, report_only: bool,
) -> int:  # fmt: skip
    """What do a KL and a VQ autoencoder give back of photos, trained on two CPU cores, and what is each loss term worth?

    Held-out photos are set aside first. Baselines have the same number of bits: thumbnails enlarged again, and WebP. The KL
    model then carries latent diffusion with LPL. Stop it with Ctrl-C; the same command goes on.
    """
    size = SMOKE if smoke else FULL
    size = replace(size, steps=steps or size.steps, ablation_steps=ablation_steps or size.ablation_steps)
    folder = Path(os.path.abspath(out))
    report = Path(os.path.abspath(report_dir)) if report_dir else folder / "report"
    variants = chosen(names)
    left_out = {} if ceiling_codec else LEFT_OUT_CEILING
    given = {"--features-weights": features_weights, "--lpips-weights": lpips_weights}
    if dry_run:
        tell_missing({**given, "--photos": photos[0] if photos else None})
        unbuilt = Photos(str(folder / "data"), {"photos": 1}, size.heldout_images)
        configs = _configs(folder, variants, size, unbuilt, lpips_weights)
        return _tell_plan(variants, configs, size, left_out, workers)
    jobs: list[Job] = []
    if not report_only:
        weights = weights_options(given)
        folders = _folders("--photos", photos)
        top = _folders("--ceiling-codec", (ceiling_codec,))[0] if ceiling_codec else None
        measured = {"size": asdict(size), **weights, "photos": folders, "ceiling": top}
        check_plan(folder, measured)
        found = _data(folder / "data", folders, size)
        configs = _configs(folder, variants, size, found, weights["lpips_weights"])
        about = {"runs": [{"name": v.name, "label": v.label, "group": v.group, "seed": v.seed} for v in variants]}
        claim(folder, measured, list(configs.values()), about)
        jobs = _jobs(folder, variants, configs, size, found, weights, with_ceiling=top is not None)
    return run_and_report(
        folder, jobs, workers=workers, left_out=left_out,
        report=lambda: write_page("trainer.experiments.autoencoder_report", folder, report, "autoencoder.md"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the plan


def _folders(option: str, paths: Sequence[str]) -> list[str]:
    if not paths:
        raise UserError(f"{option}: give a folder of photos; repeat it for more of them")
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{option} {path}: no such folder")
    return [os.path.abspath(path) for path in paths]


def _configs(
    folder: Path, variants: Sequence[Variant], size: Size, photos: Photos, lpips_weights: str | None
) -> dict[str, RunConfig]:
    exports = str(folder / "exports")
    return {v.name: config_of(v, size, photos, lpips_weights=lpips_weights, exports=exports) for v in variants}


def _data(folder: Path, photos: Sequence[str], size: Size) -> Photos:
    """Built once. Images are kept at twice the resolution at least, which is what training decodes.

    Raises:
        UserError: the images cannot be built into datasets.
    """
    if not (folder / "split.json").exists():
        click.echo(f"building datasets of {', '.join(photos)}")
        options = ["--heldout", str(size.heldout_images), "--size", str(2 * size.resolution), "--overwrite"]
        if run_module("launch.cli", "data", "split", *photos, str(folder), *options):
            raise UserError(f"--photos {' '.join(photos)}: no datasets could be built of them; see above")
    return Photos.read(str(folder))


def _training_s(variant: Variant, config: RunConfig, size: Size) -> float:
    """Seconds of the training."""
    shares = [phase.steps * phase.batch_size * (phase.resolution / FULL.resolution) ** 2 for phase in config.phases]
    if variant.group == "lpl":
        return START_S + LPL_STEP_S * sum(shares)
    speed = 1.0 + THREADS_SHARE * (config.parallel.num_threads - 1)
    seconds = START_S + STEP_S * variant.cost * sum(shares) / speed
    if config.reconstructions is None:
        return seconds
    evaluations = sum(phase.steps for phase in config.phases) // config.reconstructions.every_steps + 1
    return seconds + evaluations * _evaluating_s(size) / speed


def _evaluating_s(size: Size) -> float:
    return START_S + (size.resolution / FULL.resolution) ** 2 * EVALUATE_S * size.heldout_images


def _tell_plan(
    variants: Sequence[Variant], configs: dict[str, RunConfig], size: Size, left_out: dict[str, str], workers: int
) -> int:
    total = 0.0
    for variant in variants:
        config = configs[variant.name]
        steps, cores = sum(phase.steps for phase in config.phases), config.parallel.num_threads
        seconds = _training_s(variant, config, size)
        total += (seconds + _evaluating_s(size)) * min(cores, workers)
        click.echo(f"{variant.name:<18} {steps:>5} steps  about {seconds / 60:4.1f} min on {counted(cores, 'core')}")
    for name, why in left_out.items():
        click.echo(f"{name:<18} left out: {why}")
    total += (len(BASELINES) + 3) * _evaluating_s(size)
    click.echo(estimate(len(variants), total, workers))
    return 0


def _jobs(
    folder: Path, variants: Sequence[Variant], configs: dict[str, RunConfig], size: Size, photos: Photos,
    weights: dict[str, str], *, with_ceiling: bool,
) -> list[Job]:  # fmt: skip
    """The long runs first; what is measured without them fills the second core."""
    jobs = []
    for variant in variants:
        name, run_dir = variant.name, folder / "runs" / variant.name
        stages = [training(folder, name, _training_s(variant, configs[name], size))]
        if variant.group != "lpl":
            stages += [export(run_dir, folder / "exports" / name), _evaluation(folder, name, size, photos, weights)]
        after = (KL,) if variant.group == "lpl" else ()
        jobs.append(Job(name, stages, str(run_dir), after=after, cores=configs[name].parallel.num_threads))
        if name == KL:
            stages = [_measured(folder, ["kl_8bit"], size), _maps(folder, size, photos)]
            jobs.append(Job("kl_measures", stages, str(folder / "measures" / KL), after=(KL,)))
    names = (*BASELINES, "ceiling") if with_ceiling else BASELINES
    jobs.append(Job("baselines", [_measured(folder, names, size)], str(folder / "measures" / "baselines")))
    return jobs


def _evaluation(folder: Path, name: str, size: Size, photos: Photos, weights: dict[str, str]) -> Stage:
    out = folder / "evaluations" / name
    command = [
        sys.executable, "-m", "launch.cli", "evaluate", "autoencoder", str(folder / "exports" / name), photos.heldout_url,
        "--out", str(out), "--size", str(size.resolution), "--count", str(photos.heldout), "--seed", "0", "--device", "cpu",
        "--lpips-network", LPIPS_NETWORK, "--lpips-weights", weights["lpips_weights"],
        "--features-weights", weights["features_weights"], "--overwrite",
    ]  # fmt: skip
    return Stage("evaluation", command, there(out / "evaluation.json"), _evaluating_s(size))


def _measured(folder: Path, names: Sequence[str], size: Size) -> Stage:
    command = [sys.executable, "-m", "trainer.experiments.autoencoder_measure", str(folder), *names]
    files = [folder / "evaluations" / name / "evaluation.json" for name in names]
    return Stage("measuring", command, lambda: all(file.exists() for file in files), len(names) * _evaluating_s(size))


def _maps(folder: Path, size: Size, photos: Photos) -> Stage:
    """What LPL masks of the KL model's decoder maps."""
    out = folder / "analysis" / KL
    command = [
        sys.executable, "-m", "launch.cli", "analyze", "latents", str(folder / "exports" / KL), photos.heldout_url,
        "--out", str(out), "--size", str(size.resolution), "--count", str(photos.heldout), "--seed", "0", "--device", "cpu",
        "--only", "outliers", "--overwrite",
    ]  # fmt: skip
    return Stage("decoder maps", command, there(out / "analysis.json"), _evaluating_s(size))
