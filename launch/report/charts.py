"""Charts of runs as data: which curves, in which unit, thinned. The page's script draws them with plotly. No torch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from launch.report.gather import RunReport
from launch.report.history import History
from launch.report.thin import bucket_means, extremes, smooth
from trainer.metric_names import DETAILS, STAGES

Chart: TypeAlias = dict[str, Any]
"""id, title, unit, about, section, traces: [{name, colour, x, y, smooth}], log, stacked, range."""

STACKED_POINTS = 400
TOGETHER = (("generator", "discriminator"), ("logits_real", "logits_fake"), ("codebook", "commitment"))
"""Terms that share a chart, as in curves.png."""
EVALUATION_UNITS = {"psnr_db": "dB"}
MAX_EVALUATIONS = 8


def charts_of(runs: Sequence[RunReport]) -> list[Chart]:
    """Of one run: its terms in charts; of several: a chart a term, a curve a run. Charts without a curve are left out."""
    curves = [_Curves(run.history) for run in runs]
    charts = _of_one(runs[0], curves[0]) if len(runs) == 1 else _of_several(runs, curves)
    return [chart for chart in charts if chart["traces"]]


class _Curves:
    """The rows of a run that stand, as x and y."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.rows = history.standing()
        self.step = history.column("step")[self.rows]
        self.phases = [history.phases[row] for row in self.rows]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(self.phases))}
        self.groups = np.array([numbers[phase] for phase in self.phases], dtype=np.int64)

    def names(self, group: str) -> list[str]:
        """Without the group's: `denoising` of `loss.denoising`."""
        return [name.removeprefix(f"{group}.") for name in self.history.names if name.startswith(f"{group}.")]

    def column(self, name: str) -> np.ndarray:
        return self.history.column(name)[self.rows]

    def trace(
        self, column: str, label: str, *, colour: int = 0, factor: float = 1.0, noisy: bool = True
    ) -> dict[str, Any] | None:
        """None where no record has it.

        Args:
            noisy: it may be drawn smooth.
        """
        y = self.column(column) * factor
        known = np.isfinite(y)
        if not known.any():
            return None
        x, y = self.step[known], y[known]
        kept = extremes(y)
        even = smooth(y, self.groups[known]) if noisy else None
        trace = {"name": label, "colour": colour, "x": _integers(x[kept]), "y": _rounded(y[kept])}
        return trace if even is None else {**trace, "smooth": _rounded(even[kept])}


def _chart(name: str, title: str, section: str, traces: Iterator[Any] | Sequence[Any], **more: Any) -> Chart:
    return {"id": name, "title": title, "section": section, "traces": [trace for trace in traces if trace], **more}


def _words(term: str) -> str:
    return {"lpl": "LPL", "gate": "inside the gate", "kl": "KL", "lpips": "LPIPS"}.get(
        term, term.replace("lpl_", "LPL ").replace("_", " ")
    )


# --------------------------------------------------------------------------------------------------------------- one run


def _of_one(run: RunReport, curves: _Curves) -> Iterator[Chart]:
    terms = curves.names("loss")
    main = [term for term in ("loss", "denoising", "reconstruction") if term in terms][:2]
    yield _chart(
        "loss", "Loss", "losses", (curves.trace(f"loss.{t}", _words(t), colour=i) for i, t in enumerate(main)),
        log=True, about="Mean over all ranks and the steps of each interval.", wide=True,
    )  # fmt: skip
    for title, group in _groups([term for term in terms if term not in main]):
        share = group == ["gate"]
        yield _chart(
            f"loss-{'-'.join(group)}", title, "losses",
            (curves.trace(f"loss.{t}", _words(t), colour=i, factor=100.0 if share else 1.0) for i, t in enumerate(group)),
            log=not share and "logits_real" not in group, **({"unit": "%", "range": [0, 100]} if share else {}),
        )  # fmt: skip
    bins = sorted(curves.names("loss_by_noise"), key=lambda name: (len(name), name))
    yield _chart(
        "noise", "Denoising loss by noise level", "losses",
        (curves.trace(f"loss_by_noise.{b}", _noise_label(b, len(bins)), colour=i) for i, b in enumerate(bins)),
        log=True, scale="sequential", about="Eight levels: lighter curves have less noise.",
    )  # fmt: skip
    yield from _validations_of_one(run.history)
    yield from _speed(curves)
    yield from _optimisation(curves)
    yield from _evaluations([run])


