"""`loupe gallery`: a page that draws with one or two runs, also while they train."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import click

from trainer.errors import UserError

PORT = 8095


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("sources", metavar="RUN|CHECKPOINT [RUN2|CHECKPOINT2]", nargs=-1, required=True)
@click.option("--root", "roots", multiple=True, metavar="URL", show_default=False,
              help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]")  # fmt: skip
@click.option("--weights", multiple=True, default=("ema",), metavar="ema|raw|ema:SIGMA", show_default="ema",
              help="The average, the last step's, or the average of another width; twice: of each run.")  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--host", default="127.0.0.1", help="Address to listen on. Any but this machine's own lets others in.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, help="0: any that is free.")
@click.option("--poll", "poll_s", type=click.FloatRange(0.1, 3600), default=10.0, metavar="SECONDS",
              help="Between two looks for newer checkpoints.")  # fmt: skip
def gallery(
    sources: Sequence[str], roots: tuple[str, ...], weights: tuple[str, ...], device: str, host: str, port: int,
    poll_s: float,
) -> None:  # fmt: skip
    """Serve a page with a prompt box that draws with the newest weights of RUN, or with two runs side by side at the same
    seed. A newer checkpoint is taken up when the run has saved it; a checkpoint named by itself stays.

    It needs the extra `gallery`. Ctrl-C ends it.

    \b
    Examples:
      loupe gallery runs/demo
      loupe gallery runs/with-lpl runs/without-lpl --port 8100
      loupe gallery runs/demo runs/demo --weights ema --weights raw
      ssh -L 8095:localhost:8095 NODE    # then http://localhost:8095 shows the gallery of that machine
    """
    if find_spec("nicegui") is None:
        raise UserError("loupe gallery needs NiceGUI; pip install -e '.[gallery]' in the checkout")
    if len(sources) > 2:
        raise UserError(f"{len(sources)} runs; give one or two")
    if len(weights) not in (1, len(sources)):
        raise UserError(
            f"--weights: given {len(weights)} times for {len(sources)} runs; give it once, or once for each"
        )
    from trainer.checkpoint.folder import NAME
    from trainer.evaluate.codec_report import choose_device
    from trainer.gallery.gallery import Gallery
    from trainer.gallery.live_run import LiveRun
    from trainer.gallery.server import is_loopback, listening, server_of
    from trainer.run_folder import CHECKPOINTS
    from trainer.run_names import run_or_checkpoint

    place, loopback = choose_device(device), is_loopback(host)
    with listening(host, port) as found:
        if not loopback:
            click.echo(
                f"WARNING: whoever reaches {host} can draw, without a password; ssh -L needs no --host", err=True
            )
        runs = []
        for number, source in enumerate(sources):
            named = source.rstrip("/")
            parent, _, name = named.rpartition("/")
            alone = NAME.fullmatch(name) and os.path.basename(parent) != CHECKPOINTS  # a copy outside of its run
            url = named if alone else run_or_checkpoint(named, roots)
            runs.append(LiveRun(url, place, weights=weights[number % len(weights)]))
            click.echo(runs[-1].title)
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{found.getsockname()[1]}/"
        server = server_of(Gallery(runs, poll_s=poll_s), only_loopback=loopback, on_ready=lambda: click.echo(url))
        server.run(sockets=[found])
