"""`loupe checkpoint`: what a run has saved; is it whole; in other formats; what differs; away with it."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.runs.text import moment, printable, size
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.errors import UserError
from trainer.run_folder import CHECKPOINTS
from trainer.run_names import run_or_checkpoint

if TYPE_CHECKING:
    from trainer.checkpoint.folder import CheckpointFolder, Entry
    from trainer.checkpoint.opened import Listed, OpenedCheckpoint

DAMAGED = 1
"""Exit code of `verify` and of `diff`, as of `cmp`: there is something to tell."""
_SHOWN = 20
_ROOT = click.option(
    "--root", "roots", multiple=True, metavar="URL", show_default=False,
    help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]",
)  # fmt: skip


@click.group()
def checkpoint() -> None:
    """Look at a run's checkpoints. RUN: a run folder, its URL, or its name below a root; one checkpoint is
    RUN/checkpoints/step-..., as `ls` names it.

    \b
    Examples:
      loupe checkpoint ls runs/demo
      loupe checkpoint verify s3://bucket/runs/demo
      loupe checkpoint convert runs/demo demo.safetensors --weights ema
      loupe checkpoint diff runs/demo/checkpoints/step-00000600-c91d94ec runs/demo
      loupe checkpoint rm runs/demo --step 500
    """


@checkpoint.command("ls")
@click.argument("run")
@_ROOT
@click.option("--json", "as_json", is_flag=True, help="One object a checkpoint, in a list.")
def list_checkpoints(run: str, roots: tuple[str, ...], as_json: bool) -> None:
    """A table of RUN's checkpoints: step, time, size, whether it is complete, and whether its records and the sizes of its
    files are as they were written. `verify` reads the tensors, too. `saved` is when the storage last wrote its COMMIT file:
    a checkpoint itself holds no time, so of a copy it may be the copy's."""
    folder, only = _folder(run, roots)
    rows = [_row(folder, listed) for listed in _survey(folder, only)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"{folder.url}: no checkpoints")
        return
    table = [("step", "saved", "size", "complete", "valid", "held by", "name")]
    for row in rows:
        saved = moment(row["time"]) if isinstance(row["time"], float) else "-"
        problem = str(row["problem"])
        table.append((
            str(row["step"]), saved, size(int(str(row["bytes"]))), "yes" if row["complete"] else "no",
            "yes" if not problem else f"no: {printable(problem)}", ", ".join(row["holds"]) or "-", str(row["name"]),  # type: ignore[arg-type]
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@checkpoint.command()
@click.argument("run")
@_ROOT
@click.pass_context
def verify(ctx: click.Context, run: str, roots: tuple[str, ...]) -> None:
    """Read all of RUN's checkpoints, or the one that is named, and compare every byte with its checksum. Ends with 1 where one
    is damaged, or where there is none. One that a training deletes meanwhile is not damaged. Nothing is marked or changed."""
    from trainer.checkpoint.opened import GONE, is_gone
    from trainer.checkpoint.opened import verify as verify_all

    folder, only = _folder(run, roots)
    found = [listed for listed in _survey(folder, only) if listed.entry.committed or listed.entry.set_aside]
    damaged = gone = 0
    with _progress(sum(listed.num_bytes for listed in found), "verifying") as advance:
        for listed in found:
            where = folder.url_of(listed.entry.name)
            try:
                manifest = verify_all(folder, listed.entry, advance)
                aside = ", though it was set aside" if listed.entry.set_aside else ""
                click.echo(f"{where}: whole ({len(manifest.objects)} files, {size(listed.num_bytes)}){aside}")
            except (CorruptCheckpoint, UserError) as e:
                if is_gone(folder, listed.entry):
                    gone += 1
                    click.echo(f"{where}: {GONE}")
                    continue
                damaged += 1
                click.echo(f"{where}: DAMAGED: {printable(str(e))}")
    if not found:
        click.echo(f"{folder.url}: no checkpoints")
    ctx.exit(DAMAGED if damaged or gone == len(found) else 0)


@checkpoint.command()
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path))
@_ROOT
@click.option("--to", "form", type=click.Choice(["safetensors", "dcp"]), default="safetensors", show_default=True,
              help="One safetensors file, or a folder of torch.distributed.checkpoint.")  # fmt: skip
