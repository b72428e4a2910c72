"""The plan: of all layouts that fit, the fastest; and of each phase what it needs and takes."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from trainer.config import PhaseConfig, RunConfig
from trainer.errors import UserError
from trainer.plan.counting import Recompute
from trainer.plan.hardware import (
    DECODED_PER_CORE_S,
    HOST_COPY_BYTES_PER_S,
    MARGIN_SHARE,
    PHOTO_BYTES,
    PHOTO_SIDE,
    STORAGE_BYTES_PER_S,
    Cluster,
)
from trainer.plan.memory import Layout, checkpoint_bytes, phase_bytes
from trainer.plan.recipe import PhaseCount, RecipeCount
from trainer.plan.step_time import StepTime, StepTimes

DAY_S = 86400.0
RECOMPUTATIONS: tuple[Recompute, ...] = ("none", "selective", "full")
LAYOUT_FIELDS = ("replicas", "activation_checkpointing", "reshard_after_forward", "micro_batch_size")
"""Of `parallel`, which a plan chooses unless they are held."""


@dataclass(frozen=True)
class PhasePlan:
    phase: PhaseConfig
    memory: dict[str, float]
    """Bytes on one GPU, by part."""
    fits: bool
    flops: dict[str, float]
    """Of one step of one GPU, by part, as the trainer's own MFU counts them."""
    time: StepTime
    mfu: float
    images_per_s: float
    loader_cores: float
    """A node; 0 where latents are read."""
    loader_bytes_per_s: float
    """A node."""
    checkpoint_stall_s: float
    """Training stands still so long a save."""
    checkpoint_write_s: float
    days: float
    gpu_hours: float
    mend: str | None
    """Where it does not fit."""

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    name: str
    cluster: Cluster
    layout: Layout
    written: Layout
    """The recipe's own."""
    written_fits: bool
    num_parameters: int
    checkpoint_bytes: int
    phases: tuple[PhasePlan, ...]
    notes: tuple[str, ...]
    price_per_gpu_hour: float | None

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)


def make_plan(
    run: RunConfig, count: RecipeCount, cluster: Cluster, price_per_gpu_hour: float | None = None,
    held: Collection[str] = (),
) -> Plan:  # fmt: skip
    """`held`: fields of `run.parallel` that are to stay as they are; nothing else is weighed.

    Raises:
        UserError: a phase's batch does not divide over the GPUs, or a held field does not go with them.
    """
    weighed = list(layouts(run, cluster, held))
    times = [StepTimes(run, count, phase, cluster) for phase in count.phases]
    written = Layout(
        run.parallel.replicas, run.parallel.activation_checkpointing, run.parallel.reshard_after_forward,
        run.parallel.micro_batch_size or max(phase.batch_size for phase in run.phases) // cluster.num_gpus,
    )  # fmt: skip

    def fits(layout: Layout) -> bool:
        return all(_needs(run, count, phase, layout, cluster) <= cluster.gpu.memory_bytes for phase in count.phases)

    def seconds(layout: Layout) -> float:
        return sum(p.phase.steps * t.of(layout).whole for p, t in zip(count.phases, times, strict=True))

    candidates = [layout for layout in weighed if fits(layout)]
    if candidates:
        chosen = min(candidates, key=seconds)
    else:  # the one that lacks least, so that what is missing can be seen
        chosen = min(weighed, key=lambda layout: max(
            _needs(run, count, phase, layout, cluster) for phase in count.phases))  # fmt: skip
    phases = tuple(_phase(run, count, p, t, chosen, cluster) for p, t in zip(count.phases, times, strict=True))
    size = checkpoint_bytes(run, count.parameters, count.buffer_bytes)
    values = sum(_product(shape) for shape in count.parameters.all)
    fits_written = written in candidates or (cluster.num_gpus % written.replicas == 0 and fits(written))
    return Plan(run.name, cluster, chosen, written, fits_written, values, size, phases, count.notes, price_per_gpu_hour)


def check_batches(run: RunConfig, cluster: Cluster) -> None:
    """Raises:
    UserError: a phase's global batch does not divide over the GPUs.
    """
    for phase in run.phases:
        per_rank, rest = divmod(phase.batch_size, cluster.num_gpus)
        if rest:
            below = f"{per_rank * cluster.num_gpus} or " if per_rank else ""
            raise UserError(
                f"phases.{phase.name}.batch_size: {phase.batch_size} images do not divide over --gpus {cluster.num_gpus}; take "
                f"{below}{(per_rank + 1) * cluster.num_gpus} with --set, or another number of GPUs"
            )


