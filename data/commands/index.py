"""`loupe data index`."""

import click


@click.command()
@click.argument("url")
@click.option("--out", help="Folder or URL for the index; beside the tars when absent.")
@click.option("--overwrite", is_flag=True, help="Replace an index of tars that have changed.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="Tars read at a time.")
def index(url: str, out: str | None, overwrite: bool, threads: int) -> None:
    """Make WebDataset tars a dataset that runs can train on as they are, with images shuffled and resumed exactly.

    URL is a folder of tars, also in folders below it, or one tar: a path or a URL such as s3://bucket/laion. Each tar is read
    once; an image is a sample if it has a .txt, a .json with a caption, or a .cls. Then give URL, or --out, as the `url` of a
    dataset in a run's config.

    A broken tar is an error that says where it is broken. Interrupted, the same command goes on; when tars were added,
    it reads the new ones only (with --overwrite: a run on the old index cannot resume on the new one).

    Examples:

    \b
      loupe data index s3://bucket/laion
      loupe data index photos/00000.tar
      loupe data index s3://public/tars --out s3://bucket/tars-index
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from data.commands.shown import count
    from data.tar_index import index_tars

    console = Console(stderr=True)
    columns = (TextColumn("indexing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        found = index_tars(
            url,
            out,
            overwrite=overwrite,
            threads=threads,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    click.echo(
        f"{found.url}: {count(found.info.num_samples, 'sample')} in {count(found.num_tars, 'tar')}, "
        f"{found.num_bytes / 1e6:.2f} MB, digest {found.info.digest}; read {found.num_read} of them"
    )
    for reason, number in found.info.rejected.items():
        click.echo(f"left out: {number}, {reason}")
    for warning in found.warnings:
        click.echo(f"WARNING: {warning}")
