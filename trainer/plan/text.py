"""A plan as a person reads it, and as JSON."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.plan import hardware
from trainer.plan.choose import DAY_S, PhasePlan, Plan
from trainer.plan.hardware import GIB

COLOURS = {
    "parameters": "blue", "gradients": "cyan", "optimizer": "green", "ema": "magenta", "gathered": "yellow",
    "bf16 weights": "bright_blue", "activations": "red", "decoder, encoders": "bright_magenta",
    "working memory": "bright_yellow", "margin": "bright_black",
}  # fmt: skip
LETTERS = dict(zip(COLOURS, "PGOEgwADx-", strict=True))
"""Of the bar, which says the same without colours."""
BAR = 60
Units = tuple[tuple[str, float, float], ...]
"""Name, what one of it is, and from how many of it on it is taken; the last wherever the others are not."""
BYTES: Units = (("GiB", GIB, 0.1), ("MiB", 2.0**20, 0.1), ("KiB", 2.0**10, 0.0))
FLOP: Units = (("TFLOP", 1e12, 0.1), ("GFLOP", 1e9, 0.1), ("MFLOP", 1e6, 0.0))
STEP_TIMES: Units = (("s", 1.0, 10.0), ("ms", 1e-3, 0.1), ("µs", 1e-6, 0.0))
TIMES: Units = (("s", 1.0, 0.1), ("ms", 1e-3, 0.0))
LENGTHS: Units = (("days", DAY_S, 0.5), ("hours", 3600.0, 0.5), ("minutes", 60.0, 0.5), ("s", 1.0, 0.0))
SIZES: Units = (("GB", 1e9, 0.1), ("MB", 1e6, 0.1), ("kB", 1e3, 0.0))


def show(plan: Plan, console: Console) -> None:
    cluster, gpu = plan.cluster, plan.cluster.gpu
    console.print(
        f"[bold]{plan.name}[/]: {plan.num_parameters / 1e6:,.1f}M parameters on {cluster.num_gpus} {gpu.name} in "
        f"{cluster.num_nodes} node{'s' * (cluster.num_nodes != 1)}, {cluster.nic_gbit_per_s:g} Gbit/s of network a GPU",
        soft_wrap=True,
    )
    console.print(f"layout: {plan.layout.in_words(cluster.num_gpus)}", highlight=False, soft_wrap=True)
    console.print(f"        {overrides(plan)}", highlight=False, soft_wrap=True)
    if not plan.written_fits:
        console.print(
            f"the recipe's own does not fit: {plan.written.in_words(cluster.num_gpus)}", style="yellow"
        )  # fmt: skip
    console.print()
    _memory(plan, console)
    _step(plan, console)
    _run(plan, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    for line in sources(plan):
        console.print(line, style="dim", highlight=False, soft_wrap=True)


def overrides(plan: Plan) -> str:
    """What to add to `loupe submit` for the chosen layout."""
    layout = plan.layout
    fields = {
        "replicas": layout.replicas,
        "activation_checkpointing": layout.recompute,
        "reshard_after_forward": str(layout.reshard).lower(),
        "micro_batch_size": layout.micro_batch,
    }
    return " ".join(f"--set parallel.{name}={value}" for name, value in fields.items())


def unit_of(values: list[float], units: Units) -> tuple[str, float]:
    """(name, what one of it is) of the unit that the largest value has."""
    largest = max(values)
    return next((name, one) for name, one, least in units if largest >= least * one or (name, one, least) == units[-1])


def number(value: float, digits: int = 2) -> str:
    """So many digits behind the point; of what they would make 0, the first digit that is none."""
    text = f"{value:,.{digits}f}"
    return f"{value:.1g}" if value and not float(text.replace(",", "")) else text


def in_unit(value: float, units: Units, digits: int = 2) -> str:
    name, one = unit_of([value], units)
    return f"{number(value / one, digits)} {name}"


def _row(
    table: Table, plan: Plan, name: str, value: Callable[[PhasePlan], float], units: Units, digits: int = 2, style: str = "",
) -> None:  # fmt: skip
    """Of all phases in one unit, which is named: a small model's row is no row of zeros."""
    values = [value(phase) for phase in plan.phases]
    unit, one = unit_of(values, units)
    cells = (number(found / one, digits) if found else "0" for found in values)
    table.add_row(Text(f"{name}, {unit}", style=style), *cells)


def _table(plan: Plan, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.phase.name, justify="right")
    return table


def _memory(plan: Plan, console: Console) -> None:
    table = _table(plan, "Memory of one GPU")
    for part, colour in COLOURS.items():
        _row(table, plan, f"{LETTERS[part]} {part}", lambda p, part=part: p.memory[part], BYTES, style=colour)  # type: ignore[misc]
    of_gpu = in_unit(plan.cluster.gpu.memory_bytes, BYTES, 1)
    _row(table, plan, f"together (of {of_gpu})", lambda p: p.memory_bytes, BYTES)
    table.add_row("", *("fits" if phase.fits else "DOES NOT FIT" for phase in plan.phases))
    console.print(table)
    for phase in plan.phases:
        console.print(Text(f"{phase.phase.name:<20.20} ").append_text(bar(phase, plan.cluster.gpu.memory_bytes)))
        if phase.mend:
            missing = in_unit(phase.memory_bytes - plan.cluster.gpu.memory_bytes, BYTES, 1)
            console.print(f"  {phase.phase.name} lacks {missing}; {phase.mend}", style="red", highlight=False)
    console.print()


