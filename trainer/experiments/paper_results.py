"""What came out of the runs behind a table or figure of the paper, gathered from the experiment's folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.experiments.results import Comparison, Metric, Spread, read_json
from trainer.recipes.paper_exhibits import Exhibit, Point
from trainer.recipes.paper_trainings import FullScale, Scale, SmallScale

METRICS = {
    "fid": Metric("fid", "Fréchet distance", "Fréchet distance of features", digits=1),
    "coverage": Metric("coverage", "coverage", "", lower_is_better=False),
    "density": Metric("density", "density", "", lower_is_better=False),
    "precision": Metric("precision", "precision", "", lower_is_better=False),
    "recall": Metric("recall", "recall", "", lower_is_better=False),
    "clip_score": Metric("clip_score", "CLIPScore", "", lower_is_better=False, digits=2),
    "spectrum": Metric("spectrum", "all", ""),
    "spectrum_low": Metric("spectrum_low", "lowest third", ""),
    "spectrum_mid": Metric("spectrum_mid", "middle third", ""),
    "spectrum_high": Metric("spectrum_high", "highest third", ""),
}
"""By the name that a figure has in evaluation.json, less its network's."""
FULL_FID = Metric("fid", "FID", "", digits=2)
SPECTRA = ("spectrum", "spectrum_low", "spectrum_mid", "spectrum_high")


@dataclass(frozen=True)
class Measured:
    """A look that is there."""

    figures: Mapping[str, float]
    generated: list[float]
    """log10 power by frequency."""
    real: list[float]
    count: int
    """Images that were drawn, and as many real ones."""


class PaperResults:
    """
    Raises:
        UserError: no such experiment there.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "experiment.json").exists():
            raise UserError(f"{folder}: no experiment of the paper; run `loupe experiment paper --small` first")
        plan = read_json(folder / "experiment.json")
        if not {"scale", "networks"} <= set(plan):
            raise UserError(f"{folder}: holds another experiment than one of the paper's; take another folder")
        self.folder = folder
        self.scale: Scale = _scale(plan["scale"])
        self.networks: list[str] = [word.partition("=")[0] for word in plan["networks"]]
        self._looks: dict[str, Measured | None] = {}

    @property
    def is_fid(self) -> bool:
        """Whether the Fréchet distance is of FID's network."""
        return self.networks[:1] == ["inception"]

    def metric(self, name: str) -> Metric:
        if name != "fid":
            return METRICS[name]
        network = self.networks[0] if self.networks else "?"
        return FULL_FID if self.is_fid else replace(METRICS["fid"], label=f"Fréchet distance ({network})")

    def measured(self, look_name: str) -> Measured | None:
        """None: not there yet."""
        if look_name not in self._looks:
            path = self.folder / "evaluations" / look_name / "evaluation.json"
            self._looks[look_name] = self._read(path) if path.exists() else None
        return self._looks[look_name]

    def _read(self, path: Path) -> Measured:
        tree = json.loads(path.read_text(encoding="utf-8"))
        first = self.networks[0]
        figures = {}
        for name, figure in tree["figures"].items():
            if figure.get("network", first) == first or figure["metric"] == "clip_score":
                figures[name if figure["metric"] == "spectrum" else figure["metric"]] = float(figure["value"])
        power = tree["log_power"]
        return Measured(figures, power["generated"], power["real"], tree["generated"]["used"])

    def of(self, point: Point) -> dict[int, Measured]:
        """By seed, of the looks that are there."""
        found = {look.seed: self.measured(look.name) for look in point.looks}
        return {seed: measured for seed, measured in found.items() if measured is not None}

    def spread(self, point: Point, metric: str) -> Spread | None:
        values = tuple(m.figures[metric] for m in self.of(point).values() if metric in m.figures)
        return Spread(values) if values else None

    def compared(self, exhibit: Exhibit, point: Point, metric: str) -> Comparison | None:
        """With the baseline of the point, seed by seed; None: it has none, or no seed has both."""
        base = baseline_of(exhibit, point)
        if base is None:
            return None
        ours, theirs = self.of(point), self.of(base)
        pairs = [
            ours[seed].figures[metric] - theirs[seed].figures[metric]
            for seed in ours
            if seed in theirs and metric in ours[seed].figures and metric in theirs[seed].figures
        ]
        return Comparison("", point.label, self.metric(metric), Spread(tuple(pairs))) if pairs else None

    def summaries(self, point: Point) -> list[dict[str, Any]]:
        paths = {self.folder / "runs" / look.run / "summary.json" for look in point.looks}
        return [read_json(path) for path in sorted(paths) if path.exists()]

    def perceptual_share(self, point: Point) -> float | None:
        """Share of the weighted perceptual term in the loss at the end of training, mean over seeds; None: it has none. What
        min-SNR weighs is the denoising term, and no share."""
        losses = [summary["phases"][-1]["losses_last"] for summary in self.summaries(point)]
        parts = [(one.get("denoising_weighted", one["denoising"]), one["loss"]) for one in losses]
        shares = [1.0 - denoising / loss for denoising, loss in parts if loss != denoising]
        return sum(shares) / len(shares) if shares else None

    def missing(self, exhibit: Exhibit) -> list[str]:
        return sorted({look.name for look in exhibit.looks() if self.measured(look.name) is None})

    def why(self, look_name: str) -> str:
        failures = self.folder / "failures.json"
        known: dict[str, str] = read_json(failures) if failures.exists() else {}
        return next((why for run, why in known.items() if look_name.startswith(run)), "not run yet")


def _scale(fields: Mapping[str, Any]) -> Scale:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return FullScale(**values) if values["label"] == "full" else SmallScale(**values)


def baseline_of(exhibit: Exhibit, point: Point) -> Point | None:
    """The exhibit's, or the point that was trained and looked at like this one, without a perceptual loss."""
    if exhibit.baseline:
        found = next(one for one in exhibit.points if one.label == exhibit.baseline)
        return None if found is point else found
    if not point.looks or point.looks[0].training.loss == "plain":
        return None
    wanted = replace(point.looks[0], training=replace(point.looks[0].training, loss="plain"))
    return next((one for one in exhibit.points if one.looks and one.looks[0] == wanted), None)
