"""`loupe runs resume`: submit a run again as it was submitted. No torch."""

import os
import shlex
from collections.abc import Sequence
from typing import Any

import click

from launch.job import live_job
from launch.option_groups import FIRST, GroupedOption
from launch.runs.read import RunFacts, read_all
from launch.runs.text import printable
from launch.slurm_job.options import whole_path
from trainer.errors import UserError
from trainer.run_folder import CONFIG, OtherConfig, RunFolder
from trainer.run_names import find_run

NOT_AGAIN = frozenset({"recipe", "overrides", "run_dir", "fresh", "dry_run", "rehearse_preemption", "profile"})
"""Of the submission: what config.yaml and the folder itself say, and what was meant for one time."""
NOT_ONE_RUN = {"sweeps": "--array", "seeds": "--seeds", "at_once": "--at-once"}
FOR_ALL = (FIRST,)
"""Headings of options that go with any cluster."""
IN_RECORD = ("cluster", "nodes", "gpus_per_node", "cpu", "max_restarts")
"""What `job.json` says of any submission, also where it keeps no options."""


def options_of(context: click.Context) -> dict[str, Any]:
    """What was given on the command line, by parameter; for `job.json`."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in NOT_AGAIN and source not in (None, click.core.ParameterSource.DEFAULT):
            given[name] = _from_anywhere(name, list(value) if isinstance(value, tuple) else value)
    return given


def _from_anywhere(name: str, value: Any) -> Any:
    """The option's value, its paths whole: a run may be taken up again from another folder."""
    if name == "includes":
        return [os.path.abspath(path) for path in value]
    if name == "discovery_dir" and "://" not in value:
        return os.path.abspath(value)
    return whole_path(value) if name == "image" else value


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
      loupe runs resume first --profile
      loupe runs resume first --dry-run
    """
    folder = find_run(run, roots)
    facts = read_all([folder])[0]
    check_resumable(folder, facts)
    from launch.slurm import main

    defaults = submission_of(facts.job or {}, main)
    given = _given(main, folder, options)
    if several := next((flag for name, flag in NOT_ONE_RUN.items() if given.get(name)), None):
        raise UserError(f"{several}: makes other runs, and {folder.url} is one; submit them with `loupe submit`")
    if given.get("cluster", defaults.get("cluster")) == "local":
        defaults = {name: value for name, value in defaults.items() if name not in slurm_only(main)}
    click.echo(
        f"resuming as: loupe submit {folder.url}/{CONFIG} {printable(as_command(defaults, main, options))}", err=True
    )
    arguments = [f"{folder.url}/{CONFIG}", "--run-dir", folder.url, *options]
    with main.make_context("loupe runs resume", arguments, default_map=defaults) as context:
        try:
            code = main.invoke(context)
        except OtherConfig as e:
            raise UserError(f"{folder.url}: {e.differences} cannot change within a run; drop --set, or begin another run with "
                            "--run-dir and init_from.url set to this one") from None  # fmt: skip
    return code if isinstance(code, int) else 0


def _given(command: click.Command, folder: RunFolder, options: Sequence[str]) -> dict[str, Any]:
    """What the command line itself names, by parameter."""
    with command.make_context("loupe runs resume", [folder.url, *options], resilient_parsing=True) as context:
        return options_of(context)


def slurm_only(command: click.Command) -> set[str]:
    """Parameters that mean something to SLURM alone."""
    return {str(p.name) for p in command.params if isinstance(p, GroupedOption) and p.group not in FOR_ALL}


def check_resumable(folder: RunFolder, facts: RunFacts) -> None:
    """
    Raises:
        UserError: the run is done, in use, or was never submitted by a launcher.
    """
    if facts.finished:
        raise UserError(
            f"{folder.url}: the run is done and cannot be made longer; another one begins with its own --run-dir, or in this "
            f"folder, which loses this one, with `loupe submit {folder.url}/{CONFIG} --fresh`"
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
