"""`loupe experiment table3` and the like: the tables and figures of the latent perceptual loss's paper. On this machine at a
small size, or as jobs on a cluster at the paper's. No torch: runs are processes of their own."""

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, get_args

import click

from launch.experiments.jobs import (
    START_S,
    claim,
    config_file,
    counted,
    how_long,
    run_and_report,
    run_module,
    there,
    training,
)
from launch.experiments.queue import Job, Stage
from trainer.config import CODE_ROOT
from trainer.config.evaluation import NetworkName
from trainer.config_text import suggest
from trainer.errors import UserError
from trainer.recipes.paper_exhibits import EXHIBITS, SHOWN, Exhibit, Look
from trainer.recipes.paper_trainings import FULL, SMALL, SMOKE, FullScale, PlannedTraining, Scale, SmallScale, planned
from trainer.run_folder import CHECKPOINTS

STEP_S = 0.03
"""Seconds on one core, about, of a small training's step without a perceptual loss, an image; with one, twice that."""
SAMPLE_S, LOOK_S = 0.015, 20.0
"""Of an image and sampling step with guidance; and of an evaluation, beside its sampling."""
METRICS = ("fid", "precision", "recall", "density", "coverage", "spectrum")
NETWORKS: tuple[str, ...] = get_args(NetworkName)
_NETWORK = (
    "--network: whose features the tables are of; give efficientnet_lite0=FILE, inception=FILE, ... "
    "(see `loupe evaluate run --help`)"
)
SUBMIT = "submit.sh"
EMOJI = CODE_ROOT / "data/assets/emoji_64"


def _options(command: Any) -> Any:
    for option in reversed((
        click.option("--small", is_flag=True, help="On this machine's cores, on the shipped emoji."),
        click.option("--smoke", is_flag=True, help="As --small, in seconds; the figures mean nothing."),
        click.option("--network", "networks", multiple=True, metavar="NAME=WEIGHTS",
                     help="As `loupe evaluate run` takes it; the first one's figures are shown. Repeatable."),
        click.option("--dataset", "datasets", multiple=True, metavar="NAME=URL",
                     help="Of --small: rows of Table 2 beside the emoji. Else where a dataset is, if not in datasets/. "
                     "Repeatable."),
        click.option("--latent-network", metavar="FOLDER", help="For E-LatentLPIPS, as `loupe export` writes it."),
        click.option("--out", metavar="FOLDER", help="Of the runs; what is done stays done, and all tables and figures share "
                     "it. [default: runs/experiment-paper-small, or -full]"),
        click.option("--report", "report_dir", metavar="FOLDER", help="Of the pages. [default: OUT/report]"),
        click.option("--workers", type=click.IntRange(1), default=2, help="Runs at a time, each on one core."),
        click.option("--seeds", type=click.IntRange(1), help="Of each training. [default: 3; 1 at full size]"),
        click.option("--dry-run", is_flag=True, help="Say which runs there would be; start and write nothing."),
        click.option("--report-only", is_flag=True, help="Write the pages of what is there; start no run."),
    )):  # fmt: skip
        command = option(command)
    return command


def commands() -> Iterator[click.Command]:
    """One for each table and figure, and `paper` for several at once."""
    for name, make in EXHIBITS.items():
        exhibit = make(SMALL)

        def run(name: str = name, **given: Any) -> int:
            return _run((name,), **given)

        help_text = f"""{exhibit.title}, of Berrada et al. 2025.

        The paper: {exhibit.says} Stop it with Ctrl-C; the same command goes on.

        \b
        Examples:
          loupe experiment {name} --small --dry-run
          loupe experiment {name} --small --network efficientnet_lite0=efficientnet-lite0-57934424.pth
          loupe experiment {name} --network inception=inception.pth   # the paper's size: writes jobs for a cluster
        """
        yield click.command(name, help=help_text, context_settings={"show_default": True})(_options(run))


