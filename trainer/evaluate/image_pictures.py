"""Pictures of an evaluation of images. PNG bytes."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.evaluate import metrics
from trainer.pictures import png

ROWS_SHOWN, NEIGHBOURS_SHOWN, SIDE = 8, 4, 128
Pixels = NDArray[np.uint8]


def spectrum_plot(generated_NF: NDArray[np.float64], real_NF: NDArray[np.float64], *, name: str) -> bytes:
    """Power by frequency of both sets, and the difference of their logarithms: figures 4 and 5 of Berrada et al. 2025."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made_F, real_F = metrics.log_power(generated_NF), metrics.log_power(real_NF)
    frequency_F = np.arange(1, len(made_F) + 1) / (2 * len(made_F))
    figure = Figure(figsize=(10, 4))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.96, bottom=0.13, wspace=0.2)
    power, difference = figure.subplots(1, 2)
    power.plot(frequency_F, real_F, color="0.25", label=f"real ({len(real_NF)})")
    power.plot(frequency_F, made_F, color="C0", label=f"{name} ({len(generated_NF)})")
    power.set_ylabel("log10 power")
    power.legend()
    difference.axhline(0.0, color="0.25", linewidth=1)
    difference.plot(frequency_F, metrics.log_power_difference(made_F, real_F), color="C0")
    difference.set_ylabel("log10 power, generated - real")
    for axes in (power, difference):
        axes.set_xlabel("spatial frequency, cycles a pixel")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def nearest_rows(
    generated_ND: NDArray[np.floating], real_MD: NDArray[np.floating], *, block: int = 4096
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of some generated images, spread over the set, and for each those of its nearest real ones: (R,), (R, K)."""
    count = min(ROWS_SHOWN, len(generated_ND))
    rows = np.arange(count) * len(generated_ND) // count
    some = np.asarray(generated_ND[rows], dtype=np.float64)
    # less a length of the generated image's own, which does not change the order
    distances = np.empty((count, len(real_MD)))
    for first in range(0, len(real_MD), block):
        real = np.asarray(real_MD[first : first + block], dtype=np.float64)
        distances[:, first : first + block] = np.square(real).sum(1) - 2.0 * some @ real.T
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS_SHOWN]
    return rows, nearest


def neighbours_grid(rows: Sequence[tuple[Pixels, Sequence[Pixels]]], *, network: str) -> bytes:
    """A generated image, (H, W, 3), and the real ones nearest to it, in each row."""
    margin, label, gap = 6, 20, 14
    columns = 1 + max(len(near) for _, near in rows)
    width = margin + columns * (SIDE + margin) + gap
    sheet = Image.new("RGB", (width, label + len(rows) * (SIDE + margin) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.text((margin, 4), "generated", fill=(60, 60, 60), font=font)
    draw.text((margin + SIDE + margin + gap, 4), f"nearest real images, by {network}", fill=(60, 60, 60), font=font)
    for i, (generated, near) in enumerate(rows):
        for k, pixels in enumerate((generated, *near)):
            x = margin + k * (SIDE + margin) + (gap if k else 0)
            smooth = Image.Resampling.LANCZOS if pixels.shape[0] > SIDE else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE), smooth), (x, label + i * (SIDE + margin)))
    return png(sheet)