def _validations_of_one(history: History) -> Iterator[Chart]:
    """A chart a term, a curve a noise level."""
    found = sorted(history.validations.items())
    for term in dict.fromkeys(term for _, terms in found for term in terms):
        count = max(len(terms.get(term, ())) for _, terms in found)
        traces = []
        for level in range(count):
            points = [(step, terms[term][level]) for step, terms in found if len(terms.get(term, ())) > level]
            traces.append(_dots(_noise_label(str(level), count), level, points))
        yield _chart(
            f"validation-{term}", f"Validation by noise level: {_words(term)}", "losses", traces, log=True,
            scale="sequential", about="Averaged weights, the same images and noise each time.",
        )  # fmt: skip


def _validations_of_several(runs: Sequence[RunReport]) -> Iterator[Chart]:
    """A chart a term, a curve a run: the mean over noise levels."""
    for term in dict.fromkeys(term for run in runs for terms in run.history.validations.values() for term in terms):
        traces = []
        for i, run in enumerate(runs):
            found = sorted(run.history.validations.items())
            points = [(step, math.fsum(terms[term]) / len(terms[term])) for step, terms in found if terms.get(term)]
            traces.append(_dots(run.name, i, points))
        yield _chart(
            f"validation-{term}", f"Validation: {_words(term)}", "losses", traces, log=True,
            about="Averaged weights, mean over fixed noise levels. Compare runs of the same images, codec and paradigm.",
        )  # fmt: skip


