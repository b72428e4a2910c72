"""A training step against the loop that one would write today with diffusers: one model, one encoder, the same batch, side by
side in one process.

    python -m ops.bench.step [--recipe demo] [--resolution 64] [--batch-size 64] [--repeats 20] [--compile] [--stored-latents]
    python -m ops.bench.step --recipe sd3_medium_512 --resolution 256 --batch-size 16 --compile         # 2B, on a GPU
    python -m ops.bench.step --recipe imagenet_512_lpl --stored-latents --compile                       # 816M

The peer is diffusers' `SD3Transformer2DModel` with our weights, autocast to bf16 on a GPU, scaled-dot-product attention, fused
AdamW, clipping, diffusers' `EMAModel`, copies of the frozen autoencoder and of the text encoder, compiled whole with
`--compile`. Ours is the trainer's step. First both take three steps with equal draws, whose losses must agree; then they are
timed in turns, so that noise of the machine falls on both, and traced. On a CPU, seconds are the processor's. What LPL costs
is `ops.bench.lpl --step`.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from data.batches import Batch
from ops.bench.lpl import MIB, flops_of, peak_of, seconds_of
from ops.bench.recipes import RandomText, published_codec, random_batch
from trainer import optim
from trainer.config import FrozenTextConfig, LatentDiffusionConfig, PhaseConfig, RunConfig, replace
from trainer.ema import EMA
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import mmdit_to_diffusers
from trainer.parallel.apply import autocast, begin_micro_batch, parallelize
from trainer.parallel.world import World, init_world
from trainer.peak_flops import from_table
from trainer.profiling import spans_of
from trainer.recipes import load
from trainer.rng import normal
from trainer.stage_times import Stages
from trainer.step_plan import StepPlan
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import pixels_to_images
from trainer.trace_summary import Summary, summarise

RATE = 1e-4
CHECKED_STEPS = 3
TRACED_STEPS = 2
TOLERANCE = 1e-4
"""Of losses in float32, relative; bf16 has 2e-2."""


@dataclass
class Timed:
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    """Of the first step, compilation included."""
    flops: int = 0
    peak_bytes: int = 0
    traced: Summary | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


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


class DiffusersLoop:
    """A loop as diffusers' own training scripts have it."""

    def __init__(self, ours: Ours, device: torch.device, *, compiled: bool) -> None:
        """Takes ours' weights as they are: before it is sharded or has taken a step."""
        denoiser = ours.task.module.denoiser
        assert isinstance(denoiser, MMDiT)
        arguments, state = mmdit_to_diffusers(denoiser)
        self._model: Any = SD3Transformer2DModel(**arguments)
        self._model.load_state_dict(state)
        self._model.to(device).train()
        self._text: Any = copy.deepcopy(ours.task.module.text)
        vae: Any = ours.task.codec.vae
        self._vae = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)  # as it was loaded
        self._ours, self._device = ours, device
        self._parameters = [*self._model.parameters(), *(self._text.parameters() if self._text is not None else [])]
        config = ours.config.optim
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=RATE, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self._ema = EMAModel(self._parameters, decay=ours.phase.ema_decay, foreach=True)
        if compiled:
            self._model = torch.compile(self._model)

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
            t_B = paradigm.sample_t(ours._timestep_draws(positions, self._ours._step)).to(device)
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
        loss: Tensor = torch.nn.functional.mse_loss(prediction.float(), paradigm.target(z0, noise, t_B))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._ours.config.optim.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.step(self._parameters)
        return loss.detach()


def comparable(config: RunConfig) -> RunConfig:
    """Without what the peer has not: dropped captions, a loss by noise level, decay by group, a perceptual loss."""
    task = config.task
    assert isinstance(task, LatentDiffusionConfig)
    task = replace(task, caption_dropout=0.0)
    phases = tuple(replace(phase, perceptual=None) for phase in config.phases)
    return replace(config, task=task, phases=phases, optim=replace(config.optim, weight_decay=0.0))


def full_batch(config: RunConfig, phase: PhaseConfig, size: int, *, stored: bool) -> Batch:
    """Captions that fill the text encoder: diffusers' model has no mask for padding. `stored`: latents in place of images."""
    assert isinstance(config.task, LatentDiffusionConfig)
    batch = random_batch(config.task, phase, size)
    batch = changed(batch, captions=["a photo of a red fox on fresh snow, " * 8] * size)
    if not stored:
        return batch
    codec, side = config.task.codec, phase.resolution // config.task.codec.downsampling
    return changed(batch, latents_BCHW=torch.randn(size, codec.latent_channels, side, side).half())