def layouts(run: RunConfig, cluster: Cluster, held: Collection[str] = ()) -> Iterator[Layout]:
    """All that are weighed: copies of whole nodes or of all, every recomputation, micro-batches by halves; of what is held,
    the run's own.

    Raises:
        UserError: a phase's batch does not divide over the GPUs, or what is held does not go with them.
    """
    check_batches(run, cluster)
    own = run.parallel
    most = max(phase.batch_size for phase in run.phases) // cluster.num_gpus
    every = [phase.batch_size // cluster.num_gpus for phase in run.phases]
    micro = [n for n in range(1, most + 1) if all(per_rank <= n or per_rank % n == 0 for per_rank in every)]
    if "micro_batch_size" in held and own.micro_batch_size:
        if own.micro_batch_size < most and own.micro_batch_size not in micro:
            of_all = " and ".join(str(n) for n in sorted(set(every)))
            raise UserError(
                f"parallel.micro_batch_size: {of_all} images of a GPU do not divide by {own.micro_batch_size}"
            )
        micro = [own.micro_batch_size]
    shards = {cluster.num_gpus, *(n for n in (1, cluster.gpus_per_node, 4 * cluster.gpus_per_node)
                                  if cluster.num_gpus % n == 0 and n <= cluster.num_gpus)}  # fmt: skip
    if "replicas" in held:
        if cluster.num_gpus % own.replicas:
            raise UserError(f"parallel.replicas: {own.replicas} copies do not divide over --gpus {cluster.num_gpus}")
        shards = {cluster.num_gpus // own.replicas}
    recomputations = (own.activation_checkpointing,) if "activation_checkpointing" in held else RECOMPUTATIONS
    freed = (True, False) if cluster.num_gpus > 1 else (True,)
    if "reshard_after_forward" in held:
        freed = (own.reshard_after_forward,)
    for num_shards in sorted(shards):
        for recompute in recomputations:
            for reshard in freed:
                for images in micro:
                    yield Layout(cluster.num_gpus // num_shards, recompute, reshard, images)


def _needs(run: RunConfig, count: RecipeCount, phase: PhaseCount, layout: Layout, cluster: Cluster) -> float:
    return sum(phase_bytes(run, count, phase, layout, cluster.num_gpus).values())


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for side in shape:
        out *= side
    return out


def _phase(
    run: RunConfig, count: RecipeCount, counted: PhaseCount, times: StepTimes, layout: Layout, cluster: Cluster
) -> PhasePlan:
    phase, gpu = counted.phase, cluster.gpu
    per_rank = phase.batch_size // cluster.num_gpus
    memory, step = phase_bytes(run, count, counted, layout, cluster.num_gpus), times.of(layout)
    parts = {
        "model": counted.model.flops().at(per_rank),
        "encoder": counted.encoder.flops().at(per_rank) if counted.encoder else 0.0,
        "text": sum(text.flops().at(per_rank) for text in count.text),
        "perceptual_loss": counted.loss.flops().at(counted.inside * per_rank) if counted.loss else 0.0,
    }
    images_per_s = phase.batch_size / step.whole
    a_node = images_per_s * min(cluster.gpus_per_node, cluster.num_gpus) / cluster.num_gpus
    area = max(phase.resolution / PHOTO_SIDE, 1.0) ** 2
    image_bytes, cores = PHOTO_BYTES * area, a_node * area / DECODED_PER_CORE_S
    task = run.task
    if run.data.latents and task.kind == "latent_diffusion":
        image_bytes = 2.0 * task.codec.latent_channels * (phase.resolution // task.codec.downsampling) ** 2
        cores = 0.0
    size = checkpoint_bytes(run, count.parameters, count.buffer_bytes)
    write_s = size / (cluster.num_nodes * STORAGE_BYTES_PER_S)
    stall_s = size / cluster.num_gpus / HOST_COPY_BYTES_PER_S
    stall_s += 0.0 if run.checkpoint.asynchronous else write_s
    seconds = phase.steps * (step.whole + stall_s / run.checkpoint.every_steps)
    needed = sum(memory.values())
    return PhasePlan(
        phase=phase, memory=memory, fits=needed <= gpu.memory_bytes, flops=parts, time=step,
        mfu=sum(parts.values()) / step.whole / gpu.peak_flops, images_per_s=images_per_s, loader_cores=cores,
        loader_bytes_per_s=a_node * image_bytes, checkpoint_stall_s=stall_s, checkpoint_write_s=write_s,
        days=seconds / DAY_S, gpu_hours=seconds / 3600 * cluster.num_gpus,
        mend=None if needed <= gpu.memory_bytes else _mend(run, memory, needed - gpu.memory_bytes),
    )  # fmt: skip


def _mend(run: RunConfig, memory: dict[str, float], missing: float) -> str:
    """What would help most, by what is largest; recomputation and the smallest micro-batch have been tried."""
    largest = max((part for part in memory if part != "margin"), key=lambda part: memory[part])
    if largest in ("parameters", "gradients", "optimizer", "ema"):
        enough = not run.ema.offload and memory["ema"] * (1 + MARGIN_SHARE) >= missing
        word = {"optimizer": "the optimizer's moments", "ema": "averages"}.get(largest, largest)
        return f"{word} are the most of it: more GPUs{', or ema.offload=true' if enough else ''}"
    if largest == "gathered":
        return (
            "gathered parameters and gradients are the most of it: more GPUs, so that no gradients are summed up before"
        )
    if largest == "decoder, encoders":
        return "frozen encoders are the most of it: store their states with `loupe data encode` and data.text_states"
    return f"{largest} are the most of it: a smaller resolution or model, or GPUs with more memory"
