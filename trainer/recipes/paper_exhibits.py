"""The tables and figures of the latent perceptual loss's paper (Berrada et al., ICLR 2025): which trainings each compares, how
they are looked at, and what the paper has. No torch.

The paper's figures are its printed ones. Where it has a plot and no numbers, `says` tells what its text reads from it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from trainer.recipes.lpl_experiment import PARADIGMS
from trainer.recipes.paper_trainings import Loss, Scale, Training

Kind = Literal["table", "curve", "spectrum", "flops"]
FIVE = ("fid", "coverage", "density", "precision", "recall")
"""Of Table 3 and Figure 6, in the paper's order; `loupe evaluate --metrics`' names."""
FID = FIVE[:1]
LABELS = {"ddpm_eps": "DDPM-eps", "ddpm_v": "DDPM-v", "flow": "Flow-OT"}


@dataclass(frozen=True)
class Look:
    """One evaluation of a trained model."""

    training: Training
    seed: int
    num_steps: int
    """Of the sampler."""
    guidance: float
    sampler: str
    step: int | None = None
    """Of its checkpoint; None: the end."""
    width: float | None = None
    """Of an EMA chosen afterwards; None: the run's own."""

    @property
    def run(self) -> str:
        return f"{self.training.name}-{self.seed}"

    @property
    def name(self) -> str:
        """Unique among looks."""
        words = [self.run, f"{self.sampler}{self.num_steps}", f"guidance{self.guidance:g}"]
        words += [f"step{self.step}"] if self.step is not None else []
        words += [f"ema{self.width:g}"] if self.width is not None else []
        return "-".join(words)


@dataclass(frozen=True)
class Point:
    """A row of a table, or a mark of a curve."""

    label: str
    looks: tuple[Look, ...]
    """By seed."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """Its figures, by metric."""
    series: str = ""
    """The curve."""
    x: float = 0.0
    aside: tuple[str, ...] = ()
    """Cells before the figures, beside the label."""


@dataclass(frozen=True)
class Exhibit:
    name: str
    title: str
    kind: Kind
    says: str
    """The paper's finding, in a sentence."""
    points: tuple[Point, ...]
    metrics: tuple[str, ...] = FID
    head: tuple[str, ...] = ("",)
    """Of the columns before the figures."""
    x: str = ""
    """What a curve's axis is."""
    log_x: bool = False
    here: str = ""
    """What is other than in the paper, at a small scale."""
    baseline: str = ""
    """Label of the point that others are told apart from; empty: none."""

    def looks(self) -> Iterator[Look]:
        for point in self.points:
            yield from point.looks


# -------------------------------------------------------------------------------------------------------------- their parts


def _looks(
    scale: Scale, training: Training, *, num_steps: int | None = None, guidance: float | None = None,
    sampler: str | None = None, step: int | None = None, width: float | None = None,
) -> tuple[Look, ...]:  # fmt: skip
    """Of each seed."""
    own = "euler" if training.paradigm == "flow" else "ddim"
    return tuple(
        Look(
            training, seed, num_steps or scale.sampling_steps,
            scale.guidance(training.low) if guidance is None else guidance, sampler or own, step, width,
        )
        for seed in range(scale.seeds)
    )  # fmt: skip


def _paper(*values: float | None, metrics: tuple[str, ...] = FID) -> dict[str, float]:
    return {name: value for name, value in zip(metrics, values, strict=False) if value is not None}


# ------------------------------------------------------------------------------------------------------------------ tables


