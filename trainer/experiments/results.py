"""The figures of an experiment, gathered from its folder: by variant, over seeds, and against the baseline seed by seed."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINE, PRETRAIN = "baseline", ""
CRITICAL_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, two-sided at 5 %, by the number of pairs."""


@dataclass(frozen=True)
class Metric:
    name: str
    """In an evaluation's figures."""
    label: str
    meaning: str
    lower_is_better: bool | None = True
    """None: nearer to 0 is better."""
    scale: float = 1.0
    digits: int = 3


METRICS = (
    Metric("frechet", "Fréchet", "Fréchet distance of EfficientNet-Lite0's 1,280 features from those of the real images. "
           "**Not FID**: another network, and far fewer images; comparable within this page only", digits=1),
    Metric("kernel", "kernel", "1000 times the kernel distance of the same features (cubic polynomial, as KID), unbiased in "
           "the number of images", scale=1000.0, digits=1),
    Metric("spectrum", "spectrum", "radial power spectrum of luminance: mean absolute difference of log10 power from that of "
           "the real images"),
    Metric("spectrum_high", "spectrum (high)", "the same over the highest third of the frequencies"),
    Metric("spectrum_high_signed", "spectrum (high, signed)", "the same with its sign: negative where fine detail is missing",
           lower_is_better=None),
    Metric("latent_same", "latents (caption)", "autoencoder space: mean squared difference of the sample's latents from those "
           "of the real image with its caption"),
    Metric("latent_nearest", "latents (nearest)", "the same from the nearest of the real images"),
    Metric("lpips_same", "LPIPS (caption)", "shift-tolerant LPIPS (AlexNet) between the sample and the real image with its "
           "caption; its numbers are not standard LPIPS's"),
    Metric("lpips_nearest", "LPIPS (nearest)", "the same to the real image with the nearest latents"),
    Metric("estimate_lpips", "LPIPS (one step)", "LPIPS between decoded clean estimate and decoded truth, held-out images "
           "noised to sigma/alpha of 0.5, 1, 2 and 4, mean of the four", digits=4),
    Metric("estimate_latent", "latents (one step)", "squared error of the clean estimate's latents, likewise", digits=4),
    Metric("denoising", "denoising (one step)", "the denoising loss, likewise", digits=4),
)  # fmt: skip
BY_NAME = {metric.name: metric for metric in METRICS}
LEVELS = ("0.5", "1", "2", "4")


@dataclass(frozen=True)
class Spread:
    """Of some numbers."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """None of one number."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def standard_error(self) -> float | None:
        return None if self.deviation is None else self.deviation / math.sqrt(len(self.values))

    def text(self, metric: Metric, *, signed: bool = False) -> str:
        """`mean ± deviation`, in the metric's unit."""
        sign = "+" if signed else ""
        mean = f"{self.mean * metric.scale:{sign}.{metric.digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation * metric.scale:.{metric.digits}f}"


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, in pairs of equal seed."""

    paradigm: str
    variant: str
    metric: Metric
    difference: Spread
    """variant - baseline; of a signed metric, of absolute values."""

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not told apart`, by a paired t test at 5 %."""
        count, error, mean = len(self.difference.values), self.difference.standard_error, self.difference.mean
        if error is None or abs(mean) <= CRITICAL_T[min(count, 10)] * error:
            return "not told apart"
        return "better" if (mean < 0) is (self.metric.lower_is_better is not False) else "worse"


class Results:
    def __init__(self, folder: Path) -> None:
        plan = read_json(folder / "experiment.json")
        self.folder, self.size = folder, plan["size"]
        self.variants: dict[str, dict[str, str]] = plan["variants"]
        """Name: label and group, in the order of the plan."""
        self.runs: list[dict[str, Any]] = plan["runs"]
        self.reference: dict[str, Any] = read_json(folder / "reference.json")
        failures: dict[str, str] = read_json(folder / "failures.json") if (folder / "failures.json").exists() else {}
        self.figures: dict[str, dict[str, Any]] = {}
        """Of each run that is done, by its name."""
        self.missing: dict[str, str] = {k: v for k, v in failures.items() if k.startswith("*")}
        """Why a run is not there, by its name."""
        for run in self.runs:
            name = run["name"]
            path, summary = folder / "evaluations" / f"{name}.json", folder / "runs" / name / "summary.json"
            if path.exists() and summary.exists():
                self.figures[name] = {**_with_means(read_json(path)), "summary": read_json(summary)}
            else:
                self.missing[name] = failures.get(name, "not run yet")

    def latent_network(self) -> dict[str, Any] | None:
        """Of the latent network that the experiment trained itself: images, classes, and its losses at the end."""
        dataset, summary = self.folder / "classes/dataset.json", self.folder / "runs/latent-network/summary.json"
        if not (dataset.exists() and summary.exists()):
            return None
        data = read_json(dataset)
        losses = read_json(summary)["phases"][-1]["losses_last"]
        return {"images": data["num_samples"], "classes": len(data["class_names"]), "losses": losses}

    def of(self, paradigm: str, variant: str) -> dict[int, dict[str, Any]]:
        """Figures by seed, of the runs that are done."""
        return {
            run["seed"]: self.figures[run["name"]]
            for run in self.runs
            if run["paradigm"] == paradigm and run["variant"] == variant and run["name"] in self.figures
        }

    def main_variants(self) -> list[str]:
        """Those with a perceptual loss that every paradigm has, in the order of the plan."""
        return [name for name, v in self.variants.items() if v["group"] == "main" and name != BASELINE]

    def paradigms(self) -> list[str]:
        return list(dict.fromkeys(run["paradigm"] for run in self.runs))

    def spread(self, paradigm: str, variant: str, metric: str) -> Spread | None:
        values = tuple(figures[metric] for figures in self.of(paradigm, variant).values())
        return Spread(values) if values else None

    def compare(self, paradigm: str, variant: str, metric: Metric) -> Comparison | None:
        """None where no seed has both."""
        ours, base = self.of(paradigm, variant), self.of(paradigm, BASELINE)
        value = abs if metric.lower_is_better is None else float
        pairs = [value(ours[seed][metric.name]) - value(base[seed][metric.name]) for seed in ours if seed in base]
        return Comparison(paradigm, variant, metric, Spread(tuple(pairs))) if pairs else None

    def perceptual_share(self, paradigm: str, variant: str) -> float | None:
        """Share of the weighted perceptual term in the whole loss, at the end of training, mean over seeds."""
        shares = [
            1.0 - losses["denoising"] / losses["loss"]
            for figures in self.of(paradigm, variant).values()
            for losses in [figures["summary"]["phases"][-1]["losses_last"]]
        ]
        return statistics.fmean(shares) if shares else None

    def step_cost(self, paradigm: str, variant: str) -> float | None:
        """Seconds of a training step over the baseline's, median over seeds of each."""
        ours, base = self._seconds(paradigm, variant), self._seconds(paradigm, BASELINE)
        return ours / base if ours and base else None

    def _seconds(self, paradigm: str, variant: str) -> float | None:
        speeds = [figures["summary"]["images_per_s"] for figures in self.of(paradigm, variant).values()]
        return statistics.median(1.0 / speed for speed in speeds) if speeds and all(speeds) else None


def _with_means(figures: Mapping[str, Any]) -> dict[str, Any]:
    """With the mean over noise levels of what is measured at each."""
    means = {
        name: statistics.fmean(figures[f"{name}_{level}"] for level in LEVELS)
        for name in ("estimate_lpips", "estimate_latent", "denoising")
    }
    return {**figures, **means}


def read_json(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]
