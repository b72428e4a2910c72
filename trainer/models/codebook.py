"""Vector quantisation (van den Oord et al. 2017): the nearest code of each latent pixel, and how a codebook stays alive.

The codes themselves are the parameter of diffusers' `VQModel`. K: number of codes; C: channels of a latent; BCHW: latents.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import CodebookConfig
from trainer.models.frozen_layers import as_it_is
from trainer.models.precision import precise

CHUNK = 1 << 24
"""Distances that are in memory at a time."""


class Quantized(NamedTuple):
    latents_BCHW: Tensor
    """The codes; their gradient is the latents' (straight-through)."""
    indices_BHW: Tensor
    codebook_B: Tensor
    """|sg(z) - e|^2, mean over pixels and channels: moves the codes."""
    commitment_B: Tensor
    """|z - sg(e)|^2: moves the latents."""


def quantize(latents_BCHW: Tensor, codes_KC: Tensor) -> Quantized:
    """Eq. 1 to 3 of van den Oord et al.; in float32 at least."""
    z_BHWC = precise(latents_BCHW).permute(0, 2, 3, 1)
    indices_BHW = nearest_codes(latents_BCHW, codes_KC)
    codes_BHWC = precise(codes_KC)[indices_BHW]
    codebook_B = (codes_BHWC - z_BHWC.detach()).square().mean((1, 2, 3))
    commitment_B = (z_BHWC - codes_BHWC.detach()).square().mean((1, 2, 3))
    straight_through = z_BHWC + (codes_BHWC - z_BHWC).detach()
    return Quantized(straight_through.permute(0, 3, 1, 2).contiguous(), indices_BHW, codebook_B, commitment_B)


def nearest_codes(latents_BCHW: Tensor, codes_KC: Tensor) -> Tensor:
    """Index (B, H, W) of each pixel's nearest code."""
    z_BHWC = latents_BCHW.detach().permute(0, 2, 3, 1)
    return nearest(z_BHWC.flatten(0, 2), codes_KC.detach()).view(z_BHWC.shape[:3])


