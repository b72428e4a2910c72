"""`loupe runs resume`: submit a run again as it was submitted. No torch."""

import shlex
from collections.abc import Sequence
from typing import Any

import click

from launch.job import live_job
from launch.runs.find import find_run
from launch.runs.read import RunFacts, read_all
from launch.runs.text import printable
from trainer.errors import UserError
from trainer.run_folder import CONFIG, RunFolder

NOT_AGAIN = frozenset({"recipe", "overrides", "run_dir", "fresh", "dry_run", "rehearse_preemption"})
"""Of the submission: what config.yaml and the folder itself say, and what was meant for one time."""
IN_RECORD = ("cluster", "nodes", "gpus_per_node", "cpu", "max_restarts")
"""What `job.json` says of any submission, also where it keeps no options."""


def options_of(context: click.Context) -> dict[str, Any]:
    """What was given on the command line, by parameter; for `job.json`."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in NOT_AGAIN and source not in (None, click.core.ParameterSource.DEFAULT):
            given[name] = list(value) if isinstance(value, tuple) else value
    return given


def submission_of(job: dict[str, Any], command: click.Command) -> dict[str, Any]:
    """The options of the submission that `job.json` is of, where `command` still has them."""
    options = job.get("options")
    recorded = {name: job[name] for name in IN_RECORD if job.get(name) is not None}
    given = {**recorded, **(options if isinstance(options, dict) else {})}
    code_dir = job.get("code_dir")  # not as given, which may be relative to another folder
    if code_dir and code_dir != f"{job.get('work_dir')}/code":
        given["code_dir"] = code_dir
    known = {parameter.name for parameter in command.params} - NOT_AGAIN
    return {name: value for name, value in given.items() if name in known}


def as_command(defaults: dict[str, Any], command: click.Command, arguments: Sequence[str]) -> str:
    """The options as one would write them."""
    words = []
    for parameter in command.params:
        value = defaults.get(str(parameter.name))
        if not isinstance(parameter, click.Option) or value in (None, False, [], ()):
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], str(one)]
    return shlex.join([*words, *arguments])


@click.command("resume", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--root", "roots", multiple=True, metavar="URL", help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]"
)
@click.argument("run")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def resume(roots: tuple[str, ...], run: str, options: tuple[str, ...]) -> int:
    """Submit RUN again, as it was submitted, from its newest checkpoint; OPTIONS of `loupe submit` change what they name.

    The config is the run's own. The code is that of this checkout, as with every submission.

    \b
    Examples:
      loupe runs resume demo
      loupe runs resume first --nodes 4 --time 12:00:00
      loupe runs resume first --dry-run
    """
    folder = find_run(run, roots)
    facts = read_all([folder])[0]
    check_resumable(folder, facts)
    from launch.slurm import main

    defaults = submission_of(facts.job or {}, main)
    click.echo(
        f"resuming as: loupe submit {folder.url}/{CONFIG} {printable(as_command(defaults, main, options))}", err=True
    )
    arguments = [f"{folder.url}/{CONFIG}", "--run-dir", folder.url, *options]
    with main.make_context("loupe runs resume", arguments, default_map=defaults) as context:
        code = main.invoke(context)
    return code if isinstance(code, int) else 0


def check_resumable(folder: RunFolder, facts: RunFacts) -> None:
    """
    Raises:
        UserError: the run is done, in use, or was never submitted by a launcher.
    """
    if facts.finished:
        raise UserError(
            f"{folder.url}: the run is done; another one begins with its own --run-dir, or here with --fresh"
        )
    if facts.job is None:
        why = next((text for text in facts.damage if text.startswith("job.json")), "no job.json")
        raise UserError(f"{folder.url}: how it was submitted is not known ({printable(why)}); give the whole command, "
                        f"`loupe submit {folder.url}/{CONFIG} --cluster ...`")  # fmt: skip
    cluster = facts.job.get("cluster")
    if cluster not in ("slurm", "local"):
        raise UserError(f"{folder.url}: a job of {cluster}; submit it there again with {folder.url}/{CONFIG}, "
                        "as `python launch/k8s.py --help` shows")  # fmt: skip
    live = live_job(folder)
    if live:
        raise UserError(f"{folder.url}: in use by {live}; it needs no resuming, or cancel it first")
