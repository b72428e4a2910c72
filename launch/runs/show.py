"""`loupe runs show`: all that a run folder says of its run. No torch."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

from launch.console import losses, where_things_are
from launch.runs.find import find_run
from launch.runs.list import Row, row_of
from launch.runs.read import (
    DEADLINE_S,
    READ_ERRORS,
    RunFacts,
    commit_time,
    earlier_jobs,
    ended,
    ended_at,
    in_parallel,
    read_all,
    read_record,
    restarts_of,
    seconds,
)
from launch.runs.state import state_of
from launch.runs.text import ago, duration, moment, printable, size
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.manifests import read_manifest
from trainer.errors import UserError, one_line
from trainer.run_folder import CHECKPOINTS, RunFolder

MAX_RESTARTS_SHOWN = 20
MAX_TARGETS_SHOWN = 4


@click.command("show")
@click.argument("run")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
def show_run(run: str, roots: tuple[str, ...]) -> None:
    """State, progress, restarts and checkpoints of RUN: a name below a root, a run folder, or its URL.

    A checkpoint is `valid` when its COMMIT, its manifest and the sizes of all its objects agree; its tensors are not read.

    \b
    Examples:
      loupe runs show demo
      loupe runs show s3://bucket/runs/first
    """
    folder = find_run(run, roots)
    facts = read_all([folder])[0]
    now = time.time()
    row = row_of(facts, state_of(facts), now)
    for name, fact in facts_in_words(row, now):
        click.echo(f"{name + ':':<14} {printable(fact)}")
    for text in facts.damage:
        click.echo(f"{'damaged:':<14} {printable(text)}")
    for title, lines in (
        ("restarts", list(restarts_in_words(facts))),
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
    yield "run", facts.config.name if facts.config else facts.name
    yield "state", state.word + (f" ({state.detail})" if state.detail else "")
    if last:
        yield "phase", last.phase
        yield "step", f"{last.step} of {last.total_steps}"
        yield "losses", _losses(last.raw)
        yield "speed", f"{last.images_per_s:.1f} images/s"
        yield "last metrics", f"{moment(last.time)} ({ago(last.time, now)})"
    if row.left:
        guess = "" if row.left.measured else " (~: a phase to come has not been measured yet)"
        yield "time left", f"{duration(row.left.seconds)}, until {moment(now + row.left.seconds)}{guess}"
    if row.goodput is not None:
        yield "goodput", f"{100 * row.goodput:.1f} % of the time since the first start went into steps that stand"
    if facts.first_start:
        yield "first start", moment(facts.first_start)
    yield "starts", str(facts.starts)
    reasons = Counter(str(entry.get("reason")) for entry in _all_restarts(facts))
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
    targets = _targets(facts)
    if targets:
        more = f" and {len(targets) - MAX_TARGETS_SHOWN} more" if len(targets) > MAX_TARGETS_SHOWN else ""
        yield "metrics at", ", ".join(f"http://{target}/metrics" for target in targets[:MAX_TARGETS_SHOWN]) + more


def _losses(record: dict[str, Any]) -> str:
    try:
        return losses(record)
    except (KeyError, AttributeError, TypeError, ValueError):  # a record of somebody else's making
        return "-"


def _targets(facts: RunFacts) -> list[str]:
    if "metrics_targets.json" not in facts.files or ended(facts.job):
        return []
    try:
        found = read_record(facts.folder, "metrics_targets.json").get("targets")
    except READ_ERRORS as e:
        facts.damage.append(one_line(e))
        return []
    return [str(target) for target in found] if isinstance(found, list) else []


def _all_restarts(facts: RunFacts) -> list[dict[str, Any]]:
    """Of the jobs before this one as well."""
    return [entry for job in [*earlier_jobs(facts.job), facts.job] for entry in restarts_of(job)]


def restarts_in_words(facts: RunFacts) -> Iterator[str]:
    jobs = [*earlier_jobs(facts.job), *([facts.job] if facts.job else [])]
    events = []
    for number, job in enumerate(jobs):
        submitted = seconds(job.get("submitted_at"))
        if number and submitted is not None:
            events.append((submitted, "submitted again"))
        for entry in restarts_of(job):
            what = f"{entry.get('reason')} at step {entry.get('step')}"
            if entry.get("reason") != "preempted":
                what += f": rank {entry.get('rank')} ended with code {entry.get('code')}"
            events.append((seconds(entry.get("time")) or 0.0, what))
        end, when = ended(job), ended_at(job)
        if end is not None and when is not None and end.get("code") != 0:
            events.append((when, f"ended with code {end.get('code')}: {end.get('why')}"))
    if len(events) > MAX_RESTARTS_SHOWN:
        yield f"({len(events) - MAX_RESTARTS_SHOWN} before these)"
    for when, what in events[-MAX_RESTARTS_SHOWN:]:
        yield f"{moment(when) if when else 'at a time unknown':<19}  {what}"


def checkpoints_in_words(folder: RunFolder, now: float) -> list[str]:
    """A line for each, oldest first."""
    checkpoints = CheckpointFolder(f"{folder.url}/{CHECKPOINTS}")
    try:
        entries = checkpoints.entries()
    except READ_ERRORS as e:
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
        committed = commit_time(folder, entry) if entry.committed else None
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
    except READ_ERRORS as e:
        reason = one_line(e).removeprefix(f"{folder.url_of(entry.name)}/")
        return f"NOT VALID ({reason})"
    return "valid"


def stacks_in_words(folder: RunFolder, facts: RunFacts) -> list[str]:
    """Where the stacks of hung ranks lie."""
    if "stacks" not in facts.files:
        return []
    try:
        names = folder.names("stacks")
    except READ_ERRORS as e:
        raise UserError(f"{folder.url}/stacks: cannot be listed ({one_line(e)})") from None
    return [f"stacks of {len(names)} file(s) in {folder.url}/stacks, newest {names[-1]}"] if names else []