def table2(scale: Scale) -> Exhibit:
    metrics = ("fid", "clip_score")
    printed = {
        ("imagenet", True, "plain"): (2.98,), ("imagenet", True, "lpl"): (2.72,),
        ("imagenet", False, "plain"): (4.88,), ("imagenet", False, "lpl"): (3.79,),
        ("cc12m", False, "lpl"): (6.22, 25.12), ("cc12m", True, "plain"): (7.81, 25.06),
        ("s320m", False, "plain"): (8.81, 24.39), ("s320m", False, "lpl"): (8.30, 24.41),
    }  # fmt: skip
    losses: tuple[Loss, Loss] = ("plain", "lpl")
    points = tuple(
        Point(
            dataset, _looks(scale, Training(loss, dataset=dataset if i else "", low=low)),
            _paper(*printed.get((dataset, low, loss), ()), metrics=metrics),
            aside=(str(scale.resolutions[not low]), "yes" if loss == "lpl" else "no"),
        )
        for i, dataset in enumerate(scale.datasets) for low in (True, False) for loss in losses
    )  # fmt: skip
    return Exhibit(
        "table2", "Table 2: datasets and resolutions", "table",
        "LPL is better in FID and CLIPScore on all datasets and at both resolutions. (Its table as it can be read gives some "
        "rows only; ImageNet at 512 px is filled in from Table 3.)",
        points, metrics, head=("dataset", "resolution", "LPL"),
        here="The emoji stand in for the datasets, 32 and 64 px for 256 and 512. Other datasets: --dataset NAME=URL. "
        "CLIPScore needs a CLIP: --network clip=FOLDER.",
    )  # fmt: skip


def table3(scale: Scale) -> Exhibit:
    printed: dict[tuple[str, Loss], tuple[float, ...]] = {
        ("ddpm_eps", "plain"): (4.88, 0.80, 1.14, 0.74, 0.49), ("ddpm_eps", "lpl"): (3.79, 0.82, 1.13, 0.77, 0.51),
        ("ddpm_v", "plain"): (4.72, 0.80, 1.15, 0.73, 0.49), ("ddpm_v", "lpl"): (3.84, 0.83, 1.14, 0.78, 0.50),
        ("flow", "plain"): (4.54, 0.82, 1.14, 0.75, 0.52), ("flow", "lpl"): (3.61, 0.85, 1.29, 0.79, 0.54),
    }  # fmt: skip
    losses: tuple[Loss, Loss] = ("plain", "lpl")
    points = tuple(
        Point(
            LABELS[paradigm], _looks(scale, Training(loss, paradigm)),
            _paper(*printed[paradigm, loss], metrics=FIVE), aside=("yes" if loss == "lpl" else "no",),
        )
        for paradigm in ("ddpm_eps", "ddpm_v", "flow") for loss in losses
    )  # fmt: skip
    return Exhibit(
        "table3", "Table 3: paradigms, with and without LPL", "table",
        "LPL is better in all metrics and paradigms, but for density with DDPM, which falls by 0.01.",
        points, FIVE, head=("paradigm", "LPL"),
    )  # fmt: skip


def table4(scale: Scale) -> Exhibit:
    printed = ((-0.58, 4.29, 0.14, 4.01, 1.99), (-0.78, 3.51, 0.12, 4.55, 2.32), (-0.97, 3.99, 0.21, 5.89, 4.22))
    points: list[Point] = []
    for i, plain_steps in enumerate(scale.plain_steps):
        losses: tuple[Loss, Loss] = ("plain", "lpl")
        for loss in losses:
            told = _paper(*printed[i], metrics=FIVE) if loss == "lpl" and i < len(printed) else {}
            looks = _looks(scale, Training(loss, plain_steps=plain_steps))
            points.append(Point(f"{plain_steps:,}", looks, told, aside=("yes" if loss == "lpl" else "no",)))
    return Exhibit(
        "table4", "Table 4: how long to train without LPL before it is switched on", "table",
        "The longer the model was trained before, the more LPL gains, in all but coverage. The paper prints differences to the "
        "baseline (coverage, precision and recall in per cent), which stand in the rows with LPL.",
        tuple(points), FIVE, head=("steps before", "LPL"),
    )  # fmt: skip


