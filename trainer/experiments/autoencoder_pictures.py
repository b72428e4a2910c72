"""Pictures of the autoencoder experiment. PNG bytes."""

import itertools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.evaluate.reconstruction import measure
from trainer.experiments.autoencoder_measure import Experiment, reconstruction_of
from trainer.experiments.autoencoder_results import METRICS, MODELS, Results
from trainer.experiments.plots import figure_png, labelled_rows, new_figure
from trainer.recipes.autoencoder_experiment import KL, VQ

TERMS = ("l1", "lpips", "kl", "commitment", "generator", "discriminator", "adaptive_weight", "perplexity")


def reconstructions(results: Results) -> bytes | None:
    """A few held-out photos, by every model that is there."""
    experiment = Experiment.read(Path(results.folder))
    images = torch.cat(list(itertools.islice(experiment.heldout(), -(-experiment.size.grid // 8))))[
        : experiment.size.grid
    ]
    rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
    for name, label in MODELS.items():
        if results.evaluation(name) is not None:
            shown = measure([images], reconstruct=reconstruction_of(experiment, name), shown=range(len(images))).shown
            if not rows:
                rows.append(("photos", [original for original, _ in shown.values()]))
            rows.append((label, [made for _, made in shown.values()]))
    return labelled_rows(rows, side=experiment.size.resolution) if rows else None


def curves(results: Results) -> bytes | None:
    """Of the long runs: figures of the held-out photos while they train, and their losses."""
    runs = [results.runs[name] for name in (KL, VQ) if name in results.runs]
    if not runs:
        return None
    panels: dict[str, list[tuple[str, list[tuple[int, float]]]]] = {}
    for metric, (label, _) in METRICS.items():
        panels[f"{label}, held out"] = [
            (run.label, [(e["step"], e[metric]) for e in run.evaluations if e.get(metric) is not None]) for run in runs
        ]
    for term in TERMS:
        panels[term.replace("_", " ")] = [
            (run.label, [(r["step"], r["loss"][term]) for r in run.records if term in r["loss"]]) for run in runs
        ]
    panels = {title: lines for title, lines in panels.items() if any(points for _, points in lines)}
    columns = 4
    figure, all_axes = new_figure(columns, max(1, -(-len(panels) // columns)), width=3.6, height=2.6)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        for colour, (label, points) in zip(("#1f77b4", "#d62728"), lines, strict=False):
            if points:
                marker = "." if len(points) < 20 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2, marker=marker)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    all_axes[0].legend(fontsize=8)
    return figure_png(figure)


def ablations(results: Results) -> bytes | None:
    """Differences to all terms, a panel a metric, a bar a run."""
    runs = [run for run in results.of("ablation") if results.difference(run, "psnr_db") is not None]
    if not runs:
        return None
    figure, panels = new_figure(len(METRICS), 1, width=3.0, height=1.0 + 0.32 * len(runs))
    for i, (axes, (metric, (label, _))) in enumerate(zip(panels, METRICS.items(), strict=True)):
        values = [results.difference(run, metric) or 0.0 for run in runs]
        better = np.array(values) * (1 if metric in ("psnr_db", "ssim") else -1) > 0
        axes.barh(range(len(runs)), values, color=np.where(better, "#2ca02c", "#d62728"))
        axes.axvline(0.0, color="0.3", linewidth=1)
        axes.set_yticks(range(len(runs)), [run.label if i == 0 else "" for run in runs], fontsize=8)
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3, axis="x")
    return figure_png(figure)
