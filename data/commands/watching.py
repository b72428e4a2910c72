"""`--watch`: how far all workers of a stage are. It asks for the stage's folder and nothing else that its command takes."""

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console

from data.stages.store import STAGE, StageStore
from trainer.errors import UserError

_PLACE = "data.commands.watching"


class StageCommand(click.Command):
    """A stage's command, whose `OUT --watch` needs none of the arguments and options that work needs.

    Its last argument is the output. What else the line says is taken and not looked at, so that `--watch` can be added to
    the command that began the work.
    """

    def watched(self, out: str, values: Mapping[str, Any]) -> str:
        """Where the stage keeps its state, by its output and options."""
        return out

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--watch" not in args or "--help" in args:
            return super().parse_args(ctx, args)
        values, more, _ = self.make_parser(ctx).parse_args(list(args))
        if not values.get("watch"):  # it was the value of another option
            return super().parse_args(ctx, args)
        if more:
            ctx.fail(f"Got unexpected extra argument ({more[0]})")
        given = [values.get(param.name or "") for param in self.params if isinstance(param, click.Argument)]
        words = [word for value in given for word in (value if isinstance(value, list | tuple) else [value])]
        if not (texts := [word for word in words if isinstance(word, str)]):
            ctx.fail("Missing argument 'OUT': --watch needs the folder that the stage writes to")
        ctx.meta[_PLACE] = self.watched(texts[-1], values)
        return []

    def invoke(self, ctx: click.Context) -> Any:
        if _PLACE not in ctx.meta:
            return super().invoke(ctx)
        watch_stage(ctx.meta[_PLACE])
        return None


def watch_stage(url: str) -> None:
    """
    Raises:
        UserError: no stage has begun there.
    """
    from data.commands.progress import watch

    if not StageStore(url).exists(STAGE):
        raise UserError(f"{url}: nothing has begun there yet; watch it once workers have started")
    watch(url, Console(stderr=True))