def table5(scale: Scale) -> Exhibit:
    rows = [
        ("l2", Training(), 4.88), ("E-LatentLPIPS", Training("latent_lpips"), 7.71),
        ("E-LatentLPIPS, at LPL's noise levels", Training("latent_lpips_gated"), 7.19),
        *((f"Self-Perceptual, block {block}", Training("self_perceptual", block=block), paper)
          for block, paper in zip(scale.blocks, (5.82, 13.40, 10.43), strict=False)),
        ("LPL", Training("lpl"), 3.79),
    ]  # fmt: skip
    if not scale.latent_network:
        rows = [row for row in rows if not row[1].loss.startswith("latent_lpips")]
    return Exhibit(
        "table5", "Table 5: other perceptual losses", "table",
        "No rival is better than the denoising loss alone; LPL is. Each has a tenth of the denoising loss's variance.",
        tuple(Point(label, _looks(scale, training), _paper(paper)) for label, training, paper in rows),
        head=("loss",), baseline="l2",
        here="E-LatentLPIPS needs a network of latents: --latent-network FOLDER. Throughput and memory are measured by "
        "ops/bench/lpl.py, not here.",
    )  # fmt: skip


def table6(scale: Scale) -> Exhibit:
    rows = (
        ("baseline", Training(), 4.88), ("baseline, reweighted (Eq. 15)", Training("reweighting"), 5.43),
        ("min-SNR", Training("min_snr"), 5.04), ("LPL", Training("lpl"), 3.79),
    )  # fmt: skip
    return Exhibit(
        "table6", "Table 6: reweighting of timesteps", "table",
        "Reweighting is worse than the baseline, LPL is better: its gain is not one of weights by timestep.",
        tuple(Point(label, _looks(scale, training), _paper(paper)) for label, training, paper in rows),
        head=("re-weighting",), baseline="baseline",
    )  # fmt: skip


