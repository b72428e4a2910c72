"""What the latent perceptual loss's constants rest on: how its terms grow with depth, which omega_l evens out, and how many
samples tau lets in (Berrada et al. 2025, section 3.2 and eq. 3)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import LPLConfig, ParadigmConfig
from trainer.diffusion.paradigms import build_paradigm
from trainer.evaluate.latents import there_and_back
from trainer.losses.gate import gate_share, scaled_tau
from trainer.losses.lpl import LatentPerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder

PARADIGMS = ("ddpm_eps", "ddpm_v", "flow")

# ------------------------------------------------------------------------------- amplitude by depth (section 3.2, omega_l)

NOISE_LEVELS = (0.1, 0.3, 1.0)
"""Of white noise on the latents, in their standard deviations."""
BLUR_SCALES = (1.5, 3.0)
"""Of bilinear interpolation of the latents: an error that loses detail, as clean estimates at high noise do."""
PERTURBATIONS = {
    **{f"noise_{level:g}": f"noise, {level:g} sd" for level in NOISE_LEVELS},
    **{f"blur_{scale:g}": f"blur, s = {scale:g}" for scale in BLUR_SCALES},
}


class Amplitude:
    """Each map's term of eq. 3 before omega_l, for estimates that are the latents, perturbed."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        # the losses' own decoder, which may compute in lower precision, is not run: features come from the codec's
        decoder = FrozenDecoder(codec)
        self._losses = {
            "masked": LatentPerceptualLoss(decoder, LPLConfig()),
            "unmasked": LatentPerceptualLoss(decoder, LPLConfig(mask_outliers="none")),
        }
        size = (len(PERTURBATIONS), len(codec.map_names))
        self._terms = {which: torch.zeros(size, dtype=torch.float64) for which in self._losses}
        self._squared = torch.zeros(size, dtype=torch.float64)
        self._latent_mse = torch.zeros(len(PERTURBATIONS), dtype=torch.float64)
        self._std_L = torch.zeros(len(codec.map_names), dtype=torch.float64)
        self._num_images = 0

    @torch.no_grad()
    def add(self, z0_BCHW: Tensor, maps: list[Tensor], noise_BCHW: Tensor) -> None:
        """`maps`: the decoder's, of `z0_BCHW`. `noise_BCHW`: with the standard deviation of the latents."""
        self._std_L += torch.stack([m.std((2, 3), correction=0).mean(1).sum() for m in maps]).double().cpu()
        estimates = [z0_BCHW + level * noise_BCHW for level in NOISE_LEVELS]
        estimates += [there_and_back(z0_BCHW, scale, "bilinear") for scale in BLUR_SCALES]
        for p, estimate_BCHW in enumerate(estimates):
            self._latent_mse[p] += (estimate_BCHW - z0_BCHW).double().square().mean((1, 2, 3)).sum().cpu()
            features = self._codec.decode_features(estimate_BCHW)
            squares = [(f - m).square().mean((1, 2, 3)).sum() for f, m in zip(features, maps, strict=True)]
            self._squared[p] += torch.stack(squares).double().cpu()
            for which, loss in self._losses.items():
                _, terms = loss.of_features(features, maps)
                by_map = [terms[f"lpl_{name}"].sum() for name in self._codec.map_names]
                self._terms[which][p] += torch.stack(by_map).double().cpu()
        self._num_images += len(z0_BCHW)

    def numbers(self) -> dict[str, Any]:
        scales = self._codec.map_scales()
        rows = []
        for p, name in enumerate(PERTURBATIONS):
            masked, unmasked, squared = (
                (sums[p] / self._num_images).tolist()
                for sums in (self._terms["masked"], self._terms["unmasked"], self._squared)
            )
            rows.append(
                {
                    "perturbation": name,
                    "latent_mse": (self._latent_mse[p] / self._num_images).item(),
                    "term_by_map": masked,
                    "growth_per_doubling": growth_per_doubling(masked, scales),
                    "term_by_map_unmasked": unmasked,
                    "squared_difference_by_map": squared,
                    "squared_difference_growth_per_doubling": growth_per_doubling(squared, scales),
                }
            )
        weights = list(self._losses["masked"].depth_weights)
        std = (self._std_L / self._num_images).tolist()
        return {"maps": list(self._codec.map_names), "scale_by_map": list(scales), "omega_by_map": weights,
                "feature_std_by_map": std, "rows": rows}  # fmt: skip


def growth_per_doubling(values: Sequence[float], scales: Sequence[int]) -> float | None:
    """Factor by which values grow for each doubling of the side, by least squares of their logarithms; 2 is what
    omega_l = r_1/r_l balances. None where there is no growth to speak of."""
    if len(set(scales)) < 2 or min(values) <= 0:
        return None
    slope, _ = np.polyfit(np.log2(scales), np.log2(values), 1)
    return float(2.0**slope)


# ------------------------------------------------------------------------------------------------ the gate (eq. 3, tau)

TAUS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0)
CURVE_TAUS = tuple(i / 4 for i in range(49))


def gate_shares(tau: float, tau_reference_px: int | None, resolution: int) -> dict[str, Any]:
    """Share of training samples inside the gate, by paradigm, each with its own density of times and no shift."""
    taus = sorted({*TAUS, tau})
    rows, curves = {}, {}
    for kind in PARADIGMS:
        paradigm = build_paradigm(ParadigmConfig(kind=kind), resolution=resolution)
        shares = {t: gate_share(paradigm, scaled_tau(t, resolution, tau_reference_px)) for t in {*taus, *CURVE_TAUS}}
        rows[kind] = [shares[t] for t in taus]
        curves[kind] = [shares[t] for t in CURVE_TAUS]
    return {
        "tau": tau,
        "tau_reference_px": tau_reference_px,
        "bound": scaled_tau(tau, resolution, tau_reference_px),
        "taus": taus,
        "bounds": [scaled_tau(t, resolution, tau_reference_px) for t in taus],
        "share_by_paradigm": rows,
        "curve_taus": list(CURVE_TAUS),
        "curve_by_paradigm": curves,
    }
