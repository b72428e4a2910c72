"""Table 8 of the paper, counted: what LPL adds to an iteration and to the whole training, of the models at the paper's size."""

from typing import Any

from trainer.experiments.results import table
from trainer.plan.recipe import count_recipe
from trainer.recipes.paper import PRETRAIN
from trainer.recipes.paper_exhibits import Exhibit
from trainer.recipes.paper_trainings import FULL, Training

TERA = 1e12
PAPER = {
    ("imagenet", 256): (63.342, 99.987, 0.1443), ("imagenet", 512): (69.342, 106.581, 0.0964),
    ("cc12m", 256): (63.391, 100.064, 0.1446), ("cc12m", 512): (69.342, 106.583, 0.0964),
}  # fmt: skip
"""TFLOP an iteration without and with LPL, and by how much the whole training grows."""
PAPER_PRETRAIN = 63.389
"""Of an iteration of the first phase."""
PAPER_BATCH_512 = 16
"""Images a GPU of its 512 px iterations: Table 7 has the same 106.581 TFLOP for them."""
THEIRS = (106.581 - 69.342) / PAPER_BATCH_512
"""TFLOP of LPL, an image."""


def page(exhibit: Exhibit) -> tuple[list[str], dict[str, Any]]:
    """Its lines and figures; some seconds of counting."""
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    for (dataset, side), (without, with_lpl, growth) in PAPER.items():
        ours = _counted(dataset, low=side == 256)
        plain, lpl = ours["model"], ours["model"] + ours["lpl"]
        whole, whole_lpl = plain + ours["encoder"], lpl + ours["encoder"]
        steps = FULL.config(Training(dataset=_dataset(dataset), low=side == 256), 0, "runs").phases[-1].steps
        # the share of the second phase in the whole is the paper's, whose batches are other than ours
        second = steps * without
        share = second / (PRETRAIN.steps * PAPER_PRETRAIN + second)
        grown = share * (lpl / plain - 1)
        rows.append([
            dataset, str(side), f"{plain / TERA:.3f}", f"{ours['lpl'] / TERA:.3f}", f"{ours['encoder'] / TERA:.3f}",
            f"{ours['inside']:.2f}", f"{lpl / plain:.3f}", f"{with_lpl / without:.3f}", f"{grown:.1%}", f"{growth:.1%}",
            f"{whole_lpl / whole:.3f}",
        ])  # fmt: skip
        figures.append({"dataset": dataset, "resolution": side, **ours, "ratio": lpl / plain, "paper_ratio": with_lpl / without,
                        "growth": grown, "paper_growth": growth})  # fmt: skip
    large = next(f for f in figures if f["dataset"] == "imagenet" and f["resolution"] == 512)
    model, loss, inside = large["model"], large["lpl"], large["inside"]
    lines = [
        f"# {exhibit.title}",
        "",
        f"Written by `loupe experiment {exhibit.name}`, its figures in `{exhibit.name}.json`; do not edit it, but run "
        "the command again.",
        "",
        f"**The paper** (Berrada et al., ICLR 2025): {exhibit.says}",
        "",
        f"**Here**: {exhibit.here} TFLOP an image: the denoiser, forward and backward; LPL, the decoder on the true and on the "
        "predicted latents and back to these, times the share of samples inside its gate; and online encoding, which the paper "
        "does not name. A multiplication and an addition are two.",
        "",
        *table(
            ["dataset", "px", "denoiser", "LPL", "encoder", "inside the gate", "with LPL / without", "the paper's",
             "whole training grows by", "the paper's", "with LPL / without, encoding counted too"], rows,
        ),
        "",
        f"The whole training is the first phase's {PRETRAIN.steps:,} iterations without LPL and those of the table's, weighed "
        f"by the paper's TFLOP an iteration ({PAPER_PRETRAIN} in the first phase), of batches that it does not name at 256 px.",
        "",
        f"Of an image of 512 px the denoiser takes {model / TERA:.2f} TFLOP here; the paper's 69.342 of "
        f"{PAPER_BATCH_512} (Table 7) are {69.342 / PAPER_BATCH_512:.2f} each. LPL takes {loss / TERA:.1f} by our count, "
        f"{THEIRS:.2f} by the paper's, which does not say what it counts: ours is {loss / TERA / THEIRS:.1f} times that. One "
        f"forward pass of the asymmetric decoder is about {loss / TERA / 3 / inside:.1f} TFLOP, a third of it all.",
    ]  # fmt: skip
    return lines, {"name": exhibit.name, "rows": figures}


def _dataset(name: str) -> str:
    """Of a training: its scale's first goes without a name."""
    return "" if name == FULL.datasets[0] else name


def _counted(dataset: str, *, low: bool) -> dict[str, float]:
    """FLOPs of an image, by part."""
    run = FULL.config(Training("lpl", dataset=_dataset(dataset), low=low), 0, "runs")
    phase = count_recipe(run).phases[-1]
    assert phase.loss is not None
    assert phase.encoder is not None
    return {
        "model": phase.model.flops().at(1), "lpl": phase.inside * phase.loss.flops().at(1),
        "encoder": phase.encoder.flops().at(1), "inside": phase.inside,
    }  # fmt: skip