def table7(scale: Scale) -> Exhibit:
    """The paper's ratios of batch and of steps: 25 to 16, 122.5k to 82.5k."""
    batch_size = scale.batch_size(low=False)
    steps = max(1, scale.steps * 825 // 1225)
    rows = (
        ("baseline", Training(batch_size=max(1, batch_size * 25 // 16)), 4.62, scale.steps, batch_size * 25 // 16),
        ("with LPL", Training("lpl", steps=steps), 3.84, steps, batch_size),
    )  # fmt: skip
    return Exhibit(
        "table7", "Table 7: equal time and memory", "table",
        "With the largest batch that each fits and 48 hours for both, LPL still wins, by 0.78 instead of 1.09.",
        tuple(
            Point(label, _looks(scale, training), _paper(paper), aside=(str(size), f"{steps:,}"))
            for label, training, paper, steps, size in rows
        ),
        head=("method", "batch", "steps"), baseline="baseline",
        here="Batches and steps stand to each other as the paper's do; hours and memory were not made equal.",
    )  # fmt: skip


def table8(scale: Scale) -> Exhibit:
    return Exhibit(
        "table8", "Table 8: FLOPs", "flops",
        "LPL adds 36.6 TFLOP to an iteration's 63.4 at 256 px and 37.2 to 69.3 at 512, and 10 to 15 % to the whole training.",
        (),
        here="Counted on this machine without values, of the models at the paper's size.",
    )  # fmt: skip


def table9(scale: Scale) -> Exhibit:
    num_steps = scale.many_sampling_steps
    points = (
        Point("ours, DDPM (DDIM)", _looks(scale, Training(), num_steps=num_steps), _paper(3.02)),
        Point("ours, Flow-OT (RK4, 3/8 rule)",
              _looks(scale, Training(paradigm="flow"), num_steps=max(1, num_steps // 4), sampler="rk4-38"), _paper(2.49)),
        *(Point(label, (), _paper(paper)) for label, paper in (
            ("UNet (Rombach et al. 2022)", 4.81), ("DiT-XL/2 (Peebles & Xie 2023)", 3.04),
            ("MDTv2 (Gao et al. 2023)", 3.75), ("SiT-XL/2, flow, SDE (Ma et al. 2024)", 2.62))),
    )  # fmt: skip
    return Exhibit(
        "table9", "Table 9: the baseline against the literature", "table",
        f"The baselines without LPL are on a par with the literature's. {num_steps} network evaluations an image.",
        points, head=("model",),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- figures


def figure4(scale: Scale, name: str = "figure4", title: str = "Figure 4: power spectra's differences") -> Exhibit:
    losses: tuple[tuple[Loss, str], ...] = (("plain", "without LPL"), ("lpl", "with LPL"))
    points = tuple(
        Point(f"{LABELS[paradigm]}, {label}", _looks(scale, Training(loss, paradigm)), series=LABELS[paradigm])
        for paradigm in ("ddpm_eps", "ddpm_v", "flow") for loss, label in losses
    )  # fmt: skip
    return Exhibit(
        name, title, "spectrum",
        "With LPL there is more power at the lowest and the highest frequencies; the highest are nearer to real "
        "images' (above 150 cycles of 512 px), the middle ones (75 to 150) a little further off.",
        points, ("spectrum",),
        here="By radius alone; the paper's Figure 4 is of two dimensions.",
    )  # fmt: skip


def figure6(scale: Scale) -> Exhibit:
    taus = (1.0, 2.0, 3.0, 6.0, 10.0, 20.0)
    points = tuple(Point(f"{tau:g}", _looks(scale, Training("lpl", tau=tau)), series="with LPL", x=tau) for tau in taus)
    return Exhibit(
        "figure6", "Figure 6: the noise threshold", "curve",
        "Best between 3 and 6, and better than the baseline for all thresholds in all metrics; recall falls from 20 on.",
        (*points, Point("without", _looks(scale, Training()))), FIVE, x="tau", log_x=True, baseline="without",
    )  # fmt: skip


def figure7(scale: Scale) -> Exhibit:
    depths = range(1, scale.num_maps + 1)
    points = [Point("0", _looks(scale, Training()), series="decoder maps", x=0.0)]
    for depth in depths:
        training = Training("lpl", num_maps=None if depth == scale.num_maps else depth)
        points.append(Point(str(depth), _looks(scale, training), series="decoder maps", x=float(depth)))
    points.append(Point("RGB", _looks(scale, Training("rgb")), series="decoded RGB", x=scale.num_maps + 1.0))
    return Exhibit(
        "figure7", "Figure 7: depth of the LPL", "curve",
        "The first two blocks do not help and may harm, the third and the fourth gain more than a point each, the fifth adds "
        "little; the loss on decoded RGB is worse than none.",
        tuple(points), x="decoder maps used, from the first", baseline="0",
    )  # fmt: skip


def figure8(scale: Scale) -> Exhibit:
    losses: tuple[tuple[Loss, str], ...] = (("plain", "without LPL"), ("lpl", "with LPL"))
    counts = sorted({max(2, round(scale.sampling_steps * share)) for share in (0.2, 0.5, 1.0, 2.0, 4.0)})
    points = tuple(
        Point(str(count), _looks(scale, Training(loss), num_steps=count), series=label, x=count)
        for loss, label in losses for count in counts
    )  # fmt: skip
    return Exhibit(
        "figure8", "Figure 8: sampling steps", "curve",
        "With few steps both are alike; the gain grows from 25 steps on until 100 and stays at 1.1.",
        points, x="sampling steps (DDIM)", log_x=True,
    )  # fmt: skip


def figure9(scale: Scale) -> Exhibit:
    main = scale.weight("ddpm_eps")
    points = tuple(
        Point(
            f"{weight:g}", _looks(scale, Training("lpl", weight=None if weight == main else weight)), series="with LPL",
            x=weight,
        )
        for weight in scale.weights
    )  # fmt: skip
    return Exhibit(
        "figure9", "Figure 9: the LPL's weight", "curve",
        "FID falls sharply with small weights and rises with large ones; best near 3, where LPL is a fifth of the loss.",
        (Point("0", _looks(scale, Training())), *points), x="w_LPL", log_x=True, baseline="0",
        here="A weight's share of the loss is another here than in the paper: the table gives it.",
    )  # fmt: skip


def figure10(scale: Scale) -> Exhibit:
    losses: tuple[tuple[Loss, str], ...] = (("plain", "without LPL"), ("lpl", "with LPL"))
    points = tuple(
        Point(f"{width:g}", _looks(scale, Training(loss, profiles=True), width=width), series=label, x=width)
        for loss, label in losses for width in (0.03, 0.05, 0.1, 0.15, 0.2)
    )  # fmt: skip
    return Exhibit(
        "figure10", "Figure 10: the EMA's decay", "curve",
        "LPL is best with a shorter average: a decay of 0.99975 instead of 0.9999.",
        points, x="width of the EMA, a share of the run",
        here="One training a curve: the widths are put together from the run's snapshots (docs/ema.md).",
    )  # fmt: skip


def figure16(scale: Scale, name: str = "figure16", title: str = "Figures 14 and 16: LPL from scratch") -> Exhibit:
    losses: tuple[tuple[Loss, str], ...] = (("plain", "without LPL"), ("lpl", "with LPL"))
    every = scale.every_steps(scratch=True)
    steps = range(every, scale.scratch_steps + 1, every)
    points = tuple(
        Point(f"{step:,}", _looks(scale, Training(loss, scratch=True), step=step), series=label, x=step)
        for loss, label in losses for step in steps
    )  # fmt: skip
    return Exhibit(name, title, "curve", "Alike in the beginning; the gain of LPL grows as training goes on.",
                   points, x="steps")  # fmt: skip


def figure18(
    scale: Scale, name: str = "figure18", title: str = "Figures 15, 17 and 18: fine-tuning with LPL"
) -> Exhibit:
    losses: tuple[tuple[Loss, str], ...] = (("plain", "without LPL"), ("lpl", "with LPL"))
    every = scale.every_steps(scratch=False)
    steps = range(every, scale.steps + 1, every)
    points = tuple(
        Point(f"{step:,}", _looks(scale, Training(loss, low=scale.fine_tune_low), step=step), series=label, x=step)
        for loss, label in losses for step in steps
    )  # fmt: skip
    return Exhibit(name, title, "curve", "From 20k iterations on the model with LPL is better.", points, x="steps")


def figure19(scale: Scale) -> Exhibit:
    points = tuple(
        Point(f"{guidance:g}", _looks(scale, Training(), guidance=guidance), series="without LPL", x=guidance)
        for guidance in (1.0, 1.5, 2.0, 3.0, 4.0)
    )
    return Exhibit("figure19", "Figure 19: the scale of guidance", "curve", "Best at 2.0, at 512 px.", points,
                   x="guidance scale")  # fmt: skip


EXHIBITS: dict[str, Callable[[Scale], Exhibit]] = {
    "table2": table2, "table3": table3, "table4": table4, "table5": table5, "table6": table6, "table7": table7,
    "table8": table8, "table9": table9, "figure4": figure4,
    "figure5": partial(figure4, name="figure5", title="Figure 5: spectra against real images"),
    "figure6": figure6, "figure7": figure7, "figure8": figure8, "figure9": figure9, "figure10": figure10,
    "figure14": partial(figure16, name="figure14"), "figure15": partial(figure18, name="figure15"),
    "figure16": figure16, "figure17": partial(figure18, name="figure17"), "figure18": figure18, "figure19": figure19,
}  # fmt: skip
"""By the name that `loupe experiment` takes."""
SHOWN = ("table3", "table6", "table8", "figure5", "figure7", "figure9")
"""Those that docs/experiments/ has."""
assert set(LABELS) == set(PARADIGMS)
