"""`python -m ops.bench.lpl --step`: whole training steps with and without the latent perceptual loss, one model for all."""

import argparse
import gc
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ops.bench.lpl import MIB, Measured, flops_of, measure
from ops.bench.lpl_variants import OURS, PLAIN, PUBLIC, lpl_config, variants
from ops.bench.recipes import CUT_WIDTHS, RandomText, cut, random_batch
from trainer import optim
from trainer.config import (
    CropConfig,
    FrozenTextConfig,
    LatentDiffusionConfig,
    ParadigmConfig,
    PhasePerceptualConfig,
    RunConfig,
    SampledConfig,
    replace,
)
from trainer.ema import EMA
from trainer.losses.lpl import build_lpl
from trainer.losses.perceptual import PerceptualLoss
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.published_codecs import PUBLISHED
from trainer.parallel.apply import begin_micro_batch, parallelize
from trainer.parallel.world import World, init_world
from trainer.recipes import load
from trainer.step_plan import StepPlan
from trainer.tasks.latent_diffusion import LatentDiffusionTask

WITHOUT = "without"
COUNTED_BATCH = 6
"""Samples that FLOPs are counted of, of which four are gated, in a graph without recomputation."""
SHARE_OF_LARGEST = 0.8


class Steps:
    """A model with its optimizer and average, whose perceptual loss can be exchanged."""

    def __init__(self, config: RunConfig, codec: Codec, device: torch.device) -> None:
        assert isinstance(config.task, LatentDiffusionConfig)
        self.config, self.task_config = config, config.task
        text = config.task.text
        random_text = RandomText(text, device) if isinstance(text, FrozenTextConfig) else None
        self.task = LatentDiffusionTask(without_lpl(config), device, codec=codec, text=random_text)
        self.task.module.train()
        self._optimizer: optim.Optimizer | None = None

    def parallelize(self, world: World) -> None:
        """Recomputation, compilation and FSDP2 of the recipe; then steps can be taken."""
        task, config = self.task, self.config
        parallelize(task.module, task.sharding_units(), world, config.parallel)
        self._optimizer = optim.build_optimizer(task.module, config.optim)
        self._ema = EMA(task.module, offload=config.ema.offload)

    def forward_backward(self, loss: PerceptualLoss | None, resolution: int, batch_size: int) -> Tensor:
        phase = replace(
            self.config.phases[-1], resolution=resolution, perceptual=None if loss is None else PhasePerceptualConfig()
        )
        plan = StepPlan(step=0, phase=phase, phase_index=0, phase_step=0, learning_rate=phase.learning_rate, position=0,
                        begins_phase=False, ends_phase=False)  # fmt: skip
        torch.manual_seed(0)
        batch = random_batch(self.task_config, phase, batch_size)
        self.task.perceptual = loss
        terms = self.task.forward_backward(batch, plan, 1.0 / batch_size)
        if loss is not None:
            loss.end_step(torch.ones((), device=terms["loss"].device))
        return terms["loss"]

    def zero_grad(self) -> None:
        self.task.module.zero_grad(set_to_none=True)

    def step(self, loss: PerceptualLoss | None, resolution: int, batch_size: int) -> None:
        assert self._optimizer is not None
        begin_micro_batch(self.task.module, last=True, keep_gathered=self.config.parallel.keep_gathered)
        loss_B = self.forward_backward(loss, resolution, batch_size)
        norm = optim.gradient_norm(self.task.module)
        skip = (~(norm.isfinite() & loss_B.isfinite().all())).float()
        self._ema.wait_for_copy()
        optim.step(self._optimizer, 0.0, skip, optim.clip_divisor(norm, self.config.optim.max_grad_norm))
        self._ema.update(self.config.phases[-1].ema_decay, skip)


def without_lpl(config: RunConfig) -> RunConfig:
    """DDPM-eps, and no perceptual loss built: it is handed in."""
    task = config.task
    assert isinstance(task, LatentDiffusionConfig)
    # the task reads here how tau scales: not at all
    perceptual = replace(task.perceptual, tau_reference_px=None)
    task = replace(task, paradigm=ParadigmConfig(kind="ddpm_eps"), perceptual=perceptual)
    phases = tuple(replace(phase, perceptual=None) for phase in config.phases)
    return replace(config, task=task, phases=phases, samples=None, prompt_accuracy=None)


