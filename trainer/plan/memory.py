"""Bytes on one rank, by what they are for, and the size of a checkpoint."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from trainer.config import RunConfig
from trainer.plan.counting import Recompute
from trainer.plan.hardware import CONTEXT_BYTES, MARGIN_SHARE
from trainer.plan.recipe import Parameters, PhaseCount, RecipeCount

FLOAT = 4
"""Bytes of a float32, which parameters, gradients, moments and averages are."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    replicas: int
    recompute: Recompute
    reshard: bool
    micro_batch: int
    """Images of a forward pass on one rank, at most."""

    def in_words(self, num_gpus: int) -> str:
        rest = f"recomputation {self.recompute}, micro-batch {self.micro_batch}"
        if num_gpus == 1:
            return f"not sharded, {rest}"
        shards = num_gpus // self.replicas
        if self.replicas == 1:
            how = "sharded over all"
        elif shards == 1:
            how = f"{self.replicas} whole copies on as many"
        else:
            how = f"{self.replicas} copies, each over {shards}"
        kept = "freed between passes" if self.reshard else "kept until the backward pass"
        return f"{how} GPUs, gathered parameters {kept}, {rest}"


def numel(shapes: Iterable[Shape]) -> int:
    return sum(prod(shape) for shape in shapes)


def shard_numel(shapes: Iterable[Shape], num_shards: int) -> int:
    """Values of the first rank's shards, the largest: FSDP2 cuts the first dimension into chunks of equal size."""
    return sum(min(-(-shape[0] // num_shards), shape[0]) * prod(shape[1:]) for shape in shapes)


def moments(run: RunConfig, shapes: Sequence[Shape], num_shards: int) -> int:
    """Bytes of the optimizer's state on the first rank; AdamW's step of each parameter is a number of its own.

    Of Muon's matrices, which have one moment, two are counted.
    """
    return 2 * FLOAT * shard_numel(shapes, num_shards) + FLOAT * len(shapes)


def state_bytes(run: RunConfig, parameters: Parameters, num_shards: int) -> dict[str, int]:
    """What stays from step to step, exactly, on the first rank."""
    shard = FLOAT * shard_numel(parameters.all, num_shards)
    return {
        "parameters": shard,
        "gradients": shard,
        "optimizer": moments(run, parameters.all, num_shards),
        "ema": 0 if run.ema.offload else shard * (1 + len(run.ema.profiles)),
    }


def gathered_bytes(run: RunConfig, parameters: Parameters, layout: Layout, num_gpus: int, *, accumulates: bool) -> int:
    """Whole parameters and gradients that are there at once: the root's, and those of two units; of all units where
    nothing is freed, or where gradients of several micro-batches are summed before they are reduced. One GPU has its own."""
    if num_gpus == 1:
        return 0
    units = sorted((FLOAT * numel(unit) for unit in parameters.units), reverse=True)
    root, two, everything = FLOAT * numel(parameters.root), sum(units[:2]), sum(units)
    keeps = not layout.reshard or run.parallel.keep_gathered
    return 2 * root + (everything if keeps else two) + (everything if accumulates else two)


def phase_bytes(
    run: RunConfig, count: RecipeCount, phase: PhaseCount, layout: Layout, num_gpus: int
) -> dict[str, float]:
    """By part; their sum is what the GPU must hold.

    The working memory is that of the hungriest of three moments: images are encoded; the loss is computed on top of all
    that the forward pass keeps; a block is recomputed and goes backward.
    """
    per_rank = phase.phase.batch_size // num_gpus
    images = min(layout.micro_batch, per_rank)
    kept = phase.model.kept(layout.recompute)
    backward = phase.model.recomputed(layout.recompute) + phase.model.transient
    loss = phase.loss.peak.at(min(phase.chunk_size, images)) if phase.loss else 0.0
    encoding = phase.encoder.peak.at(images) if phase.encoder else 0.0
    encoding = max([encoding, *(text.peak.at(images) for text in count.text)])
    parts: dict[str, float] = {
        **state_bytes(run, count.parameters, num_gpus // layout.replicas),
        "gathered": gathered_bytes(run, count.parameters, layout, num_gpus, accumulates=per_rank > images),
        "bf16 weights": kept.fixed,
        "activations": kept.per_image * images,
        "decoder, encoders": float(count.text_bytes + count.codec_bytes + count.buffer_bytes),
    }
    in_step = parts["bf16 weights"] + parts["activations"]
    parts["working memory"] = max(encoding - in_step, loss, backward.at(images))
    parts["margin"] = MARGIN_SHARE * sum(parts.values()) + CONTEXT_BYTES
    return parts


def checkpoint_bytes(run: RunConfig, parameters: Parameters, buffer_bytes: int = 0) -> int:
    """Weights, averages and moments of all ranks together."""
    averages = 1 + len(run.ema.profiles)
    return FLOAT * numel(parameters.all) * (1 + averages) + moments(run, parameters.all, 1) + buffer_bytes