@click.option("--weights", type=click.Choice(["ema", "raw", "all"]), default="ema", show_default=True,
              help="The module's tensors, averaged or of the last step, by its own names; or all that is stored.")  # fmt: skip
def convert(run: str, out: Path, roots: tuple[str, ...], form: str, weights: str) -> None:
    """Write RUN's newest checkpoint, or the one that is named, as OUT, a new file or folder of this machine. Values stay as
    they are stored. `init_from.url` and `loupe sample --weights` read the file.

    \b
    Examples:
      loupe checkpoint convert runs/demo demo.safetensors
      loupe checkpoint convert runs/demo demo-dcp --to dcp --weights all
    """
    from trainer.export.checkpoint_files import chosen, to_dcp, to_safetensors

    if form == "safetensors" and out.suffix != ".safetensors":
        raise click.UsageError(f"{out}: give a name that ends in .safetensors, by which readers know it")
    opened = _open(run, roots)
    with _told(), opened.held("convert"):
        names = chosen(opened.index, opened.url, weights)
        total = sum(map(opened.num_bytes, names))
        if form == "safetensors":
            with _progress(total, "writing") as advance:
                to_safetensors(opened, out, names, advance)
        else:
            to_dcp(opened, out, names)
    click.echo(f"{out}: {len(names)} tensors of step {opened.manifest.step}, {size(total)}")


@checkpoint.command()
@click.argument("here")
@click.argument("there")
@_ROOT
@click.option("--prefix", default="", help="Compare tensors of such names alone, such as model. or ema.")
@click.pass_context
def diff(ctx: click.Context, here: str, there: str, roots: tuple[str, ...], prefix: str) -> None:
    """What differs between two checkpoints, or the newest of two runs: tensors that one side has alone, shapes, values, and the
    configs. Ends with 1 where anything differs, as `cmp` does.

    \b
    Examples:
      loupe checkpoint diff runs/a runs/b --prefix ema.
      loupe checkpoint diff runs/a/checkpoints/step-00000100-0a1b2c3d runs/a
    """
    from trainer.checkpoint.compare import compare

    first, second = _open(here, roots), _open(there, roots)
    names = {*first.index.tensors, *second.index.tensors}
    if not any(name.startswith(prefix) for name in names):
        kinds = ", ".join(sorted({f"{name.partition('.')[0]}." for name in names}))
        raise click.UsageError(f"--prefix: no tensor's name begins with {prefix}; there are {kinds}")
    total = 2 * sum(
        first.num_bytes(n) for n in first.index.tensors if n in second.index.tensors and n.startswith(prefix)
    )
    with _told(), first.held("diff"), second.held("diff"), _progress(total, "comparing") as advance:
        found = compare(first, second, prefix=prefix, on_bytes=advance)
    configs = _config_differences(first, second)
    click.echo(f"here:  {first.url}, step {first.manifest.step}\nthere: {second.url}, step {second.manifest.step}")
    for what, lines in (
        ("config", configs),
        ("tensors here alone", found.only_here),
        ("tensors there alone", found.only_there),
        ("of another type or shape", [f"{n}: {a} here, {b} there" for n, a, b in found.other_shape]),
        ("of other values (largest difference; its norm over the tensor's)",
         [f"{d.name}: {d.largest:.4g}; {d.relative:.4g}" + f"; {d.nan} NaN on one side alone" * bool(d.nan)
          for d in found.different]),
    ):  # fmt: skip
        if lines:
            click.echo(f"{what}: {len(lines)}")
            for line in lines[:_SHOWN]:
                click.echo(f"  {printable(line)}")
            if len(lines) > _SHOWN:
                click.echo(f"  and {len(lines) - _SHOWN} more")
    click.echo(f"equal bit by bit: {found.equal}")
    ctx.exit(0 if found.same and not configs else DAMAGED)


