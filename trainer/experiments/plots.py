"""Pictures of an experiment's results. PNG bytes."""

import io
import textwrap
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.experiments.evaluate import read_arrays
from trainer.experiments.results import BASELINE, BY_NAME, LEVELS, PRETRAIN, Metric, Results
from trainer.pictures import png

COLOURS = ("0.55", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")
"""Of the pre-trained checkpoint, the baseline, and each variant that every paradigm has."""


def _columns(results: Results) -> list[tuple[str, str, str]]:
    """(variant, what it is called, colour)."""
    names = [(PRETRAIN, "pre-trained"), (BASELINE, "without")]
    names += [(variant, results.variants[variant]["label"]) for variant in results.main_variants()]
    return [(variant, name, colour) for (variant, name), colour in zip(names, COLOURS, strict=False)]


def new_figure(columns: int, rows: int, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [a for row in axes for a in row]


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def main_metrics(results: Results, names: Sequence[str]) -> bytes:
    """A row a paradigm, a panel a metric: the pre-trained checkpoint, and each seed without and with LPL, joined."""
    paradigms, columns = results.paradigms(), _columns(results)
    figure, panels = new_figure(len(names), len(paradigms), width=2.4, height=2.6)
    for axes, (paradigm, name) in zip(panels, product(paradigms, names), strict=True):
        metric = BY_NAME[name]
        found = [results.of(paradigm, variant) for variant, _, _ in columns]
        for seed in found[1]:
            line = [(x, runs[seed][name] * metric.scale) for x, runs in enumerate(found) if x > 0 and seed in runs]
            axes.plot(*zip(*line, strict=True), color="0.75", zorder=1)
        for x, (runs, (_, label, colour)) in enumerate(zip(found, columns, strict=True)):
            values = [figures[name] * metric.scale for figures in runs.values()]
            axes.plot([x] * len(values), values, "o", color=colour, markersize=5, label=label)
        axes.set_xticks([])
        axes.set_xlim(-0.4, len(columns) - 0.6)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(metric.label, fontsize=9)
        axes.grid(alpha=0.3)
        if name == names[0]:
            axes.set_ylabel(paradigm)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(columns), fontsize=9)
    return figure_png(figure)


def differences(results: Results, paradigm: str, names: Sequence[str]) -> bytes:
    """A panel a metric, a row a variant: its differences to the baseline, one point a seed, and their mean."""
    variants = [v for v in results.variants if v != BASELINE and results.of(paradigm, v)]
    figure, panels = new_figure(len(names), 1, width=3.2, height=0.9 + 0.35 * len(variants))
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        metric: Metric = BY_NAME[name]
        for row, variant in enumerate(variants):
            comparison = results.compare(paradigm, variant, metric)
            if comparison:
                values = [value * metric.scale for value in comparison.difference.values]
                colour = {"better": "#2ca02c", "worse": "#d62728"}.get(comparison.verdict, "0.5")
                axes.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.6)
                axes.plot([np.mean(values)], [row], "|", color=colour, markersize=14, markeredgewidth=2)
        axes.axvline(0.0, color="0.3", linewidth=1)
        labels = [results.variants[v]["label"] if i == 0 else "" for v in variants]
        axes.set_yticks(range(len(variants)), labels)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_title(metric.label, fontsize=10)
        axes.grid(alpha=0.3, axis="x")
    return figure_png(figure)