def bar(phase: PhasePlan, memory_bytes: float) -> Text:
    """Memory as a stacked bar, whose whole length is the GPU; what is beyond it stands behind the mark."""
    whole, out, done = max(memory_bytes, phase.memory_bytes), Text("|"), 0
    edge, end = round(BAR * memory_bytes / whole), 0.0
    for part, colour in COLOURS.items():
        end += phase.memory[part]
        cells = round(BAR * end / whole) - done
        done += cells
        out.append(LETTERS[part] * cells, style=colour)
    out.append("." * max(edge - done, 0))
    return out.append("|" if done <= edge else f"| {phase.memory_bytes / memory_bytes:.0%}")


def _step(plan: Plan, console: Console) -> None:
    table = _table(plan, "A step")
    for part in plan.phases[0].flops:
        _row(table, plan, f"a GPU: {part}", lambda p, part=part: p.flops[part], FLOP)  # type: ignore[misc]
    for part in ("forward", "backward", "encoder", "text", "loss", "optimizer", "communication"):
        _row(table, plan, part, lambda p, part=part: getattr(p.time, part), STEP_TIMES, 1)  # type: ignore[misc]
    _row(table, plan, "together", lambda p: p.time.whole, STEP_TIMES, 1)
    _row(table, plan, "hidden: communication", lambda p: p.time.hidden, STEP_TIMES, 1)
    table.add_row("MFU, %", *(number(100 * p.mfu, 1) for p in plan.phases))
    table.add_row("images/s", *(number(p.images_per_s, 0) for p in plan.phases))
    console.print(table)
    console.print()


def _run(plan: Plan, console: Console) -> None:
    table = _table(plan, "The run")
    table.add_row("steps", *(f"{p.phase.steps:,}" for p in plan.phases))
    table.add_row("loader: cores a node", *(number(p.loader_cores, 1) for p in plan.phases))
    table.add_row("loader: MB/s a node", *(number(p.loader_bytes_per_s / 1e6, 1) for p in plan.phases))
    _row(table, plan, "checkpoint: stall", lambda p: p.checkpoint_stall_s, TIMES)
    _row(table, plan, "checkpoint: write", lambda p: p.checkpoint_write_s, TIMES, 1)
    _row(table, plan, "length", lambda p: p.days * DAY_S, LENGTHS)
    table.add_row("GPU-hours", *(_whole(p.gpu_hours) for p in plan.phases))
    price = plan.price_per_gpu_hour
    if price is not None:
        table.add_row("cost", *(_whole(p.gpu_hours * price) for p in plan.phases))
    console.print(table)
    days, hours = sum(p.days for p in plan.phases), sum(p.gpu_hours for p in plan.phases)
    cost = f", cost {_whole(hours * price)}" if price is not None else ""
    if not plan.fits:
        console.print("Does not fit: times and cost are of a layout that cannot run.", style="red")
    console.print(
        f"all phases: {in_unit(days * DAY_S, LENGTHS)}, {_whole(hours)} GPU-hours{cost}; a checkpoint is "
        f"{in_unit(plan.checkpoint_bytes, SIZES)}"
    )
    console.print()


def _whole(value: float) -> str:
    """Without digits behind the point from 10 on."""
    return number(value, 0 if value >= 10 else 2)


def sources(plan: Plan) -> list[str]:
    """Which figures are counted, from a data sheet, or assumed."""
    gpu = plan.cluster.gpu
    assumed = ", ".join(f"{name} {share:.0%}" for name, (share, _, _) in hardware.SHARES.items())
    return [
        "counted: parameters, gradients, optimizer, ema, checkpoint (exactly); activations, FLOPs (operation by operation)",
        f"data sheet: {gpu.peak_flops / 1e12:,.0f} TFLOP/s bf16, {gpu.hbm_bytes_per_s / 1e12:g} TB/s, NVLink "
        f"{gpu.nvlink_bytes_per_s / 1e9:.0f} GB/s one way; {gpu.matmul_source}: {gpu.matmul_share:.0%} of it in products",
        f"assumed: {assumed}; margin {hardware.MARGIN_SHARE:.0%} + {hardware.CONTEXT_BYTES / GIB:g} GiB; copies to the host "
        f"{hardware.HOST_COPY_BYTES_PER_S / 1e9:g} GB/s a GPU, storage {hardware.STORAGE_BYTES_PER_S / 1e9:g} GB/s a node",
        "measured on a CPU: images decoded a core-second. No figure has been compared with a run on GPUs.",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and operations, as the fields' names say."""
    tree = asdict(plan)
    for phase, of in zip(tree["phases"], plan.phases, strict=True):
        phase["phase"] = of.phase.name
        phase["steps"] = of.phase.steps
        phase["step_s"] = of.time.whole
        phase["memory_bytes"] = of.memory_bytes
        if plan.price_per_gpu_hour is not None:
            phase["cost"] = of.gpu_hours * plan.price_per_gpu_hour
    return {**tree, "fits": plan.fits, "sources": sources(plan)}
