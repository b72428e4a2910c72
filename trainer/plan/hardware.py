"""What a GPU and the wires between GPUs can do, and where each figure is from."""

import re
from dataclasses import dataclass
from typing import Literal

from trainer.errors import UserError
from trainer.peak_flops import from_table

GIB = float(1 << 30)
Source = Literal["data sheet", "reported", "assumed"]


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: float
    """That torch can allocate from, about what the driver shows."""
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    """One way, to all others of the node together; data sheets give both ways."""
    nic_gbit_per_s: float
    """Of the network, a GPU's share of it in the systems that are usually built."""
    matmul_share: float
    """Of the data sheet's bf16 peak, for large matrix products."""
    matmul_source: Source

    @property
    def peak_flops(self) -> float:
        """Dense bf16 operations a second, of the data sheet."""
        peak = from_table(f"NVIDIA {self.name.upper()}")
        assert peak is not None
        return peak


GPUS = {
    gpu.name: gpu
    for gpu in (
        # memory, bandwidths: NVIDIA's data sheets of the SXM boards, HGX B200's of the last
        GPU("h100", 79.1 * GIB, 3.35e12, 450e9, 400, 0.75, "assumed"),
        # about 790 TFLOP/s on large bf16 products
        GPU("h200", 139.8 * GIB, 4.8e12, 450e9, 400, 0.80, "reported"),
        GPU("a100", 79.1 * GIB, 2.039e12, 300e9, 200, 0.80, "assumed"),
        GPU("b200", 178.0 * GIB, 8.0e12, 900e9, 400, 0.70, "assumed"),
    )
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in nodes of one size."""

    gpu: GPU
    num_gpus: int
    gpus_per_node: int
    nic_gbit_per_s: float
    """A GPU's share of the network."""

    def __post_init__(self) -> None:
        """Raises:
        UserError: more than a node, and not whole ones.
        """
        whole, rest = divmod(self.num_gpus, self.gpus_per_node)
        if whole and rest:
            raise UserError(
                f"--gpus {self.num_gpus}: no whole nodes of --gpus-per-node {self.gpus_per_node}; take "
                f"{whole * self.gpus_per_node} or {(whole + 1) * self.gpus_per_node}, or nodes of another size"
            )

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)


SHARES: dict[str, tuple[float, Source, str]] = {
    "attention": (0.45, "assumed", "of the bf16 peak that fused attention reaches"),
    "convolution": (0.45, "assumed", "of the bf16 peak that convolutions reach"),
    "hbm": (0.85, "assumed", "of the memory's bandwidth that other operations reach"),
    "nvlink": (0.80, "assumed", "of NVLink's bandwidth that collectives reach"),
    "network": (0.85, "assumed", "of the network's bandwidth that collectives reach"),
    "fused_bytes": (0.40, "assumed", "of the memory traffic of operations that is left where blocks are compiled"),
}
"""Shares of what data sheets promise."""
LAUNCH_S, COMPILED_LAUNCH_S = 6e-6, 2e-6
"""The host's time for an operation; assumed. Compiled code has fewer kernels."""
COLLECTIVE_S, COLLECTIVE_RANK_S = 30e-6, 0.5e-6
"""Of one collective, and a rank more in its ring; assumed."""
MARGIN_SHARE, CONTEXT_BYTES = 0.06, 1.5 * GIB
"""Fragmentation, as a share of what is allocated; CUDA's context and NCCL's buffers. Assumed."""
HOST_COPY_BYTES_PER_S, STORAGE_BYTES_PER_S = 20e9, 2e9
"""A checkpoint's way to host memory, a GPU; and from there to storage, a node. Assumed."""
PHOTO_BYTES, PHOTO_SIDE, DECODED_PER_CORE_S = 79e3, 512, 966.0
"""Photos that data.decode=balanced was measured with (docs/benchmarks.md), of 512 px to 256 px; larger images by their area."""


def find_gpu(name: str) -> GPU:
    """Raises:
    UserError: not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: no figures of {name!r}; take one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def network_gbit(text: str) -> float:
    """Gbit/s of `400`, `400g` or `400gbit`.

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"(\d{1,5}(?:\.\d{1,3})?)(?:g|gb|gbit|gbps)?", text.strip().lower(), flags=re.ASCII)
    if not match or not float(match[1]):
        raise UserError(f"--network: {text!r} is no speed; give a GPU's share of the network in Gbit/s, as 400 or 100g")
    return float(match[1])
