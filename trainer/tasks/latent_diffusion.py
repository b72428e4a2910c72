"""Text-to-image latent diffusion: what one step is, and how to sample."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.batches import Batch
from trainer.config import LatentDiffusionConfig, PhaseConfig, PhasePerceptualConfig, RunConfig
from trainer.diffusion.paradigms import Paradigm, build_paradigm
from trainer.diffusion.schedules import NUM_TIMESTEPS
from trainer.errors import UserError
from trainer.losses.build import build_perceptual_loss
from trainer.losses.denoising import denoising_loss
from trainer.losses.gate import gate_share, threshold
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.losses.reweighting import Reweighting
from trainer.losses.variances import HALF_LIFE_STEPS, LossVariances
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.condition import Condition
from trainer.models.denoisers import build_denoiser
from trainer.models.text_encoders import TextEncoder, TextInput, build_text_encoder
from trainer.parallel.apply import autocast, reshard
from trainer.rng import normal, spread_uniform, uniform, uniforms
from trainer.sampling.draw import draw_latents, noise_of
from trainer.sampling.settings import SampleSettings
from trainer.step_plan import StepPlan
from trainer.stored_batch import known_states, scaled_latents
from trainer.tasks.base import Task
from trainer.tensors import images_to_pixels, pixels_to_images

ENCODED_AT_ONCE = 16
"""Images, on a CPU: feature maps of more leave its caches."""
FEW_INSIDE = 0.01
"""A gate that lets through a smaller share of samples is warned of."""


class TextToImage(nn.Module):
    """What is trained, under one root, so that one forward pass gathers and frees it: the denoiser, and the text encoder
    unless it is frozen. All sizes follow from the config, so it can be built on the meta device without any file."""

    def __init__(self, config: LatentDiffusionConfig) -> None:
        super().__init__()
        text = config.text
        self.text = None if text.kind == "frozen" else build_text_encoder(text, labels_only=config.model.kind == "dit")
        self.denoiser = build_denoiser(
            config.model,
            latent_channels=config.codec.latent_channels,
            token_width=text.width,
            pooled_width=text.pooled_width if text.kind == "frozen" else text.width,
            num_classes=text.num_classes if text.kind == "classes" else None,
        )

    def init_weights(self) -> None:
        if self.text is not None:
            self.text.init_weights()
        self.denoiser.init_weights()

    def units(self) -> list[nn.Module]:
        """Parts to gather, recompute and compile one at a time."""
        return [*self.denoiser.units(), *getattr(self.text, "blocks", [])]

    def forward(
        self, zt_BCHW: Tensor, time_B: Tensor, text: TextInput | Condition, num_blocks: int | None = None
    ) -> Tensor:
        """`text`: captions as the trainable encoder takes them, or what the frozen one made of them. `num_blocks`: return
        the denoiser's features behind so many blocks."""
        if not isinstance(text, Condition):
            assert self.text is not None
            text = self.text(text)
        out: Tensor = self.denoiser(zt_BCHW, time_B, text, num_blocks)
        return out

    def encode_text(self, text: TextInput) -> Condition:
        """By the trainable encoder alone."""
        assert self.text is not None
        condition: Condition = self.text(text)
        return condition


