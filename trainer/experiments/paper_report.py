"""A page for each table and figure of the paper: ours beside the paper's, a picture, and all figures as JSON. Every sentence
with a result in it is made from the figures.

    python -m trainer.experiments.paper_report OUT REPORT NAME...
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ExitCode, UserError
from trainer.experiments import paper_flops, paper_plots
from trainer.experiments.paper_results import SPECTRA, PaperResults, baseline_of
from trainer.experiments.report import notes
from trainer.experiments.results import Spread, table
from trainer.recipes.paper_exhibits import EXHIBITS, Exhibit, Point
from trainer.recipes.paper_trainings import SmallScale
from trainer.whole_files import write_whole


def write_pages(folder: Path, target: Path, names: Sequence[str]) -> list[Path]:
    """Raises:
    UserError: the folder holds no experiment of the paper.
    """
    results = PaperResults(folder)
    pages = []
    for name in names:
        exhibit = EXHIBITS[name](results.scale)
        if exhibit.kind == "flops":
            lines, figures = paper_flops.page(exhibit)
        else:
            picture = _picture(results, exhibit)
            if picture is not None:
                write_whole(target / f"{name}.png", picture)
            lines, figures = list(_page(results, exhibit, picture is not None)), _figures(results, exhibit)
        page = target / f"{name}.md"
        write_whole(target / f"{name}.json", (json.dumps(figures, indent=1) + "\n").encode())
        write_whole(page, ("\n".join([*lines, *notes(target / f"{name}_notes.md")]) + "\n").encode())
        pages.append(page)
    return pages


def _picture(results: PaperResults, exhibit: Exhibit) -> bytes | None:
    if not any(results.of(point) for point in exhibit.points):
        return None
    if exhibit.kind == "spectrum":
        return paper_plots.spectra(results, exhibit, absolute=exhibit.name == "figure5")
    return (paper_plots.curves if exhibit.kind == "curve" else paper_plots.rows)(results, exhibit)


def _figures(results: PaperResults, exhibit: Exhibit) -> dict[str, Any]:
    def of(point: Point) -> dict[str, Any]:
        return {
            "label": point.label, "aside": point.aside, "series": point.series, "x": point.x, "paper": dict(point.paper),
            "perceptual_share": results.perceptual_share(point),
            "looks": {look.name: _look(results, look.name) for look in point.looks},
        }  # fmt: skip

    return {
        "name": exhibit.name, "title": exhibit.title, "scale": results.scale.label, "networks": results.networks,
        "points": [of(point) for point in exhibit.points],
    }  # fmt: skip


def _look(results: PaperResults, name: str) -> dict[str, Any] | None:
    measured = results.measured(name)
    if measured is None:
        return None
    return {"figures": dict(measured.figures), "log_power": {"generated": measured.generated, "real": measured.real}}


# ------------------------------------------------------------------------------------------------------------- the page


def _page(results: PaperResults, exhibit: Exhibit, has_picture: bool) -> Iterator[str]:
    yield f"# {exhibit.title}"
    yield ""
    yield (
        f"Written by `loupe experiment {exhibit.name}`, its figures in `{exhibit.name}.json`; do not edit it, but run "
        "the command again."
    )
    yield ""
    yield f"**The paper** (Berrada et al., ICLR 2025): {exhibit.says}"
    yield ""
    yield f"**Here**: {_size(results)}" + (f" {exhibit.here}" if exhibit.here else "")
    yield ""
    if has_picture:
        yield f"![{exhibit.title}]({exhibit.name}.png)"
        yield ""
    yield from _table(results, exhibit)
    yield ""
    if any(results.perceptual_share(point) is not None for point in exhibit.points):
        yield (
            "*Loss's share*: of the whole loss, what is not the denoising term, `1 - denoising / loss`: that is the "
            "perceptual loss, or what takes its place, times its weight. Both are means over all samples, gated or not, of "
            "the last three lines of the training's metrics; shown is the mean over seeds."
        )
        yield ""
    yield from _in_words(results, exhibit)
    missing = results.missing(exhibit)
    if missing:
        yield ""
        yield "Not there, and in no figure above:"
        yield ""
        yield from (f"- `{name}`: {results.why(name)}" for name in missing)


def _size(results: PaperResults) -> str:
    scale, network = results.scale, results.networks[0] if results.networks else "none"
    seeds = f"{scale.seeds} seed{'s' * (scale.seeds > 1)}"
    if not isinstance(scale, SmallScale):
        return f"the paper's model and steps, {seeds}; distances by {network} of 50,000 pictures."
    smoke = " **A smoke test: these figures mean nothing.**" if scale.tiny_model else ""
    return (
        f"a small size, two CPU cores:{smoke} the demo's MMDiT, autoencoder and 3-D emoji at {scale.resolutions[1]} px, "
        f"{scale.pretrain_steps:,} steps of pre-training, then {scale.steps} steps of {scale.batch_size(low=False)} images "
        f"with and without the loss; {seeds}, which share the pre-training. w_LPL is {scale.weight('ddpm_eps'):g} for "
        f"DDPM-eps and {scale.weight('flow'):g} for the others where nothing else is said: about the paper's fifth of the "
        f"loss. {scale.num_images} pictures "
        f"({scale.sampling_steps} steps, guidance {scale.guidance(False):g}) against as many real ones; distances are of "
        f"{network}'s features{'' if results.is_fid else ', **not FID**: comparable within this page alone'}."
    )


def _columns(exhibit: Exhibit) -> tuple[str, ...]:
    return SPECTRA if exhibit.kind == "spectrum" else exhibit.metrics


def _table(results: PaperResults, exhibit: Exhibit) -> list[str]:
    """Values, below them differences to the baseline; each beside the paper's, where it prints them."""
    printed = {name for point in exhibit.points for name in point.paper}
    shares = {id(point): results.perceptual_share(point) for point in exhibit.points}
    with_share = any(share is not None for share in shares.values())
    head = (
        list(exhibit.head)
        if exhibit.kind == "table"
        else [exhibit.x or "images", *(["series"] if _series(exhibit) else [])]
    )
    for name in _columns(exhibit):
        head += [results.metric(name).label, *(["paper" if name != "fid" else "paper: FID"] if name in printed else [])]
    head += ["loss's share"] if with_share else []
    rows = []
    for point in exhibit.points:
        row = (
            [point.label, *point.aside]
            if exhibit.kind == "table"
            else [point.label, *([point.series] if _series(exhibit) else [])]
        )
        for name in _columns(exhibit):
            row.append(_cell(results, exhibit, point, name))
            if name in printed:
                row.append(f"{point.paper[name]:g}" if name in point.paper else "-")
        share = shares[id(point)]
        row += [f"{share:.0%}" if share is not None else "-"] if with_share else []
        rows.append(row)
    return table(head, rows)