@checkpoint.command()
@click.argument("run")
@_ROOT
@click.option("--step", "steps", type=int, multiple=True, help="Delete those of this step. Repeatable.")
@click.option("--keep-last", type=click.IntRange(1), help="Delete all but the newest so many that are valid.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted.")
def rm(
    run: str, roots: tuple[str, ...], steps: tuple[int, ...], keep_last: int | None, yes: bool, dry_run: bool
) -> None:
    """Delete checkpoints: the one that is named, those of a step, or all but the newest. It is said which, and asked.

    Refused: the only valid one; one that someone holds while reading it; and, while a job has the run, its newest valid one,
    from which it would go on, and those that are not committed yet.

    \b
    Examples:
      loupe checkpoint rm runs/demo/checkpoints/step-00000500-44a6b68f
      loupe checkpoint rm runs/demo --keep-last 2 --dry-run
    """
    folder, only = _folder(run, roots)
    every = _survey(folder, None)
    chosen = _to_delete(every, only, steps, keep_last)
    if not chosen:
        click.echo("nothing to delete")
        return
    _refuse(run, roots, folder, every, chosen)
    for listed in chosen:
        state = listed.problem or "valid"
        click.echo(
            f"{folder.url_of(listed.entry.name)}: step {listed.entry.step}, {size(listed.num_bytes)}, {printable(state)}"
        )
    if dry_run:
        click.echo(f"{len(chosen)} would be deleted")
        return
    if not yes and not _confirmed(f"delete {len(chosen)}, for good?"):
        raise click.Abort
    # asked again: someone may have begun to read one while the question stood there
    _refuse(run, roots, folder, _survey(folder, None), chosen)
    with _told():
        for listed in chosen:
            folder.remove(listed.entry.name)
    click.echo(f"{len(chosen)} deleted")


# --------------------------------------------------------------------------------------------------------- what is meant


def _folder(run: str, roots: tuple[str, ...]) -> "tuple[CheckpointFolder, str | None]":
    """The run's checkpoints, and the name of the one that is meant; None: all."""
    from trainer.checkpoint.folder import CheckpointFolder

    url = run_or_checkpoint(run, roots)
    above, _, last = url.rpartition("/")
    if above.endswith(f"/{CHECKPOINTS}"):
        return CheckpointFolder(above), last
    return CheckpointFolder(f"{url}/{CHECKPOINTS}"), None


def _survey(folder: "CheckpointFolder", only: str | None) -> "list[Listed]":
    from trainer.checkpoint.opened import survey

    found = survey(folder)
    if only is None:
        return found
    one = [listed for listed in found if listed.entry.name == only]
    if not one:
        raise UserError(f"{folder.url_of(only)}: no such checkpoint; `loupe checkpoint ls` lists them")
    return one


def _open(run: str, roots: tuple[str, ...]) -> "OpenedCheckpoint":
    """The checkpoint that is named, or the run's newest valid one."""
    from trainer.checkpoint.opened import OpenedCheckpoint

    folder, only = _folder(run, roots)
    found = _survey(folder, only)
    usable = [listed.entry for listed in found if listed.valid]
    if not usable:
        why = f" ({found[-1].problem})" if found else ""
        raise UserError(f"{run}: no checkpoint that verifies{why}; `loupe checkpoint ls` lists them")
    try:
        return OpenedCheckpoint.of(folder, usable[-1])
    except CorruptCheckpoint as e:
        raise UserError(f"{e}; give another checkpoint") from e


def _row(folder: "CheckpointFolder", listed: "Listed") -> dict[str, object]:
    entry = listed.entry
    return {
        "step": entry.step, "name": entry.name, "time": _time(folder, entry), "bytes": listed.num_bytes,
        "complete": "COMMIT" in entry.sizes, "problem": listed.problem, "holds": list(entry.holds),
    }  # fmt: skip


def _time(folder: "CheckpointFolder", entry: "Entry") -> float | None:
    if "COMMIT" not in entry.sizes:
        return None
    try:
        return folder.committed_at(entry.name)
    except FileNotFoundError:  # deleted since it was listed
        return None


