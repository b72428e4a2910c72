"""`loupe runs show`: all that a run folder says of its run. No torch."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from launch.cancellation import CANCELLED
from launch.console import losses, where_things_are
from launch.job import slurm_jobs_of
from launch.runs.list import Row, as_json, row_of
from launch.runs.read import (
    DEADLINE_S,
    RunFacts,
    earlier_jobs,
    ended,
    ended_at,
    in_parallel,
    read_all,
    read_errors,
    read_record,
    restarts_of,
    seconds,
)
from launch.runs.state import STARTING, state_of
from launch.runs.text import ago, duration, moment, printable, size
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.manifests import read_manifest
from trainer.discovery import TARGETS, targets_of
from trainer.errors import UserError, one_line
from trainer.goodput import in_words
from trainer.restarts import WARNED
from trainer.run_folder import CHECKPOINTS, RunFolder
from trainer.run_names import find_run

MAX_RESTARTS_SHOWN = 20
MAX_STARTS_SHOWN = 4
SHORTEST_PART_S = 0.05
"""Parts of a start that take less are left out."""
MAX_TARGETS_SHOWN = 4


@click.command("show")
@click.argument("run")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
@click.option("--json", "in_json", is_flag=True, help="One JSON object, for programs.")
def show_run(run: str, roots: tuple[str, ...], in_json: bool) -> None:
    """State, progress, restarts and checkpoints of RUN: a name below a root, a run folder, or its URL.

    A checkpoint is `valid` when its COMMIT, its manifest and the sizes of all its objects agree; its tensors are not read.

    \b
    Examples:
      loupe runs show demo
      loupe runs show s3://bucket/runs/first
      loupe runs show demo --json | jq .restart_records
    """
    folder = find_run(run, roots)
    facts = read_all([folder])[0]
    now = time.time()
    row = row_of(facts, state_of(facts), now)
    if in_json:
        click.echo(json.dumps({**as_json(row), **more_in_json(row)}, indent=1))
        return
    for name, fact in facts_in_words(row, now):
        click.echo(f"{name + ':':<14} {printable(fact)}")
    for text in facts.damage:
        click.echo(f"{'damaged:':<14} {printable(text)}")
    for title, lines in (
        ("history", list(restarts_in_words(facts))),
        ("starts", starts_in_words(facts)),
        ("checkpoints", checkpoints_in_words(folder, now)),
        ("hangs", stacks_in_words(folder, facts)),
    ):
        if lines:
            click.echo(f"{title}:")
            for line in lines:
                click.echo(f"  {printable(line)}")
    for text in where_things_are(folder):
        click.echo(text)


def facts_in_words(row: Row, now: float) -> Iterator[tuple[str, str]]:
    facts, state, last = row.facts, row.state, row.facts.last
    config = facts.config.name if facts.config else facts.name
    yield "run", facts.name + (f" (config {config})" if config != facts.name else "")
    yield "state", state.word + (f" ({state.detail})" if state.detail else "")
    if last and state.word == STARTING:
        yield "step", f"{last.step} of {last.total_steps}, by the start before"
    elif last:
        yield "phase", last.phase
        yield "step", f"{last.step} of {last.total_steps}"
        yield "losses", _losses(last.raw)
        yield "speed", f"{last.images_per_s:.1f} images/s"
        yield "last metrics", f"{moment(last.time)} ({ago(last.time, now)})"
    if row.left:
        guess = "" if row.left.measured else " (~: a phase to come has not been measured yet)"
        yield "time left", f"{duration(row.left.seconds)}, until {moment(now + row.left.seconds)}{guess}"
    if row.goodput is not None:
        yield (
            "goodput",
            f"{100 * row.goodput:.1f} % of {duration(math.fsum(row.seconds.values()))}: {in_words(row.seconds)}",
        )
    if facts.first_start:
        yield "first start", moment(facts.first_start)
    yield "starts", str(facts.starts)
    reasons = Counter(reason_of(entry) for entry in _all_restarts(facts))
    if reasons:
        yield "restarts", ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    job = facts.job
    if job:
        ranks = " without GPUs" if job.get("cpu") else ""
        yield "job", f"{job.get('cluster')}, {job.get('nodes')} node(s) x {job.get('gpus_per_node')} rank(s){ranks}"
        submitted = seconds(job.get("submitted_at"))
        if submitted:
            yield "submitted", f"{moment(submitted)} from {job.get('host')}"
        end = ended_at(job)
        if end:
            yield "ended", moment(end)
        behind = slurm_jobs_of(job)[1:] if job.get("cluster") == "slurm" and state.alive else []
        if behind:
            yield (
                "behind it",
                f"SLURM job(s) {', '.join(behind)}, which go on one after the other where it ends unfinished",
            )
    targets = _targets(facts)
    if targets:
        more = f" and {len(targets) - MAX_TARGETS_SHOWN} more" if len(targets) > MAX_TARGETS_SHOWN else ""
        yield "metrics at", ", ".join(targets[:MAX_TARGETS_SHOWN]) + more


def _losses(record: dict[str, Any]) -> str:
    try:
        return losses(record)
    except (KeyError, AttributeError, TypeError, ValueError):  # a record of somebody else's making
        return "-"


def _targets(facts: RunFacts) -> list[str]:
    """URLs where the ranks of the start that is at work answer."""
    if TARGETS not in facts.files or ended(facts.job):
        return []
    try:
        record = read_record(facts.folder, TARGETS)
        found = targets_of(record, run=facts.name, folder=facts.folder.url)
    except read_errors() as e:
        facts.damage.append(one_line(e))
        return []
    return [] if record.get("ended") else [f"{found.scheme}://{target.address}/metrics" for target in found.targets]


def _all_restarts(facts: RunFacts) -> list[dict[str, Any]]:
    """Of the jobs before this one as well."""
    return [entry for job in [*earlier_jobs(facts.job), facts.job] for entry in restarts_of(job)]


def reason_of(restart: dict[str, Any]) -> str:
    if restart.get("reason") == "preempted" and restart.get("signal") == "SIGUSR2":
        return WARNED
    return str(restart.get("reason"))


def more_in_json(row: Row) -> dict[str, Any]:
    """What `loupe runs --json` has no place for."""
    facts, folder = row.facts, row.facts.folder
    checkpoints = CheckpointFolder(f"{folder.url}/{CHECKPOINTS}")
    try:
        entries = checkpoints.entries()
    except read_errors() as e:
        facts.damage.append(one_line(e))
        entries = []
    verdicts = in_parallel([partial(verdict, checkpoints, entry) for entry in entries])
    job = facts.job or {}
    return {
        "config": facts.config.name if facts.config else None,
        "losses": facts.last.raw.get("loss") if facts.last else None,
        "first_start": facts.first_start,
        "starts": facts.starts,
        "restart_records": _all_restarts(facts),
        "job": {name: job.get(name) for name in ("cluster", "nodes", "gpus_per_node", "cpu", "host", "submitted_at", "ended")},
        "slurm_jobs": slurm_jobs_of(job) if job.get("cluster") == "slurm" else [],
        "checkpoints": [
            {
                "step": entry.step, "name": entry.name, "bytes": sum(entry.sizes.values()),
                "verdict": found or f"not read within {DEADLINE_S:.0f} s", "holds": list(entry.holds),
            }
            for entry, found in zip(entries, verdicts, strict=True)
        ],
        "metrics_targets": _targets(facts),
        "damage": facts.damage,
    }  # fmt: skip


def restarts_in_words(facts: RunFacts) -> Iterator[str]:
    jobs = [*earlier_jobs(facts.job), *([facts.job] if facts.job else [])]
    events = []
    for number, job in enumerate(jobs):
        submitted = seconds(job.get("submitted_at"))
        if number and submitted is not None:
            events.append((submitted, "submitted again"))
        for entry in restarts_of(job):
            what = f"{reason_of(entry)} at step {entry.get('step')}"
            if entry.get("code") is not None and entry.get("reason") != "preempted":
                what += f": rank {entry.get('rank')} ended with code {entry.get('code')}"
            events.append((seconds(entry.get("time")) or 0.0, what))
        end, when = ended(job), ended_at(job)
        if end is not None and when is not None and end.get("code") != 0:
            how = f"ended with code {end.get('code')}" if end.get("code") != CANCELLED else "cancelled"
            # of the newest job its state above says why
            why = str(end.get("why")).removeprefix("cancelled").strip(", ()") if job is not facts.job else ""
            events.append((when, how + (f": {why}" if why else "")))
    if len(events) > MAX_RESTARTS_SHOWN:
        yield f"({len(events) - MAX_RESTARTS_SHOWN} before these)"
    for when, what in events[-MAX_RESTARTS_SHOWN:]:
        yield f"{moment(when) if when else 'at a time unknown':<19}  {what}"


def starts_in_words(facts: RunFacts) -> list[str]:
    """Of the newest starts, oldest first: when, and on what the time until the first step went."""
    names = [f"attempts/{number:04d}.json" for number in range(max(0, facts.starts - MAX_STARTS_SHOWN), facts.starts)]
    calls = [lambda name=name: start_in_words(facts.folder, name) for name in names]
    return [
        line or f"{name}: not read within {DEADLINE_S:.0f} s"
        for name, line in zip(names, in_parallel(calls), strict=True)
    ]


def start_in_words(folder: RunFolder, name: str) -> str:
    try:
        record = read_record(folder, name)
    except read_errors() as e:
        return one_line(e).removeprefix(f"{folder.url}/")
    when = seconds(record.get("time"))
    text = f"{moment(when) if when else 'at a time unknown':<19}  {seconds(record.get('world_size')) or 0:.0f} rank(s)"
    found = record.get("start_seconds")
    if not isinstance(found, dict):  # of an earlier version, still on its way, or it ended before
        return f"{text}, no first step recorded"
    parts = {str(part): seconds(value) or 0.0 for part, value in found.items()}
    told = ", ".join(f"{part} {value:.1f}" for part, value in parts.items() if value >= SHORTEST_PART_S)
    return f"{text}, first step after {sum(parts.values()):.1f} s: {told}"


def checkpoints_in_words(folder: RunFolder, now: float) -> list[str]:
    """A line for each, oldest first."""
    checkpoints = CheckpointFolder(f"{folder.url}/{CHECKPOINTS}")
    try:
        entries = checkpoints.entries()
    except read_errors() as e:
        return [one_line(e)]
    calls = [lambda entry=entry: checkpoint_in_words(checkpoints, entry, now) for entry in entries]
    lines = in_parallel(calls)
    return [
        line or f"step {entry.step:>8}  not read within {DEADLINE_S:.0f} s"
        for entry, line in zip(entries, lines, strict=True)
    ]


def checkpoint_in_words(folder: CheckpointFolder, entry: Entry, now: float) -> str:
    what = f"step {entry.step:>8}  {size(sum(entry.sizes.values())):>9}  {verdict(folder, entry):<10}"
    try:
        committed = folder.committed_at(entry.name) if entry.committed else None
    except OSError:  # deleted by retention since it was listed
        committed = None
    if committed:
        what += f"  {ago(committed, now)}"
    if entry.holds:
        what += f"  held by {', '.join(entry.holds)}"
    return f"{what}  {entry.name}"


def verdict(folder: CheckpointFolder, entry: Entry) -> str:
    """`valid`, `incomplete`, `set aside`, or what is wrong with its records. Reads no tensors."""
    if entry.set_aside:
        return "set aside"
    if not entry.committed:
        return "incomplete"
    try:
        read_manifest(folder, entry)
    except read_errors() as e:
        reason = one_line(e).removeprefix(f"{folder.url_of(entry.name)}/")
        return f"NOT VALID ({reason})"
    return "valid"


def stacks_in_words(folder: RunFolder, facts: RunFacts) -> list[str]:
    """Where the stacks of hung ranks lie."""
    if "stacks" not in facts.files:
        return []
    try:
        names = folder.names("stacks")
    except read_errors() as e:
        raise UserError(f"{folder.url}/stacks: cannot be listed ({one_line(e)})") from None
    return [f"stacks of {len(names)} file(s) in {folder.url}/stacks, newest {names[-1]}"] if names else []
