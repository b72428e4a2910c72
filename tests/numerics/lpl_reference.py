"""The latent perceptual loss, slowly: the definition's steps one by one, over samples, channels and pixels, in float64.

Written from the definition and shares no code with `trainer.losses.lpl`, so that the two can be compared.
"""

import math

import numpy as np
import torch

EPS = 1e-6


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
    """Each pixel's `reduce` over the window around it, cut at the borders."""
    height, width = mask.shape
    reach = kernel // 2
    out = np.empty_like(mask)
    for y in range(height):
        for x in range(width):
            out[y, x] = reduce(mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1])
    return out


def inliers(channel: np.ndarray) -> np.ndarray:
    """Boolean mask (H, W) of one channel of one sample."""
    height, width = channel.shape
    values = sorted(channel.flatten().tolist())
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


def _omega(rule: str, r: int, r1: int) -> float:
    return {"inverse_scale": r1 / r, "printed": 2 ** (-r / r1), "uniform": 1.0}[rule]


def reference_loss(
    estimates: list[np.ndarray],
    targets: list[np.ndarray],
    noise_levels: list[float],
    tau: float,
    *,
    latents_side: int,
    depth_weights: str = "inverse_scale",
    mask_outliers: str = "deep",
) -> tuple[list[float], list[list[float]]]:
    """Loss of each sample, and each map's own value before omega. Maps are (B, C, H, W)."""
    losses, parts = [], []
    for b, noise_level in enumerate(noise_levels):
        total, per_map = 0.0, []
        for estimate, target in zip(estimates, targets, strict=True):
            num_channels, height, width = estimate[b].shape
            masked = mask_outliers == "all" or (mask_outliers == "deep" and width >= 4 * latents_side)
            of_channels = 0.0
            for c in range(num_channels):
                f, g = estimate[b, c].astype(np.float64), target[b, c].astype(np.float64)
                keep = inliers(f) if masked else np.ones((height, width), bool)
                kept_f, kept_g = f[keep].tolist(), g[keep].tolist()
                n = len(kept_f)
                if n == 0 or max(kept_f) == min(kept_f):
                    continue
                mean = math.fsum(kept_f) / n
                deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in kept_f) / n + EPS)
                of_channels += (
                    math.fsum((v / deviation - w / deviation) ** 2 for v, w in zip(kept_f, kept_g, strict=True)) / n
                )
            per_map.append(of_channels / num_channels if noise_level <= tau else 0.0)
            total += _omega(depth_weights, width, estimates[0].shape[-1]) * per_map[-1]
        losses.append(total)
        parts.append(per_map)
    return losses, parts


def differentiable_loss(
    estimates: list[torch.Tensor],
    targets: list[torch.Tensor],
    inside: list[bool],
    *,
    latents_side: int,
    depth_weights: str = "inverse_scale",
    mask_outliers: str = "deep",
    detach_deviation: bool = False,
) -> torch.Tensor:
    """The sum of the samples' losses, for its gradient: pixels that count are picked out, not multiplied by 0 or 1."""
    total = torch.zeros((), dtype=torch.float64)
    for b in [b for b, is_inside in enumerate(inside) if is_inside]:
        for estimate, target in zip(estimates, targets, strict=True):
            num_channels, height, width = estimate[b].shape
            masked = mask_outliers == "all" or (mask_outliers == "deep" and width >= 4 * latents_side)
            for c in range(num_channels):
                keep = np.ones((height, width), bool)
                if masked:
                    keep = inliers(estimate[b, c].detach().numpy())
                f, g = estimate[b, c][torch.from_numpy(keep)], target[b, c].detach()[torch.from_numpy(keep)]
                if f.numel() == 0 or f.max() == f.min():
                    continue
                deviation = torch.sqrt(((f - f.mean()) ** 2).mean() + EPS)
                if detach_deviation:
                    deviation = deviation.detach()
                value = ((f / deviation - g / deviation) ** 2).mean() / num_channels
                total = total + _omega(depth_weights, width, estimates[0].shape[-1]) * value
    return total
