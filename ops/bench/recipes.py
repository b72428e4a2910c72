"""What each recipe costs on one rank: parameters, peak memory and time of real steps, for every phase of another shape.

    python -m ops.bench.recipes [NAME ...] [--device cuda|cpu] [--cut] [--micro-batch N] [--steps 3]

A step is the trainer's: images encoded, forward and backward pass with the phase's losses, clipping, optimizer, average,
with the recipe's own recomputation, compilation and FSDP2. Weights are random. Frozen text encoders are left out: random
states of the shapes that they declare stand in for theirs. The micro-batch is a rank's share among the ranks that the
recipe is written for, unless told.

One rank holds the whole `state` (weights, gradients, moments, average), of which N ranks hold an Nth each. `per rank` is
reckoned from that: peak - state * (1 - 1/N), N being the recipe's ranks. It leaves out what collectives need for themselves.

`--cut` takes the same path with narrow models at an eighth of the resolution: seconds, and figures that mean nothing.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batches import Batch
from trainer import optim
from trainer.config import (
    CodecConfig,
    DenoiserConfig,
    FrozenTextConfig,
    LatentDiffusionConfig,
    PhaseConfig,
    RunConfig,
    replace,
)
from trainer.ema import EMA
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.condition import Condition
from trainer.models.published_codecs import BLOCKS, PUBLISHED
from trainer.models.text_encoders import TextEncoder
from trainer.parallel.apply import begin_micro_batch, parallelize
from trainer.parallel.world import World, init_world
from trainer.recipes import RECIPES, load
from trainer.step_plan import StepPlan
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import locals_of

RANKS = {
    "demo": 2, "photos": 2, "finetune": 8, "imagenet_256_dit": 32, "cc12m_256_unet": 32, "cc12m_256_pixart": 32,
}  # fmt: skip
"""That a recipe's docstring names; 64 of the others."""
ENCODER_MILLIONS = {("clip", 768): 123, ("clip", 1280): 695, ("t5", 4096): 4762}
"""Parameters of the published text encoders, by family and width."""
CUT_WIDTHS = (8, 8, 16, 16)


@dataclass(frozen=True)
class Cost:
    recipe: str
    phase: PhaseConfig
    micro_batch: int
    parameters: int
    """Trained ones."""
    codec_parameters: int
    state_bytes: int
    """Weights, gradients, the optimizer's state and the average."""
    loss: float
    """After the last step."""
    peak_bytes: int | None
    """None: on the CPU it is not measured."""
    step_s: float
    """Median."""

    @property
    def rank_bytes(self) -> int | None:
        """Peak on each of the recipe's ranks, reckoned."""
        ranks = RANKS.get(self.recipe, 64)
        return None if self.peak_bytes is None else self.peak_bytes - self.state_bytes * (ranks - 1) // ranks


# ---------------------------------------------------------------------------------------------------------- what is built


class RandomText(TextEncoder):
    """States as frozen encoders of these shapes would give them, without the encoders."""

    frozen = True

    @dataclass(frozen=True)
    class Input:
        batch_size: int
        num_cut: int = 0

        def to(self, device: torch.device) -> "RandomText.Input":
            return self

        def trimmed(self) -> "RandomText.Input":
            return self

    def __init__(self, config: FrozenTextConfig, device: torch.device) -> None:
        super().__init__()
        self.token_width, self.pooled_width = config.width, config.pooled_width
        self.num_tokens = sum(group[0].max_tokens for group in config.groups)
        self._device = device

    def init_weights(self) -> None:
        """There are none."""

    def prepare(
        self,
        captions: Sequence[str | None],
        labels: Sequence[int] | None = None,
        dropped: Sequence[Sequence[bool]] = (),
        known: Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]] = (),
    ) -> Input:
        del labels, dropped, known
        return self.Input(len(captions))

    def forward(self, text: Input) -> Condition:
        size, device = text.batch_size, self._device
        tokens_BLT = torch.randn(size, self.num_tokens, self.token_width, device=device)
        pooled_BP = torch.randn(size, self.pooled_width, device=device) if self.pooled_width else None
        mask_BL = torch.rand(size, self.num_tokens, device=device) < 0.5  # a mask that masks: attention has one to obey
        mask_BL[:, 0] = True
        return Condition(tokens_BLT, pooled_BP, mask_BL)