class LatentDiffusionTask(Task):
    def __init__(
        self, run: RunConfig, device: torch.device, *, codec: Codec | None = None, text: TextEncoder | None = None
    ) -> None:
        """`codec`, `text`: an autoencoder and a frozen text encoder that are there already, in place of the config's files."""
        assert isinstance(run.task, LatentDiffusionConfig)
        self.config, self._run, self._device = run.task, run, device
        self.codec = (load_codec(self.config.codec) if codec is None else codec).to(device)
        # the layout in which convolutions are fastest, on tensor cores and on a CPU
        self.codec.vae.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.codec.vae.encoder.modules():  # what they are given nobody reads again
            if isinstance(module, nn.SiLU):
                module.inplace = True
        torch.manual_seed(run.seed)  # the same weights on every rank and any number of them
        self.module: TextToImage = TextToImage(self.config)
        self.module.init_weights()
        if text is None:
            text = self.module.text or build_text_encoder(self.config.text, device)
        self.text: TextEncoder = text
        self.perceptual: PerceptualLoss | None = None
        """Built where some phase has it: a rival's network need not be there for a run without."""
        if any(phase.perceptual for phase in run.phases):
            self.perceptual = build_perceptual_loss(self.config.perceptual, self.codec, self.module).to(device)
        self._variances: LossVariances | None = None
        """Of the denoising term and the perceptual loss, where some phase derives the weight from them."""
        if any(phase.perceptual and phase.perceptual.variance_share for phase in run.phases):
            self._variances = LossVariances(2, half_life_steps=HALF_LIFE_STEPS).to(device)
        self._paradigms: dict[int, Paradigm] = {}
        self._noise: list[tuple[Tensor, Tensor]] = []

    def sharding_units(self) -> list[nn.Module]:
        return self.module.units()

    def frozen_sharded(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        return self.perceptual.sharded() if self.perceptual else []

    def state_tensors(self) -> dict[str, Tensor]:
        of_loss = self.perceptual.state_tensors() if self.perceptual else {}
        of_weight = {"variances": self._variances.sums} if self._variances else {}
        return {**{f"perceptual.{name}": tensor for name, tensor in of_loss.items()}, **of_weight}

    def check(self) -> list[str]:
        warnings = []
        for i, phase in enumerate(self._run.phases):
            if phase.perceptual and self.perceptual:
                warnings += self.perceptual.check(phase.resolution)
                if isinstance(self.perceptual, Reweighting) and self.perceptual.measures and phase.batch_size < 2:
                    raise UserError(f"phases.{i}.batch_size: one image has no variance to measure; take more, or set "
                                    "task.perceptual.variance_ratio")  # fmt: skip
                bound = self._threshold(phase.perceptual, phase.resolution)
                share = gate_share(self.paradigm(phase.resolution), bound)
                if share < FEW_INSIDE:
                    warnings.append(
                        f"phases.{i}.perceptual: {share:.2%} of the samples have a noise level of {bound:.3g} or less, for "
                        "the others the loss is 0; raise tau, or set task.perceptual.tau_reference_px"
                    )
        return warnings

    def check_side(self, phase: PhaseConfig, side_px: int) -> None:
        if phase.perceptual and self.perceptual:
            self.perceptual.check(side_px)

    def _threshold(self, phase: PhasePerceptualConfig, resolution: int) -> float:
        reference_px = self.config.perceptual.tau_reference_px
        return threshold(phase, self.paradigm(resolution), resolution, reference_px)

    def paradigm(self, resolution: int) -> Paradigm:
        if resolution not in self._paradigms:
            self._paradigms[resolution] = build_paradigm(self.config.paradigm, resolution=resolution)
        return self._paradigms[resolution]

    # ------------------------------------------------------------------------------------------------------ training

    def begin_step(self, plan: StepPlan) -> None:
        self._noise.clear()
        if plan.begins_phase and plan.phase.perceptual and self.perceptual:
            self.perceptual.begin_phase(self.module)
            if self._variances:
                self._variances.begin()

    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        phase, paradigm = plan.phase, self.paradigm(batch.resolution)
        seed, positions = self._run.seed, batch.positions_B.tolist()
        with self.stages("text", "text"):
            text = self._text_of(batch, positions)
        images = pixels_to_images(batch.images_BCHW.to(self._device, non_blocking=True))
        host_t_B = paradigm.sample_t(self._timestep_draws(positions, plan.step))
        t_B = host_t_B.to(self._device, non_blocking=True)
        with autocast(self._device):
            with self.stages("encode", "encoder"):
                z0 = self._latents_of(images) if batch.latents_BCHW is None else self._stored_latents(batch)
            with self.stages("forward"):
                noise = normal(seed, positions, "noise", z0.shape[1:], device=self._device)
                zt, time_B = paradigm.add_noise(z0, noise, t_B), paradigm.model_time(t_B)
                prediction = self.module(zt, time_B, text).float()
                denoising_B = denoising_loss(prediction, paradigm.target(z0, noise, t_B))
            self._noise.append((time_B / NUM_TIMESTEPS, denoising_B.detach()))
            weighted_B, terms = paradigm.loss_weight(t_B) * denoising_B, {"denoising": denoising_B.detach()}
            if self.config.paradigm.weighting != "uniform":
                terms["denoising_weighted"] = weighted_B.detach()
            loss_B = phase.denoising_weight * weighted_B
            if phase.perceptual and self.perceptual:
                context = PerceptualContext(
                    threshold=self._threshold(phase.perceptual, batch.resolution),
                    phase_step=plan.phase_step,
                    paradigm=paradigm,
                    images_BCHW=images,
                    denoising_B=denoising_B,
                    text=text,
                    uniform=lambda purpose: uniform(seed, positions, purpose),
                    normal=lambda purpose: normal(seed, positions, purpose, z0.shape[1:], device=self._device),
                )
                z0_hat = paradigm.to_z0(prediction, zt, t_B)
                # levels from the host's times: the gate is decided there, and nothing waits for the device
                with self.stages("perceptual_loss", "perceptual_loss"):
                    perceptual_B, named = self.perceptual(z0_hat, z0, paradigm.noise_level(host_t_B), context)
                terms |= {self.perceptual.name: perceptual_B.detach(), **named}
                weight: Tensor | float = phase.perceptual.weight
                if phase.perceptual.variance_share is not None:
                    assert self._variances is not None
                    # section A.4: the share of the denoising term's variance that the weighted loss's is to be
                    ratio = self._variances.ratio(0, 1, min_steps=phase.perceptual.measure_steps)
                    weight = (phase.perceptual.variance_share * ratio).sqrt()
                    self._variances.add(loss_B, perceptual_B)
                    terms["perceptual_weight"] = weight.expand(perceptual_B.shape)
                loss_B = loss_B + weight * perceptual_B
        with self.stages("backward"):
            (scale * loss_B.sum()).backward()
        return {"loss": loss_B.detach(), **terms}

    def noise_levels(self) -> tuple[Tensor, Tensor] | None:
        if not self._noise:
            return None
        times, losses = zip(*self._noise, strict=True)
        self._noise.clear()
        return torch.cat(times), torch.cat(losses)

    def end_step(self, plan: StepPlan, keep: Tensor) -> None:
        if plan.phase.perceptual and self.perceptual:
            self.perceptual.end_step(keep)
            if self._variances:
                self._variances.end_step(keep)
            for module, _ in self.frozen_sharded():
                reshard(module)  # sharding keeps the root's own parameters where nothing has asked for a gradient

    def _timestep_draws(self, positions: Sequence[int], step: int) -> Tensor:
        """Uniform numbers (B,), one a sample, that the timestep density maps to times."""
        if self.config.paradigm.timestep_draws == "low_discrepancy":
            return spread_uniform(self._run.seed, positions, step)
        return uniform(self._run.seed, positions, "timestep")

    def _latents_of(self, images: Tensor) -> Tensor:
        at_once = len(images) if images.is_cuda else ENCODED_AT_ONCE
        with torch.no_grad():
            return torch.cat([self.codec.encode(part).float() for part in images.split(at_once)])

    def _stored_latents(self, batch: Batch) -> Tensor:
        return scaled_latents(batch, self.codec, seed=self._run.seed, device=self._device)

    def _text_of(self, batch: Batch, positions: Sequence[int]) -> TextInput | Condition:
        seed, dropouts = self._run.seed, self.text.dropouts
        dropped_B = (uniform(seed, positions, "caption_dropout") < self.config.caption_dropout).tolist()
        captions = [None if drop else caption for caption, drop in zip(batch.captions, dropped_B, strict=True)]
        draws_EB = uniforms(seed, positions, "encoder_dropout", count=len(dropouts)) if dropouts else ()
        dropped_EB = [(row_B < share).tolist() for row_B, share in zip(draws_EB, dropouts, strict=True)]
        text = self.text.prepare(captions, batch.labels_B.tolist(), dropped_EB, known_states(batch.states))
        self.captions_cut += text.num_cut
        # compiled blocks keep one length: a new one would be compiled anew
        return self._encoded(text if self._run.parallel.compile else text.trimmed())

    def _encoded(self, text: TextInput) -> TextInput | Condition:
        """On the device; encoded already where the encoder is frozen, which the trained module does not hold."""
        text = text.to(self._device)
        return self.text(text) if self.text.frozen else text

    @torch.no_grad()
    def condition(self, text: TextInput) -> TextInput | Condition:
        """What the module takes, of captions that none is dropped of: outside of training."""
        return self._encoded(text)

    # ------------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample_latents(self, prompts: Sequence[str], first: int, settings: SampleSettings) -> Tensor:
        """Latents (B, C, h, w) for prompts `first`, `first + 1`, ... of a list: a prompt's noise follows from its place
        in the list, so neither batch size nor rank changes its picture. A collective under sharding."""
        paradigm, count = self.paradigm(settings.side), len(prompts)
        noise = noise_of(settings, range(first, first + count), self.codec.latent_channels, self.codec.downsampling)
        text: dict[int, TextInput | Condition] = {}

        def model(zt: Tensor, t_B: Tensor) -> Tensor:
            rows = len(zt)
            if rows not in text:
                text[rows] = self._encoded(self.text.prepare([*prompts, *[None] * (rows - count)]))
            with autocast(self._device):
                out: Tensor = self.module(zt, paradigm.model_time(t_B), text[rows])
            return out.float()

        return draw_latents(model, paradigm, noise.to(self._device), settings)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8."""
        return images_to_pixels(self.codec.decode(latents))
