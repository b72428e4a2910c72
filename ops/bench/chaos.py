"""Fifty random faults on one run: does it always come back, what does it lose, how soon does it go on?

The demo with a tiny model trains under a launcher and is struck, fault after fault, each some steps after the run has
recovered from the one before; an undisturbed run of the same config comes first. From outside, as it happens to a user: signals
and kills, and files that are spoilt; nothing in the code knows of it.

preemption, time limit   SIGTERM, SIGUSR2 to the launcher; then the same command again, as a scheduler does it
rank killed, rank 0 killed, launcher killed   SIGKILL; the launcher's ranks must end with it, then the same command again
rank stopped             SIGSTOP: the watchdog must find it
killed in a save         SIGKILL of a rank as soon as a file of a new checkpoint appears
bit flip, truncation, deletion   of an object of the newest checkpoint, then SIGKILL of a rank
resize                   preempted, and on with another number of ranks, 2 or 1 (only with --resize)

Exit code 1 unless: the run completes; weights, averages, moments and the loss of every step equal the undisturbed run's, bit by
bit, or with --resize to a tolerance; told faults lose no step, others at most the interval between two checkpoints, damage one
interval more (and what was done during a save that was cut); each start goes on from the newest whole checkpoint; and job.json
accounts for every restart.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from launch.entry import run_command
from trainer.errors import UserError

if TYPE_CHECKING:
    from ops.bench.chaos_checks import Check
    from ops.bench.chaos_faults import Struck
    from ops.bench.chaos_jobs import Job

RESULTS = "results.json"
STEPS_A_FAULT, STEPS_AFTER = 10, 20
"""Of the run."""
LEAST_AFTER, MOST_AFTER = 3, 7
"""New steps that a recovered run has until the next fault, which takes some more until it strikes. Fewer would keep it from a
newer checkpoint for three restarts in a row, after which a run ends."""
INTERVAL = 5
RANKS = 2

Say = Callable[["Struck", int], None]


@dataclass
class Outcome:
    struck: "list[Struck]"
    checks: "list[Check]"
    goodput: float | None
    undisturbed_goodput: float | None
    steps: int
    wall_s: float
    undisturbed_s: float

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)


def kinds_for(job: "Job", faults: int, rng: random.Random, *, resize: bool, only: Sequence[str] = ()) -> list[str]:
    """As many of each kind as of every other, or one more, in random order.

    Raises:
        UserError: `only` names kinds that this job cannot be struck by, or none of ours.
    """
    from ops.bench.chaos_faults import KINDS, LAUNCHER, RESIZE

    kinds = [kind for kind in KINDS if kind != LAUNCHER or job.launcher_dies] + ([RESIZE] if resize else [])
    if wrong := set(only) - set(kinds):
        raise UserError(f"--kind {', '.join(sorted(wrong))}: here there are {', '.join(kinds)}")
    kinds = [kind for kind in kinds if not only or kind in only]
    rng.shuffle(kinds)
    deck = (kinds * (faults // len(kinds) + 1))[:faults]
    rng.shuffle(deck)
    return deck


def undisturbed_run(job: "Job", ranks: int = RANKS) -> float:
    """Seconds that it took."""
    from ops.bench.chaos_faults import wait_done
    from ops.bench.chaos_jobs import Broken, ending

    began = time.monotonic()
    with ending(job):
        job.begin(ranks)
        if (code := wait_done(job)) != 0:
            raise Broken(f"{job.folder.url}: the undisturbed run ended with {code}")
    return time.monotonic() - began


def disturbed_run(job: "Job", kinds: Sequence[str], rng: random.Random, say: Say) -> "tuple[list[Struck], int]":
    """(what happened, exit code of the job)."""
    from ops.bench.chaos_faults import Striker, wait_done
    from ops.bench.chaos_jobs import ending

    striker = Striker(job, rng, ranks=RANKS, interval=INTERVAL)
    struck: list[Struck] = []
    with ending(job):
        job.begin(RANKS)
        for i, kind in enumerate(kinds):
            # the first checkpoint must be there to be damaged
            struck.append(
                striker.strike(kind, after=rng.randint(LEAST_AFTER, MOST_AFTER) + (2 * INTERVAL if i == 0 else 0))
            )
            say(struck[-1], i)
        return struck, wait_done(job)


def outcome_of(
    job: "Job",
    undisturbed: "Job",
    struck: "list[Struck]",
    code: int,
    *,
    steps: int,
    wall_s: float,
    undisturbed_s: float,
) -> Outcome:
    from ops.bench import chaos_checks as checks
    from ops.bench.chaos_faults import RESIZE, Steps

    exactly = all(s.kind != RESIZE for s in struck)
    starts, whole = Steps(job.folder), Steps(undisturbed.folder)
    starts.poll()
    whole.poll()
    found = [
        checks.complete(job.folder, code, steps),
        checks.same_weights(job.folder, undisturbed.folder, exactly=exactly),
        checks.same_losses(starts.by_start, whole.by_start, exactly=exactly),
        checks.bounded_losses(struck),
        checks.from_the_newest(struck),
        checks.accounted(job.folder, struck),
    ]
    return Outcome(
        struck,
        found,
        checks.goodput_of(job.folder),
        checks.goodput_of(undisturbed.folder),
        steps,
        wall_s,
        undisturbed_s,
    )


def measure(
    out: Path, faults: int, seed: int, *, resize: bool, only: Sequence[str], watchdog_s: float, cluster: str, say: Say
) -> Outcome:
    """Both runs, in `out`.

    Args:
        only: kinds of faults; none: all.

    Raises:
        Broken: a run does what no fault explains; their logs are in `out`.
        UserError: `only` names kinds that there are not, or there is no SLURM.
    """
    from launch import snapshot
    from ops.bench.chaos_jobs import LocalJob, settings

    steps = faults * STEPS_A_FAULT + STEPS_AFTER + 2 * INTERVAL
    overrides = settings(steps, INTERVAL, seed, watchdog_s)
    snapshot.take(out / "code")
    rng = random.Random(seed)

    @contextmanager
    def jobs() -> "Iterator[tuple[Job, Job]]":
        if cluster == "slurm":
            from ops.bench.chaos_slurm import slurm_jobs

            with slurm_jobs(out, overrides, max_restarts=faults) as two:
                yield two
        else:
            yield (LocalJob(out / "undisturbed", out / "code", overrides, max_restarts=0),
                   LocalJob(out / "disturbed", out / "code", overrides, max_restarts=faults))  # fmt: skip

    with jobs() as (undisturbed, job):
        kinds = kinds_for(job, faults, rng, resize=resize, only=only)
        undisturbed_s = undisturbed_run(undisturbed)
        began = time.monotonic()
        struck, code = disturbed_run(job, kinds, rng, say)
        wall_s = time.monotonic() - began
        return outcome_of(job, undisturbed, struck, code, steps=steps, wall_s=wall_s, undisturbed_s=undisturbed_s)


# ------------------------------------------------------------------------------------------------------------- in words


def row(s: "Struck", i: int) -> str:
    return (
        f"{i + 1:3}  {s.kind:16} {s.ranks} ranks  step {s.step:4}  lost {s.lost:2} of {s.allowed:2}  "
        f"noticed {s.noticed_s:5.1f} s  new step {s.new_step_s:5.1f} s  {s.detail}"
    )


def table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def in_words(outcome: Outcome) -> str:
    from ops.bench.chaos_checks import COLUMNS, medians

    percent = ["unknown" if g is None else f"{g:.1%}" for g in (outcome.goodput, outcome.undisturbed_goodput)]
    lost = sum(s.lost for s in outcome.struck)
    lines = [
        "",
        table([COLUMNS, *medians(outcome.struck)]),
        "",
        f"{lost} of {outcome.steps} steps lost, {outcome.wall_s:.0f} s (undisturbed {outcome.undisturbed_s:.0f} s); "
        f"goodput {percent[0]} (undisturbed {percent[1]})",
    ]
    lines += [f"{'ok' if check.holds else 'FAILED':7} {check.name}: {check.found}" for check in outcome.checks]
    return "\n".join(lines)


def results(outcome: Outcome, **given: Any) -> dict[str, Any]:
    return {
        **given, "steps": outcome.steps, "interval": INTERVAL, "wall_s": outcome.wall_s,
        "undisturbed_s": outcome.undisturbed_s, "goodput": outcome.goodput,
        "undisturbed_goodput": outcome.undisturbed_goodput, "load_average": os.getloadavg(), "cores": os.cpu_count(),
        "faults": [{**asdict(s), "lost": s.lost} for s in outcome.struck],
        "checks": [asdict(check) for check in outcome.checks], "holds": outcome.holds,
    }  # fmt: skip


@contextmanager
def shown(faults: int) -> Iterator[Say]:
    """A line a fault; on a terminal also a bar."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    if not console.is_terminal:
        yield lambda s, i: print(row(s, i), flush=True)
        return
    with Progress(console=console) as progress:
        task = progress.add_task("faults", total=faults)

        def say(s: "Struck", i: int) -> None:
            progress.console.print(row(s, i), markup=False, highlight=False)
            progress.update(task, completed=i + 1)

        yield say


