"""`loupe doctor`: whether this machine, and the storage behind it, are fit to train on. No torch in this process."""

import dataclasses
import json
from collections.abc import Sequence

import click

from launch.doctor.checks import Finding, Status
from trainer.errors import UserError

COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "not here": "dim"}


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("recipe", required=False)
@click.option("--run-dir", metavar="PATH|URL", show_default=False,
              help="Write to this run folder, read back, delete.  [default: of RECIPE, the one it would have]")  # fmt: skip
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", show_default=False,
              help="GPUs to test, or with --cpu processes.  [default: all; 2]")  # fmt: skip
@click.option("--cpu", is_flag=True, help="A machine without GPUs.")
@click.option("--quick", is_flag=True, help="Smaller writes and shorter tests; what a job does before its ranks start.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with all figures.")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field of RECIPE. Repeatable.")
def doctor(
    recipe: str | None, run_dir: str | None, gpus: int | None, cpu: bool, quick: bool, as_json: bool, overrides: tuple[str, ...]
) -> int:  # fmt: skip
    """Whether this machine is fit to train on: packages, GPUs (memory, speed, all-reduce), memory, disks; and of RECIPE or a
    run's config.yaml, whether its datasets, its frozen networks and its run folder can be reached.

    Ends with 1 where something has failed. Each check has a deadline; one that hangs fails and is named.

    \b
    Examples:
      loupe doctor
      loupe doctor --cpu --quick
      loupe doctor demo --run-dir s3://bucket/runs/demo
      loupe doctor runs/demo/config.yaml --json
      srun --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 loupe doctor --quick
    """
    from rich.console import Console

    from launch.doctor.checks import run_checks
    from launch.doctor.device import count_gpus
    from launch.doctor.preflight import checks_for
    from launch.job import absolute_run_dir, load_config

    if overrides and recipe is None:
        raise UserError("--set: changes a field of a recipe; name one, such as `loupe doctor demo`")
    config = load_config(recipe, overrides) if recipe else None
    if recipe and config:
        run_dir, _ = absolute_run_dir(run_dir, recipe, config)
    ranks = gpus or (2 if cpu else count_gpus())
    found: list[Finding] = []
    if not ranks:
        found.append(Finding("GPUs", "failed", "nvidia-smi shows none", "give --cpu where none is meant", "node"))
    checks = checks_for(
        config, run_dir, work_dir=_local(run_dir), ranks=max(1, ranks), cpu=cpu, quick=quick, devices_too=ranks > 0
    )
    console = Console(stderr=True)
    if console.is_terminal and not as_json:
        with console.status("checking") as status:
            found += run_checks(checks, lambda name: status.update(f"waiting for {name}"))
    else:
        found += run_checks(checks)
    show(found, as_json=as_json)
    return int(any(finding.status == "failed" for finding in found))


def _local(run_dir: str | None) -> str | None:
    if run_dir is None or ("://" in run_dir and not run_dir.startswith(("file://", "local://"))):
        return None
    return run_dir.partition("://")[2] or run_dir


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        failed = any(finding.status == "failed" for finding in findings)
        click.echo(json.dumps({"fit": not failed, "findings": [dataclasses.asdict(f) for f in findings]}, indent=1))
        return
    from rich.console import Console
    from rich.text import Text

    from launch.runs.text import printable

    console = Console(soft_wrap=True)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mend = f"  [{finding.mend}]" if finding.mend and finding.status in ("warning", "failed") else ""
        line = Text(f"{finding.name:<{width}}  ")
        line.append(f"{finding.status:<8}", COLOURS[finding.status])
        line.append(f"  {printable(finding.figure)}{printable(mend)}")
        console.print(line)
    counts = {status: sum(f.status == status for f in findings) for status in ("failed", "warning")}
    said = "fit to train on" if not counts["failed"] else "not fit to train on"
    warned = f", {counts['warning']} warning(s)" if counts["warning"] else ""
    console.print(Text(f"{said}: {counts['failed']} failed{warned}" if counts["failed"] else f"{said}{warned}"))
