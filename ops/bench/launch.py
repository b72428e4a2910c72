"""How long a run takes to start, to stop with a save, and to come back; what saves cost it; what a restore reads.

    python -m ops.bench.launch                               # everything on this machine
    python -m ops.bench.launch restart stall --repeats 5     # two of the parts
    python -m ops.bench.launch restart --cluster slurm       # as jobs of a real SLURM with two nodes, the tests' own
    python -m ops.bench.launch reads

restart   the demo cut small, its first phase: submission to the first line of the log and to the first step; SIGTERM to the
          durable checkpoint, to the end, to the first new step; and on what the time from a start to its first step went
start     the same of the whole demo
compile   the same with torch.compile: the first start compiles, the second finds the kept cache
stall     the whole demo with a save every few steps, in the background and waited for, in turns: how long training stands
          still, and how much longer the steps are that are made beside the writing, as a share of 200 steps
reads     bytes that a restore reads from S3 over the checkpoint's size, beside torch's own reader (ops.bench.checkpoint_reads)

Runs are real ones: two ranks, by `launch/slurm.py`, each in a folder of its own below --work. Figures are medians.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ops.bench import checkpoint_reads
from ops.bench.launch_runs import Cycle, LocalRun, Saves, SlurmRun, Submitted, cycle, measure_saves

LONG = ("phases.low_resolution.steps=100000", "metrics.every_steps=1", "checkpoint.every_steps=100000")
"""It does not end by itself, and tells each step."""
SMALL = (
    *LONG, "task.model.num_blocks=2", "task.model.num_heads=2", "task.model.head_dim=16", "task.text.width=32",
    "task.text.num_blocks=1", "task.text.num_heads=2", "phases.low_resolution.batch_size=8",
)  # fmt: skip
PARTS = ("restart", "start", "compile", "stall", "reads")
STEPS = 3
"""That a run makes before it is stopped."""
SAVE_EVERY = 10
STEPS_BETWEEN_SAVES = 200
"""That the shares are of."""


def settings(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def cycles(
    make: Callable[[Path, list[str]], Submitted], work: Path, overrides: Sequence[str], repeats: int
) -> list[Cycle]:
    return [cycle(make(work / str(i), settings(overrides)), steps=STEPS) for i in range(repeats)]


def median_cycle(found: Sequence[Cycle]) -> Cycle:
    """Each figure's own median; of parts that not all starts had, 0 where one had none."""

    def middle(figure: Callable[[Cycle], float]) -> float:
        return statistics.median(map(figure, found))

    starts = []
    for number in (0, 1):
        names = dict.fromkeys(name for one in found for name in one.starts[number])
        starts.append({name: statistics.median(one.starts[number].get(name, 0.0) for one in found) for name in names})
    return Cycle(
        middle(lambda c: c.first_line), middle(lambda c: c.first_step), middle(lambda c: c.durable), middle(lambda c: c.ended),
        middle(lambda c: c.next_step), middle(lambda c: c.held), starts,
    )  # fmt: skip


def cycle_table(title: str, found: Sequence[Cycle]) -> str:
    one = median_cycle(found)
    rows = [
        ("submission to the first line of the log", one.first_line),
        ("submission to the first step", one.first_step),
        ("SIGTERM to the durable checkpoint", one.durable),
        ("SIGTERM to the end of all ranks", one.ended),
        ("SIGTERM to the first new step", one.next_step),
    ]
    if one.held:
        rows.append(("  of it held back by the scheduler", one.held))
    lines = [f"{title}; seconds, median of {len(found)}", *(f"  {name:<44}{value:>8.2f}" for name, value in rows)]
    lines.append(f"  {'from a start to its first step':<44}{'first':>8}{'again':>8}")
    for name in dict.fromkeys([*one.starts[0], *one.starts[1]]):
        cells = "".join(f"{start.get(name, 0.0):>8.2f}" for start in one.starts)
        lines.append(f"    {name:<42}{cells}")
    return "\n".join(
        [*lines, f"    {'together':<42}" + "".join(f"{sum(start.values()):>8.2f}" for start in one.starts)]
    )


def stall_table(background: Sequence[Saves], waiting: Sequence[Saves]) -> str:
    lines = [f"a save of the whole demo, median of {len(background)} run(s){'background':>16}{'waited for':>12}"]

    def row(name: str, figure: Callable[[Saves], float], form: str) -> None:
        cells = (form.format(statistics.median(map(figure, runs))) for runs in (background, waiting))
        lines.append(f"  {name:<49}" + "".join(f"{cell:>12}" for cell in cells))

    row("a step", lambda s: s.step_s, "{:.3f} s")
    row("training stands still", lambda s: s.stall_s, "{:.4f} s")
    row("steps beside the writing are longer by", lambda s: s.beside_s, "{:.3f} s")
    row(f"share at a save every {STEPS_BETWEEN_SAVES} steps", lambda s: s.share(STEPS_BETWEEN_SAVES), "{:.3%}")
    row("  longer steps included", lambda s: s.share_with_slower_steps(STEPS_BETWEEN_SAVES), "{:.3%}")
    return "\n".join(lines)


def measure_stall(work: Path, repeats: int, steps: int) -> str:
    found: dict[bool, list[Saves]] = {True: [], False: []}
    for i in range(repeats):
        for in_background in (True, False):
            overrides = (
                *LONG[:2],
                f"checkpoint.every_steps={SAVE_EVERY}",
                f"checkpoint.asynchronous={in_background}".lower(),
            )
            run = LocalRun(work / f"{i}-{in_background}", "demo", settings(overrides))
            found[in_background].append(measure_saves(run, every=SAVE_EVERY, steps=steps))
    return stall_table(found[True], found[False])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"{', '.join(PARTS)}; all if absent"
    )
    parser.add_argument("--cluster", choices=["local", "slurm"], default="local", help="for restart, start and compile")
    parser.add_argument("--repeats", type=int, default=3, help="of restart and start; compile and stall are made once")
    parser.add_argument("--stall-steps", type=int, default=70, help="of each run whose saves are measured")
    parser.add_argument("--work", help="folder for the runs, kept; a temporary one when absent")
    options = parser.parse_args()
    parts = options.parts or (PARTS if options.cluster == "local" else ("restart",))
    with ExitStack() as stack:
        work = Path(options.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="loupe-bench-"))).absolute()

        def make(run_dir: Path, arguments: list[str]) -> Submitted:
            return LocalRun(run_dir, "demo", arguments)

        if options.cluster == "slurm":
            from tests.slurm_cluster import slurm_cluster

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
            cluster = stack.enter_context(slurm_cluster(folder))

            def make(run_dir: Path, arguments: list[str]) -> Submitted:
                return SlurmRun(cluster, run_dir, "demo", arguments)

        where = "2 ranks on this machine" if options.cluster == "local" else "SLURM, 2 nodes with a rank each"
        for part, title, overrides, repeats in (
            ("restart", "the demo cut small", SMALL, options.repeats),
            ("start", "the whole demo", LONG, options.repeats),
            ("compile", "the whole demo, compiled", (*LONG, "parallel.compile=true"), 1),
        ):
            if part in parts:
                print(cycle_table(f"{title}, {where}", cycles(make, work / part, overrides, repeats)), flush=True)
        if "stall" in parts:
            print(measure_stall(work / "stall", 1, options.stall_steps), flush=True)
        if "reads" in parts:
            print("bytes read on a restore from S3 over the checkpoint's size")
            print(checkpoint_reads.table(checkpoint_reads.run(256, 3, [(2, 2), (2, 1), (1, 2)])), flush=True)


if __name__ == "__main__":
    main()
