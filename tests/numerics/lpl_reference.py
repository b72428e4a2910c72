"""The latent perceptual loss, slowly: the definition's steps one by one, over samples, channels and pixels, in float64.

Written from the definition and shares no code with `trainer.losses`, so that the two can be compared. Maps are those that
count, (B, C, H, W), in the decoder's order; `latents_side` is the side of the latents and so of the decoder's first map.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

VARIANCE_EPS = 1e-6
NORM_EPS = 1e-6


def kernels(side: float) -> tuple[int, int]:
    """(closing, opening) for a map of this side."""
    opening, closing = math.ceil(5 * side / 512), math.ceil(3 * side / 512)
    if opening == 2:
        opening = 3
    if closing == 2:
        closing = 1
    while opening % 2 == 0:
        opening += 1
    while closing % 2 == 0:
        closing += 1
    return closing, opening


def _pooled(mask: np.ndarray, kernel: int, reduce) -> np.ndarray:
    """Each pixel's `reduce` over the window around it; beyond the borders lies what changes neither `any` nor `all`."""
    padded = np.pad(mask, kernel // 2, constant_values=reduce is np.all)
    return reduce(sliding_window_view(padded, (kernel, kernel)), axis=(-2, -1))


def inliers(channel: np.ndarray) -> np.ndarray:
    """Boolean mask (H, W) of one channel of one sample."""
    height, width = channel.shape
    values = sorted(channel.astype(np.float64).flatten().tolist())
    n = len(values)
    k1, k2 = max(1, 2 * n // 100), max(1, 98 * n // 100)
    mean = math.fsum(values) / n
    margin = 2 * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    mask = (channel > values[k1 - 1] - margin) & (channel < values[k2 - 1] + margin)
    closing, opening = kernels(math.sqrt(height * width))
    if closing > 1:
        mask = _pooled(mask, closing, np.any)
    if opening > 1:
        mask = _pooled(mask, opening, np.all)
    return mask


@functools.cache
def _inliers(channel: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Many options have the same channels."""
    return inliers(np.frombuffer(channel).reshape(shape))


def _masks(source: np.ndarray, rule: str, latents_side: int) -> list[np.ndarray]:
    """What counts of each channel of one sample (C, H, W)."""
    if rule == "all" or (rule == "deep" and source.shape[-1] >= 4 * latents_side):
        return [_inliers(channel.astype(np.float64).tobytes(), channel.shape) for channel in source]
    return [np.ones(channel.shape, bool) for channel in source]


def _omega(rule: str, r: int, r1: int) -> float:
    return {"inverse_scale": r1 / r, "printed": 2 ** (-r / r1), "uniform": 1.0}[rule]


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values) + VARIANCE_EPS)


def _norms(target: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """(H, W): at each pixel the norm over the channels in which it is an inlier."""
    _, height, width = target.shape
    out = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            kept = [float(channel[y, x]) for channel, mask in zip(target, masks, strict=True) if mask[y, x]]
            out[y, x] = math.sqrt(math.fsum(v * v for v in kept)) + NORM_EPS
    return out


def map_loss(
    estimate: np.ndarray,
    target: np.ndarray,
    *,
    latents_side: int,
    mask_outliers: str = "deep",
    statistics: str = "shared",
    mask_source: str = "estimate",
    over_pixels: str = "mean",
) -> float:
    """One map of one sample (C, H, W), before omega."""
    estimate, target = estimate.astype(np.float64), target.astype(np.float64)
    masks = _masks(estimate if mask_source == "estimate" else target, mask_outliers, latents_side)
    norms = _norms(target, masks) if statistics == "target_norm" else None
    of_channels = []
    for f_map, g_map, keep in zip(estimate, target, masks, strict=True):
        f, g = f_map[keep].tolist(), g_map[keep].tolist()
        if not f:
            continue
        if norms is not None:
            differences = [(a - b) / n for a, b, n in zip(f, g, norms[keep].tolist(), strict=True)]
        else:
            if min(f) == max(f) or (statistics == "separate" and min(g) == max(g)):
                continue
            mean, deviation = _mean_and_deviation(f)
            target_mean, target_deviation = (mean, deviation) if statistics == "shared" else _mean_and_deviation(g)
            differences = [
                (a - mean) / deviation - (b - target_mean) / target_deviation for a, b in zip(f, g, strict=True)
            ]
        total = math.fsum(d * d for d in differences)
        of_channels.append(total if over_pixels == "sum" else total / len(differences))
    return math.fsum(of_channels) / len(estimate)


@functools.cache
def _map_loss(estimate: bytes, target: bytes, shape: tuple[int, ...], latents_side: int, **options: str) -> float:
    """Many options have the same maps, and differ in what is made of their losses."""
    f, g = (np.frombuffer(data).reshape(shape) for data in (estimate, target))
    return map_loss(f, g, latents_side=latents_side, **options)


def reference_loss(
    estimates: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    noise_levels: list[float],
    tau: float,
    *,
    latents_side: int,
    depth_weights: str = "inverse_scale",
    over_batch: str = "all",
    **options: str,
) -> tuple[list[float], list[list[float]]]:
    """Loss of each sample, and each map's own value before omega."""
    losses, parts = [], []
    num_inside = sum(level <= tau for level in noise_levels)
    for b, noise_level in enumerate(noise_levels):
        per_map, total = [0.0] * len(estimates), 0.0
        if noise_level <= tau:
            for i, (estimate, target) in enumerate(zip(estimates, targets, strict=True)):
                both = (features[b].astype(np.float64).tobytes() for features in (estimate, target))
                per_map[i] = _map_loss(*both, estimate[b].shape, latents_side, **options)
                total += _omega(depth_weights, estimate.shape[-1], latents_side) * per_map[i]
            if over_batch == "gated":
                total *= len(noise_levels) / num_inside / len(estimates)
        losses.append(total)
        parts.append(per_map)
    return losses, parts


def differentiable_loss(
    estimates: list[torch.Tensor],
    targets: list[torch.Tensor],
    noise_levels: list[float],
    tau: float,
    *,
    latents_side: int,
    depth_weights: str = "inverse_scale",
    mask_outliers: str = "deep",
    statistics: str = "shared",
    mask_source: str = "estimate",
    over_pixels: str = "mean",
    over_batch: str = "all",
    detach_deviation: bool = False,
) -> torch.Tensor:
    """The sum of the samples' losses, for its gradient: pixels that count are picked out, not multiplied by 0 or 1."""
    total = torch.zeros((), dtype=torch.float64)
    inside = [b for b, level in enumerate(noise_levels) if level <= tau]
    for b in inside:
        for estimate, target in zip(estimates, [target.detach() for target in targets], strict=True):
            num_channels, _, width = estimate[b].shape
            source = (estimate if mask_source == "estimate" else target)[b].detach().numpy()
            masks = _masks(source, mask_outliers, latents_side)
            norms = torch.from_numpy(_norms(target[b].numpy(), masks)) if statistics == "target_norm" else None
            for c in range(num_channels):
                keep = torch.from_numpy(masks[c])
                f, g = estimate[b, c][keep], target[b, c][keep]
                if f.numel() == 0:
                    continue
                if norms is not None:
                    difference = f / norms[keep] - g / norms[keep]
                else:
                    if f.max() == f.min() or (statistics == "separate" and g.max() == g.min()):
                        continue
                    deviation = torch.sqrt(((f - f.mean()) ** 2).mean() + VARIANCE_EPS)
                    deviation = deviation.detach() if detach_deviation else deviation
                    if statistics == "shared":
                        difference = f / deviation - g / deviation
                    else:
                        of_target = torch.sqrt(((g - g.mean()) ** 2).mean() + VARIANCE_EPS)
                        difference = (f - f.mean()) / deviation - (g - g.mean()) / of_target
                square = difference**2
                value = (square.sum() if over_pixels == "sum" else square.mean()) / num_channels
                total = total + _omega(depth_weights, width, latents_side) * value
    if over_batch == "gated" and inside:
        total = total * len(noise_levels) / len(inside) / len(estimates)
    return total
