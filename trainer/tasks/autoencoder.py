"""Stage 1 at its simplest: an `AutoencoderKL` trained with L1 and a KL penalty (Rombach et al. 2022, appendix G)."""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from data.loader import Batch
from trainer.config import AutoencoderConfig, AutoencoderModelConfig, RunConfig
from trainer.errors import UserError
from trainer.parallel.apply import autocast
from trainer.rng import normal
from trainer.step_plan import StepPlan
from trainer.tasks.base import Task
from trainer.tensors import pixels_to_images


def build_autoencoder(config: AutoencoderModelConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=64,
    )


class Reconstruction(nn.Module):
    """Encode, draw from the posterior, decode: one forward pass for the sharding to wrap."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images_BCHW: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, and the posterior's KL divergence from a standard normal, summed over each latent: (B,)."""
        posterior = self.autoencoder.encode(images_BCHW).latent_dist
        reconstructed = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        return reconstructed, posterior.kl()


class AutoencoderTask(Task):
    def __init__(self, run: RunConfig, device: torch.device) -> None:
        assert isinstance(run.task, AutoencoderConfig)
        self.config, self._run, self._device = run.task, run, device
        torch.manual_seed(run.seed)
        self.module: Reconstruction = Reconstruction(build_autoencoder(run.task.model))

    def sharding_units(self) -> list[nn.Module]:
        return [self.module.autoencoder.encoder, self.module.autoencoder.decoder]

    def check(self) -> list[str]:
        factor = 2 ** (len(self.config.model.block_out_channels) - 1)
        for i, phase in enumerate(self._run.phases):
            if phase.resolution % factor:
                raise UserError(
                    f"phases.{i}.resolution: {phase.resolution} px is no multiple of the autoencoder's {factor}"
                )
        return []

    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        images = pixels_to_images(batch.images_BCHW.to(self._device, non_blocking=True))
        side = batch.resolution // 2 ** (len(self.config.model.block_out_channels) - 1)
        shape = (self.config.model.latent_channels, side, side)
        noise = normal(self._run.seed, batch.positions_B.tolist(), "posterior", shape, device=self._device)
        with autocast(self._device):
            reconstructed, kl_B = self.module(images, noise)
        l1_B = (reconstructed.float() - images).abs().mean((1, 2, 3))
        kl_B = kl_B.float() / images[0].numel()  # both terms per pixel and channel, as latent-diffusion weighs them
        loss_B = l1_B + self.config.kl_weight * kl_B
        (scale * loss_B.sum()).backward()
        return {"loss": loss_B.detach(), "l1": l1_B.detach(), "kl": kl_B.detach()}