def nearest(vectors_NC: Tensor, codes_KC: Tensor) -> Tensor:
    """Index (N,) of the nearest code, the first of equals."""
    codes = precise(codes_KC)
    squares_K = codes.square().sum(1)
    parts = precise(vectors_NC).split(max(1, CHUNK // len(codes)))
    # autocast's products have 8 bits: of many codes that lie close they would take another one
    with as_it_is(codes):
        return torch.cat([torch.addmm(squares_K, part, codes.T, alpha=-2.0).argmin(1) for part in parts])


class CodebookState:
    """What is known of a codebook over steps: running counts of its codes, and with `update: ema` of the latents behind them.

    All of it is on the device and, after `end_step`, the same on all ranks, however the batch was split.
    """

    def __init__(self, config: CodebookConfig, channels: int, device: torch.device, *, frozen: bool = False) -> None:
        """`frozen`: codes stay as they are, whatever the config says of their update; only counted."""
        self.config = config
        self._is_mean = config.update == "ema" and not frozen
        self._restart_below = 0.0 if frozen else config.restart_below
        size = config.size
        self.chosen_K = torch.zeros(size, device=device)
        """Running mean of how often a step's global batch chooses each code."""
        self.counts_K = torch.zeros(size, device=device)
        """The same, but a code that begins again does so at `restart_below`."""
        self.sums_KC = torch.zeros(size if self._is_mean else 0, channels, device=device)
        """Running mean of the sum of the latents that chose it."""
        self._new_counts_K = torch.zeros(size, device=device)
        self._new_sums_KC = torch.zeros_like(self.sums_KC)
        self._candidates_KC = torch.zeros(size if self._restart_below else 0, channels, device=device)
        self._restarts = torch.zeros((), device=device)

    @torch.no_grad()
    def begin_with(self, codes_KC: Tensor, count: float) -> None:
        """Codes that something has trained before: running means go on as if each had been chosen `count` times a step. From
        no count at all, the first step would put its own few latents' mean in their place."""
        self.counts_K.fill_(count)
        if self._is_mean:
            self.sums_KC.copy_(count * codes_KC)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"chosen": self.chosen_K, "counts": self.counts_K, "sums": self.sums_KC, "restarts": self._restarts}

    @torch.no_grad()
    def observe(self, latents_BCHW: Tensor, indices_BHW: Tensor) -> None:
        """A micro-batch, whose latents chose these codes."""
        indices_N = indices_BHW.flatten()
        ones_N = torch.ones(indices_N.shape, device=indices_N.device)
        self._new_counts_K.index_add_(0, indices_N, ones_N)
        if self._is_mean:
            latents_NC = latents_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
            self._new_sums_KC.index_add_(0, indices_N, latents_NC.to(self._new_sums_KC.dtype))

    def restart_is_due(self, step: int) -> bool:
        return bool(self._restart_below) and (step + 1) % self.config.restart_every_steps == 0

    def moves_codes(self, step: int) -> bool:
        """Whether `end_step` sets codes, which otherwise only the optimizer moves."""
        return self._is_mean or self.restart_is_due(step)

    @torch.no_grad()
    def offer(self, latents_BCHW: Tensor, offsets_B: NDArray[np.int64], batch_size: int, uniform_2K: Tensor) -> None:
        """Latents of this micro-batch that dead codes would begin again at.

        Args:
            offsets_B: places of its images in the global batch of `batch_size`.
            uniform_2K: drawn from [0, 1), the same on all ranks: which image, and which of its pixels, each code is offered.
        """
        height, width = latents_BCHW.shape[-2:]
        image_K = (uniform_2K[0] * batch_size).long().numpy()
        pixel_K = (uniform_2K[1] * (height * width)).long().numpy()
        order = np.argsort(offsets_B)
        place_K = np.searchsorted(offsets_B[order], image_K).clip(max=len(order) - 1)
        mine = np.flatnonzero(offsets_B[order][place_K] == image_K)
        device = latents_BCHW.device
        codes, rows, pixels = (
            torch.from_numpy(a).to(device, non_blocking=True) for a in (mine, order[place_K[mine]], pixel_K[mine])
        )
        self._candidates_KC[codes] = latents_BCHW.detach().to(self._candidates_KC.dtype).flatten(2)[rows, :, pixels]

    @torch.no_grad()
    def end_step(self, codes_KC: Tensor | None, step: int, keep: Tensor) -> Tensor | None:
        """After a step, on all ranks: given the codes where this moves them, returns them as they are to be now. A
        collective.

        Args:
            keep: 1.0 where the step counts, else 0.0, on the device.
        """
        decay = self.config.ema_decay
        due = self.restart_is_due(step)
        parts = [self._new_counts_K, self._new_sums_KC, *([self._candidates_KC] if due else [])]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        new_counts_K, *rest = flat.split([part.numel() for part in parts])
        new_sums_KC = rest[0].view_as(self.sums_KC)
        chosen_K = decay * self.chosen_K + (1 - decay) * new_counts_K
        counts_K = decay * self.counts_K + (1 - decay) * new_counts_K
        sums_KC = decay * self.sums_KC + (1 - decay) * new_sums_KC
        codes = None if codes_KC is None else precise(codes_KC)
        if codes is not None and self._is_mean:
            # appendix A; a code that nothing has chosen yet stays where it is
            codes = torch.where(counts_K[:, None] > 1e-20, sums_KC / counts_K.clamp(min=1e-20)[:, None], codes)
        restarted = torch.zeros_like(self._restarts)
        if due:
            dead_K = counts_K < self._restart_below
            candidates_KC = rest[1].view_as(self._candidates_KC)
            assert codes is not None
            codes = torch.where(dead_K[:, None], candidates_KC, codes)
            if self._is_mean:
                sums_KC = torch.where(dead_K[:, None], candidates_KC * self._restart_below, sums_KC)
            counts_K = torch.where(dead_K, torch.full_like(counts_K, self._restart_below), counts_K)
            restarted = dead_K.sum().float()
        kept = keep > 0
        self.chosen_K.copy_(torch.where(kept, chosen_K, self.chosen_K))
        self.counts_K.copy_(torch.where(kept, counts_K, self.counts_K))
        self.sums_KC.copy_(torch.where(kept, sums_KC, self.sums_KC))
        self._restarts.add_(torch.where(kept, restarted, torch.zeros_like(restarted)))
        for buffer in (self._new_counts_K, self._new_sums_KC, self._candidates_KC):
            buffer.zero_()
        return None if codes is None or codes_KC is None else torch.where(kept, codes, precise(codes_KC))

    def terms(self) -> dict[str, Tensor]:
        """Scalars: `perplexity`, exp of the entropy of the codes' shares; `codebook_usage`, the share of codes that were chosen
        within about the last 1 / (1 - ema_decay) steps; `codes_restarted`, so far."""
        share_K = self.chosen_K / self.chosen_K.sum().clamp(min=1e-20)
        entropy = -(share_K * share_K.clamp(min=1e-20).log()).sum()
        used = (self.chosen_K > (1 - self.config.ema_decay) / np.e).float().mean()
        return {"perplexity": entropy.exp(), "codebook_usage": used, "codes_restarted": self._restarts.clone()}