def _confirmed(question: str) -> bool:
    """
    Raises:
        UserError: nobody is there to answer.
    """
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        click.echo()
        raise UserError(
            "--yes: nothing was deleted, as there is no terminal to ask on; give it to delete without"
        ) from None


def _to_delete(
    every: "list[Listed]", only: str | None, steps: tuple[int, ...], keep_last: int | None
) -> "list[Listed]":
    if sum((only is not None, bool(steps), keep_last is not None)) != 1:
        raise click.UsageError("say which: a checkpoint's own folder, --step, or --keep-last")
    if keep_last is not None:
        kept = {listed.entry.name for listed in [listed for listed in every if listed.valid][-keep_last:]}
        return [listed for listed in every if listed.valid and listed.entry.name not in kept]
    found = [listed for listed in every if listed.entry.name == only or listed.entry.step in steps]
    if missing := set(steps) - {listed.entry.step for listed in found}:
        raise UserError(f"--step: no checkpoint of step {min(missing)}; `loupe checkpoint ls` lists them")
    if only is not None and not found:
        raise UserError(f"{only}: no such checkpoint; `loupe checkpoint ls` lists them")
    return found


def _refuse(
    run: str, roots: tuple[str, ...], folder: "CheckpointFolder", every: "list[Listed]", chosen: "list[Listed]"
) -> None:
    names = {listed.entry.name for listed in chosen}
    now = {listed.entry.name: listed for listed in every}
    valid = [listed.entry.name for listed in every if listed.valid]
    for name in sorted(names & now.keys()):
        if holds := now[name].entry.holds:
            raise UserError(f"{folder.url_of(name)}: held by {holds[0]}, which reads it; wait, or remove its HOLD-{holds[0]} "
                            "if that reader is gone")  # fmt: skip
    if valid and set(valid) <= names:
        raise UserError(f"{folder.url_of(valid[-1])}: the only valid checkpoint{'s are all chosen' * (len(valid) > 1)}, and "
                        "without one the training is lost; delete the run's folder if that is meant")  # fmt: skip
    who = _live(run, roots)
    if who is None:
        return
    unfinished = [name for name in names & now.keys() if "COMMIT" not in now[name].entry.sizes]
    if unfinished:
        raise UserError(f"{folder.url_of(unfinished[0])}: {who}, and may be writing it; wait until it has ended")
    if valid and valid[-1] in names:
        raise UserError(
            f"{folder.url_of(valid[-1])}: {who}, and would go on from it; wait for the next, or until it has ended"
        )


def _live(run: str, roots: tuple[str, ...]) -> str | None:
    """What has the run now; None: nothing, as far as can be told from here."""
    from launch.runs.read import read_facts
    from launch.runs.state import state_of
    from trainer.run_names import open_folder

    url = run_or_checkpoint(run, roots)
    above, _, _ = url.rpartition("/")
    facts = read_facts(open_folder(above.removesuffix(f"/{CHECKPOINTS}") if above.endswith(f"/{CHECKPOINTS}") else url))
    if facts is None:
        return None
    state = state_of(facts)
    return f"a job has the run ({printable(f'{state.word} {state.detail}').strip()})" if state.alive else None


def _config_differences(first: "OpenedCheckpoint", second: "OpenedCheckpoint") -> list[str]:
    from trainer.config.run import differences
    from trainer.run_folder import RunFolder

    runs = [checkpoint.folder.url.removesuffix(f"/{CHECKPOINTS}") for checkpoint in (first, second)]
    digests = [checkpoint.manifest.config_digest for checkpoint in (first, second)]
    found = [] if runs[0] == runs[1] else differences(*(RunFolder(url).config() for url in runs))
    if not found and digests[0] != digests[1]:
        found = [f"digest of config and data: {digests[0]} here, {digests[1]} there"]
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Damage, and storage that fails, in one line."""
    try:
        yield
    except (CorruptCheckpoint, CheckpointError) as e:
        raise UserError(f"{e}; `loupe checkpoint verify` says what else is damaged") from e


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
