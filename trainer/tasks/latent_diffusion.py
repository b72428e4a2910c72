"""Text-to-image latent diffusion: what one step is, and how to sample."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.loader import Batch
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.diffusion.paradigms import Paradigm, build_paradigm
from trainer.diffusion.samplers import build_sampler, guided
from trainer.errors import UserError
from trainer.losses.denoising import denoising_loss
from trainer.losses.lpl import LatentPerceptualLoss, gate_share
from trainer.losses.perceptual import PerceptualContext
from trainer.models.autoencoders import Codec
from trainer.models.mmdit import MMDiT
from trainer.models.text_encoders import TextInput, build_text_encoder
from trainer.parallel.apply import autocast
from trainer.rng import normal, uniform
from trainer.step_plan import StepPlan
from trainer.tensors import pixels_to_images


class TextToImage(nn.Module):
    """The trainable text encoder and the denoiser under one root, so that one forward pass gathers and frees both."""

    def __init__(self, config: LatentDiffusionConfig, latent_channels: int) -> None:
        super().__init__()
        self.text = build_text_encoder(config.text)
        self.denoiser = MMDiT(
            config.model,
            latent_channels=latent_channels,
            token_width=self.text.token_width,
            pooled_width=self.text.pooled_width,
        )

    def init_weights(self) -> None:
        self.text.init_weights()
        self.denoiser.init_weights()

    def forward(self, zt_BCHW: Tensor, time_B: Tensor, text: TextInput) -> Tensor:
        prediction: Tensor = self.denoiser(zt_BCHW, time_B, self.text(text))
        return prediction


class LatentDiffusionTask:
    def __init__(self, run: RunConfig, device: torch.device) -> None:
        assert isinstance(run.task, LatentDiffusionConfig)
        self.config, self._run, self._device = run.task, run, device
        self.codec = Codec.load(self.config.codec.url).to(device)
        torch.manual_seed(run.seed)  # the same weights on every rank and any number of them
        self.module = TextToImage(self.config, self.codec.latent_channels)
        self.module.init_weights()
        self._lpl = LatentPerceptualLoss(self.codec, self.config.lpl)
        self._paradigms: dict[int, Paradigm] = {}
        self.captions_cut = 0
        """Captions longer than the text encoder takes, so far."""

    def sharding_units(self) -> list[nn.Module]:
        return [*self.module.denoiser.blocks, *getattr(self.module.text, "blocks", [])]

    def check(self) -> list[str]:
        warnings = []
        model, f = self.config.model, self.codec.downsampling
        for i, phase in enumerate(self._run.phases):
            patches, rest = divmod(phase.resolution, f * model.patch_size)
            if rest:
                raise UserError(
                    f"phases.{i}.resolution: {phase.resolution} px is no multiple of the codec's {f} times "
                    f"task.model.patch_size {model.patch_size}; take a multiple of {f * model.patch_size}"
                )
            if patches > model.position_grid:
                raise UserError(
                    f"task.model.position_grid: {model.position_grid} is less than the {patches} patches a side "
                    f"of phase {phase.name}"
                )
            if phase.lpl and phase.lpl.weight:
                self._lpl.check_resolution(phase.resolution)
                tau = self._lpl.threshold(PerceptualContext(phase.lpl.tau, phase.resolution))
                if gate_share(self.paradigm(phase.resolution), tau) == 0.0:
                    warnings.append(f"phases.{i}.lpl.tau: no timestep has a noise level of {tau:g} or less; LPL is 0")
        return warnings

    def paradigm(self, resolution: int) -> Paradigm:
        if resolution not in self._paradigms:
            self._paradigms[resolution] = build_paradigm(self.config.paradigm, resolution=resolution)
        return self._paradigms[resolution]

    # ------------------------------------------------------------------------------------------------------ training

    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        phase, paradigm = plan.phase, self.paradigm(batch.resolution)
        seed, positions = self._run.seed, batch.positions_B.tolist()
        text = self._text_of(batch, positions)
        t_B = paradigm.sample_t(uniform(seed, positions, "timestep")).to(self._device)
        with autocast(self._device):
            z0 = self._latents_of(batch)
            noise = normal(seed, positions, "noise", z0.shape[1:], device=self._device)
            zt = paradigm.add_noise(z0, noise, t_B)
            prediction = self.module(zt, paradigm.model_time(t_B), text).float()
            denoising_B = denoising_loss(prediction, paradigm.target(z0, noise, t_B))
            loss_B, terms = phase.denoising_weight * denoising_B, {"denoising": denoising_B.detach()}
            if phase.lpl:
                z0_hat = paradigm.to_z0(prediction, zt, t_B)
                context = PerceptualContext(phase.lpl.tau, batch.resolution)
                lpl_B, lpl_terms = self._lpl(z0_hat, z0, paradigm.noise_level(t_B), context)
                loss_B = loss_B + phase.lpl.weight * lpl_B
                terms |= {"lpl": lpl_B.detach(), **lpl_terms}
        (scale * loss_B.sum()).backward()
        return {"loss": loss_B.detach(), **terms}

    def _latents_of(self, batch: Batch) -> Tensor:
        images = pixels_to_images(batch.images_BCHW.to(self._device, non_blocking=True))
        with torch.no_grad():
            return self.codec.encode(images).float()

    def _text_of(self, batch: Batch, positions: Sequence[int]) -> TextInput:
        dropped_B = uniform(self._run.seed, positions, "caption_dropout") < self.config.caption_dropout
        captions = [None if drop else caption for caption, drop in zip(batch.captions, dropped_B, strict=True)]
        text = self.module.text.prepare(captions, batch.labels_B.tolist())
        self.captions_cut += text.num_cut
        return text.to(self._device)

    # ------------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample_latents(
        self, prompts: Sequence[str], first: int, *, resolution: int, sampler: str, num_steps: int,
        guidance_scale: float, seed: int,
    ) -> Tensor:  # fmt: skip
        """Latents (B, C, h, w) for prompts `first`, `first + 1`, ... of a list: a prompt's noise follows from its place
        in the list, so neither batch size nor rank changes its picture. A collective under sharding."""
        paradigm = self.paradigm(resolution)
        side = resolution // self.codec.downsampling
        positions = range(first, first + len(prompts))
        noise = normal(seed, positions, "sample", (self.codec.latent_channels, side, side), device=self._device)
        text = self.module.text.prepare([*prompts, *[None] * len(prompts)]).to(self._device)

        def predict(zt: Tensor, t_B: Tensor) -> Tensor:
            with autocast(self._device):
                out: Tensor = self.module(zt, paradigm.model_time(t_B), text)
            return out.float()

        return build_sampler(sampler)(guided(predict, guidance_scale), paradigm, noise, num_steps)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8."""
        images = self.codec.decode(latents)
        return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
