"""E-LatentLPIPS (Kang et al. 2024, section 3.2): LPIPS (Zhang et al. 2018) on the features of a network over latents.

Shapes: latents and feature maps BCHW, N = H * W pixels. Nothing here makes the host wait for the device.
"""

import torch
from torch import Tensor

from trainer.config import LatentLPIPSConfig
from trainer.errors import UserError
from trainer.losses.gate import inside
from trainer.losses.injection import injected, to_device
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.latent_network_files import read_latent_network
from trainer.models.lpips import layer_distance

MAX_SHIFT, CUTOUT = 1 / 8, 1 / 2
"""Largest translation and side of the square cut out, over the latents' side (Karras et al. 2020, Zhao et al. 2020)."""


class LatentLPIPSLoss(PerceptualLoss):
    """Distance of the estimate's features to the truth's, for each sample.

    Terms: `latent_lpips_<l>`, the share of stage l of 1 to 5, and `gate`, 1 inside and 0 outside.
    """

    name = "latent_lpips"

    def __init__(self, config: LatentLPIPSConfig, codec: Codec) -> None:
        """
        Raises:
            UserError: the latent network is not there, damaged, or takes other latents than the codec's.
        """
        super().__init__()
        self.config = config
        self._codec_downsampling = codec.downsampling
        self._info, self.network, heads = read_latent_network(config.url)
        if self._info.latent_channels != codec.latent_channels:
            raise UserError(
                f"task.perceptual.url: the latent network at {config.url} takes {self._info.latent_channels} channels, the "
                f"codec's latents have {codec.latent_channels}; train one on them with the recipe latent_network"
            )
        self._warnings = _warn_of_another_codec(self._info.scaling_factor, self._info.shift_factor, codec)
        for i, head in enumerate(heads):
            self.register_buffer(f"head_{i}", head, persistent=False)
        self._num_heads = len(heads)
        self.eval()

    @property
    def heads(self) -> list[Tensor]:
        """Of each stage, a weight for each channel (C,)."""
        return [self.get_buffer(f"head_{i}") for i in range(self._num_heads)]

    def check(self, resolution: int) -> list[str]:
        """
        Raises:
            UserError: the latents vanish in the network's poolings.
        """
        side, smallest = resolution // self._codec_downsampling, self._info.model.smallest_side
        if side < smallest:
            raise UserError(
                f"resolution {resolution}: latents of {side} pixels a side, and the latent network's poolings need "
                f"{smallest}; train at {smallest * self._codec_downsampling} px, or give one with fewer pooled_stages"
            )
        return self._warnings

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = inside(noise_level_B, context.threshold)
        drawn_B5 = None
        if self.config.augment:
            drawn_B5 = draw_augmentations(context.uniform("augmentation"), z0_BCHW.shape[-1])
            drawn_B5 = to_device(drawn_B5, z0_BCHW.device)

        def value(z0_hat: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.of_latents(z0_hat, z0_BCHW[rows], None if drawn_B5 is None else drawn_B5[rows])

        return injected(z0_hat_BCHW, rows, value, term_names=self.term_names(), chunk_size=self.config.chunk_size)

    def term_names(self) -> list[str]:
        return ["gate", *(f"{self.name}_{i + 1}" for i in range(self._num_heads))]

    def of_latents(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, drawn_B5: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of samples inside the gate."""
        # What is cut out or shifted away, or not greater than 0 behind a ReLU, would hide that it is not finite.
        probe_B = 0.0 * (z0_hat_BCHW.detach().float().sum((1, 2, 3)) + z0_BCHW.float().sum((1, 2, 3)))
        if drawn_B5 is not None:
            z0_hat_BCHW, z0_BCHW = augmented(z0_hat_BCHW, drawn_B5), augmented(z0_BCHW, drawn_B5)
        with torch.no_grad():
            targets = self.network.features(z0_BCHW)
        estimates = self.network.features(z0_hat_BCHW)
        stages = [layer_distance(*maps) for maps in zip(estimates, targets, self.heads, strict=True)]
        loss_B = torch.stack(stages).sum(0) + probe_B
        terms = dict(zip(self.term_names()[1:], stages, strict=True))
        return loss_B, {"gate": torch.ones_like(loss_B), **terms}


def _warn_of_another_codec(scaling_factor: float | None, shift_factor: float | None, codec: Codec) -> list[str]:
    """A network that was trained on another codec's latents computes something, and nothing that means anything."""
    pairs = (
        ("scaling_factor", scaling_factor, codec.scaling_factor),
        ("shift_factor", shift_factor, codec.shift_factor),
    )
    return [
        f"task.perceptual.url: the latent network was trained on latents of {name} {there:.6g}, the codec's is {here:.6g}; "
        "unless both are the same latent space, train one with the recipe latent_network"
        for name, there, here in pairs
        if there is not None and abs(there - here) > 1e-4 * max(1.0, abs(there))
    ]


# -------------------------------------------------------------------------------------------------------- augmentation


def draw_augmentations(uniform_B: Tensor, side: int) -> Tensor:
    """One uniform number of each sample to one of the augmentations: int64 (B, 5), where the input is.

    Columns: turn (0..7: bit 0 mirrors columns, bit 1 rows, bit 2 swaps rows and columns, together all flips and rotations by
    90 degrees), rows and columns to shift by, row and column at the centre of the square cut out.
    """
    reach = round(side * MAX_SHIFT)
    columns = []
    # digits of the number to these bases: independent, as long as they use few of its 53 bits (30 at 128 a side)
    for base, first in ((8, 0), (2 * reach + 1, -reach), (2 * reach + 1, -reach), (side, 0), (side, 0)):
        uniform_B = uniform_B * base
        digit_B = uniform_B.floor().clamp(max=base - 1)
        uniform_B = uniform_B - digit_B
        columns.append(digit_B.long() + first)
    return torch.stack(columns, dim=1)


def augmented(latents_BCHW: Tensor, drawn_B5: Tensor) -> Tensor:
    """Turn, shift (what comes in is 0), then set a square to 0, each sample as drawn. Latents are square."""
    side = latents_BCHW.shape[-1]
    assert latents_BCHW.shape[-2] == side, "square images alone are turned"
    source_BN, kept_BN = source_pixels(drawn_B5, side)
    index_BCN = source_BN[:, None].expand(-1, latents_BCHW.shape[1], -1)
    moved_BCN = latents_BCHW.flatten(2).gather(-1, index_BCN)
    # `where`, not a product: 0 times a pixel that is not finite is not 0
    return torch.where(kept_BN[:, None], moved_BCN, 0.0).unflatten(-1, (side, side))


def source_pixels(drawn_B5: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(number of the pixel that each output pixel is taken from, whether it is taken at all), both (B, N)."""
    turn_B, down_B, right_B, centre_row_B, centre_column_B = (c[:, None, None] for c in drawn_B5.unbind(1))
    row = torch.arange(side, device=drawn_B5.device)[:, None]
    column = torch.arange(side, device=drawn_B5.device)[None, :]
    cut = _within_square(row, centre_row_B, side) & _within_square(column, centre_column_B, side)
    # backwards: from the output to where it comes from, so the last step of all is undone first
    from_row, from_column = row - down_B, column - right_B
    there = (from_row >= 0) & (from_row < side) & (from_column >= 0) & (from_column < side)
    from_column = torch.where(turn_B & 1 > 0, side - 1 - from_column, from_column)
    from_row = torch.where(turn_B & 2 > 0, side - 1 - from_row, from_row)
    swapped = turn_B & 4 > 0
    first, second = torch.where(swapped, from_column, from_row), torch.where(swapped, from_row, from_column)
    kept = there & ~cut
    return torch.where(kept, first * side + second, 0).flatten(1), kept.flatten(1)


def _within_square(coordinate: Tensor, centre_B: Tensor, side: int) -> Tensor:
    """CUTOUT of the side, rounded; where the centre is near a border, less of it."""
    size = round(side * CUTOUT)
    first = centre_B - size // 2
    return (coordinate >= first) & (coordinate < first + size)
