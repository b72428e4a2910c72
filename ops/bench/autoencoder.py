"""What a step of stage 1 costs, side by side in one process: ours, and the way of latent-diffusion with the same networks.

    python -m ops.bench.autoencoder [--recipe autoencoder_kl_f8] [--resolution 32] [--batch-size 2] [--device cuda|cpu]

Latent-diffusion's step, from its published code: the autoencoder's forward pass twice, once for each optimizer; the adaptive
weight from two `autograd.grad` calls with respect to the decoder's last layer, through LPIPS and through the discriminator,
which both are passed again by the step's backward pass; and all of that before the discriminator's start as well, times 0.
Only one player's parameters ask for gradients at a time, as its trainer has it, so its second pass keeps no graph.
Ours: one forward pass, the two gradients at the images, and nothing of the discriminator before its start.

First the two are compared: gradients of both players and the adaptive weight, at the same weights and noise. Then they
take turns, each a whole step with clipping and both optimizers (of rate 0, so that weights stay). Weights are random, and
images too. Ratios first; times are medians, on a CPU of this process alone: `OMP_NUM_THREADS=1` disturbs them least. The
peak is of tensors that a step makes, beyond weights and moments. FLOPs are those of operations as they run.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batches import Batch
from ops.bench.lpl import MIB, Measured, measure
from ops.bench.recipes import CUT_WIDTHS
from trainer import optim
from trainer.config import AutoencoderConfig, PhaseConfig, RunConfig, replace
from trainer.losses.adversarial import EPS, LARGEST_WEIGHT, discriminator_loss
from trainer.models.lpips import LPIPS
from trainer.parallel.apply import autocast
from trainer.parallel.world import init_world
from trainer.recipes import RECIPES, load
from trainer.rng import normal
from trainer.step_plan import StepPlan
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tensors import pixels_to_images

OURS, THEIRS = "ours", "as latent-diffusion"
BEFORE = "ours, before the start"
NO_LPIPS = "ours, no LPIPS"
NEITHER = "ours, neither"
START = 1
"""The discriminator's, in steps: step 0 is before it."""


@dataclass
class Gradients:
    autoencoder: Tensor
    discriminator: Tensor
    weight: Tensor
    """The adaptive one."""


class Steps:
    """One autoencoder with its losses and optimizers, and both ways to take a step of it."""

    def __init__(self, config: RunConfig, resolution: int, batch_size: int, device: torch.device) -> None:
        assert isinstance(config.task, AutoencoderConfig)
        assert config.task.discriminator is not None
        self.batch_size = batch_size
        own = replace(config.task.discriminator, start_step=START)
        self.config = replace(config.task, lpips=None, discriminator=own)
        torch.manual_seed(0)
        self.lpips = LPIPS(config.task.lpips.network if config.task.lpips else "vgg16").to(device)
        self.run = replace(config, task=self.config, init_from=None, reconstructions=None)
        self.task = AutoencoderTask(self.run, device)
        self.task.module.to(device).train()
        self.optimizer = optim.build_optimizer(self.task.module, config.optim)
        assert self.task.discriminator is not None
        self.discriminator: nn.Module = self.task.discriminator
        self.discriminator_optimizer = optim.build_optimizer(
            self.discriminator, replace(config.optim, betas=own.betas, weight_decay=0.0)
        )
        self.device, self.not_skipped = device, torch.zeros((), device=device)
        self.batch = Batch(
            step=0,
            resolution=resolution,
            positions_B=torch.arange(batch_size),
            images_BCHW=torch.randint(0, 256, (batch_size, 3, resolution, resolution), dtype=torch.uint8),
            captions=[""] * batch_size,
            labels_B=torch.full((batch_size,), -1),
            keys=["random"] * batch_size,
            substitutions=(),
        )
        self.phase = replace(config.phases[-1], resolution=resolution, batch_size=batch_size)

    # ------------------------------------------------------------------------------------------------------------ ours

    def ours(self, *, lpips: bool = True, plays: bool = True) -> Gradients:
        """Gradients, before anything has moved; then both optimizers' steps."""
        plan = _plan(START if plays else 0, self.phase)
        self.task.lpips = self.lpips if lpips else None
        self.task.begin_step(plan)
        terms = self.task.forward_backward(self.batch, plan, 1.0 / self.batch_size)
        self.task.own_gradient_norm(plan)
        found = self._gradients(terms.get("adaptive_weight", torch.zeros(1))[0])
        divisor = optim.clip_divisor(optim.gradient_norm(self.task.module), self.run.optim.max_grad_norm)
        optim.step(self.optimizer, 0.0, self.not_skipped, divisor)
        self.task.end_step(plan, 1.0 - self.not_skipped)
        return found

    # ---------------------------------------------------------------------------------------------- as latent-diffusion

    def theirs(self) -> Gradients:
        config, module, discriminator = self.config, self.task.module, self.discriminator
        assert config.discriminator is not None
        images = pixels_to_images(self.batch.images_BCHW.to(self.device))
        side = images.shape[-1] // config.model.downsampling
        shape = (config.model.latent_channels, side, side)
        noise = normal(self.run.seed, self.batch.positions_B.tolist(), "posterior", shape, device=self.device)
        with no_gradient_for(discriminator), autocast(self.device):
            out = module(images, noise)
            x_hat = out.x.float()
            pixel = (x_hat - images).abs().mean()
            nll = config.pixel_weight * pixel + config.lpips_weight * self.lpips(images, x_hat).mean()
            generator = -discriminator(x_hat).float().mean()
            last = module.autoencoder.decoder.conv_out.weight
            (of_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
            (of_game,) = torch.autograd.grad(generator, last, retain_graph=True)
            weight = (of_nll.norm() / (of_game.norm() + EPS)).clamp(0.0, LARGEST_WEIGHT).detach()
            kl = (out.kl_B / images[0].numel()).mean()
            loss = nll + config.kl_weight * kl + config.discriminator.weight * weight * generator
        loss.backward()
        of_autoencoder = _flat(module)
        divisor = optim.clip_divisor(optim.gradient_norm(module), self.run.optim.max_grad_norm)
        optim.step(self.optimizer, 0.0, self.not_skipped, divisor)
        with no_gradient_for(module), autocast(self.device):
            fake = discriminator(module(images, noise).x.float().detach())
            judged_B = discriminator_loss(discriminator(images), fake, config.discriminator.loss)
        judged_B.mean().backward()
        found = Gradients(of_autoencoder, _flat(discriminator), weight)
        optim.step(self.discriminator_optimizer, 0.0, self.not_skipped)
        return found

    def _gradients(self, weight: Tensor) -> Gradients:
        return Gradients(_flat(self.task.module), _flat(self.discriminator), weight)


def _plan(step: int, phase: PhaseConfig) -> StepPlan:
    return StepPlan(step=step, phase=phase, phase_index=0, phase_step=step, learning_rate=0.0, position=0,
                    begins_phase=False, ends_phase=False)  # fmt: skip


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None] or [torch.zeros(0)])


