"""Pictures of `loupe analyze latents`, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from trainer.evaluate.latents import METHODS, Interpolation, MapOutliers, Sensitivity
from trainer.evaluate.lpl_constants import PERTURBATIONS

DPI = 110
OUTLINE = "#ff2d2d"
PARADIGM_NAMES = {"ddpm_eps": "DDPM-eps", "ddpm_v": "DDPM-v, zero terminal SNR", "flow": "flow, mode sampling"}


def outliers(maps: Sequence[MapOutliers]) -> bytes:
    """A row a map: masked share and peak of all channels, then the worst channels with their mask outlined (Figure 13)."""
    columns = 1 + max(len(m.worst) for m in maps)
    figure = _figure(2.5 * columns + 0.9, 2.75 * len(maps) + 0.7)
    figure.suptitle("Decoder maps: outliers by Algorithm 1, outlined in red in the worst channels")
    grid = figure.subplots(len(maps), columns, squeeze=False, width_ratios=[1.25, *[1] * (columns - 1)])
    for row, m in zip(grid, maps, strict=True):
        axes = row[0]
        # a channel without masked pixels stands at the left edge
        share = np.maximum(100 * np.array(m.masked_share_C), _FLOOR_PERCENT)
        axes.scatter(share, m.peak_sd_C, s=9, alpha=0.6, linewidths=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(_FLOOR_PERCENT / 1.6, 160)
        axes.set_xticks([_FLOOR_PERCENT, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        low, high = min(m.peak_sd_C), max(m.peak_sd_C)
        axes.set_ylim(min(2.0, max(low, 0.5)) / 1.2, max(20.0, high) * 1.5)
        _plain_log_ticks(axes)
        axes.grid(alpha=0.3)
        axes.set_xlabel("masked pixels, %", fontsize=8)
        axes.set_ylabel("largest distance, inliers' sd", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{m.name}: {len(m.peak_sd_C)} channels of {m.side} x {m.side}", fontsize=9)
        for axes, worst in zip(row[1:], [*m.worst, *[None] * columns], strict=False):
            if worst is None:
                axes.set_axis_off()
                continue
            _bare(axes)
            inside = worst.features_HW[worst.inlier_HW] if worst.inlier_HW.any() else worst.features_HW
            # colours span the inliers, so that what is there besides the outliers can be seen
            low, high = np.percentile(inside, (1, 99))
            axes.imshow(worst.features_HW, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), interpolation="nearest")
            _outline(axes, ~worst.inlier_HW)
            axes.set_title(f"channel {worst.channel}, image {worst.image}\n"
                           f"{100 * worst.masked_share:.2g} % masked, peak {_short(worst.peak_sd)} sd", fontsize=8)  # fmt: skip
    return _png(figure)


_FLOOR_PERCENT = 0.01


def sensitivity(maps: Sequence[Sensitivity], *, patch: int, halo: int, downsampling: int) -> bytes:
    """A row an image: error norm and its share elsewhere by perturbed position, and the change where it is largest and
    smallest (Figure 12)."""
    figure = _figure(14.6, 2.55 * len(maps) + 0.6)
    what = "one latent pixel" if patch == 1 else f"{patch} x {patch} latent pixels"
    figure.suptitle(f"Noise of half the latents' variance on {what}: what changes in the decoded image")
    for s, row in zip(maps, figure.subplots(len(maps), 5, squeeze=False), strict=True):
        height, width = s.decoded_HWC.shape[:2]
        extent = (0, width, height, 0)
        row[0].imshow(s.decoded_HWC, extent=extent)
        row[0].set_title(f"image {s.image}, decoded", fontsize=9)
        panels = (
            (s.error_norm_GG, "norm of the image's change", "magma", None),
            (100 * s.elsewhere_share_GG, f"share beyond {halo} latent px, %", "viridis", (0, 100)),
        )
        for axes, (values, title, colours, limits) in zip(row[1:3], panels, strict=True):
            low, high = limits or (0, max(float(values.max()), 1e-12))
            shown = axes.imshow(values, extent=extent, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03).ax.tick_params(labelsize=7)
            axes.set_title(title, fontsize=9)
        ceiling = max(float(np.percentile(s.extremes_HW[0], 99.8)), 1e-12)
        for axes, change_HW, largest in zip(row[3:], s.extremes_HW, (True, False), strict=True):
            at = s.at(largest)
            shown = axes.imshow(change_HW, extent=extent, cmap="magma", vmin=0, vmax=ceiling)
            figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03, extend="max").ax.tick_params(labelsize=7)
            axes.set_title(
                f"change, {'most' if largest else 'least'} sensitive: norm {s.error_norm_GG[at]:.2g}", fontsize=9
            )
        for largest, colour in ((True, OUTLINE), (False, "#36c5f0")):
            y, x = (s.positions_GG2[s.at(largest)] + patch / 2) * downsampling
            half = downsampling * (patch / 2 + halo)
            for axes in (row[0], row[3] if largest else row[4]):
                axes.plot([x - half, x + half, x + half, x - half, x - half],
                          [y - half, y - half, y + half, y + half, y - half], color=colour, linewidth=1.2)  # fmt: skip
        for axes in row:
            _bare(axes)
            axes.set_xlim(0, width)
            axes.set_ylim(height, 0)
    return _png(figure)


def interpolation(measure: Interpolation, numbers: Mapping[str, Any], scales: Sequence[float]) -> bytes:
    """Rows of methods and columns of scales for the first image (Figure 11), and both errors over all images."""
    assert measure.reconstruction_HWC is not None
    columns = 1 + len(scales)
    figure = _figure(2.55 * columns + 5.6, 2.75 * len(METHODS) + 0.6)
    halves: Any = figure.subfigures(1, 2, width_ratios=[2.55 * columns, 5.6])
    pictures, plots = halves
    pictures.suptitle("Interpolated to 1/s of the sides and back, then decoded")
    for row, (method, title) in zip(pictures.subplots(len(METHODS), columns), METHODS.items(), strict=True):
        row[0].imshow(measure.reconstruction_HWC)
        row[0].set_ylabel(title, fontsize=10)
        row[0].set_title("reconstruction", fontsize=9)
        for axes, scale in zip(row[1:], scales, strict=True):
            degraded = measure.pictures[method, scale]
            axes.imshow(degraded.picture_HWC)
            axes.set_title(f"s = {scale:g}: latent MSE {degraded.latent_mse:.2g},\nPSNR {degraded.psnr_db:.1f} dB",
                           fontsize=8)  # fmt: skip
        for axes in row:
            _bare(axes)
    axes = plots.subplots()
    axes.set_box_aspect(1.1)
    for method, title in METHODS.items():
        points = [r for r in numbers["rows"] if r["method"] == method]
        axes.plot([r["latent_mse"] for r in points], [r["psnr_db"] for r in points], marker="o", label=title)
        for r in points:
            axes.annotate(f"{r['scale']:g}", (r["latent_mse"], r["psnr_db"]), textcoords="offset points",
                          xytext=(6, 3), fontsize=8, color="0.35")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("latent MSE (scaled latents)")
    axes.set_ylabel("PSNR of the decoded image, dB")
    axes.set_title("Mean over images, against the codec's reconstruction;\nnumbers at points: s", fontsize=10)
    axes.margins(0.1)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    return _png(figure)


def amplitude(numbers: Mapping[str, Any]) -> bytes:
    """By map: standard deviation of features, their squared differences, the terms before omega, and after it."""
    figure = _figure(12.4, 9.4)
    (top_left, top_right), (left, right) = figure.subplots(2, 2)
    maps, omega = numbers["maps"], np.array(numbers["omega_by_map"])
    scales = np.array(numbers["scale_by_map"])
    x = np.arange(len(maps))

    top_left.plot(x, numbers["feature_std_by_map"], marker="o", color="0.25")
    top_left.set_title("Standard deviation of the features")
    top_left.set_ylabel("mean over channels and images")
    _plain_log_ticks(top_left)
    for p, row in enumerate(numbers["rows"]):
        name = PERTURBATIONS[row["perturbation"]]
        for axes, values, growth in (
            (top_right, np.array(row["squared_difference_by_map"]), row["squared_difference_growth_per_doubling"]),
            (left, np.array(row["term_by_map"]), row["growth_per_doubling"]),
        ):
            label = f"{name}: x {growth:.2f}" if growth else name
            axes.plot(x, values / values[0], marker="o", color=f"C{p}", label=label)
        weighted = omega * np.array(row["term_by_map"])
        right.plot(x, weighted / weighted.sum(), marker="o", color=f"C{p}", label=name)
    for axes, title in (
        (top_right, "Squared difference of the features as they are"),
        (left, "Term of eq. 3 before omega: standardised, outliers masked"),
    ):
        axes.plot(x, scales / scales[0], linestyle="--", color="black", label=r"$r_l/r_1$: x 2.00")
        axes.set_title(title)
        axes.set_ylabel("ratio to the first map")
        axes.legend(fontsize=8, title="growth as the side doubles", title_fontsize=8)
        _plain_log_ticks(axes)
    right.axhline(1.0 / len(maps), linestyle=":", color="0.5", label="equal shares")
    right.plot(x, omega / omega.sum(), linestyle="--", color="black", label=r"omega $= r_1/r_l$ alone")
    right.set_title("Term times omega")
    right.set_ylabel("share of the sum over maps")
    right.set_ylim(0, 1.05)
    right.legend(fontsize=8)
    for axes in (top_left, top_right, left, right):
        axes.set_xticks(x, [f"{name}\n{scale}x" for name, scale in zip(maps, scales, strict=True)])
        axes.grid(alpha=0.3)
    for axes in (left, right):
        axes.set_xlabel("decoder map, and its side over the latents' side")
    return _png(figure)


def gate(shares: Mapping[str, Any], chosen: str, size: int) -> bytes:
    """Share of training samples inside the gate over tau, and as a table."""
    figure = _figure(12.5, 4.9)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    tau, reference = shares["tau"], shares["tau_reference_px"]
    for kind, curve in shares["curve_by_paradigm"].items():
        share = shares["share_by_paradigm"][kind][shares["taus"].index(tau)]
        is_chosen = kind == chosen
        (line,) = left.plot(shares["curve_taus"], 100 * np.array(curve), linewidth=2.6 if is_chosen else 1.3,
                            label=f"{PARADIGM_NAMES[kind]}: {100 * share:.0f} % at tau = {tau:g}")  # fmt: skip
        left.plot([tau], [100 * share], marker="o", color=line.get_color())
    left.axvline(tau, color="0.4", linestyle="--", linewidth=1)
    meant = f"tau meant at {reference} px, so {shares['bound']:.3g} at {size} px" if reference else "tau fixed"
    left.set_title(f"Samples inside the gate\n(bound on sigma/alpha: {meant})", fontsize=11)
    left.set_xlabel("tau")
    left.set_ylabel("share of training samples, %")
    left.set_xlim(0, max(shares["curve_taus"][-1], tau * 1.05))
    left.set_ylim(0, 102)
    left.grid(alpha=0.3)
    left.legend(loc="lower right")

    right.set_axis_off()
    kinds = list(shares["share_by_paradigm"])
    cells = [
        [f"{t:g}", f"{bound:.3g}", *(f"{100 * shares['share_by_paradigm'][kind][i]:.1f} %" for kind in kinds)]
        for i, (t, bound) in enumerate(zip(shares["taus"], shares["bounds"], strict=True))
    ]
    heads = ["tau", "largest\nsigma/alpha", *(PARADIGM_NAMES[kind].partition(",")[0] for kind in kinds)]
    table = right.table(cells, colLabels=heads, loc="center", cellLoc="center", bbox=(0.0, 0.04, 1.0, 0.92))
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    row_of_tau = shares["taus"].index(tau) + 1
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("0.85")
        if row == row_of_tau:
            cell.set_facecolor("#fff3c4")
        if row == 0:
            cell.set_height(cell.get_height() * 1.6)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _plain_number(value: float, _: float) -> str:
    return f"{value:g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _plain_log_ticks(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(_plain_number)
    axes.yaxis.set_minor_locator(NullLocator())


def _outline(axes: Axes, mask_HW: NDArray[np.bool_]) -> None:
    """Around pixels, not through their centres; closed at the border."""
    if not mask_HW.any():
        return
    factor = max(1, 256 // max(mask_HW.shape))
    fine = np.pad(np.kron(mask_HW, np.ones((factor, factor))), 1)
    y, x = ((np.arange(side) - 0.5) / factor - 0.5 for side in fine.shape)
    axes.contour(x, y, fine, levels=[0.5], colors=OUTLINE, linewidths=1.0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