def traced(step: Callable[[], object], device: torch.device) -> Summary:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        for _ in range(TRACED_STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    spans = list(spans_of(trace.events(), cuda=device.type == "cuda"))
    return summarise(spans, (min(s.begin for s in spans), max(s.end for s in spans)), TRACED_STEPS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="of an MMDiT in SD3's layout")
    parser.add_argument("--resolution", type=int, help="in pixels; the last phase's unless told")
    parser.add_argument("--batch-size", type=int, help="of one rank; the last phase's unless told")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="both: our blocks, and the peer's model whole")
    parser.add_argument("--stored-latents", action="store_true", help="in place of online encoding")
    options = parser.parse_args(arguments)
    world = init_world()
    device = world.device
    config = comparable(load(options.recipe))
    config = replace(config, parallel=replace(config.parallel, compile=options.compile))
    phase = config.phases[-1]
    phase = replace(
        phase, resolution=options.resolution or phase.resolution, batch_size=options.batch_size or phase.batch_size
    )
    torch.manual_seed(0)
    ours = Ours(config, phase, world)
    peer = DiffusersLoop(ours, device, compiled=options.compile)
    batch = full_batch(config, phase, phase.batch_size, stored=options.stored_latents)
    ours.parallelize(world)
    runs = {"diffusers loop": Timed(partial(peer.step, batch)), "ours": Timed(partial(ours.step, batch))}

    pairs = []
    for _ in range(CHECKED_STEPS):
        began = time.perf_counter()
        theirs = float(peer.step(batch, equal_draws=True))
        middle = time.perf_counter()
        pairs.append((theirs, float(ours.step(batch))))
        if len(pairs) == 1:
            runs["diffusers loop"].first_s, runs["ours"].first_s = middle - began, time.perf_counter() - middle
    tolerance = TOLERANCE if device.type == "cpu" else 2e-2
    for theirs, own in pairs:
        print(f"loss: diffusers {theirs:.6f}, ours {own:.6f}, {abs(own / theirs - 1):.1e} apart")
        assert abs(own / theirs - 1) < tolerance, "the two do not compute the same"
    for run in runs.values():
        run.flops = flops_of(run.step)
        run.peak_bytes = peak_of(run.step, device)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(options.repeats):
        for run in runs.values():
            run.seconds.append(seconds_of(run.step, device))
    recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    stages = ours.task.stages = Stages(device)
    for name, run in runs.items():
        stages.annotate((lambda stage: record_function(f"stage:{stage}")) if name == "ours" else None)
        run.traced = traced(run.step, device)
    tell(runs, config, phase, device, compiled=options.compile)
    print(f"compiled anew after the first steps: {recompiled} graphs")
    dist.destroy_process_group()


def tell(
    runs: dict[str, Timed], config: RunConfig, phase: PhaseConfig, device: torch.device, *, compiled: bool
) -> None:
    theirs, ours = runs["diffusers loop"], runs["ours"]
    print(f"\nours over the diffusers loop: {theirs.median_s / ours.median_s:.3f}x the images a second, "
          f"{ours.peak_bytes / theirs.peak_bytes:.3f}x the peak memory")  # fmt: skip
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU thread(s), float32"
    )
    print(f"{config.name}, {phase.resolution} px, {phase.batch_size} images, {name}{', compiled' * compiled}")
    peak = from_table(name)
    print(
        f"{'':16s} {'ms':>9s} {'images/s':>9s} {'GFLOP':>9s} {'TFLOP/s':>8s} {'MFU':>6s} {'peak MiB':>9s} {'first s':>8s}"
    )
    for label, run in runs.items():
        rate = run.flops / run.median_s
        mfu = f"{rate / peak:.1%}" if peak else "-"
        print(f"{label:16s} {run.median_s * 1e3:9.1f} {phase.batch_size / run.median_s:9.2f} {run.flops / 1e9:9.1f} "
              f"{rate / 1e12:8.3f} {mfu:>6s} {run.peak_bytes / MIB:9.1f} {run.first_s:8.1f}")  # fmt: skip
    for label, run in runs.items():
        assert run.traced
        counts = f"{run.traced.kernels:.0f} kernels, the host waits {run.traced.waits:.1f} times" if run.traced.kernels else (
            f"{run.traced.waits:.1f} values read by the host"
        )  # fmt: skip
        print(f"traced, {label}: {run.traced.idle:.1%} idle, {counts}")
        if run.traced.stages_ms:
            print("  " + ", ".join(f"{name} {ms:.1f}" for name, ms in run.traced.stages_ms.items()) + " ms of the host")


if __name__ == "__main__":
    main()