def _dots(label: str, colour: int, points: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """A curve of few points; None where no value is finite."""
    known = [(step, value) for step, value in points if math.isfinite(value)]
    if not known:
        return None
    x, y = [step for step, _ in known], _rounded(np.array([value for _, value in known]))
    return {"name": label, "colour": colour, "x": x, "y": y, "dots": True}


def _noise_label(name: str, count: int) -> str:
    return f"{name} (least noise)" if name == "0" else f"{name} (most noise)" if name == str(count - 1) else name


def _groups(terms: list[str]) -> Iterator[tuple[str, list[str]]]:
    depths = sorted(term for term in terms if term.startswith("lpl_"))
    rest = [term for term in terms if term not in depths]
    for term in sorted(rest, key=lambda term: (term in DETAILS, term != "lpl", term)):
        group = [other for other in next((g for g in TOGETHER if term in g), (term,)) if other in rest]
        if group[0] == term:
            title = "Share of samples inside the gate" if term == "gate" else ", ".join(_words(t) for t in group)
            yield title[0].upper() + title[1:], group
    if depths:
        yield "LPL by depth of the decoder", depths


def _speed(curves: _Curves) -> Iterator[Chart]:
    yield _chart("speed", "Throughput", "speed", [curves.trace("images_per_s", "images/s")], unit="images/s", zero=True)
    yield _chart("mfu", "Model FLOPs utilisation", "speed", [curves.trace("mfu", "MFU", factor=100.0)], unit="%", zero=True,
                 about="Counted operations, frozen networks included, over the device's peak.")  # fmt: skip
    yield _chart("stages", "Time of a step by stage", "speed", _stages(curves), unit="ms", stacked=True, zero=True,
                 about="Of rank 0, mean of each interval.")  # fmt: skip
    ranks = [curves.trace(f"ranks.step_s.{s}", s, colour=i, factor=1e3) for i, s in enumerate(("min", "mean", "max"))]
    yield _chart("ranks", "Time of a step over ranks", "speed", ranks, unit="ms", zero=True)
    memory = curves.trace("peak_memory_bytes", "rank 0", factor=2.0**-30, noisy=False)
    yield _chart("memory", "Peak memory", "speed", [memory], unit="GiB", zero=True)


def _stages(curves: _Curves) -> list[dict[str, Any]]:
    """On the same steps for all, so that they can be stacked; a stage that takes nothing is left out."""
    names = [name for name in STAGES if name in curves.names("stages")]
    if not names:
        return []
    table = np.stack([curves.step, *(curves.column(f"stages.{name}") for name in names)], axis=1)
    table = table[np.isfinite(table[:, 1:]).any(axis=1)]
    table = bucket_means(table, STACKED_POINTS)
    values = np.nan_to_num(table[:, 1:], nan=0.0) * 1e3
    x = _integers(table[:, 0])
    return [
        {"name": name.replace("_", " "), "colour": STAGES.index(name), "x": x, "y": _rounded(values[:, i])}
        for i, name in enumerate(names)
        if values[:, i].sum() > 1e-3 * values.sum()
    ]


def _optimisation(curves: _Curves) -> Iterator[Chart]:
    for column, title, log, about in (
        ("gradient_norm", "Gradient norm", True, "Before clipping."),
        ("learning_rate", "Learning rate", False, ""),
        ("update_ratio", "Update over weights", True, "Norm of one step's update over the norm of the weights."),
    ):
        trace = curves.trace(column, title.lower(), noisy=column != "learning_rate")
        yield _chart(column, title, "optimisation", [trace], log=log, about=about, zero=not log)


# --------------------------------------------------------------------------------------------------------------- several


def _of_several(runs: Sequence[RunReport], curves: Sequence[_Curves]) -> Iterator[Chart]:
    def traces(column: str, factor: float = 1.0, *, noisy: bool = True) -> list[dict[str, Any] | None]:
        return [
            c.trace(column, run.name, colour=i, factor=factor, noisy=noisy)
            for i, (run, c) in enumerate(zip(runs, curves, strict=True))
        ]

    terms = list(dict.fromkeys(term for c in curves for term in c.names("loss")))
    shown = [t for t in terms if t not in DETAILS and not t.startswith("lpl_")]
    for term in sorted(shown, key=lambda t: (t != "loss", t != "denoising", t)):
        share = term == "gate"
        title = "Share of samples inside the gate" if share else _words(term)[0].upper() + _words(term)[1:]
        yield _chart(f"loss-{term}", title, "losses", traces(f"loss.{term}", 100.0 if share else 1.0), log=not share,
                     wide=term == "loss", **({"unit": "%", "range": [0, 100]} if share else {}))  # fmt: skip
    yield from _validations_of_several(runs)
    yield _chart("speed", "Throughput", "speed", traces("images_per_s"), unit="images/s", zero=True)
    yield _chart("mfu", "Model FLOPs utilisation", "speed", traces("mfu", 100.0), unit="%", zero=True)
    yield _chart(
        "step", "Time of a step, mean over ranks", "speed", traces("ranks.step_s.mean", 1e3), unit="ms", zero=True
    )
    yield _chart("gradient_norm", "Gradient norm", "optimisation", traces("gradient_norm"), log=True)
    yield _chart("learning_rate", "Learning rate", "optimisation", traces("learning_rate", noisy=False), zero=True)
    yield from _evaluations(runs)


def _evaluations(runs: Sequence[RunReport]) -> Iterator[Chart]:
    names = list(dict.fromkeys(n for run in runs for figures in run.history.evaluations.values() for n in figures))
    for name in names[:MAX_EVALUATIONS]:
        traces = []
        for i, run in enumerate(runs):
            points = [
                (step, figures[name]) for step, figures in sorted(run.history.evaluations.items()) if name in figures
            ]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if points:
                label = run.name if len(runs) > 1 else name
                traces.append(
                    {"name": label, "colour": i, "x": [p[0] for p in points], "y": [p[1] for p in points], "dots": True}
                )
        yield _chart(
            f"evaluation-{name}", _evaluation_title(name), "evaluation", traces, unit=EVALUATION_UNITS.get(name, "")
        )


def _evaluation_title(name: str) -> str:
    return {"psnr_db": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}.get(name, name.replace("_", " "))


# ------------------------------------------------------------------------------------------------------------- numbers


def _rounded(values: np.ndarray) -> list[float | None]:
    """Five digits are more than a screen shows; JSON has no NaN."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


def _integers(values: np.ndarray) -> list[int]:
    return [round(value) for value in values.tolist()]