@click.command("paper", context_settings={"show_default": True})
@click.argument("names", nargs=-1, metavar="[NAME|all]...")
@_options
def paper(names: tuple[str, ...], **given: Any) -> int:
    """Several tables and figures of the paper at once: NAMES, or those that docs/experiments/ shows.

    Trainings that they share run once. At a small size (--small) all runs are processes here; else their configs and a
    script are written, which queues them on SLURM.

    \b
    Examples:
      loupe experiment paper --small --dry-run
      loupe experiment paper --small --network efficientnet_lite0=efficientnet-lite0-57934424.pth
      loupe experiment paper all --dry-run
    """
    return _run(tuple(EXHIBITS) if "all" in names else names or SHOWN, **given)


def _run(
    names: Sequence[str], *, small: bool, smoke: bool, networks: Sequence[str], datasets: Sequence[str],
    latent_network: str | None, out: str | None, report_dir: str | None, workers: int, seeds: int | None, dry_run: bool,
    report_only: bool,
) -> int:  # fmt: skip
    for name in names:
        if name not in EXHIBITS:
            raise UserError(f"{name}: no table or figure of the paper that is here; take of {', '.join(EXHIBITS)}")
    here = small or smoke
    scale = _scale(SMOKE if smoke else SMALL if small else FULL, datasets, latent_network, seeds)
    folder = Path(os.path.abspath(out or f"runs/experiment-paper-{scale.label}"))
    exhibits = [EXHIBITS[name](scale) for name in names]
    runs, looks = _shared(scale, exhibits, str(folder / "runs"))
    _check_networks(networks, here=here)
    if dry_run:
        _tell_plan(exhibits, runs, looks, scale, workers)
        if looks and not networks:
            click.echo(f"without --dry-run it wants {_NETWORK}")
        return 0
    if looks and not networks and not report_only:
        raise UserError(_NETWORK)
    report = Path(os.path.abspath(report_dir)) if report_dir else folder / "report"
    jobs: list[Job] = []
    if not report_only:
        words = [_absolute(network) for network in networks]
        measured = {"scale": asdict(scale), "networks": words}
        claim(folder, measured, [run.config for run in runs], {})
        if not here and runs:  # what is only counted is counted here
            _write_submit(folder, runs, looks, scale, words, names)
            return 0
        jobs = list(_jobs(folder, runs, looks, scale, words))
    return run_and_report(
        folder, jobs, workers=workers, left_out={},
        report=lambda: run_module("trainer.experiments.paper_report", str(folder), str(report), *names),
    )  # fmt: skip


def _scale(scale: Scale, datasets: Sequence[str], latent_network: str | None, seeds: int | None) -> Scale:
    urls = {}
    for word in datasets:
        name, equals, url = word.partition("=")
        if not (equals and name and url):
            raise UserError(f"--dataset {word}: give NAME=URL, such as cc12m=s3://bucket/cc12m")
        urls[name] = url if "://" in url else os.path.abspath(url)
        if isinstance(scale, SmallScale) and "://" not in url and not os.path.exists(url):
            raise UserError(f"--dataset {word}: {url} is not there")
    if isinstance(scale, SmallScale):
        scale = replace(scale, datasets=(*scale.datasets, *urls))
    elif unknown := set(urls) - set(scale.datasets):
        raise UserError(f"--dataset {min(unknown)}=...: the paper's are {', '.join(scale.datasets)}")
    network = os.path.abspath(latent_network) if latent_network else scale.latent_network
    return replace(scale, dataset_urls=urls or None, latent_network=network, seeds=seeds or scale.seeds)


def _check_networks(networks: Sequence[str], *, here: bool) -> None:
    """Before trainings of hours: whether evaluations could begin.

    Raises:
        UserError: no such network, no weights given, or none there.
    """
    for word in networks:
        name, _, where = word.partition("=")
        if ":" in name:  # code of the user's own
            continue
        if name not in NETWORKS:
            raise UserError(f"--network {word}: no network {name}{suggest(name, NETWORKS)}")
        if not where:
            raise UserError(f"--network {word}: give its weights, as {name}=FILE")
        if "://" not in where and not os.path.exists(where):
            if here:
                raise UserError(f"--network {word}: {where} is not there")
            click.echo(f"WARNING: --network {word}: {where} is not on this machine; the jobs need it", err=True)


def _absolute(network: str) -> str:
    name, equals, where = network.partition("=")
    return f"{name}{equals}{where if '://' in where or not where else os.path.abspath(where)}"


