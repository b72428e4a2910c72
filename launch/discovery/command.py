"""`loupe discovery`: how Prometheus finds runs. No torch."""

import os
import signal
import threading

import click

from launch.lazy_group import LazyGroup
from trainer.discovery import DIR_VARIABLE, Targets

ROOT = click.option(
    "--root", "roots", multiple=True, metavar="PATH|URL", show_default=False,
    help="Folder with runs below it. Repeatable.  [default: $LOUPE_RUNS, or runs]",
)  # fmt: skip
DIR = click.option(
    "--discovery-dir", metavar="DIR", envvar=DIR_VARIABLE, show_default=False,
    help=f"The discovery folder.  [default: ${DIR_VARIABLE}]",
)  # fmt: skip


@click.group(cls=LazyGroup, lazy={
    "serve": ("launch.discovery.command:serve", "Answer Prometheus which runs are live, from their folders."),
    "show": ("launch.discovery.command:show", "What to put into prometheus.yml."),
    "prune": ("launch.discovery.command:prune", "Remove files of jobs that are gone from a discovery folder."),
})  # fmt: skip
def discovery() -> None:
    """How Prometheus finds the ranks of runs: by files in a folder that it sees too (`loupe submit --discovery-dir`), by a
    server for runs on object storage, or by a list.

    \b
    Examples:
      loupe discovery show runs/demo
      loupe discovery serve --root s3://bucket/runs
      loupe discovery prune --discovery-dir /shared/prometheus/loupe
    """


@click.command(context_settings={"show_default": True})
@ROOT
@click.option(
    "--bind", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all of this machine's."
)
@click.option("--port", default=9901, type=click.IntRange(0, 65535), help="Port; 0: any free one.")
@click.option("--every", "every_s", default=30.0, type=click.FloatRange(min=1), metavar="SECONDS",
              help="Between two looks at the folders; what is asked meanwhile gets the last one's answer.")  # fmt: skip
@click.option("--fresh", "fresh_s", default=3600.0, type=click.FloatRange(min=60), metavar="SECONDS",
              help="A run without a sign of life for so long is not live.")  # fmt: skip
@click.option("--depth", default=2, type=click.IntRange(1, 6), help="Levels of folders that are looked through.")
def serve(roots: tuple[str, ...], bind: str, port: int, every_s: float, fresh_s: float, depth: int) -> int:
    """Answer Prometheus' http_sd_configs with the ranks of all live runs below ROOT, a folder or a URL of object storage.

    A run is live from its start until the start has ended, or has given no sign of life for a while. It looks through the run
    folders now and then and answers from what it saw; a run that cannot be read for a moment keeps its targets. Of runs
    that have ended, one look in ten asks again.

    \b
    Examples:
      loupe discovery serve --root s3://bucket/runs
      loupe discovery serve --root /shared/runs --bind 0.0.0.0 --port 9901 --every 60
      curl http://127.0.0.1:9901/targets
      curl http://127.0.0.1:9901/-/healthy
    """
    from launch.discovery.live import LiveRuns
    from launch.discovery.server import PATH, DiscoveryServer, Looker
    from launch.runs.find import folders_in
    from trainer.run_names import roots_of

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    found_roots = roots_of(roots)
    for root in found_roots:
        folders_in(root, depth=1)  # a root that is mistyped, or keys that are missing, are told at once
    looker = Looker(
        LiveRuns(found_roots, fresh_s, depth).look,
        every_s=every_s,
        say=lambda line: click.echo(f"WARNING: {line}", err=True),
    )
    with DiscoveryServer(looker, address=bind, port=port) as server, looker:
        where = f"{'[' + bind + ']' if ':' in bind else bind}:{server.port}"
        click.echo(f"targets of {', '.join(found_roots)} on http://{where}{PATH}")
        ended.wait()
    return 0


@click.command()
@click.argument("run", required=False)
@ROOT
@DIR
@click.option("--kind", type=click.Choice(["file", "http", "static", "kubernetes", "all"]), default="all", show_default=True,
              help="One of them alone is a whole prometheus.yml.")  # fmt: skip
