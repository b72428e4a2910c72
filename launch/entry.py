"""How our commands end: exit codes and one-line errors. No torch."""

from collections.abc import Sequence

import click

from trainer.errors import ExitCode, UserError


def run_command(command: click.Command, arguments: Sequence[str] | None = None, *, prog_name: str) -> int:
    """Run a command; a user's error is one line on stderr and exit code 2."""
    try:
        result = command.main(args=arguments, prog_name=prog_name, standalone_mode=False)
    except UserError as e:
        click.echo(f"error: {e}", err=True)
        return int(ExitCode.USAGE)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    return result if isinstance(result, int) else 0