# ------------------------------------------------------------------------------------------------------------- the plan


def _shared(
    scale: Scale, exhibits: Iterable[Exhibit], runs_dir: str
) -> tuple[list[PlannedTraining], dict[str, list[Look]]]:
    """All runs, pre-trainings first and then by seed, so that an early stop leaves whole comparisons; and the looks of each."""
    runs: dict[str, PlannedTraining] = {}
    looks: dict[str, dict[str, Look]] = {}
    for exhibit in exhibits:
        for look in exhibit.looks():
            for run in planned(scale, look.training, look.seed, runs_dir):
                runs.setdefault(run.name, run)
            looks.setdefault(look.run, {})[look.name] = look
    in_order = sorted(runs.values(), key=lambda run: (run.training is not None, run.seed))
    return in_order, {name: list(of.values()) for name, of in looks.items()}


def _estimates(run: PlannedTraining, looks: Sequence[Look], scale: Scale) -> tuple[float, list[float]]:
    """Seconds of training and of each look, on one core, at a small size."""
    assert isinstance(scale, SmallScale)
    share = 0.02 if scale.tiny_model else 1.0
    images = sum(phase.steps * phase.batch_size * (2 if phase.perceptual else 1) for phase in run.config.phases)
    passes = [look.num_steps * (4 if look.sampler.startswith("rk4") else 1) for look in looks]
    return START_S + share * STEP_S * images, [LOOK_S + share * SAMPLE_S * scale.num_images * n for n in passes]


def _tell_plan(
    exhibits: Sequence[Exhibit], runs: Sequence[PlannedTraining], looks: dict[str, list[Look]], scale: Scale, workers: int
) -> None:  # fmt: skip
    total = 0.0
    for run in runs:
        of = looks.get(run.name, [])
        text = f"{run.name:<36} {run.num_steps:>7,} steps  {len(of)} looks"
        if isinstance(scale, SmallScale):
            training_s, looks_s = _estimates(run, of, scale)
            total += training_s + sum(looks_s)
            text += f"  about {(training_s + sum(looks_s)) / 60:4.1f} min"
        click.echo(text)
    shown = ", ".join(exhibit.name for exhibit in exhibits)
    if not runs:
        click.echo(f"{shown}: counted here in a minute, on this machine; nothing is trained")
        return
    looked = counted(sum(map(len, looks.values())), "look")
    took = f", {how_long(total, workers)}" if total else ""
    click.echo(f"{shown}: {counted(len(runs), 'run')}, {looked} at them{took}")


def _evaluate(
    folder: Path, look: Look, scale: Scale, networks: Sequence[str], run_dir: Path, checkpoint: str | None
) -> list[str]:
    """The words of `loupe` that look at a run."""
    side = scale.resolutions[not (look.training.low or (look.training.scratch and isinstance(scale, FullScale)))]
    dataset = look.training.dataset or scale.datasets[0]
    url = (scale.dataset_urls or {}).get(dataset)
    if isinstance(scale, SmallScale):
        count, url = scale.num_images, url or str(EMOJI)
        counts = [
            "--count",
            str(count),
            "--reference-count",
            str(count),
            "--lot",
            "32",
            "--allow-few",
        ]
    else:
        url, counts = url or f"datasets/{dataset}", ["--count", "50000"]
    metrics = [*METRICS, *(["clip_score"] if any(n.startswith("clip=") for n in networks) else [])]
    weights = "ema" if look.width is None else f"ema:{look.width:g}"
    return [
        "evaluate", "run", str(run_dir) if checkpoint is None else checkpoint, "--reference", url,
        "--out", str(folder / "evaluations" / look.name), *(word for n in networks for word in ("--network", n)),
        "--metrics", ",".join(metrics), "--resamples", "0", "--no-record", "--weights", weights, "--size", str(side),
        "--sampler", look.sampler, "--steps", str(look.num_steps), "--guidance", f"{look.guidance:g}", *counts,
    ]  # fmt: skip


def _checkpoint(run_dir: Path, step: int) -> str:
    """A pattern: its name ends in a token."""
    return str(run_dir / CHECKPOINTS / f"step-{step:08d}-*")


