"""The latent perceptual loss (Berrada et al., ICLR 2025): clean estimates compared in the decoder's features.

Equation numbers are the paper's. Where it is unclear, `LPLConfig` says what is offered. One map's term is in
`trainer.losses.feature_loss`, its outliers in `trainer.losses.outliers`.
Shapes: latents and feature maps BCHW. Nothing here makes the host wait for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config import LPLConfig
from trainer.errors import UserError
from trainer.losses.estimators import (
    GatedSampler,
    LightDecoder,
    check_estimators,
    check_window,
    draw_windows,
    load_light,
)
from trainer.losses.feature_loss import feature_loss
from trainer.losses.gate import inside
from trainer.losses.injection import injected, to_device
from trainer.losses.outliers import kernel_sizes
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import WINDOWED, FrozenDecoder, Window

MASKED_FROM_SCALE = 4
"""`mask_outliers="deep"`: maps at least so many times the latents' side."""


class LatentPerceptualLoss(PerceptualLoss):
    """L_LPL of each sample, eq. 3, without its weight.

    The trainer's mean over the whole batch completes eq. 3, whose expectation holds the indicator inside. Terms:
    `lpl_<map>`, each used map's loss before its depth weight and before what `over_batch` makes of it, 0 outside the gate;
    and `gate`, 1 inside and 0 outside, whose mean is the share inside.
    """

    name = "lpl"

    def __init__(self, decoder: FrozenDecoder, config: LPLConfig) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = config
        used = [i for i, name in enumerate(decoder.map_names) if config.maps is None or name in config.maps]
        self.map_names = tuple(decoder.map_names[i] for i in used)
        """The maps that are used, in the decoder's order. It may give more: those before the deepest one."""
        self.map_scales = tuple(decoder.map_scales[i] for i in used)
        # relative to the decoder's first map, used or not: a map weighs the same whatever others there are
        weights = depth_weights(decoder.map_scales, config.depth_weights)
        self.depth_weights = tuple(weights[i] for i in used)
        self.sampler = GatedSampler(config.sampled) if config.sampled else None
        self._num_whole = config.sampled.whole_maps if config.sampled else 0
        self._is_deep = [name not in decoder.map_names[: self._num_whole] for name in self.map_names]
        check_estimators(config, self.map_names, self._is_deep, decoder.map_names)

    def check(self, resolution: int) -> list[str]:
        """Raises:
        UserError: the codec cannot encode it, or a map is too small for its statistics or its mask's kernels.
        """
        f = self.decoder.downsampling
        if resolution % f:
            raise UserError(f"resolution {resolution}: not a multiple of the autoencoder's downsampling, {f}")
        for name, scale in zip(self.map_names, self.map_scales, strict=True):
            side = resolution // f * scale
            if self.config.statistics != "target_norm" and side < 2:
                raise UserError(f"resolution {resolution}: the decoder's map {name} has {side} pixels a side, of which no "
                                "deviation can be taken; train larger images, name other maps in task.perceptual.maps, "
                                "or set task.perceptual.statistics=target_norm")  # fmt: skip
            smallest = max(2, *kernel_sizes(side, side))
            if self._is_masked(scale) and side < smallest:
                raise UserError(f"resolution {resolution}: the decoder's map {name} has {side} pixels a side, fewer "
                                f"than the {smallest} that the outlier mask needs; train larger images or set "
                                "task.perceptual.mask_outliers=none")  # fmt: skip
            if self.config.crop and self.decoder.map_names.index(name) > WINDOWED:
                cut_scale = self.decoder.map_scales[WINDOWED]
                needed = smallest if self._is_masked(scale) else 2
                cut_side = resolution // f * cut_scale
                check_window(resolution, cut_side, scale // cut_scale, needed, name, self.config.crop)
        return []

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        size, latents_size = len(z0_BCHW), z0_BCHW.shape[-2:]
        gated = inside(noise_level_B, context.threshold)
        windows = self._windows(latents_size, context)
        if self.sampler is None:
            loss_B, terms = self._decoded(z0_hat_BCHW, z0_BCHW, gated, windows)
        else:
            choice = self.sampler.choose(noise_level_B, context)
            factors_BL = to_device(choice.map_factors(size, self._is_deep), z0_BCHW.device)
            loss_B, terms = self._decoded(z0_hat_BCHW, z0_BCHW, choice.rows, windows, factors_BL)
            deep, whole = torch.zeros(2, size, dtype=torch.float64, device=z0_BCHW.device)
            for name, weight, is_deep in zip(self.map_names, self.depth_weights, self._is_deep, strict=True):
                (deep if is_deep else whole).add_(terms[f"lpl_{name}"], alpha=weight)
            self.sampler.record(choice, deep, whole, noise_level_B, context)
            if not all(self._is_deep):
                others_B, of_others = self._decoded(
                    z0_hat_BCHW, z0_BCHW, choice.others, windows, factors_BL, self._num_whole
                )
                loss_B = loss_B + others_B
                terms |= {name: terms[name] + value_B for name, value_B in of_others.items()}
            for i, name in enumerate(self.map_names):
                if self._is_deep[i]:
                    terms[f"lpl_{name}"] = terms[f"lpl_{name}"] * factors_BL[:, i]
            # known of all, not of the chosen alone
            terms["gate"] = to_device(torch.zeros(size).index_fill(0, gated, 1.0), z0_BCHW.device)
        if self.config.over_batch == "gated" and len(gated):
            # so that the mean over the micro-batch is that over the samples inside
            loss_B = loss_B * (len(loss_B) / len(gated))
        return loss_B, terms

    def _decoded(
        self,
        z0_hat_BCHW: Tensor,
        z0_BCHW: Tensor,
        rows: Tensor,
        windows: Window | None,
        factors_BL: Tensor | None = None,
        num_maps: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (B,) and terms of these rows; of the decoder's first `num_maps` maps alone, where that is given."""
        done = 0

        def value(z0_hat: Tensor, device_rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal done
            part = rows[done : done + len(z0_hat)]
            done += len(z0_hat)
            window = None if windows is None else (windows[0][part], windows[1][part], *windows[2:])
            with torch.no_grad():
                targets = self.decoder(z0_BCHW[device_rows], window=window, num_maps=num_maps)
            estimates = self.decoder(z0_hat, window=window, num_maps=num_maps)
            factors = None if factors_BL is None else factors_BL[device_rows]
            return self.of_features(estimates, targets, factors)  # eq. 2

        names = [name for name in self.map_names if name in self.decoder.map_names[:num_maps]]
        term_names = ["gate", *(f"lpl_{name}" for name in names)]
        return injected(z0_hat_BCHW, rows, value, term_names=term_names, chunk_size=self.config.chunk_size)

    @torch.no_grad()
    def measure(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> Tensor:
        """Of whole images and all used maps, without what training estimates it by."""
        chunks = zip(z0_hat_BCHW.split(self.config.chunk_size), z0_BCHW.split(self.config.chunk_size), strict=True)
        return torch.cat([self.of_features(self.decoder(z0_hat), self.decoder(z0))[0] for z0_hat, z0 in chunks])

    def end_step(self, keep: Tensor) -> None:
        if self.sampler:
            self.sampler.end_step(keep)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.sampler.state_tensors() if self.sampler else {}

    def _windows(self, latents_size: Sequence[int], context: PerceptualContext) -> Window | None:
        if self.config.crop is None:
            return None
        height, width = (side * self.decoder.map_scales[WINDOWED] for side in latents_size)
        return draw_windows(context.uniform("estimator"), height, width, self.config.crop)

    def of_features(
        self, estimates: list[Tensor], targets: list[Tensor], factors_BL: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 inside the gate, from the maps that the decoder gives, from the first on; deep ones may be a part of theirs.

        `factors_BL`: on each used map's loss; terms are without.
        """
        config = self.config
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        maps = dict(zip(self.decoder.map_names, zip(estimates, targets, strict=True), strict=False))
        first, first_scale = targets[0], self.decoder.map_scales[0]
        used = zip(self.map_names, self.map_scales, self.depth_weights, strict=True)
        for i, (name, scale, weight) in enumerate(used):
            if name not in maps:
                break
            map_loss_B = feature_loss(
                *maps[name],
                mask_outliers=self._is_masked(scale),
                statistics=config.statistics,
                mask_source=config.mask_source,
                over_pixels=config.over_pixels,
                detach_deviation=config.detach_deviation,
                whole_size=(first.shape[-2] * scale // first_scale, first.shape[-1] * scale // first_scale),
            )
            terms[f"lpl_{name}"] = map_loss_B.detach()
            weighted_B = weight * map_loss_B
            losses.append(weighted_B if factors_BL is None else weighted_B * factors_BL[:, i])
        loss_B = torch.stack(losses).sum(0)
        if config.over_batch == "gated":
            loss_B = loss_B / len(self.map_names)
        terms["gate"] = torch.ones_like(loss_B)
        return loss_B, terms

    def _is_masked(self, scale: int) -> bool:
        which = self.config.mask_outliers
        return which == "all" or (which == "deep" and scale >= MASKED_FROM_SCALE)


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
    UserError: the config names maps that the decoder does not have, or another decoder that is not there or does not fit.
    """
    if config.decoder_url:
        light = load_light(config.decoder_url, codec)
        return LatentPerceptualLoss(LightDecoder(codec, light, num_decoded(config, light.map_names)), config)
    return LatentPerceptualLoss(FrozenDecoder(codec, num_decoded(config, codec.map_names)), config)


def num_decoded(config: LPLConfig, map_names: tuple[str, ...]) -> int | None:
    """How many maps the decoder must compute for those that are used; None: all.

    Raises:
        UserError: it has none of some name.
    """
    if config.maps is None:
        return config.num_maps
    if unknown := [name for name in config.maps if name not in map_names]:
        raise UserError(f"task.perceptual.maps: {', '.join(unknown)}: no such block; this decoder has "
                        f"{', '.join(map_names)}")  # fmt: skip
    return max(map_names.index(name) for name in config.maps) + 1
