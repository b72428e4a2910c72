"""What the latent perceptual loss costs, side by side in one process, and what each saving brings.

    python -m ops.bench.lpl [--part] [--step] [--balance] [--device cuda|cpu] [--cut] [--repeats 5]

--part     the loss and its gradient with respect to z0_hat alone, with a decoder of Stable Diffusion XL's sizes and random
           weights: plainly (all samples decoded, five maps, the whole graph kept), as the public SDXL script, and ours,
           saving by saving. Prints time and FLOPs over those of the plain one, and the most memory that is alive at once.
--step     whole training steps with and without it: of the recipe `imagenet_512_lpl` (816M parameters, Stable Diffusion
           XL's autoencoder) at 256 and 512 px on a GPU, of the demo on a CPU. Prints throughput over that of a step
           without, the same by FLOPs, and the peak memory.
--balance  how many more gated samples than the mean the fullest of 64 ranks of 25 has (simulated).

Without any of the three: all of them. DDPM-eps and tau = 3. Variants take turns, and times are medians. On a CPU, time is
that of this process alone; `OMP_NUM_THREADS=1` gives figures that other processes disturb least. FLOPs are counted by
torch.utils.flop_counter, as operations run; a ratio of theirs is the bound that a saving can reach.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ops.bench.lpl_variants import PLAIN, variants
from ops.bench.recipes import CUT_WIDTHS
from trainer.config import ParadigmConfig
from trainer.diffusion.paradigms import Paradigm, build_paradigm
from trainer.flops import Flops
from trainer.live_tensors import LiveTensors
from trainer.losses.gate import inside
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.autoencoders import Codec
from trainer.models.published_codecs import PUBLISHED
from trainer.parallel.apply import autocast
from trainer.rng import spread_uniform

TAU = 3.0
MIB = 1 << 20
RANKS, PER_RANK = 64, 25


@dataclass
class Measured:
    run: Callable[[], object]
    flops: int = 0
    peak_bytes: int = 0
    """The most alive at once, beyond what was before."""
    seconds: list[float] = field(default_factory=list)
    failed: bool = False
    """It did not fit."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(runs: dict[str, Measured], repeats: int, device: torch.device) -> None:
    """Each once for its memory, and FLOPs where they are not known, then in turns: noise of the machine falls on all."""
    for measured in runs.values():
        try:
            measured.flops = measured.flops or flops_of(measured.run)
            measured.peak_bytes = peak_of(measured.run, device)
        except torch.OutOfMemoryError:
            measured.failed = True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for _ in range(repeats):
        for measured in runs.values():
            if not measured.failed:
                measured.seconds.append(seconds_of(measured.run, device))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.process_time()
        run()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        with LiveTensors() as live:
            run()
        return live.peak_bytes
    run()  # the first of two chooses algorithms and compiles
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def flops_of(run: Callable[[], object]) -> int:
    # what is once called under a dispatch mode, the compiler skips for good
    with torch.compiler.set_stance("force_eager"), Flops() as counted:
        run()
    return counted.total


# ---------------------------------------------------------------------------------------------------------- the loss alone


