"""A plan as a person reads it, and as JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.plan import hardware
from trainer.plan.choose import PhasePlan, Plan
from trainer.plan.hardware import GIB

COLOURS = {
    "parameters": "blue", "gradients": "cyan", "optimizer": "green", "ema": "magenta", "gathered": "yellow",
    "bf16 weights": "bright_blue", "activations": "red", "decoder, encoders": "bright_magenta",
    "working memory": "bright_yellow", "margin": "bright_black",
}  # fmt: skip
LETTERS = dict(zip(COLOURS, "PGOEgwADx-", strict=True))
"""Of the bar, which says the same without colours."""
BAR = 60


def show(plan: Plan, console: Console) -> None:
    cluster, gpu = plan.cluster, plan.cluster.gpu
    console.print(
        f"[bold]{plan.name}[/]: {plan.num_parameters / 1e6:,.1f}M parameters on {cluster.num_gpus} {gpu.name} in "
        f"{cluster.num_nodes} node(s), {cluster.nic_gbit_per_s:g} Gbit/s of network a GPU",
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


def _table(plan: Plan, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.phase.name, justify="right")
    return table


def _memory(plan: Plan, console: Console) -> None:
    table = _table(plan, "Memory of one GPU, GiB")
    for part, colour in COLOURS.items():
        name = Text(f"{LETTERS[part]} {part}", style=colour)
        table.add_row(name, *(f"{phase.memory[part] / GIB:.2f}" for phase in plan.phases))
    table.add_row(
        f"together, of {plan.cluster.gpu.memory_bytes / GIB:.1f}",
        *(f"{phase.memory_bytes / GIB:.2f}" for phase in plan.phases),
    )
    table.add_row("", *("fits" if phase.fits else "DOES NOT FIT" for phase in plan.phases))
    console.print(table)
    for phase in plan.phases:
        console.print(Text(f"{phase.phase.name:<20.20} ").append_text(bar(phase, plan.cluster.gpu.memory_bytes)))
        if phase.mend:
            missing = (phase.memory_bytes - plan.cluster.gpu.memory_bytes) / GIB
            console.print(f"  {phase.phase.name} lacks {missing:.1f} GiB; {phase.mend}", style="red", highlight=False)
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
    rows: list[tuple[str, Any]] = [
        (f"TFLOP a GPU: {part}", lambda p, part=part: f"{p.flops[part] / 1e12:.4g}") for part in plan.phases[0].flops
    ]
    rows += [
        (f"ms: {part}", lambda p, part=part: f"{getattr(p.time, part) * 1e3:.1f}")
        for part in ("forward", "backward", "encoder", "text", "loss", "optimizer", "communication")
    ]
    rows += [
        ("ms: together", lambda p: f"{p.time.whole * 1e3:.1f}"),
        ("ms hidden: communication", lambda p: f"{p.time.hidden * 1e3:.1f}"),
        ("MFU", lambda p: f"{p.mfu:.1%}"),
        ("images/s", lambda p: f"{p.images_per_s:,.0f}"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(phase) for phase in plan.phases))
    console.print(table)
    console.print()


def _run(plan: Plan, console: Console) -> None:
    table = _table(plan, "The run")
    table.add_row("steps", *(f"{p.phase.steps:,}" for p in plan.phases))
    table.add_row("loader: cores a node", *(f"{p.loader_cores:.1f}" for p in plan.phases))
    table.add_row("loader: MB/s a node", *(f"{p.loader_bytes_per_s / 1e6:.1f}" for p in plan.phases))
    table.add_row("checkpoint: stall, s", *(f"{p.checkpoint_stall_s:.2f}" for p in plan.phases))
    table.add_row("checkpoint: write, s", *(f"{p.checkpoint_write_s:.1f}" for p in plan.phases))
    table.add_row("days", *(f"{p.days:.2f}" for p in plan.phases))
    table.add_row("GPU-hours", *(f"{p.gpu_hours:,.0f}" for p in plan.phases))
    if plan.price_per_gpu_hour is not None:
        table.add_row("cost", *(f"{p.gpu_hours * plan.price_per_gpu_hour:,.0f}" for p in plan.phases))
    console.print(table)
    days, hours = sum(p.days for p in plan.phases), sum(p.gpu_hours for p in plan.phases)
    cost = f", cost {hours * plan.price_per_gpu_hour:,.0f}" if plan.price_per_gpu_hour is not None else ""
    console.print(
        f"all phases: {days:.2f} days, {hours:,.0f} GPU-hours{cost}; a checkpoint is {plan.checkpoint_bytes / 1e9:.3g} GB"
    )
    console.print()


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
