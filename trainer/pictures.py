"""Pictures of a run: sample grids with their prompts, and loss curves. PNG bytes."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def sample_grid(images_BHWC: np.ndarray, prompts: Sequence[str], *, side: int = 160) -> bytes:
    """Images (B, H, W, 3), uint8, in rows, each shown at `side` pixels with its prompt below."""
    columns = math.ceil(math.sqrt(len(prompts)))
    rows = math.ceil(len(prompts) / columns)
    margin, caption = 8, 34
    sheet = Image.new("RGB", (columns * (side + margin) + margin, rows * (side + caption + margin) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (pixels, prompt) in enumerate(zip(images_BHWC, prompts, strict=True)):
        x, y = margin + i % columns * (side + margin), margin + i // columns * (side + caption + margin)
        smooth = Image.Resampling.LANCZOS if pixels.shape[0] > side else Image.Resampling.BICUBIC
        sheet.paste(Image.fromarray(pixels).resize((side, side), smooth), (x, y))
        text = "\n".join(textwrap.wrap(prompt, width=side // 6, max_lines=2, placeholder=" ..."))
        draw.text((x, y + side + 3), text, fill=(60, 60, 60), font=font)
    return png(sheet)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def loss_curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """One panel a loss term over steps, phases shaded; and one for images per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    terms = sorted({term for record in records for term in record["loss"]}, key=_term_order)
    panels = [*terms, "images_per_s"]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    bounds = _phase_bounds(records)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = [
            (r["step"], r[panel] if panel == "images_per_s" else r["loss"][panel])
            for r in records
            if panel == "images_per_s" or panel in r["loss"]
        ]
        axes.plot(*zip(*points, strict=True), linewidth=1.5, marker="." if len(points) < 40 else None)
        if panel == "gate":
            axes.set_ylim(0, 1)
        elif panel != "images_per_s" and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        for k, (name, first, last) in enumerate(bounds):
            axes.axvspan(first, last, color="0.5", alpha=0.12 if k % 2 else 0.04, linewidth=0)
            if i == 0:
                axes.text((first + last) / 2, 1.01, name, ha="center", va="bottom", fontsize=7,
                          transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_title(_TITLES.get(panel, panel.replace("_", " ")), pad=14)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


_TITLES = {"images_per_s": "images per second", "gate": "share of samples inside the gate"}


def _term_order(term: str) -> tuple[int, str]:
    return (0 if term == "loss" else 1, term)


def _phase_bounds(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(name, step at which it began, last recorded step) of each phase."""
    bounds: list[tuple[str, int, int]] = []
    for record in records:
        if bounds and bounds[-1][0] == record["phase"]:
            bounds[-1] = (record["phase"], bounds[-1][1], record["step"])
        else:
            bounds.append((record["phase"], bounds[-1][2] if bounds else 0, record["step"]))
    return bounds
