"""Stage 1: an autoencoder trained by reconstruction, LPIPS and a discriminator, with a weak penalty or a codebook (Rombach et
al. 2022, appendix G; Esser et al. 2021).

Both players learn in one step, from the same forward pass: the discriminator sees the reconstructions as they were before
either has moved.
"""

from collections.abc import Collection

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from data.batches import Batch
from trainer import optim
from trainer.config import AutoencoderConfig, OptimConfig, PhaseConfig, RunConfig
from trainer.errors import UserError
from trainer.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, last_layer_gradient
from trainer.losses.image_space import ImageSpaceTerms
from trainer.losses.regularisers import Transform, outlier_penalty, transformed
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.codebook import CodebookState
from trainer.models.discriminator import Discriminator
from trainer.models.lpips import LPIPS
from trainer.models.lpips_weights import build_lpips
from trainer.models.reconstruction import Reconstructed, Reconstruction
from trainer.parallel.apply import autocast
from trainer.rng import normal, uniforms
from trainer.step_plan import StepPlan
from trainer.tasks.base import Task
from trainer.tensors import full, pixels_to_images, put


class AutoencoderTask(Task):
    def __init__(self, run: RunConfig, device: torch.device, *, teacher: Codec | None = None) -> None:
        """`teacher`: a frozen autoencoder that is there already, in place of the config's files."""
        assert isinstance(run.task, AutoencoderConfig)
        self.config, self._run, self._device = run.task, run, device
        config = run.task
        torch.manual_seed(run.seed)  # the same weights on every rank and any number of them
        self.module: Reconstruction = Reconstruction(config)
        self.lpips: LPIPS | None = build_lpips(config.lpips, "task.lpips").to(device) if config.lpips else None
        self.teacher: Codec | None = None
        if config.teacher:
            self.teacher = (teacher or load_codec(config.teacher, "task.teacher")).to(device)
        self.image_space: ImageSpaceTerms | None = None
        if config.image_space:
            assert self.teacher is not None
            self.image_space = ImageSpaceTerms(config.image_space, self.teacher, "task.image_space").to(device)
        self.codebook: CodebookState | None = None
        if config.model.kind == "vq":
            frozen = config.trained != "all"
            self.codebook = CodebookState(config.model.codebook, config.model.latent_channels, device, frozen=frozen)
        self.discriminator: Discriminator | None = None
        """Whole on every rank: it is small, and runs twice in each step."""
        if config.discriminator:
            self.discriminator = Discriminator(config.discriminator).to(device).eval()
            own = OptimConfig(betas=config.discriminator.betas, weight_decay=0.0)
            self._optimizer = optim.build_optimizer(self.discriminator, own)
            self._judged = torch.zeros((), device=device)
            """Its loss in this step."""
            self._buffers_before: list[Tensor] = []

    def sharding_units(self) -> list[nn.Module]:
        return self.module.units()

    def state_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if self.discriminator:
            moments = optim.state_tensors(self.discriminator, self._optimizer)
            tensors |= {f"discriminator.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
            tensors |= {f"discriminator_optim.{name}": tensor for name, tensor in moments.items()}
        if self.codebook:
            tensors |= {f"codebook.{name}": tensor for name, tensor in self.codebook.state_tensors().items()}
        return tensors

    # ------------------------------------------------------------------------------------------------------ the config

    def check(self) -> list[str]:
        config, warnings = self.config, []
        for i, phase in enumerate(self._run.phases):
            self.check_side(phase, phase.resolution)
            if config.discriminator and phase.resolution < config.discriminator.patch_px:
                warnings.append(
                    f"phases.{i}.resolution: {phase.resolution} px are fewer than the discriminator's patch of "
                    f"{config.discriminator.patch_px} px; take a smaller task.discriminator.num_layers"
                )
        steps = sum(phase.steps for phase in self._run.phases)
        if config.discriminator and config.discriminator.start_step >= steps:
            warnings.append(
                f"task.discriminator.start_step: {config.discriminator.start_step}, and the run has {steps} steps: there will "
                "be no discriminator; begin it earlier, or set task.discriminator=null"
            )
        return warnings

    def check_side(self, phase: PhaseConfig, side_px: int) -> None:
        if self.lpips and side_px < self.lpips.smallest_side:
            i = self._run.phases.index(phase)
            raise UserError(
                f"phases.{i}.resolution: {side_px} px, and task.lpips.network {self.lpips.network} needs "
                f"{self.lpips.smallest_side}; take more, or task.lpips=null"
            )
        if self.image_space:
            self.image_space.check(side_px)

    def _map_indices(self) -> list[int]:
        """Places of the decoder maps that the outlier penalty is of."""
        wanted = self.config.outliers.maps if self.config.outliers else None
        return [i for i, name in enumerate(self.config.model.decoder_maps) if wanted is None or name in wanted]

    def after_warm_start(self, loaded: Collection[str]) -> None:
        """What is not trained must have been loaded; loaded codes are where their running means begin."""
        lost = sorted(set(self.module.given_names()) - set(loaded))
        if lost:
            raise UserError(
                f"task.trained: {self.config.trained}, and init_from gave nothing for {lost[0]} ({len(lost)} such), which "
                "would stay as it was drawn at random; take it in with init_from.include, or from weights that have it"
            )
        if self.codebook and any(name.endswith("quantize.embedding.weight") for name in loaded):
            phase = self._run.phases[0]
            latent_pixels = phase.batch_size * (phase.resolution // self.config.model.downsampling) ** 2
            self.codebook.begin_with(full(self.module.codes_KC.detach()), latent_pixels / self.codebook.config.size)

    # -------------------------------------------------------------------------------------------------------- training

    def begin_step(self, plan: StepPlan) -> None:
        for unit in self.module.units_without_backward():
            if isinstance(unit, FSDPModule):
                unit.set_unshard_in_backward(False)  # the decoder's first block would have its neighbour gathered
        if self.discriminator and self._plays(plan):
            self._judged.zero_()
            self._buffers_before = [buffer.clone() for buffer in self.discriminator.buffers()]
            self.discriminator.begin_step()

    def begins_another_loss(self, plan: StepPlan) -> bool:
        return self.config.discriminator is not None and plan.step == self.config.discriminator.start_step

    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        images = pixels_to_images(batch.images_BCHW.to(self._device, non_blocking=True)).to(self._dtype)
        x = self._teachers_latents(images) if self.config.reconstructs == "latents" else images
        rows, columns = (side // self.config.model.downsampling for side in x.shape[-2:])
        shape = (self.config.model.latent_channels, rows, columns)
        positions = batch.positions_B.tolist()
        noise = None
        if self.config.model.kind != "vq":
            noise = normal(self._run.seed, positions, "posterior", shape, device=self._device).to(self._dtype)
        transform = self._transform(plan.step)
        with autocast(self._device):
            with self.stages("forward"):
                out: Reconstructed = self.module(x, noise, transform and (lambda z: _turned(z, transform)))
            if self.config.reconstructs == "latents":
                gradient: Tensor | None = None
                terms: dict[str, Tensor] = {}
                loss_B = torch.zeros(len(x), device=self._device)
            else:
                with self.stages("perceptual_loss"):
                    loss_B, gradient, terms = self._of_images(images, out, plan, scale)
            with self.stages("perceptual_loss", "perceptual_loss"):
                regular_B, of_latents = self._of_latents(images, x, out, transform)
        if self.codebook and out.quantized:
            self._observe(batch, plan, out)
            terms |= {name: value.expand(len(x)) for name, value in self.codebook.terms().items()}
        roots: list[tuple[Tensor, Tensor | None]] = [] if gradient is None else [(out.x, gradient.to(out.x.dtype))]
        if regular_B.requires_grad:
            roots.append((scale * regular_B.sum(), None))
        if out.log_variance is not None:
            # d nll / ds of reconstruction / exp(s) + s
            slope_B = 1.0 - terms["reconstruction"] / out.log_variance.detach().exp()
            roots.append((out.log_variance, scale * slope_B.sum(0, keepdim=True)))
        with self.stages("backward"):
            torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        return {"loss": loss_B + regular_B.detach(), **terms, **of_latents}

    def _of_images(
        self, images: Tensor, out: Reconstructed, plan: StepPlan, scale: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss (B,) of the reconstructed images, its gradient with respect to them, and its terms. The discriminator's own
        gradient is added to its parameters'."""
        x_hat = out.x.detach().to(self._dtype).requires_grad_()
        with self.stages("perceptual_loss", "perceptual_loss"):
            reconstruction_B, terms = self._reconstruction(images, x_hat, out)
        nll_B, terms["reconstruction"] = reconstruction_B, reconstruction_B.detach()
        if out.log_variance is not None:
            log_variance = out.log_variance.detach()
            nll_B = reconstruction_B / log_variance.exp() + log_variance
            terms["log_variance"] = log_variance.expand(len(images))
        with self.stages("perceptual_loss", "perceptual_loss"):
            (gradient,) = torch.autograd.grad(scale * nll_B.sum(), x_hat)
        loss_B = nll_B.detach()
        config = self.config.discriminator
        if self.discriminator and config and plan.step >= config.start_step:
            with self.stages("perceptual_loss", "discriminator"):
                fake = self.discriminator(x_hat)
                generator_B = generator_loss(fake)
                (of_game,) = torch.autograd.grad(scale * generator_B.sum(), x_hat, retain_graph=True)
            balance = torch.ones((), device=self._device)
            if config.adaptive_weight:
                shape = self.module.last_layer_shape
                # of the micro-batch's means: eps of the weight is beside a gradient of that size
                share = scale * len(images)
                with self.stages("perceptual_loss", "discriminator"):
                    nll, game = (last_layer_gradient(out.before_last, shape, g / share) for g in (gradient, of_game))
                    balance = adaptive_weight(nll, game)
            gradient = gradient + config.weight * balance * of_game
            with self.stages("perceptual_loss", "discriminator"):
                real = self.discriminator(images)
                judged_B = discriminator_loss(real, fake, config.loss)
                (scale * judged_B.sum()).backward(inputs=list(self.discriminator.parameters()))
            self._judged += scale * judged_B.detach().sum()
            loss_B = loss_B + config.weight * balance * generator_B.detach()
            terms |= {
                "generator": generator_B.detach(),
                "discriminator": judged_B.detach(),
                "adaptive_weight": balance.expand(len(images)),
                "logits_real": real.detach().float().mean((1, 2, 3)),
                "logits_fake": -generator_B.detach(),
            }
        return loss_B, gradient, terms

    def _reconstruction(self, images: Tensor, x_hat: Tensor, out: Reconstructed) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        error = x_hat - images
        pixel_B = (error.abs() if config.pixel_loss == "l1" else error.square()).mean((1, 2, 3))
        terms: dict[str, Tensor] = {config.pixel_loss: pixel_B.detach()}
        total_B = config.pixel_weight * pixel_B
        compared = config.lpips_weight or (config.consistency and config.consistency.lpips_weight)
        features = self.lpips.features(x_hat) if self.lpips and compared else []
        if self.lpips and config.lpips_weight:
            with torch.no_grad():
                target = self.lpips.features(images)
            lpips_B = self.lpips.distance(features, target)
            total_B, terms["lpips"] = total_B + config.lpips_weight * lpips_B, lpips_B.detach()
        if config.consistency:
            assert self.teacher is not None
            with torch.no_grad():
                taught = self.teacher.decode(self.teacher.raw_to_scaled(out.drawn.detach())).to(self._dtype)
            taught_B = (x_hat - taught).abs().mean((1, 2, 3))
            total_B, terms["consistency"] = total_B + config.consistency.pixel_weight * taught_B, taught_B.detach()
            if config.consistency.lpips_weight:
                assert self.lpips is not None
                with torch.no_grad():
                    target = self.lpips.features(taught)
                alike_B = self.lpips.distance(features, target)
                total_B = total_B + config.consistency.lpips_weight * alike_B
                terms["consistency_lpips"] = alike_B.detach()
        return total_B, terms

    def _of_latents(
        self, images: Tensor, x: Tensor, out: Reconstructed, transform: Transform | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What does not go through the reconstructed images' gradient: (B,), and its terms."""
        config, terms = self.config, {}
        total_B = torch.zeros(len(x), device=self._device)
        if out.kl_B is not None:
            kl_B = out.kl_B / x[0].numel()
            total_B, terms["kl"] = total_B + config.kl_weight * kl_B, kl_B.detach()
        if out.quantized is not None:
            assert config.model.kind == "vq"
            book, quantized = config.model.codebook, out.quantized
            terms |= {"codebook": quantized.codebook_B.detach(), "commitment": quantized.commitment_B.detach()}
            moved_B = quantized.commitment_B * book.commitment_weight
            if quantized.codebook_B.requires_grad:  # not where codes are frozen, or running means
                moved_B = moved_B + quantized.codebook_B
            total_B = total_B + book.weight * moved_B
        if config.outliers:
            penalty_B = outlier_penalty([out.maps[i] for i in self._map_indices()], config.outliers.threshold)
            total_B, terms["outliers"] = total_B + config.outliers.weight * penalty_B, penalty_B.detach()
        if transform and config.equivariance:
            assert out.transformed is not None
            height, width = out.transformed.shape[-2:]
            before_turn = (width, height) if transform.quarter_turns % 2 else (height, width)
            target = transformed(images, transform, before_turn)
            turned_B = (out.transformed.to(self._dtype) - target).abs().mean((1, 2, 3))
            total_B, terms["equivariance"] = total_B + config.equivariance.weight * turned_B, turned_B.detach()
        if self.image_space:
            assert self.teacher is not None
            if config.reconstructs == "latents":
                estimate, truth = out.x.to(self._dtype), x
            else:
                estimate, truth = self.teacher.raw_to_scaled(out.raw), self._teachers_latents(images)
            compared_B, named = self.image_space(estimate, truth, images)
            total_B, terms = total_B + compared_B, {**terms, **{name: term.detach() for name, term in named.items()}}
        elif config.reconstructs == "latents":
            l2_B = (out.x.to(self._dtype) - x).square().mean((1, 2, 3))
            total_B, terms["l2"] = total_B + l2_B, l2_B.detach()
        return total_B, terms

    def _teachers_latents(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        with self.stages("encode", "encoder"), torch.no_grad():
            return self.teacher.encode(images).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the trained weights, and of all that no autocast lowers: float32."""
        return next(self.module.parameters()).dtype

    def _transform(self, step: int) -> Transform | None:
        """This step's, the same on all ranks and in all micro-batches."""
        config = self.config.equivariance
        if config is None:
            return None
        u_scale, u_turns = uniforms(self._run.seed, [step], "transform", count=2).flatten().tolist()
        return Transform(config.scales[int(u_scale * len(config.scales))], int(u_turns * 4) if config.rotations else 0)

    # ---------------------------------------------------------------------------------------------------- what is its own

    def _observe(self, batch: Batch, plan: StepPlan, out: Reconstructed) -> None:
        assert self.codebook is not None
        assert out.quantized is not None
        self.codebook.observe(out.raw.detach(), out.quantized.indices_BHW)
        if self.codebook.restart_is_due(plan.step):
            offsets_B = np.asarray(batch.positions_B) - plan.position
            size = self.codebook.config.size
            uniform_2K = uniforms(self._run.seed, [plan.step], "codebook", count=2 * size).view(2, size)
            self.codebook.offer(out.raw, offsets_B, plan.phase.batch_size, uniform_2K)

    def own_gradient_norm(self, plan: StepPlan) -> Tensor | None:
        if not (self.discriminator and self._plays(plan)):
            return None
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), self._judged[None]])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        *parts, judged = flat.split([*(gradient.numel() for gradient in gradients), 1])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        # a loss may be non-finite and its gradient finite
        return torch.linalg.vector_norm(flat[:-1]) + 0.0 * judged[0]

    def _plays(self, plan: StepPlan) -> bool:
        return self.config.discriminator is not None and plan.step >= self.config.discriminator.start_step

    def end_step(self, plan: StepPlan, keep: Tensor) -> None:
        config = self.config.discriminator
        if self.discriminator and config and self._plays(plan):
            optim.step(self._optimizer, plan.learning_rate * config.learning_rate_factor, 1.0 - keep)
            for buffer, before in zip(self.discriminator.buffers(), self._buffers_before, strict=True):
                buffer.copy_(torch.where(keep > 0, buffer, before))
        if self.codebook:
            moved = self.codebook.moves_codes(plan.step)
            codes = self.module.codes_KC.detach()
            codes_KC = self.codebook.end_step(full(codes) if moved else None, plan.step, keep)
            if codes_KC is not None:
                put(codes_KC, codes)


def _turned(latents_BCHW: Tensor, transform: Transform) -> Tensor:
    height, width = (transform.side(side) for side in latents_BCHW.shape[-2:])
    return transformed(latents_BCHW, transform, (height, width))
