"""`loupe ema`: averages of another width, from what a run has stored for them."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trainer.posthoc_ema import Plan, StoredAverages

GROUP_BYTES = 4 << 30
"""Of float32 sums that are in memory at a time."""


@click.command(context_settings={"show_default": True})
@click.argument("run")
@click.option("--sigma-rel", "width", type=float, metavar="WIDTH", help="Width of the average, a share of its steps.")
@click.option("--at", "step", type=int, metavar="STEP", help="After so many steps.  [default: the newest snapshot]")
@click.option("--out", metavar="URL", help="File to write, .safetensors, at a path or any fsspec URL.")
@click.option(
    "--sweep", metavar="WIDTHS", help="Several, such as 0.03,0.05,0.1: prints what each would take, writes nothing."
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", help="Of the file.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@click.option("--root", "roots", multiple=True, metavar="URL", show_default=False,
              help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]")  # fmt: skip
def ema(
    run: str,
    width: float | None,
    step: int | None,
    out: str | None,
    sweep: str | None,
    dtype: str,
    overwrite: bool,
    roots: tuple[str, ...],
) -> None:
    """Make the average of RUN's weights that has another width, after the training. RUN: a run folder, its URL, or its name
    below a root, trained with ema.profiles and ema.snapshot_steps. docs/ema.md says what a width is.

    What is written has the model's own names: `loupe sample RUN --weights FILE` draws with it, and
    --set 'init_from={url: FILE}' begins with it. `loupe sample RUN --weights ema:0.08` needs no file.

    \b
    Examples:
      loupe ema runs/first
      loupe ema runs/first --sweep 0.03,0.05,0.08,0.1,0.15
      loupe ema runs/first --sigma-rel 0.08 --out first-0.08.safetensors
      loupe ema s3://bucket/runs/first --sigma-rel 0.12 --at 400000 --out s3://bucket/weights/first-0.12.safetensors
    """
    from trainer.errors import UserError
    from trainer.posthoc_ema import StoredAverages
    from trainer.run_names import find_run

    if sweep is not None and (width is not None or out is not None):
        raise UserError("--sweep: writes nothing; leave out --sigma-rel and --out")
    if width is not None and out is None:
        raise UserError("--out: name the file to write; to look first, take --sweep")
    if out is not None and not out.endswith(".safetensors"):
        raise UserError(f"--out: {out}: the name of a file that ends in .safetensors")
    snapshots = StoredAverages(find_run(run, roots).url)
    if sweep is None and width is None:
        _list(snapshots)
        return
    if sweep is not None:
        _sweep(snapshots, [_number(item) for item in sweep.split(",") if item.strip()], step)
        return
    assert width is not None
    assert out is not None
    plan = snapshots.plan(width, step, width_field="--sigma-rel", step_field="--at")
    click.echo(_line(plan))
    _write(snapshots, plan, out, dtype, overwrite=overwrite)


def _number(text: str) -> float:
    from trainer.errors import UserError

    try:
        return float(text)
    except ValueError:
        raise UserError(f"--sweep: {text.strip()!r} is no number; give widths such as 0.03,0.05,0.1") from None


def _list(snapshots: "StoredAverages") -> None:
    stored = snapshots.stored
    widths = ", ".join(f"{width:g}" for width in stored[-1].widths)
    total = sum(s.bytes_each * len(s.widths) for s in stored)
    click.echo(
        f"{len(stored)} snapshots of steps {stored[0].step} to {stored[-1].step}, of widths {widths}, {_size(total)}"
    )
    for line in snapshots.damaged:
        click.echo(f"left out: {line}")


def _sweep(snapshots: "StoredAverages", widths: Sequence[float], step: int | None) -> None:
    from trainer.errors import UserError

    if not widths:
        raise UserError("--sweep: names no width")
    for width in widths:
        try:
            click.echo(_line(snapshots.plan(width, step, step_field="--at")))
        except UserError as e:
            click.echo(f"not to be had: {e}")


def _line(plan: "Plan") -> str:
    return (
        f"sigma_rel {plan.width:g} at step {plan.step}: {len(plan.parts)} averages of {plan.num_snapshots} snapshots, "
        f"{_size(plan.num_bytes)} to read; profile off by {plan.error:.2%}, rounding times {plan.amplification:.2f}"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _write(snapshots: "StoredAverages", plan: "Plan", out: str, dtype: str, *, overwrite: bool) -> None:
    import torch

    from trainer.checkpoint.folder import CheckpointFolder
    from trainer.checkpoint.storage import DTYPES
    from trainer.errors import UserError
    from trainer.run_folder import make_folder
    from trainer.safetensors_stream import SafetensorsStream

    parent, _, name = out.rpartition("/")
    folder = CheckpointFolder(parent or ("/" if out.startswith("/") else "."))
    if folder.fs.exists(folder.path(name)) and not overwrite:
        raise UserError(f"--out: {out} is there already; take another name, or --overwrite")
    make_folder(folder.fs, folder.root)
    kind: torch.dtype = getattr(torch, dtype)
    records = snapshots.records()
    kinds = {name: kind if DTYPES[r.dtype].is_floating_point else DTYPES[r.dtype] for name, r in records.items()}
    about = {
        "run": snapshots.url, "step": str(plan.step), "sigma_rel": repr(plan.width), "profile_error": f"{plan.error:.3g}",
        "averages": json.dumps([[stored.step, width, round(weight, 9)] for stored, width, weight in plan.parts]),
    }  # fmt: skip
    names = sorted(records)
    with _progress(plan.num_bytes) as advance, folder.create(name) as file:
        stream = SafetensorsStream(file, {n: (records[n].size, kinds[n]) for n in names}, about)
        for group in _groups(names, {n: records[n].size for n in names}):
            for tensor_name, tensor in snapshots.read(plan, group, on_read=advance):
                stream.write(tensor_name, tensor.to(kinds[tensor_name]))
        stream.close()
    click.echo(f"wrote {out}, {_size(int(folder.fs.size(folder.path(name))))}")


def _groups(names: Sequence[str], sizes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    total = 0
    for name in names:
        num_bytes = 4 * math.prod(sizes[name])
        if groups[-1] and total + num_bytes > GROUP_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += num_bytes
    return groups


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        "reading snapshots", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=num_bytes)
        yield lambda num_bytes: bar.update(task, advance=num_bytes)
