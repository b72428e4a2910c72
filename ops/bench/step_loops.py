"""The two sides of `ops.bench.step`: the trainer's step, and the loop that one would write today with diffusers."""

from collections.abc import Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from data.batches import Batch
from data.buckets import ASPECTS, shape_of
from data.reader import open_dataset, readable
from ops.bench.recipes import RandomText, published_codec, random_batch
from trainer import optim
from trainer.config import (
    FrozenTextConfig,
    LatentDiffusionConfig,
    MMDiTConfig,
    PhaseConfig,
    RunConfig,
    replace,
    resolve_url,
)
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.host_memory import keep_freed_memory
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import mmdit_to_diffusers
from trainer.parallel.apply import autocast, begin_micro_batch, parallelize
from trainer.parallel.world import World
from trainer.rng import normal
from trainer.step_plan import StepPlan
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import locals_of, pixels_to_images

RATE = 1e-4


class Ours:
    """The trainer's step, of a model with random weights."""

    def __init__(self, config: RunConfig, phase: PhaseConfig, world: World) -> None:
        assert isinstance(config.task, LatentDiffusionConfig)
        self.config, self.phase = config, phase
        text = config.task.text
        self.task = LatentDiffusionTask(
            config, world.device, codec=published_codec(config.task.codec, narrow=False),
            text=RandomText(text, world.device) if isinstance(text, FrozenTextConfig) else None,
        )  # fmt: skip
        self.task.module.train().to(world.device)
        self._step = 0

    def parallelize(self, world: World) -> None:
        if world.device.type == "cpu":
            keep_freed_memory()
        parallelize(self.task.module, self.task.sharding_units(), world, self.config.parallel)
        self._optimizer = optim.build_optimizer(self.task.module, self.config.optim)
        self._ema = EMA(self.task.module)

    def step(self, batch: Batch) -> Tensor:
        plan = StepPlan(step=self._step, phase=self.phase, phase_index=0, phase_step=self._step, learning_rate=RATE,
                        position=0, begins_phase=False, ends_phase=False)  # fmt: skip
        self._step += 1
        self.task.begin_step(plan)
        begin_micro_batch(self.task.module, last=True, keep_gathered=self.config.parallel.keep_gathered)
        loss_B = self.task.forward_backward(batch, plan, 1.0 / len(batch.keys))["loss"]
        norm = optim.gradient_norm(self.task.module)
        skip = (~(norm.isfinite() & loss_B.isfinite().all())).float()
        optim.step(self._optimizer, RATE, skip, optim.clip_divisor(norm, self.config.optim.max_grad_norm))
        self._ema.update(self.phase.ema_decay, skip)
        return loss_B.mean()

    def held(self) -> list[Tensor]:
        """Between steps."""
        module, codec = self.task.module, self.task.codec
        state = optim.state_tensors(module, self._optimizer)
        return locals_of([*module.parameters(), *state.values(), *self._ema.average.values(), *codec.vae.parameters()])