@contextmanager
def no_gradient_for(module: nn.Module) -> Iterator[None]:
    """Within, its parameters ask for none."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def difference(one: Gradients, other: Gradients) -> dict[str, float]:
    """Of each, the norm of the difference over the norm."""

    def relative(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    return {
        "autoencoder": relative(one.autoencoder, other.autoencoder),
        "discriminator": relative(one.discriminator, other.discriminator),
        "adaptive weight": relative(one.weight, other.weight),
    }


def runs_of(steps: Steps) -> dict[str, Callable[[], Any]]:
    return {
        THEIRS: steps.theirs,
        OURS: steps.ours,
        BEFORE: lambda: steps.ours(plays=False),
        NO_LPIPS: lambda: steps.ours(lpips=False),
        NEITHER: lambda: steps.ours(lpips=False, plays=False),
    }


def cut(config: RunConfig) -> RunConfig:
    """Narrow, in seconds, with figures that mean nothing."""
    task = config.task
    assert isinstance(task, AutoencoderConfig)
    assert task.discriminator is not None
    levels = len(task.model.block_out_channels)
    widths = (CUT_WIDTHS + CUT_WIDTHS[-1:] * levels)[:levels]
    model = replace(task.model, block_out_channels=widths, layers_per_block=1, norm_num_groups=4)
    return replace(config, task=replace(task, model=model, discriminator=replace(task.discriminator, width=4)))


def main() -> None:
    known = [name for name, recipe in RECIPES.items() if _fits(recipe())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=known, default="autoencoder_kl_f8")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="absent: a GPU where there is one")
    parser.add_argument("--resolution", type=int, help="absent: 32 px on a CPU, the recipe's on a GPU")
    parser.add_argument("--batch-size", type=int, help="absent: 2 on a CPU, 4 on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cut", action="store_true", help="narrow networks: the path, not figures")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine shows no CUDA device; take --device cpu")

    world = init_world()
    on_gpu = world.device.type == "cuda"
    config = load(options.recipe)
    config = cut(config) if options.cut else config
    resolution = options.resolution or (config.phases[-1].resolution if on_gpu else 32)
    batch_size = options.batch_size or (4 if on_gpu else 2)
    steps = Steps(config, resolution, batch_size, world.device)
    where = torch.cuda.get_device_name(world.device) if on_gpu else f"cpu, {torch.get_num_threads()} thread(s)"
    print(f"{options.recipe}, {resolution} px, {batch_size} images, {where}, torch {torch.__version__}")
    off = difference(steps.ours(), steps.theirs())
    print(
        "gradients, ours against theirs: " + ", ".join(f"{name} {value:.1e}" for name, value in off.items()), flush=True
    )

    runs = {name: Measured(run) for name, run in runs_of(steps).items()}
    measure(runs, options.repeats, world.device)
    report(runs)
    dist.destroy_process_group()


def _fits(config: RunConfig) -> bool:
    """What latent-diffusion has: an autoencoder with a KL penalty, trained as a whole, against a discriminator."""
    task = config.task
    return task.kind == "autoencoder" and task.model.kind == "kl" and task.trained == "all" and bool(task.discriminator)


def report(runs: dict[str, Measured]) -> None:
    theirs, ours = runs[THEIRS], runs[OURS]
    print(f"{'':24s} {'time':>7s} {'FLOPs':>7s} {'peak':>7s} {'s/step':>9s} {'GFLOP':>9s} {'peak MiB':>9s}")
    for name, one in runs.items():
        print(f"{name:24s} {one.median_s / theirs.median_s:7.3f} {one.flops / theirs.flops:7.3f} "
              f"{one.peak_bytes / theirs.peak_bytes:7.3f} {one.median_s:9.3f} {one.flops / 1e9:9.1f} "
              f"{one.peak_bytes / MIB:9.1f}")  # fmt: skip
    for what, without in (("LPIPS", runs[NO_LPIPS]), ("the discriminator", runs[BEFORE])):
        time, flops = 1 - without.median_s / ours.median_s, 1 - without.flops / ours.flops
        print(f"share of {what} in our step: {time:.1%} of the time, {flops:.1%} of the FLOPs")


if __name__ == "__main__":
    main()
