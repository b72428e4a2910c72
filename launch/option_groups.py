"""Options under headings in `--help`: a long list has parts. No torch."""

from collections.abc import Callable
from typing import Any

import click

FIRST = "Options"


class GroupedOption(click.Option):
    """An option below the heading `group`."""

    def __init__(self, *args: Any, group: str = FIRST, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """Shows its options by heading, in the order in which headings first appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", FIRST), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def option(group: str, *names: str, **kwargs: Any) -> Callable[..., Any]:
    return click.option(*names, cls=GroupedOption, group=group, **kwargs)