# ------------------------------------------------------------------------------------------------------- on this machine


def _jobs(
    folder: Path, runs: Sequence[PlannedTraining], looks: dict[str, list[Look]], scale: Scale, networks: Sequence[str]
) -> Iterator[Job]:
    for run in runs:
        of = looks.get(run.name, [])
        training_s, looks_s = _estimates(run, of, scale)
        run_dir = folder / "runs" / run.name
        stages = [training(folder, run.name, training_s)]
        for look, seconds in zip(of, looks_s, strict=True):
            stages.append(
                Stage(
                    f"look {look.name.removeprefix(run.name + '-')}",
                    partial(_look_here, folder, look, scale, networks, run_dir),
                    there(folder / "evaluations" / look.name / "evaluation.json"),
                    seconds,
                )
            )
        yield Job(run.name, stages, str(run_dir), after=(run.after,) if run.after else ())


def _look_here(folder: Path, look: Look, scale: Scale, networks: Sequence[str], run_dir: Path) -> list[str]:
    """When the run is done, so that its checkpoints can be named."""
    checkpoint = None
    if look.step is not None:
        found = sorted(glob(_checkpoint(run_dir, look.step)))
        if not found:
            raise UserError(f"{run_dir}: has no checkpoint of step {look.step}, which {look.name} looks at")
        checkpoint = found[-1]
    return [sys.executable, "-m", "launch.cli", *_evaluate(folder, look, scale, networks, run_dir, checkpoint)]


# ----------------------------------------------------------------------------------------------------------- on a cluster


def _write_submit(
    folder: Path, runs: Sequence[PlannedTraining], looks: dict[str, list[Look]], scale: Scale, networks: Sequence[str],
    names: Sequence[str],
) -> None:  # fmt: skip
    """A script that queues everything: trainings after what they begin with, and a job for each look."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Queues the trainings of {', '.join(names)}, and an evaluation after each. Made by `loupe experiment`.",
        "# Start it in the folder that datasets/ and models/ are in, with a cluster's options:",
        '#   SUBMIT="--nodes 8 --gpus-per-node 8 --partition gpu" JOB="--gpus-per-task 1 --partition gpu" ' + SUBMIT,
        "# Trainings go on where they ended when it is started again, and evaluations that are done end at once.",
        "set -euo pipefail",
        'loupe="${LOUPE:-loupe}"',
        "id() { sed -n 's/^job \\([0-9][0-9]*\\).*/\\1/p' | head -n 1; }",
        "",
    ]
    variables: dict[str, str] = {}
    for run in runs:
        run_dir = folder / "runs" / run.name
        variables[run.name] = variable = f"job{len(variables)}"
        after = f' --after "${variables[run.after]}"' if run.after else ""
        config = shlex.quote(str(config_file(folder, run.name)))
        lines.append(
            f"{variable}=$($loupe submit {config} --run-dir {shlex.quote(str(run_dir))}{after} ${{SUBMIT:-}} | id)"
        )
        lines.append(f'echo "{run.name}: job ${variable}"')
        for look in looks.get(run.name, []):
            pattern = None if look.step is None else _checkpoint(run_dir, look.step)
            words = shlex.join(_evaluate(folder, look, scale, networks, run_dir, pattern))
            if pattern is not None:
                # by the shell of the job, when the checkpoint is there
                words = words.replace(shlex.quote(pattern), shlex.quote(pattern[:-1]) + "*")
                words = f"bash -c {shlex.quote(f'exec $0 {words}')} $loupe"
            else:
                words = f"loupe {words}"
            lines.append(f'$loupe job --name {shlex.quote(look.name)} --after "${variable}" ${{JOB:-}} -- {words}')
    script = folder / SUBMIT
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)
    click.echo(
        f"{len(runs)} configs in {folder / 'configs'}, {sum(map(len, looks.values()))} evaluations; queue them with:"
    )
    click.echo(f'  SUBMIT="--nodes 8 --gpus-per-node 8" JOB="--gpus-per-task 1" {script}')
    click.echo(f"and then: loupe experiment paper {' '.join(names)} --out {folder} --report-only")