def spectra(results: Results) -> bytes:
    """A panel a paradigm: log10 power over that of the real images, by frequency; bands are the range over seeds."""
    paradigms = results.paradigms()
    figure, panels = new_figure(len(paradigms), 1)
    real = np.array(results.reference["log_power"])
    frequency = np.arange(1, len(real) + 1)
    for axes, paradigm in zip(panels, paradigms, strict=True):
        for variant, label, colour in _columns(results):
            runs = [np.array(f["log_power"]) - real for f in results.of(paradigm, variant).values()]
            if runs:
                axes.plot(frequency, np.mean(runs, 0), color=colour, label=label)
                axes.fill_between(frequency, np.min(runs, 0), np.max(runs, 0), color=colour, alpha=0.2, linewidth=0)
        for name, style in (("reconstructed", ":"), ("halves", "--")):
            line = np.array(results.reference[name]["log_power"]) - real
            label = {"reconstructed": "autoencoder", "halves": "other real images"}[name]
            axes.plot(frequency, line, style, color="0.4", linewidth=1, label=label)
        axes.axhline(0.0, color="0.3", linewidth=0.8)
        axes.set_title(paradigm)
        axes.set_xlabel("cycles an image")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("log10 power - real")
    panels[0].legend(fontsize=7)
    return figure_png(figure)


def estimates(results: Results) -> bytes:
    """By noise level, with LPL over without: LPIPS and squared error of one-step estimates of held-out images. A row a
    variant."""
    variants = results.main_variants()
    titles = {"estimate_lpips": "LPIPS of the decoded estimate", "estimate_latent": "squared error of its latents"}
    figure, panels = new_figure(len(titles), len(variants))
    levels = [float(level) for level in LEVELS]
    for axes, (variant, (name, title)) in zip(panels, product(variants, titles.items()), strict=True):
        for i, paradigm in enumerate(results.paradigms()):
            ours, base = results.of(paradigm, variant), results.of(paradigm, BASELINE)
            pairs = [(ours[seed], base[seed]) for seed in ours if seed in base]
            ratios = [[ours[f"{name}_{level}"] / base[f"{name}_{level}"] for level in LEVELS] for ours, base in pairs]
            if ratios:
                axes.plot(levels, np.mean(ratios, 0), "o-", color=f"C{i}", label=paradigm)
                axes.fill_between(levels, np.min(ratios, 0), np.max(ratios, 0), color=f"C{i}", alpha=0.2, linewidth=0)
        axes.axhline(1.0, color="0.3", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("noise level sigma/alpha")
        axes.set_title(f"{title}, over the baseline's", fontsize=10)
        axes.set_ylabel(results.variants[variant]["label"], fontsize=8)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure_png(figure)


def sample_rows(results: Results, paradigm: str, *, count: int = 12, side: int = 80) -> bytes | None:
    """The same captions in columns: real, pre-trained, without and with LPL (first seed that all have), from equal noise."""
    real: dict[str, Any] = read_arrays(results.folder / "reference.npz")
    columns = [column for column in _columns(results) if results.of(paradigm, column[0])]
    seeds = set.intersection(*(set(results.of(paradigm, v)) for v, _, _ in columns if v != PRETRAIN), set(range(1000)))
    if not seeds or len(columns) < 2:
        return None
    rows = [("real", real["pixels"]), ("autoencoder", real["reconstructed"])]
    for variant, label, _ in columns:
        name = results.of(paradigm, variant)[0 if variant == PRETRAIN else min(seeds)]["name"]
        rows.append((label, read_arrays(results.folder / "evaluations" / f"{name}.npz")["pixels"]))
    count = min(count, len(real["pixels"]))
    chosen = [i * len(real["pixels"]) // count for i in range(count)]
    return labelled_rows([(label, [pixels[i] for i in chosen]) for label, pixels in rows], side=side)


def labelled_rows(rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], *, side: int) -> bytes:
    """Images (H, W, 3) in rows, each row with its label on the left, each image shown at `side` pixels."""
    margin, title, count = 4, 110, max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (title + count * (side + margin), len(rows) * (side + margin) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, (label, images) in enumerate(rows):
        y = margin + row * (side + margin)
        draw.text((4, y + side // 2 - 12), "\n".join(textwrap.wrap(label, 17)), fill=(60, 60, 60), font=font)
        for column, pixels_HWC in enumerate(images):
            picture = Image.fromarray(pixels_HWC).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (title + column * (side + margin), y))
    return png(sheet)