def published_codec(config: CodecConfig, *, narrow: bool) -> Codec:
    """The architecture that a recipe's codec has, with random weights; the demo's own, whose weights are in the code."""
    if config.url.startswith("repo://"):
        return load_codec(config)
    name = "asymmetric_x1.5" if "asymmetric" in config.url else "sd3" if config.latent_channels == 16 else "sd15"
    options = {}
    if narrow:
        sizes = (
            ("down_block_out_channels", "up_block_out_channels") if "asymmetric" in name else ("block_out_channels",)
        )
        options = {**dict.fromkeys(sizes, CUT_WIDTHS), "norm_num_groups": 4, **BLOCKS}
    codec = Codec(PUBLISHED[name](**options))
    found = (codec.latent_channels, codec.downsampling)
    assert found == (config.latent_channels, config.downsampling), (
        f"{config.url} is taken for {name}, which has {found}"
    )
    return codec


def cut(config: RunConfig) -> RunConfig:
    """The same parts, narrow, at an eighth of the resolution; the demo's stays."""
    task = config.task
    assert isinstance(task, LatentDiffusionConfig)
    text = task.text
    if isinstance(text, FrozenTextConfig):
        encoders = tuple(
            replace(e, width=16, pooled_width=16 if e.pooled_width else None, max_tokens=8) for e in text.encoders
        )
        text = replace(text, encoders=encoders)
    return replace(
        config,
        task=replace(task, model=cut_model(task.model), text=text),
        phases=tuple(
            replace(p, resolution=p.resolution // 8 if p.resolution > 64 else p.resolution) for p in config.phases
        ),
        parallel=replace(config.parallel, compile=False),  # a minute a recipe on a CPU
        samples=None,
        prompt_accuracy=None,
    )


def cut_model(model: DenoiserConfig) -> DenoiserConfig:
    if model.kind == "unet":
        return replace(
            model, block_out_channels=(16, 32), attention_levels=(True, False), head_dim=8, layers_per_block=1,
            norm_num_groups=8,
        )  # fmt: skip
    if model.kind == "mmdit":
        model = replace(model, num_dual_attention_blocks=min(1, model.num_dual_attention_blocks))
    return replace(model, num_blocks=2, num_heads=2, head_dim=16)


def random_batch(config: LatentDiffusionConfig, phase: PhaseConfig, size: int) -> Batch:
    side = phase.resolution
    num_classes = config.text.num_classes if config.text.kind == "classes" else None
    return Batch(
        step=0,
        resolution=side,
        positions_B=torch.arange(size),
        images_BCHW=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        captions=["a photo of a red fox on fresh snow"] * size,
        labels_B=torch.randint(0, num_classes, (size,)) if num_classes else torch.full((size,), -1),
        keys=["random"] * size,
        substitutions=(),
    )


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(
    name: str,
    config: RunConfig,
    phase: PhaseConfig,
    world: World,
    *,
    micro_batch: int,
    steps: int,
    narrow: bool = False,
) -> Cost:
    """Build everything, take a step to warm up and `steps` more; nothing of it is left behind."""
    assert isinstance(config.task, LatentDiffusionConfig)
    device, text = world.device, config.task.text
    on_gpu = device.type == "cuda"
    task = LatentDiffusionTask(
        config,
        device,
        codec=published_codec(config.task.codec, narrow=narrow),
        text=RandomText(text, device) if isinstance(text, FrozenTextConfig) else None,
    )
    # as each of many ranks does it: what it gathers is in the peak
    parallelize(task.module, task.sharding_units(), world, replace(config.parallel, shard_one_rank=True))
    task.module.train()
    optimizer = optim.build_optimizer(task.module, config.optim)
    ema = EMA(task.module, offload=config.ema.offload)
    batch = random_batch(config.task, phase, micro_batch)
    plan = StepPlan(step=0, phase=phase, phase_index=0, phase_step=0, learning_rate=phase.learning_rate, position=0,
                    begins_phase=True, ends_phase=False)  # fmt: skip

    def step() -> Tensor:
        begin_micro_batch(task.module, last=True, keep_gathered=config.parallel.keep_gathered)
        terms = task.forward_backward(batch, plan, 1.0 / micro_batch)
        norm = optim.gradient_norm(task.module)
        skip = (~(norm.isfinite() & terms["loss"].isfinite().all())).float()
        ema.wait_for_copy()
        optim.step(optimizer, phase.learning_rate, skip, optim.clip_divisor(norm, config.optim.max_grad_norm))
        ema.update(phase.ema_decay, skip)
        return terms["loss"].mean()

    step()  # compiles, and lets convolutions choose their algorithms
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        loss = step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    weights = list(task.module.parameters())
    state = [*weights, *weights, *optim.state_tensors(task.module, optimizer).values(), *ema.average.values()]
    return Cost(
        recipe=name,
        phase=phase,
        micro_batch=micro_batch,
        parameters=count(task.module),
        codec_parameters=count(task.codec),
        state_bytes=sum(t.nbytes for t in locals_of(state)),
        loss=loss.item(),
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        step_s=statistics.median(seconds),
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shapes(config: RunConfig) -> list[PhaseConfig]:
    """The phases, without those that cost what an earlier one does."""
    seen: dict[tuple[int, int, bool], PhaseConfig] = {}
    for phase in config.phases:
        seen.setdefault((phase.resolution, phase.batch_size, phase.perceptual is not None), phase)
    return list(seen.values())


def share(name: str, phase: PhaseConfig, config: RunConfig) -> int:
    """Images of a forward pass on one of the recipe's ranks."""
    per_rank = max(1, phase.batch_size // RANKS.get(name, 64))
    return min(per_rank, config.parallel.micro_batch_size or per_rank)


# -------------------------------------------------------------------------------------------------------------- printing

HEADER = (
    f"{'recipe':22s} {'phase':15s} {'px':>4s} {'LPL':>3s} {'images':>6s} {'params M':>8s} {'codec M':>7s} "
    f"{'state GiB':>9s} {'peak GiB':>8s} {'per rank':>8s} {'ms/step':>8s} {'images/s':>8s} {'loss':>6s}"
)


def start_of_line(recipe: str, phase: PhaseConfig, micro_batch: int) -> str:
    lpl = "yes" if phase.perceptual else "no"
    return f"{recipe:22s} {phase.name:15s} {phase.resolution:4d} {lpl:>3s} {micro_batch:6d}"


def line(cost: Cost) -> str:
    peak, per_rank = ("-" if n is None else f"{n / 2**30:.1f}" for n in (cost.peak_bytes, cost.rank_bytes))
    return (
        f"{start_of_line(cost.recipe, cost.phase, cost.micro_batch)} {cost.parameters / 1e6:8.1f} "
        f"{cost.codec_parameters / 1e6:7.1f} {cost.state_bytes / 2**30:9.2f} {peak:>8s} {per_rank:>8s} "
        f"{cost.step_s * 1000:8.1f} {cost.micro_batch / cost.step_s:8.1f} {cost.loss:6.3f}"
    )


def encoder_bytes(config: LatentDiffusionConfig) -> int:
    """Of the frozen text encoders, in bf16 and whole on each rank; of those whose size is known."""
    if not isinstance(config.text, FrozenTextConfig):
        return 0
    return sum(ENCODER_MILLIONS.get((e.family, e.width), 0) for e in config.text.encoders) * 2_000_000


def left_out(config: LatentDiffusionConfig) -> str:
    """What comes on top, on every rank: the frozen text encoders."""
    if not isinstance(config.text, FrozenTextConfig):
        return ""
    sizes = [(e.family, e.width, ENCODER_MILLIONS.get((e.family, e.width))) for e in config.text.encoders]
    words = ", ".join(f"{family} {width} wide: {f'{m}M' if m else 'unknown'}" for family, width, m in sizes)
    return f"{'':22s} left out: frozen text encoders ({words}), {encoder_bytes(config) / 2**30:.1f} GiB in bf16"


def main() -> None:
    every = [name for name in RECIPES if RECIPES[name]().task.kind == "latent_diffusion"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; absent: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="absent: a GPU where there is one")
    parser.add_argument("--cut", action="store_true")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    for name in options.names:
        if name not in every:
            parser.error(f"{name!r} is no recipe of latent diffusion; have {', '.join(every)}")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine shows no CUDA device; take --device cpu, with --cut")

    world = init_world()
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    print(f"device {where}, torch {torch.__version__}, one rank, {options.steps} steps after one to warm up")
    print(HEADER, flush=True)
    for name in options.names or every:
        given = load(name)
        config = cut(given) if options.cut else given
        for phase in shapes(config):
            micro_batch = options.micro_batch or (2 if options.cut else share(name, phase, config))
            try:
                cost = measure(
                    name, config, phase, world, micro_batch=micro_batch, steps=options.steps, narrow=options.cut
                )
                print(line(cost), flush=True)
            except torch.OutOfMemoryError:
                print(f"{start_of_line(name, phase, micro_batch)}   out of memory; give --micro-batch less", flush=True)
            gc.collect()  # hooks and modules refer to each other
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
        assert isinstance(given.task, LatentDiffusionConfig)
        if left_out(given.task):
            print(left_out(given.task), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
