"""Whether a change of arithmetic leaves training what it was: losses of two versions, step by step, on several seeds.

    python -m ops.bench.parity --against main~5      # this checkout's code and that of a revision
    python -m ops.bench.parity --set parallel.compile=true   # with a field changed and without
    python -m ops.bench.parity --against v1 --recipe demo --steps 200 --seeds 3 --batch-size 8

Each seed is trained twice on the same images with the same noise. Rounding parts them slowly; a mistake parts them at once,
or leads elsewhere. Printed are, of each seed, how far losses are apart at the first step, at most in the first ten, and in
the mean of the last quarter; beside them how far seeds are apart in that mean, which is what a difference is to be measured by.
Ends with 1 where the first ten steps are more than --tolerance apart, or the means more than a fifth of the seeds' spread.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.config import CODE_ROOT
from trainer.run_folder import RunFolder

FIRST = 10
OF_SPREAD = 0.2


_CONFIG = """
import sys
from trainer.config import replace
from trainer.config_text import to_yaml, with_overrides
from trainer.recipes import load
recipe, steps, batch_size, *overrides = sys.argv[1:]
config = with_overrides(load(recipe), overrides)
phase = replace(config.phases[-1], steps=int(steps), batch_size=int(batch_size), learning_rate=2e-4)
print(to_yaml(replace(config, phases=(phase,))))
"""
"""By each version's own code: a config names all fields, and an older version does not know the newer ones."""


@dataclass(frozen=True)
class Version:
    code: str
    """Its folder."""
    overrides: tuple[str, ...] = ()


def losses(version: Version, recipe: str, steps: int, batch_size: int, seed: int, folder: Path) -> list[float]:
    """Of each step of the recipe's last phase, trained from scratch.

    Raises:
        SystemExit: a loss is not finite.
    """
    overrides = (
        "samples=null", "prompt_accuracy=null", "validation=null", "metrics.every_steps=1", f"checkpoint.every_steps={steps}",
        "optim.warmup_steps=10", "parallel.num_threads=1", "data.num_workers=0", f"seed={seed}", *version.overrides,
    )  # fmt: skip
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": version.code, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    run = partial(subprocess.run, env=environment, cwd=version.code, check=True, stdout=subprocess.PIPE, text=True)
    text = run([sys.executable, "-c", _CONFIG, recipe, str(steps), str(batch_size), *overrides]).stdout
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    run([sys.executable, "-m", "trainer.train", "--config", f"{folder}/config.yaml", "--run-dir", f"{folder}/run"])
    found = [record["loss"]["loss"] for record in RunFolder(f"{folder}/run").metrics()]
    if len(found) != steps or not all(map(math.isfinite, found)):
        raise SystemExit(
            f"seed {seed} in {version.code}: {len(found)} losses of {steps} steps, or one that is not finite"
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="its last phase")
    parser.add_argument("--against", metavar="REVISION", help="of this repository: the other version's code")
    parser.add_argument(
        "--set", dest="changed", action="append", default=[], metavar="FIELD=VALUE", help="of this version alone"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the first ten steps, relative")
    options = parser.parse_args(arguments)
    if not options.against and not options.changed:
        parser.error("name another version: --against REVISION, or --set FIELD=VALUE")
    if options.seeds < 2:
        parser.error("--seeds: two at least, whose spread is the measure")
    with tempfile.TemporaryDirectory() as name:
        folder, other = Path(name), str(CODE_ROOT)
        if options.against:
            other = str(folder / "code")
            subprocess.run(
                ["git", "-C", str(CODE_ROOT), "worktree", "add", "--detach", "--quiet", other, options.against],
                check=True,
            )
        try:
            return _compare(options, folder, other)
        finally:
            if options.against:
                subprocess.run(["git", "-C", str(CODE_ROOT), "worktree", "remove", "--force", other], check=True)


def _compare(options: argparse.Namespace, folder: Path, other: str) -> int:
    last = max(1, options.steps // 4)
    versions = Version(str(CODE_ROOT), tuple(options.changed)), Version(other)
    means: list[tuple[float, float]] = []
    worst = 0.0
    print(f"{'seed':>4s} {'step 1':>9s} {f'1 to {FIRST}':>9s} {'mean loss of the end, here and there':>38s}")
    for seed in range(options.seeds):
        here, there = (
            losses(version, options.recipe, options.steps, options.batch_size, seed, folder / f"{name}-{seed}")
            for name, version in zip(("here", "there"), versions, strict=True)
        )
        apart = [abs(a / b - 1) for a, b in zip(here, there, strict=True)]
        worst = max(worst, *apart[:FIRST])
        means.append((statistics.mean(here[-last:]), statistics.mean(there[-last:])))
        print(
            f"{seed:4d} {apart[0]:9.1e} {max(apart[:FIRST]):9.1e} {means[-1][0]:18.6f} {means[-1][1]:18.6f}", flush=True
        )
    spread = statistics.stdev(there for _, there in means)
    difference = statistics.mean(here - there for here, there in means)
    print(f"means differ by {difference:+.2e} on average; seeds by {spread:.2e} (standard deviation)")
    return int(worst > options.tolerance or abs(difference) > OF_SPREAD * spread)


if __name__ == "__main__":
    sys.exit(main())
