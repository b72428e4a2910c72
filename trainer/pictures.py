"""Pictures of a run: sample grids with their prompts, and loss curves. PNG bytes."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def sample_grid(images_BHWC: np.ndarray, prompts: Sequence[str], *, side: int = 160) -> bytes:
    """Images (B, H, W, 3), uint8, in rows, each shown at `side` pixels, its longer side, with its prompt below."""
    columns = math.ceil(math.sqrt(len(prompts)))
    rows = math.ceil(len(prompts) / columns)
    margin, caption = 8, 34
    sheet = Image.new("RGB", (columns * (side + margin) + margin, rows * (side + caption + margin) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (pixels, prompt) in enumerate(zip(images_BHWC, prompts, strict=True)):
        x, y = margin + i % columns * (side + margin), margin + i // columns * (side + caption + margin)
        smooth = Image.Resampling.LANCZOS if pixels.shape[0] > side else Image.Resampling.BICUBIC
        # the longer side is `side`, and what is no square stands in the middle
        shown = [max(1, round(side * length / max(pixels.shape[:2]))) for length in (pixels.shape[1], pixels.shape[0])]
        place = (x + (side - shown[0]) // 2, y + (side - shown[1]) // 2)
        sheet.paste(Image.fromarray(pixels).resize((shown[0], shown[1]), smooth), place)
        text = "\n".join(textwrap.wrap(prompt, width=side // 6, max_lines=2, placeholder=" ..."))
        draw.text((x, y + side + 3), text, fill=(60, 60, 60), font=font)
    return png(sheet)


def reconstruction_grid(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, gain: int = 4, columns: int = 8, smallest_px: int = 96
) -> bytes:
    """Originals and reconstructions (H, W, 3), uint8, of one size: a row of each and below them a row of the difference,
    `gain` times as large and grey where there is none; then the next `columns`. Small images are shown larger, by whole
    factors."""
    side = pairs[0][0].shape[0]
    factor = max(1, -(-smallest_px // side))
    shown, margin, label = side * factor, 4, 18
    columns = min(columns, len(pairs))
    titles = ("originals", "reconstructions", f"difference x {gain}, grey: none")
    width, height = columns * (shown + margin) + margin, label + shown + margin
    sheet = Image.new("RGB", (max(width, 180), -(-len(pairs) // columns) * len(titles) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (original, reconstruction) in enumerate(pairs):
        difference = 128 + gain * (reconstruction.astype(np.int32) - original)
        rows = (original, reconstruction, difference.clip(0, 255).astype(np.uint8))
        x = margin + i % columns * (shown + margin)
        for k, (title, pixels) in enumerate(zip(titles, rows, strict=True)):
            y = (i // columns * len(titles) + k) * height
            if i % columns == 0:
                draw.text((margin, y + 2), title, fill=(60, 60, 60), font=font)
            sheet.paste(Image.fromarray(pixels).resize((shown, shown), Image.Resampling.NEAREST), (x, y + label))
    return png(sheet)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: dict[str, list[tuple[int, float]]]
    """(step, value), by label."""
    is_loss: bool = True

    @property
    def is_logarithmic(self) -> bool:
        return self.is_loss and all(value > 0 for points in self.curves.values() for _, value in points)


TOGETHER = (("generator", "discriminator"), ("logits_real", "logits_fake"), ("codebook", "commitment"))
"""Terms that share a panel."""
_TITLES = {"gate": "share of samples inside the gate"}
_FIGURES = {
    "psnr_db": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "frechet": "Frechet distance", "fid": "FID",
    "fid_clean": "clean-fid's FID", "fd_dinov2": "Frechet distance of DINOv2", "clip_score": "CLIPScore",
}  # fmt: skip
"""Of evaluations."""


def loss_curves(
    records: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = (),
    validations: Sequence[Mapping[str, Any]] = (),
) -> bytes:  # fmt: skip
    """A panel for each loss term over steps, or for terms that belong together, phases shaded; for a few figures of
    evaluations; for each term of validations, by noise level; and for images per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(records, evaluations, validations)
    columns = min(3 if len(panels) <= 9 else 4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = 5 * columns, 3 * rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # fixed margins, in inches: matplotlib's own layout lays all text out twice, while the ranks wait
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.15 / width, top=1 - 0.4 / height, bottom=0.5 / height, wspace=0.2, hspace=0.45
    )
    bounds = _phase_bounds(records)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for label, points in panel.curves.items():
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, marker="." if len(points) < 40 else None)
        if panel.title == _TITLES["gate"]:
            axes.set_ylim(0, 1)
        elif panel.is_logarithmic:
            axes.set_yscale("log")
        for k, (name, first, last) in enumerate(bounds):
            axes.axvspan(first, last, color="0.5", alpha=0.12 if k % 2 else 0.04, linewidth=0)
            if i == 0:
                axes.text((first + last) / 2, 1.01, name, ha="center", va="bottom", fontsize=7,
                          transform=axes.get_xaxis_transform())  # fmt: skip
        if len(panel.curves) > 1:
            axes.legend(fontsize=7)
        # with y the place is not looked for, which takes as long as the drawing
        axes.set_title(panel.title, pad=14, y=1.0)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _panels(
    records: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[_Panel]:  # fmt: skip
    found = {term for record in records for term in record["loss"]}
    curves = {term: [(r["step"], r["loss"][term]) for r in records if term in r["loss"]] for term in found}
    panels = []
    for term in sorted(found, key=lambda term: (term != "loss", term)):
        group = next((group for group in TOGETHER if term in group), (term,))
        shown = [other for other in group if other in found]
        if term == shown[0]:
            title = ", ".join(_TITLES.get(other, other.replace("_", " ")) for other in shown)
            panels.append(_Panel(title, {other: curves[other] for other in shown}))
    for name, title in _FIGURES.items():
        points = [(e["step"], e[name]) for e in evaluations if e.get(name) is not None]
        if points:
            panels.append(_Panel(f"evaluation: {title}", {name: points}, is_loss=False))
    for term in dict.fromkeys(term for v in validations for term in v["terms"]):
        by_level: dict[str, list[tuple[int, float]]] = {}
        for v in validations:
            for level, value in enumerate(v["terms"].get(term, ())):
                if value is not None:
                    by_level.setdefault(f"level {level}", []).append((v["step"], value))
        if by_level:
            panels.append(_Panel(f"validation: {term.replace('_', ' ')} by noise level", by_level))
    speed = [(r["step"], r["images_per_s"]) for r in records]
    return [*panels, _Panel("images per second", {"images_per_s": speed}, is_loss=False)]


def _phase_bounds(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(name, step at which it began, last recorded step) of each phase."""
    bounds: list[tuple[str, int, int]] = []
    for record in records:
        if bounds and bounds[-1][0] == record["phase"]:
            bounds[-1] = (record["phase"], bounds[-1][1], record["step"])
        else:
            bounds.append((record["phase"], bounds[-1][2] if bounds else 0, record["step"]))
    return bounds
