"""The latent perceptual loss computed in other ways, to measure against: as the public SDXL script does, plainly, and ours with
fewer of its savings."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.config import LPLConfig
from trainer.losses.feature_loss import feature_loss
from trainer.losses.gate import inside
from trainer.losses.injection import to_device
from trainer.losses.lpl import LatentPerceptualLoss, build_lpl, depth_weights
from trainer.losses.outliers import kernel_sizes
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.autoencoders import Codec, run_chain
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.models.frozen_layers import Savings

MASKED_FROM_SCALE = 4
MAPS = 4
"""That ours uses of five: the paper finds the fifth marginal (Figure 7)."""
PLAIN, PUBLIC, OURS = "plain, five maps", "as the public script", "+ channels-last: ours"


class GraphLPL(PerceptualLoss):
    """Eq. 3, with the whole graph kept until the backward pass."""

    name = "lpl"

    def __init__(
        self,
        codec: Codec,
        num_maps: int | None = None,
        *,
        compact: bool = False,
        savings: Savings | None = None,
        closed_form: bool = False,
    ) -> None:
        """
        Args:
            compact: decode the samples inside the gate alone; else all, and zeros for the others.
            savings: a `FrozenDecoder` with these; None: diffusers' decoder as it is.
            closed_form: the trainer's `feature_loss`, with the gradient in closed form; else its formula under autograd.
        """
        super().__init__()
        self.num_maps, self.compact, self.closed_form = num_maps, compact, closed_form
        self.scales = codec.map_scales(num_maps)
        self.codec = codec if savings is None else None
        self.decoder = None if savings is None else FrozenDecoder(codec, num_maps, savings=savings)

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device, size = z0_hat_BCHW.device, len(noise_level_B)
        host_rows = inside(noise_level_B, context.threshold)
        rows = to_device(host_rows, device)
        gate_B = to_device(torch.zeros(size).index_fill(0, host_rows, 1.0), device)
        if not self.compact:
            return self._of(z0_hat_BCHW, z0_BCHW) * gate_B, {"gate": gate_B}
        loss_B = z0_hat_BCHW.float().flatten(1).sum(1) * 0.0
        if len(host_rows):
            loss_B = loss_B.index_copy(0, rows, self._of(z0_hat_BCHW[rows], z0_BCHW[rows]))
        return loss_B, {"gate": gate_B}

    def _of(self, z0_hat: Tensor, z0: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self._features(z0)
        estimates = self._features(z0_hat)
        of_map = feature_loss if self.closed_form else plain_feature_loss
        weights = depth_weights(self.scales, "inverse_scale")
        maps = zip(self.scales, weights, estimates, targets, strict=True)
        losses = [omega * of_map(f, g, mask_outliers=scale >= MASKED_FROM_SCALE) for scale, omega, f, g in maps]
        return torch.stack(losses).sum(0)

    def _features(self, latents: Tensor) -> list[Tensor]:
        if self.decoder is not None:
            return self.decoder(latents)
        assert self.codec is not None
        return self.codec.decode_features(latents, self.num_maps)


def plain_feature_loss(estimate_BCHW: Tensor, target_BCHW: Tensor, *, mask_outliers: bool) -> Tensor:
    """Shared statistics, by operations that torch has and that autograd follows. Returns (B,)."""
    f, g = estimate_BCHW.float(), target_BCHW.float()
    if not mask_outliers:
        return ((f - g).square().mean((2, 3)) / (f.var((2, 3), correction=0) + 1e-6)).mean(1)
    mask = plain_mask(f.detach(), *kernel_sizes(*f.shape[-2:]))
    count_BC = mask.sum((2, 3)).clamp(min=1)
    mean_BC11 = ((f * mask).sum((2, 3)) / count_BC)[..., None, None]
    var_BC = ((f - mean_BC11).square() * mask).sum((2, 3)) / count_BC
    return (((f - g).square() * mask).sum((2, 3)) / count_BC / (var_BC + 1e-6)).mean(1)


def plain_mask(features_BCHW: Tensor, closing: int, opening: int) -> Tensor:
    """Algorithm 1 by `kthvalue`, `std` and max-pooling."""
    n = features_BCHW[0, 0].numel()
    features_BCN = features_BCHW.flatten(2)
    low, high = (features_BCN.kthvalue(max(1, n * share // 100)).values for share in (2, 98))
    margin = 2 * features_BCN.std(-1)
    mask = ((low - margin)[..., None, None] < features_BCHW) & (features_BCHW < (high + margin)[..., None, None])
    mask = F.max_pool2d(mask.float(), closing, stride=1, padding=closing // 2)
    return -F.max_pool2d(-mask, opening, stride=1, padding=opening // 2)


class PublicLPL(PerceptualLoss):
    """What diffusers' `examples/research_projects/lpl` computes with its own defaults and an outlier mask: five maps of the
    gated samples, each divided by its own norm over channels, the target's mask, equal weights; the mean over maps and gated
    samples. Each block of the decoder is run again in the backward pass. Its figures for the log, which it reads from the
    device at every map, are left out."""

    name = "lpl"

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gate_B = (noise_level_B <= context.threshold).to(z0_hat_BCHW.device)
        rows = torch.where(gate_B)[0]
        if not len(rows):
            return z0_hat_BCHW.float().flatten(1).sum(1) * 0.0, {"gate": gate_B.float()}
        estimates = self._features(z0_hat_BCHW[rows].float())
        with torch.no_grad():
            targets = self._features(z0_BCHW[rows])
        losses = []
        for i, (f, g) in enumerate(zip(estimates, targets, strict=True)):
            mask = torch.ones_like(g)
            if i >= 2:
                mask = plain_mask(g, *((1, 3) if i == 2 else (3, 5)))
                g = g * mask
            error = (_normalized(f) - _normalized(g)).square() * mask
            losses.append((error.sum((2, 3)) / mask.sum((2, 3))).mean(1))
        loss_N = torch.stack(losses).mean(0)
        # the trainer takes the mean over all samples, the script over gated ones
        scale = len(gate_B) / len(rows)
        loss_B = torch.zeros(len(gate_B), dtype=loss_N.dtype, device=loss_N.device)
        return loss_B.index_copy(0, rows, loss_N * scale), {"gate": gate_B.float()}

    def _features(self, latents: Tensor) -> list[Tensor]:
        h = self.codec.scaled_to_raw(latents).to(self.codec.dtype)
        maps = []
        for stage in self.codec.decoder_stages():
            if torch.is_grad_enabled():
                h = checkpoint(run_chain, stage, h, use_reentrant=False)
            else:
                h = run_chain(stage, h)
            maps.append(h)
        return maps


def _normalized(features_BCHW: Tensor) -> Tensor:
    return features_BCHW / (features_BCHW.square().sum(1, keepdim=True).sqrt() + 1e-10)


def variants(chunk_size: int) -> dict[str, Callable[[Codec], PerceptualLoss]]:
    """Each + has what is above it as well. All but the public script's have the value of the first, but for its fifth map."""
    phases = Savings(weight_only=False, channels_last=False)
    contiguous = Savings(channels_last=False)

    def graph(codec: Codec, savings: Savings | None = None, *, closed_form: bool = False) -> GraphLPL:
        return GraphLPL(codec, maps_of(codec), compact=True, savings=savings, closed_form=closed_form)

    def chunked(codec: Codec) -> LatentPerceptualLoss:
        config = lpl_config(codec, chunk_size)
        return LatentPerceptualLoss(FrozenDecoder(codec, config.num_maps, savings=contiguous), config)

    return {
        PLAIN: GraphLPL,
        PUBLIC: PublicLPL,
        "gated samples alone": lambda codec: GraphLPL(codec, compact=True),
        "+ four maps": graph,
        "+ phase convolution": lambda codec: graph(codec, phases),
        "+ weight-only layers": lambda codec: graph(codec, contiguous),
        "+ loss in closed form": lambda codec: graph(codec, contiguous, closed_form=True),
        "+ chunks, injected": chunked,
        OURS: lambda codec: build_lpl(lpl_config(codec, chunk_size), codec),
    }


def lpl_config(codec: Codec, chunk_size: int, **options: Any) -> LPLConfig:
    return LPLConfig(num_maps=maps_of(codec), chunk_size=chunk_size, tau_reference_px=None, **options)


def maps_of(codec: Codec) -> int:
    return min(MAPS, len(codec.map_names))