@contextmanager
def folder_of(out: str | None) -> Iterator[Path]:
    if out is None:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        keep = False
        try:
            yield folder
        except Exit:
            # the logs say what it was
            keep = True
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return
    folder = Path(out).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {out}: is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--faults", default=50, type=click.IntRange(min=1), help="So many, one after the other.")
@click.option(
    "--seed", default=0, type=click.IntRange(min=0), help="Of the order of faults, of what they hit, and of the run."
)
@click.option(
    "--resize", is_flag=True, help="Among them changes of the number of ranks, 2 or 1; equality is to a tolerance."
)
@click.option("--kind", "only", multiple=True, metavar="KIND", help="Only these, such as 'rank killed'. Repeatable.")
@click.option("--cluster", type=click.Choice(["local", "slurm"]), default="local",
              help="Under the local supervisor, or on a real SLURM of two nodes that is started for this.")  # fmt: skip
@click.option("--watchdog-s", default=10.0, type=click.FloatRange(min=1), help="watchdog.min_s of the run.")
@click.option("--out", metavar="FOLDER", show_default=False,
              help="For the runs, their logs and results.json; new or empty.  [default: a temporary one]")  # fmt: skip
def main(
    faults: int, seed: int, resize: bool, only: tuple[str, ...], cluster: str, watchdog_s: float, out: str | None
) -> int:
    """Strike a small run of the demo with random faults, one after the other, and compare it with an undisturbed one.

    Ends with 1 unless the run completes, equals the undisturbed one bit by bit (with --resize to a tolerance), loses no more
    steps than checkpoints and saves explain, and accounts for every restart. Prints what each fault cost.

    \b
    Examples:
      python -m ops.bench.chaos
      python -m ops.bench.chaos --faults 10 --seed 3 --out runs/chaos
      python -m ops.bench.chaos --faults 20 --resize
      python -m ops.bench.chaos --faults 6 --kind "bit flip" --kind "killed in a save"
      python -m ops.bench.chaos --faults 10 --cluster slurm
    """
    from ops.bench.chaos_jobs import Broken

    if resize and cluster == "slurm":
        raise UserError("--resize: goes with --cluster local")
    with folder_of(out) as folder, shown(faults) as say:
        try:
            outcome = measure(
                folder, faults, seed, resize=resize, only=only, watchdog_s=watchdog_s, cluster=cluster, say=say
            )
        except Broken as e:
            click.echo(f"FAILED: {e}", err=True)
            if out is None:
                click.echo(f"the runs and their logs are left in {folder}", err=True)
            raise Exit(1) from None
        given = {"seed": seed, "resize": resize, "cluster": cluster, "watchdog_s": watchdog_s}
        (folder / RESULTS).write_text(json.dumps(results(outcome, **given), indent=1) + "\n")
        click.echo(in_words(outcome))
    return 0 if outcome.holds else 1


if __name__ == "__main__":
    sys.exit(run_command(main, prog_name="python -m ops.bench.chaos"))
