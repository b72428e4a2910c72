"""Stored columns of a batch as a task takes them.

B batch, C channels, h and w sides of the latents.
"""

import torch
from torch import Tensor

from data.batches import Batch
from data.encode.stored import States
from trainer.models.autoencoders import Codec
from trainer.rng import normal


def scaled_latents(batch: Batch, codec: Codec, *, seed: int, device: torch.device) -> Tensor:
    """A batch's stored latents as the diffusion model sees them: (B, C, h, w), float32, on the device.

    Of moments, drawn from the posterior anew at each stream position; scale and shift are the codec's.
    """
    assert batch.latents_BCHW is not None
    raw_BCHW = batch.latents_BCHW.to(device, non_blocking=True).float()
    if raw_BCHW.shape[1] == 2 * codec.latent_channels:
        mean_BCHW, log_variance_BCHW = raw_BCHW.chunk(2, dim=1)
        noise = normal(seed, batch.positions_B.tolist(), "posterior", mean_BCHW.shape[1:], device=device)
        raw_BCHW = mean_BCHW + (0.5 * log_variance_BCHW).exp() * noise
    assert raw_BCHW.shape[1] == codec.latent_channels, tuple(raw_BCHW.shape)
    return codec.raw_to_scaled(raw_BCHW)


def known_states(states: tuple[States | None, ...]) -> list[dict[str, tuple[Tensor, Tensor | None]]]:
    """For each of the run's text encoders: caption -> token states and pooled output, as `TextEncoder.prepare` takes them."""
    return [{} if of_encoder is None else of_encoder.by_caption() for of_encoder in states]