def _series(exhibit: Exhibit) -> bool:
    return exhibit.kind == "curve" and len({point.series for point in exhibit.points}) > 1


def _cell(results: PaperResults, exhibit: Exhibit, point: Point, name: str) -> str:
    spread: Spread | None = results.spread(point, name)
    if spread is None:
        return "-"
    metric = results.metric(name)
    compared = results.compared(exhibit, point, name)
    if compared is None:
        return spread.text(metric)
    difference = compared.difference.text(metric, signed=True)
    return f"{spread.text(metric)}<br>{difference if compared.verdict == 'not told apart' else f'**{difference}**'}"


def _in_words(results: PaperResults, exhibit: Exhibit) -> Iterator[str]:
    """Of the first metric: what is told apart from its baseline."""
    name = _columns(exhibit)[0]
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for point in exhibit.points:
        compared = results.compared(exhibit, point, name) if baseline_of(exhibit, point) else None
        if compared:
            label = ", ".join([point.label, *([point.series] if _series(exhibit) else [])])
            verdicts[compared.verdict].append(label)
    if not any(verdicts.values()):
        return
    if results.scale.seeds < 2:
        yield "One seed tells nothing apart."
        return
    yield (
        f"By {results.metric(name).label}: "
        + "; ".join(f"{verdict}: {' / '.join(of) or 'none'}" for verdict, of in verdicts.items())
        + ". `±` is the standard deviation over seeds; below a value stands its difference to the baseline of equal seed, bold "
        "where a paired t test tells it from none at 5 %. With three seeds that takes large and even differences, and one "
        "in twenty passes by chance."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the experiment's folder")
    parser.add_argument("report", help="where the pages go")
    parser.add_argument("names", nargs="+", choices=tuple(EXHIBITS), metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        for page in write_pages(Path(options.out), Path(options.report), options.names):
            print(f"report: {page}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(ExitCode.USAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
