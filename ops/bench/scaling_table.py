"""The tables of docs/scaling.md: a recipe's plan from 8 GPUs to 4,096, and its data from a million images to a billion.

    python -m ops.bench.scaling_table [--recipe sd3_medium_512] [--gpu h100]

Counted once, then planned as by `loupe plan` for each number of GPUs: with the recipe's batch as long as that divides, and
with one that grows with the GPUs. Half a minute, without a GPU.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace as changed

from rich.progress import track

from trainer.config import PhaseConfig, RunConfig, replace
from trainer.errors import UserError
from trainer.experiments.results import table
from trainer.plan.choose import PhasePlan, Plan, make_plan
from trainer.plan.hardware import GIB, PHOTO_BYTES, Cluster, find_gpu
from trainer.plan.recipe import RecipeCount, count_recipe
from trainer.recipes import load

GPUS = (8, 64, 256, 512, 1024, 2048, 4096)
GROWN_FROM = 64
"""GPUs among which the recipe's batch is dealt; a batch that grows keeps the images of each."""
IMAGES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
SHARD_BYTES = 64 << 20
"""`loupe data build --shard-mib`."""
INDEX_S, INDEX_BYTES = 1.5e-5, 2.5e3
"""A shard; measured at 100,000 of them (docs/benchmarks.md)."""


def planned(run: RunConfig, count: RecipeCount, gpu: str, num_gpus: int) -> Plan:
    kind = find_gpu(gpu)
    phases = tuple(changed(of, phase=phase) for of, phase in zip(count.phases, run.phases, strict=True))
    return make_plan(run, changed(count, phases=phases), Cluster(kind, num_gpus, 8, kind.nic_gbit_per_s))


def rows_of(run: RunConfig, count: RecipeCount, gpu: str, *, grows: bool) -> Iterator[list[str]]:
    for num_gpus in track(GPUS, f"{run.name}, {'growing' if grows else 'fixed'} batch"):
        scaled = replace(run, phases=tuple(_of_gpus(phase, num_gpus) for phase in run.phases)) if grows else run
        try:
            plan = planned(scaled, count, gpu, num_gpus)
        except UserError as e:
            yield [f"{num_gpus:,}", str(e).partition(";")[0], *[""] * 6]
            continue
        yield row(plan, num_gpus)


def _of_gpus(phase: PhaseConfig, num_gpus: int) -> PhaseConfig:
    return replace(phase, batch_size=phase.batch_size * num_gpus // GROWN_FROM)


def row(plan: Plan, num_gpus: int) -> list[str]:
    def each(value: Callable[[PhasePlan], str]) -> str:
        return " / ".join(map(value, plan.phases))

    layout = plan.layout
    copies = "one copy" if layout.replicas == 1 else f"{layout.replicas} copies"
    reshard = "freed" if layout.reshard else "kept"
    return [
        f"{num_gpus:,}", f"{copies}, {reshard}, recompute {layout.recompute}, micro-batch {layout.micro_batch}",
        f"{max(p.memory_bytes for p in plan.phases) / GIB:.0f}{'' if plan.fits else ' (does not fit)'}",
        each(lambda p: f"{p.time.whole * 1e3:.0f}"), each(lambda p: f"{p.time.communication * 1e3:.0f}"),
        each(lambda p: f"{p.mfu * 100:.0f}"), each(lambda p: f"{p.images_per_s:,.0f}"),
        f"{sum(p.days for p in plan.phases):.2f}, {sum(p.gpu_hours for p in plan.phases):,.0f}",
    ]  # fmt: skip


def data_rows(plans: dict[int, Plan]) -> Iterator[list[str]]:
    """Photos as docs/benchmarks.md measured with; one pass over them in the first phase."""
    for images in IMAGES:
        shards = math.ceil(images * PHOTO_BYTES / SHARD_BYTES)
        hours = [f"{images / plan.phases[0].images_per_s / 3600:,.2g}" for plan in plans.values()]
        yield [f"{images:,}", f"{images * PHOTO_BYTES / 1e12:,.2g}", f"{shards:,}", f"{shards * INDEX_S:,.2g}",
               f"{shards * INDEX_BYTES / 1e9:,.2g}", *hours]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="sd3_medium_512")
    parser.add_argument("--gpu", default="h100")
    options = parser.parse_args()
    run = load(options.recipe)
    count = count_recipe(run)
    names = " / ".join(phase.name for phase in run.phases)
    head = ["GPUs", "layout", "GiB", "ms a step", "of it exposed", "MFU, %", "images/s", "days, GPU-hours"]
    print(f"Phases: {names}.\n\nThe recipe's batch, {' / '.join(f'{p.batch_size:,}' for p in run.phases)} images:\n")
    print("\n".join(table(head, list(rows_of(run, count, options.gpu, grows=False)))), end="\n\n")
    each = " / ".join(str(p.batch_size // GROWN_FROM) for p in run.phases)
    print(f"A batch that grows, {each} images a GPU; the recipe's number of steps:\n")
    print("\n".join(table(head, list(rows_of(run, count, options.gpu, grows=True)))), end="\n\n")
    of = {n: planned(run, count, options.gpu, n) for n in (8, 64, 512)}
    of[4096] = planned(replace(run, phases=tuple(_of_gpus(p, 4096) for p in run.phases)), count, options.gpu, 4096)
    head = ["images", "TB", "shards", "index: s", "index: GB", *(f"hours a pass, {n:,} GPUs" for n in of)]
    print("\n".join(table(head, list(data_rows(of)))))


if __name__ == "__main__":
    main()
