"""The report of `loupe experiment lpl`: Markdown, pictures, and all figures as JSON. Every sentence with a result in it is made
from the figures.

    python -m trainer.experiments.report OUT REPORT
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from trainer.errors import ExitCode, UserError
from trainer.experiments import plots
from trainer.experiments.results import (
    BASELINE,
    BY_NAME,
    LEVELS,
    METRICS,
    PRETRAIN,
    Comparison,
    Metric,
    Results,
    Spread,
    table,
)
from trainer.recipes.lpl_experiment import RIVALS_ON
from trainer.whole_files import write_whole

PANELS = ("frechet", "spectrum_high", "lpips_same", "latent_same", "estimate_lpips", "estimate_latent")
RIVAL_COLUMNS = ("frechet", "kernel", "spectrum", "spectrum_high", "latent_same", "lpips_same", "estimate_lpips")
PICTURES, NOTES = "lpl", "lpl_notes.md"
"""Beside the page: the folder of its pictures, and what people add to it by hand."""


def write_report(folder: Path, target: Path) -> None:
    """Raises:
    UserError: the folder holds no experiment, or one without a single result.
    """
    if not (folder / "experiment.json").exists() or not (folder / "reference.json").exists():
        raise UserError(f"{folder}: no experiment with results; run `loupe experiment lpl` first")
    results = Results(folder)
    if not results.figures:
        raise UserError(f"{folder}: no run is done yet; run `loupe experiment lpl` first")
    pictures = dict(_pictures(results))
    for name, data in pictures.items():
        write_whole(target / PICTURES / name, data)
    write_whole(target / "lpl.json", (json.dumps(_figures(results), indent=1) + "\n").encode())
    page = [*_page(results, pictures), *notes(target / NOTES)]
    write_whole(target / "lpl.md", ("\n".join(page) + "\n").encode())


def _figures(results: Results) -> dict[str, Any]:
    return {
        "size": results.size,
        "variants": results.variants,
        "reference": results.reference,
        "missing": results.missing,
        "latent_network": results.latent_network(),
        "runs": {r["name"]: {**r, **results.figures[r["name"]]} for r in results.runs if r["name"] in results.figures},
        "differences": [
            {
                "paradigm": c.paradigm, "variant": c.variant, "metric": c.metric.name, "by_seed": c.difference.values,
                "mean": c.difference.mean, "deviation": c.difference.deviation, "verdict": c.verdict,
            }
            for c in _comparisons(results)
        ],
    }  # fmt: skip


def _comparisons(results: Results) -> Iterator[Comparison]:
    for paradigm in results.paradigms():
        for variant in results.variants:
            for metric in METRICS if variant != BASELINE else ():
                comparison = results.compare(paradigm, variant, metric)
                if comparison:
                    yield comparison


def _pictures(results: Results) -> Iterator[tuple[str, bytes]]:
    yield "metrics.png", plots.main_metrics(results, PANELS)
    yield "spectra.png", plots.spectra(results)
    yield "estimates.png", plots.estimates(results)
    if any(results.of(RIVALS_ON, v) for v in results.variants if v != BASELINE):
        yield "rivals.png", plots.differences(results, RIVALS_ON, RIVAL_COLUMNS[:1] + RIVAL_COLUMNS[3:])
    for paradigm in results.paradigms():
        picture = plots.sample_rows(results, paradigm)
        if picture:
            yield f"samples_{paradigm}.png", picture


# ------------------------------------------------------------------------------------------------------------- the page


def _page(results: Results, pictures: dict[str, bytes]) -> Iterator[str]:
    yield "# Does the latent perceptual loss help at a small size?"
    yield ""
    yield (
        "Written by `loupe experiment lpl` from the figures in `lpl.json`; do not edit it, run the command again. What stands "
        f"in `{NOTES}` beside it comes last."
    )
    yield ""
    yield from _setup(results)
    yield from _in_words(results)
    yield from _main_table(results)
    yield from _picture("metrics.png", "Each seed without and with LPL", pictures)
    yield from _estimates(results)
    yield from _picture("estimates.png", "One-step estimates by noise level", pictures)
    yield from _picture("spectra.png", "Power spectra against real images", pictures)
    yield from _rivals(results)
    yield from _picture("rivals.png", "Differences to the baseline by seed; green and red: told apart", pictures)
    for paradigm in results.paradigms():
        yield from _picture(f"samples_{paradigm}.png", f"{paradigm}: equal captions, equal noise", pictures)
    yield from _missing(results)
    yield from _times(results)


def _picture(name: str, what: str, pictures: dict[str, bytes]) -> Iterator[str]:
    if name in pictures:
        yield f"![{what}]({PICTURES}/{name})"
        yield ""


def _setup(results: Results) -> Iterator[str]:
    size, halves, decoded = results.size, results.reference["halves"], results.reference["reconstructed"]
    yield "## Setup"
    yield ""
    yield (
        f"- The demo's MMDiT, autoencoder (f8) and 3-D emoji at 64 px with their names; {size['train_images']} images to train "
        f"on, {size['heldout_images']} held out."
    )
    yield (
        f"- One checkpoint a paradigm: {size['pretrain_steps']} steps of {size['batch_size']} images at 2e-3, falling to 5e-4. "
        f"From its average, each run goes on for {size['steps']} steps at 5e-4, with a new optimizer; EMA decay 0.97 for all. "
        "Runs of equal seed see the same images in the same order with the same noise: they differ by the loss alone."
    )
    yield (
        "- LPL: tau = 3 (reference 64 px), all maps; with the paper's w = 3, and with the rule that weights the rivals: the "
        "weighted term's variance is 0.1 of the denoising loss's, by running variances (the paper's A.4). Rivals and options "
        f"run on {RIVALS_ON} alone and share its baselines. Rivals have LPL's gate; min-SNR and Eq. 15 have weights of their "
        "own, options w = 3."
    )
    network = results.latent_network()
    if network:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in network["losses"].items())
        yield (
            f"- E-LatentLPIPS's network was trained here, on {network['images']} photos of {network['classes']} classes and no "
            f"emoji; at the end of its training: {losses}."
        )
    yield (
        f"- {size['num_images']} samples of each run for captions of the training set (DDIM, or Euler for flow; "
        f"{size['sampling_steps']} steps, guidance {size['guidance_scale']:g}), from the same noise for all, against the "
        f"{size['num_images']} real images of these captions."
    )
    yield (
        f"- What to expect at best: as many other real images are at a Fréchet distance of {halves['frechet']:.1f} and a "
        f"kernel distance of {halves['kernel'] * 1000:.1f}; the real images, encoded and decoded, at "
        f"{decoded['frechet']:.1f} and {decoded['kernel'] * 1000:.1f}, with an LPIPS of {decoded['lpips_same']:.3f}."
    )
    yield ""
    yield "Smaller is better for all of these; of the signed one nearer to 0, and its differences are of absolute values:"
    yield ""
    yield from (f"- **{metric.label}**: {metric.meaning}." for metric in METRICS)
    yield ""
    yield (
        "`±` is the standard deviation over seeds. Differences are between runs of equal seed, and *told apart* from none by a "
        f"paired t test at 5 %: with so few seeds it finds large and even differences alone, and of {len(METRICS)} metrics "
        "one in twenty passes by chance. Seeds vary the continuation; the pre-training, one a paradigm, is shared."
    )
    yield ""


def _in_words(results: Results) -> Iterator[str]:
    yield "## What came out"
    yield ""
    for paradigm, variant in product(results.paradigms(), results.main_variants()):
        label = f"{paradigm}, {results.variants[variant]['label']}"
        of = {c.metric.name: c for c in _comparisons(results) if c.paradigm == paradigm and c.variant == variant}
        if not of:
            yield f"- {label}: no seed has this and the baseline."
            continue
        frechet, base = of["frechet"], results.spread(paradigm, BASELINE, "frechet")
        assert base is not None
        values = frechet.difference.values
        told = "; ".join(f"{words}: {_labels(of, words)}" for words in ("better", "worse", "not told apart"))
        yield (
            f"- **{label}**: the Fréchet distance is {_by(frechet)} (difference "
            f"{frechet.difference.text(frechet.metric, signed=True)}, {frechet.difference.mean / base.mean:+.1%}; lower with "
            f"{sum(value < 0 for value in values)} of {len(values)} seeds). "
            f"{f'Of all metrics, {told}' if len(values) > 1 else 'One seed tells nothing apart'}. At the end of training the "
            f"weighted LPL is {results.perceptual_share(paradigm, variant):.0%} of the loss (in the paper about a fifth)."
        )
    yield ""


def _by(comparison: Comparison) -> str:
    if len(comparison.difference.values) == 1:
        return "lower" if comparison.difference.mean < 0 else "no lower"
    words = {"better": "lower", "worse": "higher", "not told apart": "not told apart from the baseline's"}
    return words[comparison.verdict]


def _labels(comparisons: dict[str, Comparison], verdict: str) -> str:
    return ", ".join(c.metric.label for c in comparisons.values() if c.verdict == verdict) or "none"


def _main_table(results: Results) -> Iterator[str]:
    yield "## With and without LPL"
    yield ""
    yield "Values, and below them differences to the baseline of equal seed; bold where told apart."
    yield ""
    variants = results.main_variants()
    rows = []
    for paradigm, metric in product(results.paradigms(), METRICS):
        before, base = (results.spread(paradigm, variant, metric.name) for variant in (PRETRAIN, BASELINE))
        rows.append([
            paradigm, metric.label, _cell(before, metric.name), _cell(base, metric.name),
            *(_compared(results, paradigm, variant, metric) for variant in variants),
        ])  # fmt: skip
    labels = [results.variants[variant]["label"] for variant in variants]
    yield from table(["paradigm", "metric", "pre-trained", "without", *labels], rows)
    yield ""


def _compared(results: Results, paradigm: str, variant: str, metric: Metric) -> str:
    text = _cell(results.spread(paradigm, variant, metric.name), metric.name)
    comparison = results.compare(paradigm, variant, metric) if variant != BASELINE else None
    if comparison is None:
        return text
    difference = comparison.difference.text(metric, signed=True)
    return f"{text}<br>{difference if comparison.verdict == 'not told apart' else f'**{difference}**'}"


def _cell(spread: Spread | None, metric: str) -> str:
    return spread.text(BY_NAME[metric]) if spread else "-"


def _estimates(results: Results) -> Iterator[str]:
    variants = (BASELINE, *results.main_variants())
    yield "## One-step estimates of held-out images, by noise level"
    yield ""
    yield f"Means over seeds: {' / '.join(results.variants[variant]['label'] for variant in variants)}."
    yield ""
    rows = []
    for paradigm in results.paradigms():
        for name, label in (
            ("estimate_lpips", "LPIPS"),
            ("estimate_latent", "latents"),
            ("denoising", "denoising loss"),
        ):
            row = [paradigm, label]
            for level in LEVELS:
                spreads = [results.spread(paradigm, variant, f"{name}_{level}") for variant in variants]
                row.append(" / ".join(f"{spread.mean:.4f}" if spread else "-" for spread in spreads))
            rows.append(row)
    yield from table(["paradigm", "", *(f"sigma/alpha {level}" for level in LEVELS)], rows)
    yield ""


def _rivals(results: Results) -> Iterator[str]:
    metrics = [BY_NAME[name] for name in RIVAL_COLUMNS]
    variants = [v for v in results.variants if results.of(RIVALS_ON, v)]
    if len(variants) < 2:
        return
    yield f"## Rivals and options, on {RIVALS_ON}"
    yield ""
    yield "Values, and below them differences to the baseline of equal seed; bold where told apart. A step's seconds over the "
    yield "baseline's are medians of runs that shared the machine, two at a time: rough."
    yield ""
    rows = []
    for variant in variants:
        cost = results.step_cost(RIVALS_ON, variant)
        count = len(results.of(RIVALS_ON, variant))
        row = [results.variants[variant]["label"], str(count)]
        row += [_compared(results, RIVALS_ON, variant, metric) for metric in metrics]
        rows.append([*row, f"{cost:.2f}" if cost else "-"])
    yield from table(["", "seeds", *(metric.label for metric in metrics), "step"], rows)
    yield ""


def _missing(results: Results) -> Iterator[str]:
    if results.missing:
        yield "## Not there"
        yield ""
        yield "These runs have no result, and no table above counts them:"
        yield ""
        yield from (f"- `{name}`: {why}" for name, why in results.missing.items())
        yield ""


def _times(results: Results) -> Iterator[str]:
    yield "## Seconds"
    yield ""
    yield "Of each run, from its first start to its end; on one core, with another run beside it."
    yield ""
    rows = []
    for run in results.runs:
        figures = results.figures.get(run["name"])
        if figures:
            summary = figures["summary"]
            rows.append([
                f"`{run['name']}`", str(summary["steps"]), f"{summary['wall_s']:.0f}", f"{summary['images_per_s']:.1f}",
                f"{figures['sampling_s']:.0f}", f"{figures['measuring_s']:.0f}", str(summary["restarts"]),
            ])  # fmt: skip
    yield from table(["run", "steps", "training", "images/s", "sampling", "measuring", "restarts"], rows)


def notes(path: Path) -> Iterator[str]:
    if path.exists():
        yield ""
        yield "## Notes"
        yield ""
        yield path.read_text(encoding="utf-8").strip()


def report_command(
    description: str | None, write: Callable[[Path, Path], None], arguments: list[str] | None = None
) -> int:
    """The command of a module that writes a report; its exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the experiment's folder")
    parser.add_argument("report", help="where the page goes")
    options = parser.parse_args(arguments)
    try:
        write(Path(options.out), Path(options.report))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(ExitCode.USAGE)
    return 0


if __name__ == "__main__":
    sys.exit(report_command(__doc__, write_report))