def losses(codec: Codec, chunk_size: int, batch_size: int) -> dict[str, Callable[[], PerceptualLoss | None]]:
    """What is measured; estimators on top of all that is exact. Built late: each has a decoder of its own."""
    exact = variants(chunk_size)
    few = max(1, batch_size // 8)
    return {
        WITHOUT: lambda: None,
        PLAIN: lambda: exact[PLAIN](codec),
        PUBLIC: lambda: exact[PUBLIC](codec),
        "ours": lambda: exact[OURS](codec),
        **{
            f"ours, 1/8, {whole} maps whole": lambda whole=whole: build_lpl(  # type: ignore[misc]
                lpl_config(codec, chunk_size, sampled=SampledConfig(samples_per_rank=few, whole_maps=whole)), codec
            )
            for whole in (2, 3)
        },
        "ours, a quarter's window": lambda: build_lpl(lpl_config(codec, chunk_size, crop=CropConfig()), codec),
    }


def largest_that_fits(fits: Callable[[int], bool], first: int) -> int:
    """By doubling, then halving the gap, to a sixteenth; 0: not even one. `fits` is asked for growing numbers first."""
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bench_step(options: argparse.Namespace) -> None:
    world = init_world()
    device, on_gpu = world.device, world.device.type == "cuda"
    config = load(options.recipe or ("imagenet_512_lpl" if on_gpu else "demo"))
    config = cut(config) if options.cut else config
    assert isinstance(config.task, LatentDiffusionConfig)
    torch.manual_seed(0)
    if config.task.codec.url.startswith("repo://"):
        codec = load_codec(config.task.codec)
    else:
        codec = Codec(
            PUBLISHED["sdxl"](**({"block_out_channels": CUT_WIDTHS, "norm_num_groups": 4} if options.cut else {}))
        )
    steps = Steps(config, codec.to(device), device)
    resolutions = options.resolution or ([256, 512] if on_gpu else [config.phases[-1].resolution])
    batch = options.batch_size or (24 if on_gpu else 16)
    made = losses(steps.task.codec, options.chunk_size, batch)

    flops: dict[tuple[int, str], int] = {}
    for resolution in resolutions:
        for name, make in losses(steps.task.codec, options.chunk_size, COUNTED_BATCH).items():
            loss = placed(make(), device)
            flops[resolution, name] = flops_of(partial(steps.forward_backward, loss, resolution, COUNTED_BATCH))
            steps.zero_grad()
    steps.parallelize(world)
    for resolution in resolutions:
        built = {name: placed(make(), device) for name, make in made.items()}
        runs = {name: Measured(partial(steps.step, loss, resolution, batch)) for name, loss in built.items()}
        for name, one in runs.items():
            one.flops = flops[resolution, name]
        steps.step(None, resolution, batch)  # the optimizer makes its state
        measure(runs, options.repeats, device)
        print_steps(runs, f"{config.name}, {resolution} px, {batch} samples, chunks of {options.chunk_size}", batch)
        if on_gpu:
            bench_peak(steps, built["ours"], resolution, options.fits, device)
        del built, runs
        gc.collect()
    dist.destroy_process_group()


def placed(loss: PerceptualLoss | None, device: torch.device) -> PerceptualLoss | None:
    return None if loss is None else loss.to(device)


def print_steps(runs: dict[str, Measured], what: str, batch: int) -> None:
    print(f"\nthe step: {what}")
    print(
        f"{'':24s} {'ms':>9s} {'images/s':>9s} {'/ without':>10s} {'by FLOPs':>9s} {'peak MiB':>9s} {'/ without':>10s}"
    )
    without = runs[WITHOUT]
    for name, one in runs.items():
        if one.failed:
            print(f"{name:24s}   out of memory")
            continue
        print(f"{name:24s} {one.median_s * 1000:9.1f} {batch / one.median_s:9.2f} "
              f"{without.median_s / one.median_s:10.3f} {without.flops / one.flops:9.3f} "
              f"{one.peak_bytes / MIB:9.1f} {one.peak_bytes / without.peak_bytes:10.3f}", flush=True)  # fmt: skip


def bench_peak(
    steps: Steps, loss: PerceptualLoss | None, resolution: int, given: int | None, device: torch.device
) -> None:
    """Peak memory at four fifths of the largest batch that fits without; weights and the optimizer's state are in it."""

    def peak(loss: PerceptualLoss | None, batch: int) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        steps.step(loss, resolution, batch)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    def fits(batch: int) -> bool:
        try:
            peak(None, batch)
        except torch.OutOfMemoryError:
            steps.zero_grad()
            return False
        return True

    largest = given or largest_that_fits(fits, 32)
    batch = max(1, int(largest * SHARE_OF_LARGEST))
    without, with_lpl = peak(None, batch), peak(loss, batch)
    print(f"peak memory at {batch} samples, {SHARE_OF_LARGEST:.0%} of the {largest} that fit without: "
          f"{without / MIB:.0f} MiB without, {with_lpl / MIB:.0f} with, ratio {with_lpl / without:.3f}")  # fmt: skip
