"""How long a step takes: a roofline over its operations, one by one, and the collectives that they do not hide.

An operation takes what its arithmetic takes, or what its memory traffic takes, or what the host takes to launch it,
whichever is longest. Collectives run beside the computation; what is longer than it is exposed, and so is the first gather
and the last reduction of each micro-batch, which nothing is there to hide.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trainer.config import RunConfig
from trainer.plan.counting import Operation
from trainer.plan.hardware import (
    COLLECTIVE_RANK_S,
    COLLECTIVE_S,
    COMPILED_LAUNCH_S,
    LAUNCH_S,
    SHARES,
    Cluster,
)
from trainer.plan.memory import FLOAT, Layout, numel, state_bytes
from trainer.plan.recipe import PhaseCount, RecipeCount


class Work:
    """Operations as arrays, for a quick answer at any number of images."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        rows = [(op.flops.fixed, op.flops.per_image, op.bytes.fixed, op.bytes.per_image, op.kind) for op in operations]
        self._flops = np.array([row[:2] for row in rows], dtype=np.float64).reshape(-1, 2)
        self._bytes = np.array([row[2:4] for row in rows], dtype=np.float64).reshape(-1, 2)
        self._kinds = [row[4] for row in rows]

    def seconds(self, images: float, cluster: Cluster, *, compiled: bool) -> float:
        if not self._kinds or not images:
            return 0.0
        at = np.array([1.0, images])
        shares = {"matmul": cluster.gpu.matmul_share, "other": 1.0, **{kind: SHARES[kind][0] for kind in SHARES}}
        speed = cluster.gpu.peak_flops * np.array([shares[kind] for kind in self._kinds])
        fused = np.array([SHARES["fused_bytes"][0] if compiled and kind == "other" else 1.0 for kind in self._kinds])
        traffic = self._bytes @ at * fused / (cluster.gpu.hbm_bytes_per_s * SHARES["hbm"][0])
        gpu_s = float(np.maximum(self._flops @ at / speed, traffic).sum())
        return max(gpu_s, len(self._kinds) * (COMPILED_LAUNCH_S if compiled else LAUNCH_S))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by part."""

    forward: float
    backward: float
    encoder: float
    text: float
    loss: float
    optimizer: float
    communication: float
    """That computation does not hide."""
    hidden: float
    """That it does; not part of the whole."""

    @property
    def whole(self) -> float:
        return self.forward + self.backward + self.encoder + self.text + self.loss + self.optimizer + self.communication


def bus_bytes_per_s(cluster: Cluster, ranks: int) -> float:
    """Of a ring over neighbouring ranks: within a node NVLink's, beyond it all the node's network cards together."""
    nvlink = cluster.gpu.nvlink_bytes_per_s * SHARES["nvlink"][0]
    if ranks <= cluster.gpus_per_node:
        return nvlink
    return min(nvlink, cluster.gpus_per_node * cluster.nic_gbit_per_s / 8 * 1e9 * SHARES["network"][0])


def ring_s(cluster: Cluster, size: float, ranks: int, collectives: int) -> float:
    """An all-gather or a reduce-scatter of `size` bytes, in so many pieces: (n - 1) / n of it passes through each rank."""
    if ranks == 1:
        return 0.0
    return size * (ranks - 1) / ranks / bus_bytes_per_s(cluster, ranks) + collectives * (
        COLLECTIVE_S + ranks * COLLECTIVE_RANK_S
    )


def across_s(cluster: Cluster, size: float, replicas: int, collectives: int) -> float:
    """The all-reduce of a shard of `size` bytes between copies of the model, over each GPU's own share of the network."""
    if replicas == 1:
        return 0.0
    speed = cluster.nic_gbit_per_s / 8 * 1e9 * SHARES["network"][0]
    if cluster.num_nodes == 1:
        speed = cluster.gpu.nvlink_bytes_per_s * SHARES["nvlink"][0]
    return 2 * size * (replicas - 1) / replicas / speed + collectives * (COLLECTIVE_S + replicas * COLLECTIVE_RANK_S)


class StepTimes:
    """Of one phase, for any layout."""

    def __init__(self, run: RunConfig, count: RecipeCount, phase: PhaseCount, cluster: Cluster) -> None:
        self._run, self._count, self._phase, self._cluster = run, count, phase, cluster
        self._passes = {}
        for recompute in ("none", "selective", "full"):
            forward, backward = phase.model.operations(recompute)
            self._passes[recompute] = Work(forward), Work(backward)
        self._encoder = Work(phase.encoder.operations if phase.encoder else ())
        self._loss = Work(phase.loss.operations if phase.loss else ())
        self._text = [Work(text.operations) for text in count.text]

    def of(self, layout: Layout) -> StepTime:
        cluster, phase = self._cluster, self._phase
        compiled = self._run.parallel.compile
        per_rank = phase.phase.batch_size // cluster.num_gpus
        images = min(layout.micro_batch, per_rank)
        micro = -(-per_rank // images)
        images_each = per_rank / micro
        forward_work, backward_work = self._passes[layout.recompute]
        forward = forward_work.seconds(images_each, cluster, compiled=compiled)
        backward = backward_work.seconds(images_each, cluster, compiled=compiled)
        exposed, hidden = self._communication(layout, forward, backward, micro)
        chunks = phase.inside * images_each / max(phase.chunk_size, 1)
        # on a GPU the frozen decoder's norms are fused kernels, whatever the trained blocks are (`models.frozen_layers`)
        a_chunk = self._loss.seconds(phase.chunk_size, cluster, compiled=True)
        return StepTime(
            forward=micro * forward,
            backward=micro * backward,
            encoder=micro * self._encoder.seconds(images_each, cluster, compiled=False),
            text=micro * sum(work.seconds(images_each, cluster, compiled=False) for work in self._text),
            loss=micro * chunks * a_chunk,
            optimizer=self._optimizer_s(layout),
            communication=exposed,
            hidden=hidden,
        )

    def _communication(self, layout: Layout, forward: float, backward: float, micro: int) -> tuple[float, float]:
        """(exposed, hidden) seconds of a step."""
        cluster, parameters = self._cluster, self._count.parameters
        size, units = FLOAT * numel(parameters.all), len(parameters.units) + 1
        shards = cluster.num_gpus // layout.replicas
        gather = ring_s(cluster, size, shards, units)
        reduce = ring_s(cluster, size, shards, units)
        reduce += across_s(cluster, size / shards, layout.replicas, units)
        keeps = self._run.parallel.keep_gathered
        exposed = total = 0.0
        for i in range(micro):
            first = gather if i == 0 or not keeps else 0.0
            again = gather if layout.reshard and not keeps else 0.0
            last = reduce if i == micro - 1 else 0.0
            total += first + again + last
            edges = (first + last) / units
            exposed += max(0.0, first * (1 - 1 / units) - forward) + edges
            exposed += max(0.0, again + last * (1 - 1 / units) - backward)
        return exposed, total - exposed

    def _optimizer_s(self, layout: Layout) -> float:
        """Clipping, AdamW and the average, of which each reads and writes its tensors once."""
        state = state_bytes(self._run, self._count.parameters, self._cluster.num_gpus // layout.replicas)
        traffic = 3 * state["gradients"] + 3 * state["parameters"] + 2 * state["optimizer"] + 2 * state["ema"]
        return traffic / (self._cluster.gpu.hbm_bytes_per_s * SHARES["hbm"][0])
