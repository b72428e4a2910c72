"""Pictures of the paper's tables and figures, with our results. PNG bytes."""

import numpy as np
from matplotlib.axes import Axes

from trainer.experiments.paper_results import PaperResults
from trainer.experiments.plots import figure_png, new_figure
from trainer.recipes.paper_exhibits import Exhibit, Point

COLOURS = ("0.4", "#1f77b4", "#d62728", "#2ca02c")


def rows(results: PaperResults, exhibit: Exhibit) -> bytes:
    """A table as a picture: a panel a metric, a row a point, a mark a seed, and the mean."""
    points = [point for point in exhibit.points if results.of(point)]
    names = [name for name in exhibit.metrics if any(results.spread(point, name) for point in points)]
    figure, panels = new_figure(max(1, len(names)), 1, width=3.0, height=0.9 + 0.33 * len(points))
    labels = [" ".join([point.label, *(f"{head}: {cell}" for head, cell in zip(exhibit.head[1:], point.aside, strict=True))])
              for point in points]  # fmt: skip
    for i, (axes, name) in enumerate(zip(panels, names, strict=False)):
        metric = results.metric(name)
        for row, point in enumerate(points):
            spread = results.spread(point, name)
            if spread:
                has_loss = bool(point.looks) and point.looks[0].training.loss != "plain"
                colour = COLOURS[1] if has_loss else COLOURS[0]
                values = [value * metric.scale for value in spread.values]
                axes.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.6)
                axes.plot([spread.mean * metric.scale], [row], "|", color=colour, markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(points)), labels if i == 0 else [""] * len(points))
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.set_title(
            f"{metric.label} ({'higher' if metric.lower_is_better is False else 'lower'} is better)", fontsize=9
        )
        axes.grid(alpha=0.3, axis="x")
    return figure_png(figure)


def curves(results: PaperResults, exhibit: Exhibit) -> bytes:
    """A panel a metric: a line a series, over x; marks are seeds, the dashed line a point without a series."""
    names = [name for name in exhibit.metrics if any(results.spread(point, name) for point in exhibit.points)]
    figure, panels = new_figure(max(1, len(names)), 1)
    for axes, name in zip(panels, names, strict=False):
        metric = results.metric(name)
        for i, series in enumerate(dict.fromkeys(point.series for point in exhibit.points if point.series)):
            _line(axes, results, [p for p in exhibit.points if p.series == series], name, series, COLOURS[1 + i])
        for point in exhibit.points:
            spread = results.spread(point, name)
            if not point.series and spread:
                level = spread.mean * metric.scale
                axes.axhline(level, linestyle="--", color="0.4", label=f"{point.label} (baseline)")
                if spread.deviation is not None:
                    half = spread.deviation * metric.scale
                    axes.axhspan(level - half, level + half, color="0.4", alpha=0.12, linewidth=0)
        if exhibit.log_x:
            axes.set_xscale("log")
        drawn = [point for point in exhibit.points if point.series]
        axes.set_xticks([point.x for point in drawn], [point.label for point in drawn], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(exhibit.x)
        axes.set_ylabel(metric.label)
        axes.grid(alpha=0.3)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=8)
    return figure_png(figure)


def _line(axes: Axes, results: PaperResults, points: list[Point], name: str, label: str, colour: str) -> None:
    scale = results.metric(name).scale
    found = [(point.x, spread) for point in points if (spread := results.spread(point, name))]
    if found:
        axes.plot([x for x, _ in found], [spread.mean * scale for _, spread in found], "-", color=colour, label=label)
        for x, spread in found:
            values = [value * scale for value in spread.values]
            axes.plot([x] * len(values), values, "o", color=colour, markersize=4, alpha=0.6)


def spectra(results: PaperResults, exhibit: Exhibit, *, absolute: bool) -> bytes:
    """A panel a series: log10 power over the real images', by frequency; bands are the range over seeds.

    Args:
        absolute: the error (the paper's Figure 5); else its sign too, and the difference that LPL makes (Figure 4).
    """
    all_series = list(dict.fromkeys(point.series for point in exhibit.points))
    figure, panels = new_figure(len(all_series), 1)
    for axes, series in zip(panels, all_series, strict=True):
        means = []
        for i, point in enumerate(p for p in exhibit.points if p.series == series):
            runs = np.array([np.subtract(m.generated, m.real) for m in results.of(point).values()])
            if not runs.size:
                continue
            shown = np.abs(runs) if absolute else runs
            frequency = np.arange(1, runs.shape[1] + 1)
            label = point.label.partition(", ")[2]
            axes.plot(frequency, shown.mean(0), color=COLOURS[i], label=label)
            axes.fill_between(frequency, shown.min(0), shown.max(0), color=COLOURS[i], alpha=0.2, linewidth=0)
            means.append(runs.mean(0))
        if not absolute:
            if len(means) == 2:
                axes.plot(
                    np.arange(1, len(means[0]) + 1), means[1] - means[0], ":", color="#2ca02c", label="with - without"
                )
            axes.axhline(0.0, color="0.3", linewidth=0.8)
        axes.set_title(series)
        axes.set_xlabel("cycles an image")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("|log10 power - real|" if absolute else "log10 power - real")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=8)
    return figure_png(figure)
