"""How many operations a second a device can do: from its data sheet, or by trying."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

_TABLE: tuple[tuple[tuple[str, ...], float], ...] = (
    # NVIDIA's data sheets, dense bf16 on tensor cores; where they print the figure with sparsity, half of it. A row's words
    # are all in the device's name, the first row that fits counts.
    # GB200, B300 and B200: Blackwell and Blackwell Ultra data sheets, 5, 4.5 and 4.5 PFLOP/s with sparsity
    (("GB200",), 2.5e15),
    (("B300",), 2.25e15),
    (("B200",), 2.25e15),
    # H200: 1,979 (SXM) and 1,671 (NVL) TFLOP/s with sparsity
    (("H200", "NVL"), 835.5e12),
    (("GH200",), 989.5e12),
    (("H200",), 989.5e12),
    # H100: 1,979 (SXM), 1,671 (NVL) and 1,513 (PCIe) with sparsity; H800 is its arithmetic, H20 has 148 dense
    (("H100", "NVL"), 835.5e12),
    (("H100", "PCIe"), 756.5e12),
    (("H100",), 989.5e12),
    (("H800", "PCIe"), 756.5e12),
    (("H800",), 989.5e12),
    (("H20",), 148e12),
    # A100 and A800: 312 dense, SXM and PCIe alike; A30: 165
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("A30",), 165e12),
    (("A40",), 149.7e12),
    (("A10G",), 70e12),
    (("A10",), 125e12),
    # Ada: L40S 733 with sparsity, L40 362, L4 242
    (("L40S",), 366.5e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    # of the Ada and Blackwell whitepapers, with float32 accumulation: 4090 165.2, 5090 209.5; 3090 71
    (("RTX 5090",), 209.5e12),
    (("RTX 4090",), 165.2e12),
    (("RTX 3090",), 71e12),
    (("RTX A6000",), 154.8e12),
    # AMD's data sheets; of the MI250 torch shows each of two halves
    (("MI325X",), 1307.4e12),
    (("MI300X",), 1307.4e12),
    (("MI250X",), 191.5e12),
)
_SIDE = {"cuda": 8192, "cpu": 1024}
_MEASURE_S = {"cuda": 0.2, "cpu": 0.1}
_MOST_ROUNDS = 50


@dataclass(frozen=True)
class Peak:
    flops: float
    """A second."""
    source: Literal["table", "measured", "config"]


def peak_of(device: torch.device, configured: float | None = None) -> Peak:
    """Of the precision that `trainer.parallel.apply.autocast` computes in: bf16 on a GPU, float32 on CPU. Where the table does
    not know the device, the best of a few matrix products, which takes a fraction of a second."""
    if configured:
        return Peak(configured, "config")
    known = from_table(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Peak(known, "table") if known else Peak(_measured(device), "measured")


def from_table(name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by the name that torch gives it; None: unknown, a part of one, or a slower
    kin of the same number."""
    words: Sequence[str] = name.replace("-", " ").split()
    if "MIG" in name or {"Laptop", "D", "Ti", "SUPER"} & set(words):
        return None
    for wanted, flops in _TABLE:
        if all(_has(words, phrase) for phrase in wanted):
            return flops
    return None


def _has(words: Sequence[str], phrase: str) -> bool:
    parts = phrase.split()
    return any(list(words[i : i + len(parts)]) == parts for i in range(len(words)))


def _measured(device: torch.device) -> float:
    side, dtype = _SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(side, side, device=device, dtype=dtype)
    best, begun = float("inf"), time.perf_counter()
    for _ in range(_MOST_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > _MEASURE_S[device.type]:
            break
    return 2.0 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
