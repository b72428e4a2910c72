"""The latent perceptual loss (Berrada et al., ICLR 2025): clean estimates compared in the decoder's features.

Equation numbers and Algorithm 1 are the paper's. Where it is unclear, `LPLConfig` says what is offered.
Shapes: latents and feature maps BCHW, statistics BC. Nothing here makes the host wait for the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import LPLConfig
from trainer.errors import UserError
from trainer.losses.gate import inside
from trainer.losses.injection import injected
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder

KERNEL_REFERENCE_SIDE = 512
"""Side of a feature map, in pixels, at which Algorithm 1's kernels of 3 and 5 hold."""
CLOSING, OPENING = 3, 5
MASKED_FROM_SCALE = 4
"""`mask_outliers="deep"`: maps at least so many times the latents' side."""
VARIANCE_EPS = 1e-6


class LatentPerceptualLoss(PerceptualLoss):
    """L_LPL of each sample, eq. 3, without its weight.

    The trainer's mean over the whole batch completes eq. 3, whose expectation holds the indicator inside. Terms:
    `lpl_<map>`, each map's loss before its depth weight and 0 outside the gate, and `gate`, 1 inside and 0 outside, whose
    mean is the share inside.
    """

    name = "lpl"

    def __init__(self, decoder: FrozenDecoder, config: LPLConfig) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = config
        self.map_names, self.map_scales = decoder.map_names, decoder.map_scales
        self.depth_weights = depth_weights(self.map_scales, config.depth_weights)

    def check(self, resolution: int) -> list[str]:
        """Raises:
        UserError: the codec cannot encode it, or a masked map is too small for statistics or kernels.
        """
        f = self.decoder.downsampling
        if resolution % f:
            raise UserError(f"resolution {resolution}: not a multiple of the autoencoder's downsampling, {f}")
        for name, scale in zip(self.map_names, self.map_scales, strict=True):
            side = resolution // f * scale
            smallest = max(2, *kernel_sizes(side, side))
            if self._is_masked(scale) and side < smallest:
                raise UserError(f"resolution {resolution}: the decoder's map {name} has {side} pixels a side, fewer "
                                f"than the {smallest} that the outlier mask needs; train larger images or set "
                                "task.perceptual.mask_outliers=none")  # fmt: skip
        return []

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = inside(noise_level_B, context.threshold)

        def value(z0_hat: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                targets = self.decoder(z0_BCHW[rows])
            return self.of_features(self.decoder(z0_hat), targets)  # eq. 2

        names = ["gate", *(f"lpl_{name}" for name in self.map_names)]
        return injected(z0_hat_BCHW, rows, value, term_names=names, chunk_size=self.config.chunk_size)

    def of_features(self, estimates: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 inside the gate, from the decoder's maps."""
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        maps = zip(self.map_names, self.map_scales, self.depth_weights, targets, estimates, strict=True)
        for name, scale, weight, target, estimate in maps:
            map_loss_B = feature_loss(
                estimate, target, mask_outliers=self._is_masked(scale), detach_deviation=self.config.detach_deviation
            )
            terms[f"lpl_{name}"] = map_loss_B.detach()
            losses.append(weight * map_loss_B)
        loss_B = torch.stack(losses).sum(0)
        terms["gate"] = torch.ones_like(loss_B)
        return loss_B, terms

    def _is_masked(self, scale: int) -> bool:
        which = self.config.mask_outliers
        return which == "all" or (which == "deep" and scale >= MASKED_FROM_SCALE)


# ------------------------------------------------------------------------------------------------------ the mathematics


def feature_loss(
    estimate_BCHW: Tensor, target_BCHW: Tensor, *, mask_outliers: bool, detach_deviation: bool = False
) -> Tensor:
    """One map's term of eq. 3 without omega: standardised squared difference, mean over inlier pixels, then channels.

    Mask and deviation are the estimate's, for both maps (shared statistics: the mean cancels in the difference).
    A channel whose mask is empty, or which is constant where the mask is not, adds 0 and is still counted.
    Computed in float32 at least, also under autocast, which lowers matrix products only. Returns (B,).
    """
    dtype = torch.promote_types(estimate_BCHW.dtype, torch.float32)
    estimate_BCN = estimate_BCHW.to(dtype).flatten(2)
    target_BCN = target_BCHW.to(dtype).flatten(2)

    if mask_outliers:
        inlier_BCN = inlier_mask(estimate_BCHW.detach().to(dtype)).flatten(2)
        count_BC = inlier_BCN.sum(-1)
        # Deviations are taken from some inlier pixel: a constant channel then has a variance of exactly 0.
        anchor_BC1 = estimate_BCN.detach().gather(-1, inlier_BCN.argmax(-1, keepdim=True))
        centred_BCN = (estimate_BCN - anchor_BC1) * inlier_BCN
        error_BCN = (estimate_BCN - target_BCN) * inlier_BCN
        divisor_BC = count_BC.clamp(min=1)
        mean_BC1 = (centred_BCN.sum(-1) / divisor_BC)[..., None]
        var_BC = ((centred_BCN - mean_BC1) * inlier_BCN).square().sum(-1) / divisor_BC
        error_BC = error_BCN.square().sum(-1) / divisor_BC
    else:
        var_BC = estimate_BCN.var(-1, correction=0)
        error_BC = (estimate_BCN - target_BCN).square().mean(-1)

    statistic_BC = var_BC.detach() if detach_deviation else var_BC
    loss_BC = error_BC / (statistic_BC + VARIANCE_EPS)
    loss_B = torch.where(var_BC > 0, loss_BC, 0.0).mean(-1)

    # Comparisons with NaN are false, so the mask would hide what is not finite: 0 times the sum brings it back.
    probe_B = 0.0 * (estimate_BCN.detach().sum((1, 2)) + target_BCN.sum((1, 2)))
    return loss_B * (1.0 + probe_B)


@torch.no_grad()
def inlier_mask(features_BCHW: Tensor) -> Tensor:
    """Algorithm 1: 1 where a pixel is no outlier of its channel, else 0; the features' shape and dtype."""
    h, w = features_BCHW.shape[-2:]
    n = h * w
    features_BCN = features_BCHW.flatten(2)
    # k counts from 1. Fewer than 50 pixels would give k = 0. Integers, because 0.98 * n may round below a whole number.
    low, high = max(1, n * 2 // 100), max(1, n * 98 // 100)
    # Two selections are a third of one sort on a CPU; `Tensor.std` is ten times these two passes there.
    deviations_BCN = features_BCN - features_BCN.mean(-1, keepdim=True)
    margin_BC = 2.0 * (deviations_BCN.square().sum(-1) / max(1, n - 1)).sqrt()
    low_BC11 = (features_BCN.kthvalue(low).values - margin_BC)[..., None, None]
    high_BC11 = (features_BCN.kthvalue(high).values + margin_BC)[..., None, None]
    mask = ((low_BC11 < features_BCHW) & (features_BCHW < high_BC11)).to(features_BCHW.dtype)

    closing, opening = kernel_sizes(h, w)
    if closing > 1:
        mask = F.max_pool2d(mask, closing, stride=1, padding=closing // 2)
    if opening > 1:
        mask = -F.max_pool2d(-mask, opening, stride=1, padding=opening // 2)
    return mask


def kernel_sizes(height: int, width: int) -> tuple[int, int]:
    """(closing, opening) of Algorithm 1 for a map of this size: the same share of the image at every depth, always odd.

    An opening of 2 becomes 3 and a closing of 2 becomes 1, as printed; larger even ones, of which the paper says
    nothing and which would move the map by half a pixel, the next odd.
    """
    side = math.sqrt(height * width)
    closing, opening = (math.ceil(k * side / KERNEL_REFERENCE_SIDE) for k in (CLOSING, OPENING))
    closing = 1 if closing == 2 else closing + (closing % 2 == 0)
    opening = opening + (opening % 2 == 0)
    return closing, opening


def depth_weights(map_scales: tuple[int, ...], rule: str) -> tuple[float, ...]:
    """omega_l from the sides of the maps: r_1/r_l, the printed 2**(-r_l/r_1), or 1."""
    ratios = [scale / map_scales[0] for scale in map_scales]
    if rule == "inverse_scale":
        return tuple(1.0 / ratio for ratio in ratios)
    if rule == "printed":
        return tuple(2.0**-ratio for ratio in ratios)
    assert rule == "uniform", rule
    return (1.0,) * len(ratios)


def build_lpl(config: LPLConfig, codec: Codec) -> LatentPerceptualLoss:
    """Raises:
    UserError: the config names maps that the decoder does not have.
    """
    return LatentPerceptualLoss(FrozenDecoder(codec, config.num_maps), config)