def part_runs(
    codec: Codec, resolution: int, batch: int, chunk_size: int, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Of each variant (per-sample loss, its mean's gradient with respect to z0_hat), at the same latents and noise levels."""
    paradigm = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=resolution)
    t_B = paradigm.sample_t(spread_uniform(0, range(batch), 0))
    level_B = paradigm.noise_level(t_B)
    side = resolution // codec.downsampling
    generator = torch.Generator().manual_seed(0)
    z0, error = torch.randn(2, batch, codec.latent_channels, side, side, generator=generator).to(device)
    z0_hat = z0 + 0.3 * error
    context = context_of(paradigm, z0, resolution)

    def run(loss: PerceptualLoss) -> Callable[[], tuple[Tensor, Tensor]]:
        def once() -> tuple[Tensor, Tensor]:
            estimate = z0_hat.clone().requires_grad_()
            with autocast(device):
                loss_B, _ = loss(estimate, z0, level_B, context)
            (gradient,) = torch.autograd.grad(loss_B.mean(), estimate)
            return loss_B.detach(), gradient

        return once

    return {name: run(make(codec).to(device)) for name, make in variants(chunk_size).items()}


def context_of(paradigm: Paradigm, z0: Tensor, resolution: int) -> PerceptualContext:
    size = len(z0)
    return PerceptualContext(
        threshold=TAU,
        phase_step=0,
        paradigm=paradigm,
        images_BCHW=torch.zeros(size, 3, resolution, resolution, device=z0.device),
        denoising_B=torch.ones(size, device=z0.device),
        text=None,
        uniform=lambda purpose: torch.full((size,), 0.5, dtype=torch.float64),
        normal=lambda purpose: torch.zeros_like(z0),
    )


def bench_part(options: argparse.Namespace, device: torch.device) -> None:
    widths = {"block_out_channels": CUT_WIDTHS, "norm_num_groups": 4, "layers_per_block": 1} if options.cut else {}
    torch.manual_seed(0)
    codec = Codec(PUBLISHED["sdxl"](**widths)).to(device)
    for resolution in options.resolution or ([256, 512] if device.type == "cuda" else [128]):
        batch = options.batch_size or (24 if device.type == "cuda" else 6)
        losses = part_runs(codec, resolution, batch, options.chunk_size, device)
        runs = {name: Measured(run) for name, run in losses.items()}
        measure(runs, options.repeats, device)
        levels = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=resolution)
        gated = len(inside(levels.noise_level(levels.sample_t(spread_uniform(0, range(batch), 0))), TAU))
        print(
            f"\nthe loss alone: {resolution} px, {batch} samples of which {gated} gated, chunks of {options.chunk_size}"
        )
        print(
            f"{'':24s} {'ms':>9s} {'/ plain':>8s} {'FLOPs / plain':>14s} {'TFLOP/s':>8s} {'peak MiB':>9s} {'/ plain':>8s}"
        )
        plain = runs[PLAIN]
        for name, one in runs.items():
            if one.failed or plain.failed:
                print(f"{name:24s}" + ("   out of memory" if one.failed else f" {one.median_s * 1000:9.1f}"))
                continue
            print(f"{name:24s} {one.median_s * 1000:9.1f} {one.median_s / plain.median_s:8.3f} "
                  f"{one.flops / plain.flops:14.3f} {one.flops / one.median_s / 1e12:8.3f} "
                  f"{one.peak_bytes / MIB:9.1f} {one.peak_bytes / plain.peak_bytes:8.3f}", flush=True)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the fullest rank


def fullest_ranks(num_steps: int, *, spread: bool) -> Tensor:
    """(num_steps,): gated samples of the fullest rank over the mean rank's."""
    paradigm = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=512)
    generator = torch.Generator().manual_seed(0)
    size = RANKS * PER_RANK
    ratios = []
    for step in range(num_steps):
        if spread:
            u = spread_uniform(0, range(step * size, (step + 1) * size), step)
        else:
            u = torch.rand(size, generator=generator, dtype=torch.float64)
        counts = (paradigm.noise_level(paradigm.sample_t(u)) <= TAU).view(RANKS, PER_RANK).sum(1).double()
        ratios.append(counts.max() / counts.mean())
    return torch.stack(ratios)


def bench_balance(num_steps: int) -> None:
    print(f"\ngated samples of the fullest of {RANKS} ranks of {PER_RANK}, over the mean rank's; {num_steps} steps")
    for name, spread in (("independent times", False), ("low-discrepancy times", True)):
        ratios = fullest_ranks(num_steps, spread=spread)
        print(f"{name:24s} mean {ratios.mean():.3f}, largest {ratios.max():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--balance", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="absent: a GPU where there is one")
    parser.add_argument("--cut", action="store_true", help="narrow models: seconds, and figures that mean nothing")
    parser.add_argument("--recipe", help="of --step; absent: imagenet_512_lpl on a GPU, the demo on a CPU")
    parser.add_argument("--resolution", type=int, nargs="+", help="in pixels")
    parser.add_argument("--batch-size", type=int, help="samples of a rank")
    parser.add_argument(
        "--fits", type=int, help="of --step: the largest batch that fits without LPL; absent: looked for"
    )
    parser.add_argument("--chunk-size", type=int, default=2, help="samples that ours decodes at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of --balance")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine shows no CUDA device; take --device cpu")
    everything = not (options.part or options.step or options.balance)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    print(f"device {where}, torch {torch.__version__}, DDPM-eps, tau = {TAU:g}, {options.repeats} repeats", flush=True)
    if options.balance or everything:
        bench_balance(options.steps)
    if options.part or everything:
        bench_part(options, device)
    if options.step or everything:
        from ops.bench.lpl_step import bench_step  # it imports this module's measures

        bench_step(options)


if __name__ == "__main__":
    main()
