"""`python -m ops.dashboards`: write the dashboards' JSON, or say which differ from the code."""

from pathlib import Path

import click

from ops.dashboards.board import as_json

FOLDER = Path(__file__).parent
NAMES = ("run", "fleet", "data", "recovery", "gpu")


def built(name: str) -> str:
    """The JSON of the dashboard of this name."""
    from ops.dashboards import fleet, gpu, recovery, run, streams

    builds = {"run": run, "fleet": fleet, "data": streams, "recovery": recovery, "gpu": gpu}
    return as_json(builds[name].build())


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; end with 1 where a file is not what the code builds.")
def main(check: bool) -> None:
    """Write ops/dashboards/*.json from the code beside them.

    \b
    Examples:
      python -m ops.dashboards
      python -m ops.dashboards --check
    """
    stale = [name for name in NAMES if read(name) != built(name)]
    if check and stale:
        raise click.ClickException(
            f"{', '.join(f'{name}.json' for name in stale)}: not what the code builds; run `python -m ops.dashboards`"
        )
    for name in stale:
        (FOLDER / f"{name}.json").write_text(built(name), encoding="utf-8")
        click.echo(f"wrote ops/dashboards/{name}.json")


def read(name: str) -> str:
    path = FOLDER / f"{name}.json"
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    main()