class DiffusersLoop:
    """A loop as diffusers' own training scripts have it."""

    def __init__(self, ours: Ours, device: torch.device, *, compiled: bool) -> None:
        """Takes ours' weights as they are, before it is sharded or has taken a step, and of it leaves what is not the
        trained module."""
        denoiser = ours.task.module.denoiser
        assert isinstance(denoiser, MMDiT)
        arguments, state = mmdit_to_diffusers(denoiser)
        self._model: Any = SD3Transformer2DModel(**arguments)
        self._model.load_state_dict(state)
        self._model.to(device).train()
        self._text: Any = ours.task.module.text
        vae: Any = ours.task.codec.vae
        self._vae = vae.to(memory_format=torch.contiguous_format)  # as it was loaded
        for module in vae.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = False
        self._ours, self._device = ours, device
        del ours.task.module.denoiser
        self._parameters = [*self._model.parameters(), *(self._text.parameters() if self._text is not None else [])]
        config = ours.config.optim
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=RATE, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self._ema = EMAModel(self._parameters, decay=ours.phase.ema_decay, foreach=True)
        self._steps = 0
        if compiled:
            self._model = torch.compile(self._model)

    def held(self) -> list[Tensor]:
        state = [tensor for of_one in self._optimizer.state.values() for tensor in of_one.values()]
        return [*self._parameters, *state, *self._ema.shadow_params, *self._vae.parameters()]

    def step(self, batch: Batch, *, equal_draws: bool = False) -> Tensor:
        ours, device, positions = self._ours.task, self._device, batch.positions_B.tolist()
        paradigm = ours.paradigm(batch.resolution)
        if batch.latents_BCHW is None:
            images = pixels_to_images(batch.images_BCHW.to(device, non_blocking=True))
            with torch.no_grad(), autocast(device):
                raw = self._vae.encode(images).latent_dist.mode().float()
        else:
            raw = batch.latents_BCHW.to(device, non_blocking=True).float()
        z0 = ours.codec.raw_to_scaled(raw)
        if equal_draws:
            t_B = paradigm.sample_t(ours._timestep_draws(positions, self._steps)).to(device)
            noise = normal(ours._run.seed, positions, "noise", z0.shape[1:], device=device)
        else:
            t_B, noise = paradigm.sample_t(torch.rand(len(positions))).to(device), torch.randn_like(z0)
        zt = paradigm.add_noise(z0, noise, t_B)
        text = ours.text.prepare(batch.captions, batch.labels_B.tolist()).to(device)
        with autocast(device):
            condition = self._text(text) if self._text is not None else ours.text(text)
            prediction = self._model(
                hidden_states=zt, timestep=paradigm.model_time(t_B), encoder_hidden_states=condition.tokens_BLT,
                pooled_projections=condition.pooled_BP, return_dict=False,
            )[0]  # fmt: skip
        self._steps += 1
        loss: Tensor = torch.nn.functional.mse_loss(prediction.float(), paradigm.target(z0, noise, t_B))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._ours.config.optim.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.step(self._parameters)
        return loss.detach()


def comparable(config: RunConfig) -> RunConfig:
    """Without what the peer has not: dropped captions, a loss by noise level, decay by group, a perceptual loss, recomputation.

    Raises:
        UserError: diffusers' `SD3Transformer2DModel` is another model.
    """
    task = config.task
    if (
        not isinstance(task, LatentDiffusionConfig)
        or not isinstance(task.model, MMDiTConfig)
        or task.model.layout != "sd3"
    ):
        raise UserError(f"--recipe {config.name}: not an MMDiT in SD3's layout, which is all that the peer has; have demo and "
                        "sd3_medium_512, whose size FIELD=VALUE changes")  # fmt: skip
    task = replace(task, caption_dropout=0.0)
    phases = tuple(replace(phase, perceptual=None) for phase in config.phases)
    parallel = replace(config.parallel, activation_checkpointing="none")
    return replace(config, task=task, phases=phases, parallel=parallel, optim=replace(config.optim, weight_decay=0.0))


def batches(config: RunConfig, phase: PhaseConfig, size: int, *, stored: bool, buckets: bool) -> list[Batch]:
    """One of each shape, with captions that fill the text encoder: diffusers' model has no mask for padding.

    Args:
        stored: latents in place of images.
        buckets: the shapes of the default aspect buckets, in place of squares.
    """
    assert isinstance(config.task, LatentDiffusionConfig)
    assert isinstance(config.task.model, MMDiTConfig)
    multiple = config.task.codec.downsampling * config.task.model.patch_size
    aspects = ASPECTS.values() if buckets else (1.0,)
    made = []
    for height, width in (shape_of(aspect, phase.resolution, multiple) for aspect in aspects):
        batch = changed(
            random_batch(config.task, phase, size),
            captions=["a photo of a red fox on fresh snow, " * 8] * size,
            images_BCHW=torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8),
        )
        if stored:
            factor, channels = config.task.codec.downsampling, config.task.codec.latent_channels
            latents = torch.randn(size, channels, height // factor, width // factor).half()
            batch = changed(batch, latents_BCHW=latents)
        made.append(batch)
    return made


def dataset_captions(config: RunConfig, count: int) -> list[str] | None:
    """The recipe's own, where its data are in the repository."""
    (name, of_config), *_ = config.data.datasets.items()
    if not of_config.url.startswith("repo://"):
        return None
    dataset = open_dataset(resolve_url(of_config.url), name=name, max_samples=of_config.max_samples)
    samples = [readable(dataset, i * dataset.num_samples // count) for i in range(count)]
    return [sample.texts[0] for sample in samples]


def with_captions(made: Sequence[Batch], captions: list[str]) -> list[Batch]:
    return [changed(batch, captions=captions[: len(batch.captions)]) for batch in made]