@click.option("--url", default="http://127.0.0.1:9901/targets", metavar="URL", show_default=True,
              help="Where `loupe discovery serve` answers.")  # fmt: skip
def show(run: str | None, roots: tuple[str, ...], discovery_dir: str | None, kind: str, url: str) -> None:
    """Print what to put into prometheus.yml, one of these: the files of a discovery folder, HTTP discovery, Kubernetes' own, or
    the ranks of RUN as a list, which holds until its next start.

    \b
    Examples:
      loupe discovery show
      loupe discovery show demo --kind static > prometheus.yml
      loupe discovery show --kind file --discovery-dir /shared/prometheus/loupe
    """
    from launch.discovery.snippets import KINDS, snippet
    from trainer.errors import UserError

    targets = []
    if run is not None:
        from trainer.run_names import find_run

        folder = find_run(run, roots)
        targets = _targets(folder.url)
        discovery_dir = discovery_dir or folder.config().metrics.discovery_dir
    if kind == "static" and run is None:
        raise UserError("RUN: needed with --kind static, which lists its ranks")
    if kind == "file" and not discovery_dir:
        raise UserError(f"--discovery-dir: name the folder, or set {DIR_VARIABLE}")
    words = {
        "file": "files in a folder: `loupe submit --discovery-dir`",
        "http": "runs on object storage: `loupe discovery serve --root URL`",
        "static": f"the ranks of {run}, until its next start",
        "kubernetes": "pods; with Prometheus' operator: `loupe k8s --metrics podmonitor`",
    }
    kinds = KINDS if kind == "all" else (kind,)
    for one in kinds:
        if one == "static" and run is None:
            continue
        if kind == "all":
            click.echo(f"--- # {words[one]}")
        text = snippet(one, discovery_dir=os.path.abspath(discovery_dir or _A_FOLDER), url=url, targets=targets)
        click.echo(text, nl=False)


_A_FOLDER = "/FOLDER/ON/A/SHARED/DISK"


def _targets(url: str) -> list[Targets]:
    from launch.runs.read import read_errors, read_record
    from trainer.discovery import TARGETS, public, targets_of
    from trainer.errors import UserError, one_line
    from trainer.run_folder import RunFolder

    folder = RunFolder(url)
    try:
        record = read_record(folder, TARGETS)
    except FileNotFoundError:
        raise UserError(
            f"{url}: its ranks have not begun to answer yet (no {TARGETS}); look again once it trains"
        ) from None
    except read_errors() as e:
        raise UserError(f"{url}: {one_line(e)}") from None
    if record.get("ended"):
        click.echo(f"WARNING: {public(folder.url)}: the start that these ranks were of has ended", err=True)
    return [targets_of(record, run=folder.url.rpartition("/")[2], folder=public(folder.url))]


@click.command()
@DIR
@click.option("--dry-run", is_flag=True, help="Name them only.")
def prune(discovery_dir: str | None, dry_run: bool) -> None:
    """Remove from a discovery folder the files of jobs that are gone, which a node that was lost takes along: those that
    nobody has renewed for ten minutes. A job that was only held up writes its file again.

    \b
    Examples:
      loupe discovery prune --discovery-dir /shared/prometheus/loupe --dry-run
    """
    from launch.discovery.stale import look_through
    from trainer.errors import UserError

    if not discovery_dir:
        raise UserError(f"--discovery-dir: name the folder, or set {DIR_VARIABLE}")
    removed = kept = 0
    for file, is_stale, why in look_through(discovery_dir):
        if is_stale:
            removed += 1
            if not dry_run:
                _unlink(file)
            click.echo(f"{'would remove' if dry_run else 'removed'} {os.path.basename(file)}: {why}")
        else:
            kept += 1
            if why:
                click.echo(f"kept {os.path.basename(file)}: {why}", err=True)
    click.echo(f"{discovery_dir}: {removed} {'to remove' if dry_run else 'removed'}, {kept} kept")


def _unlink(file: str) -> None:
    from trainer.errors import UserError, one_line

    try:
        os.unlink(file)
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{file}: cannot be removed ({one_line(e)})") from None
