"""One process of `loupe doctor`'s device checks: a GPU, or a share of the processors. Started by `launch.doctor.device`.

A process of its own, because what hangs in a driver can only be killed, and because a launcher must not hold GPU memory.
Says on standard output, a JSON object a line, what it begins and what it has measured.
"""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB, MIB = 1 << 30, 1 << 20
SHARE_OF_FREE = 0.85
"""Of a GPU's free memory that is tested: the job's other ranks hold a context on their GPUs by then."""
_MIX = 0x9E3779B1
"""So that chunks differ in all bits."""


@dataclass(frozen=True)
class Plan:
    """What a rank does; the same for all but the rank."""

    rank: int
    size: int
    cuda: bool
    port: int
    memory_bytes: int
    """0: SHARE_OF_FREE of a GPU's free memory."""
    side: int
    """Of the square matrices that are multiplied."""
    matmul_s: float
    reduce_bytes: int
    timeout_s: float


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def die_with_parent() -> None:
    """The parent holds the other end of standard input: when it is gone, so are we."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------------------------------------- memory


def fill(chunks: "list[torch.Tensor]", address_N: "torch.Tensor", *, inverted: bool) -> None:
    """Each word gets its address in its chunk, mixed with the chunk's number: words that share a cell show as well."""
    for i, chunk_N in enumerate(chunks):
        _pattern(i, address_N, chunk_N, inverted=inverted)


def _pattern(i: int, address_N: "torch.Tensor", out_N: "torch.Tensor", *, inverted: bool) -> None:
    import torch

    word = (i + 1) * _MIX & 0xFFFF_FFFF
    torch.bitwise_xor(address_N, word - (1 << 32) if word >> 31 else word, out=out_N)
    if inverted:
        torch.bitwise_not(out_N, out=out_N)


def count_wrong(chunks: "list[torch.Tensor]", address_N: "torch.Tensor", *, inverted: bool) -> int:
    """Words that are not what `fill` wrote."""
    import torch

    expected_N = torch.empty_like(address_N)
    wrong = torch.zeros((), dtype=torch.int64, device=address_N.device)
    for i, chunk_N in enumerate(chunks):
        _pattern(i, address_N, expected_N, inverted=inverted)
        wrong += (chunk_N != expected_N).sum()
    return int(wrong)


def check_memory(device: "torch.device", num_bytes: int, chunk_bytes: int) -> tuple[int, int]:
    """(bytes tested, wrong words): each bit as 0 and as 1, read after all has been written."""
    import torch

    address_N = torch.arange(chunk_bytes // 4, dtype=torch.int32, device=device)
    chunks: list[torch.Tensor] = []
    try:
        while (len(chunks) + 1) * chunk_bytes <= num_bytes:
            chunks.append(torch.empty_like(address_N))
    except torch.OutOfMemoryError:  # another rank came; what there is will do
        chunks = chunks[:-2]
    wrong = 0
    for inverted in (False, True):
        fill(chunks, address_N, inverted=inverted)
        wrong += count_wrong(chunks, address_N, inverted=inverted)
    return len(chunks) * chunk_bytes, wrong


def _memory(plan: Plan, device: "torch.device") -> dict[str, Any]:
    import torch

    began = time.monotonic()
    chunk_bytes, num_bytes = 16 * MIB, plan.memory_bytes
    if plan.cuda:
        free, _ = torch.cuda.mem_get_info(device)
        chunk_bytes = GIB if free > 8 * GIB else 64 * MIB
        num_bytes = plan.memory_bytes or int(SHARE_OF_FREE * free) - 3 * chunk_bytes
    tested, wrong = check_memory(device, num_bytes, chunk_bytes)
    if plan.cuda:
        torch.cuda.empty_cache()
    return {"tested_bytes": tested, "wrong_words": wrong, "seconds": time.monotonic() - began}


# ------------------------------------------------------------------------------------------------------------- matmul


def _matmul(plan: Plan, device: "torch.device") -> dict[str, Any]:
    """The same product over and over: its speed, whether it stays the same, and how far it is from float32's."""
    import torch

    dtype = torch.bfloat16 if plan.cuda else torch.float32
    generator = torch.Generator(device).manual_seed(plan.rank)
    a, b = (torch.randn(plan.side, plan.side, generator=generator, device=device, dtype=dtype) for _ in range(2))
    first = a @ b
    for _ in range(3 if plan.cuda else 1):
        last = a @ b
    best_s, deadline = float("inf"), time.monotonic() + plan.matmul_s
    while time.monotonic() < deadline or best_s == float("inf"):
        count = 10 if plan.cuda else 1
        _wait(plan)
        began = time.perf_counter()
        for _ in range(count):
            last = a @ b
        _wait(plan)
        best_s = min(best_s, (time.perf_counter() - began) / count)
    reference = a[:16].double().cpu() @ b.double().cpu() if not plan.cuda else a[:16].double() @ b.double()
    error = float((first[:16].double().to(reference.device) - reference).norm() / reference.norm())
    return {"tflops": 2 * plan.side**3 / best_s / 1e12, "same": bool(torch.equal(first, last)), "error": error}


def _wait(plan: Plan) -> None:
    if plan.cuda:
        import torch

        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------- all-reduce


def _all_reduce(plan: Plan, device: "torch.device") -> dict[str, Any]:
    """Bus bandwidth as nccl-tests have it, and whether the sum is right."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if plan.cuda else "gloo", init_method=f"tcp://127.0.0.1:{plan.port}", rank=plan.rank,
        world_size=plan.size, timeout=timedelta(seconds=plan.timeout_s), device_id=device if plan.cuda else None,
    )  # fmt: skip
    ours = torch.full((plan.reduce_bytes // 4,), float(plan.rank + 1), device=device)
    summed = ours.clone()
    dist.all_reduce(summed)
    right = bool((summed == plan.size * (plan.size + 1) / 2).all())
    best_s = float("inf")
    for _ in range(5):
        dist.barrier()
        _wait(plan)
        began = time.perf_counter()
        dist.all_reduce(summed)
        _wait(plan)
        best_s = min(best_s, time.perf_counter() - began)
    dist.destroy_process_group()
    bus_bytes = 2 * (plan.size - 1) / plan.size * plan.reduce_bytes
    return {"bus_gb_per_s": bus_bytes / best_s / 1e9, "right": right}


# ------------------------------------------------------------------------------------------------------------------ all


def main(arguments: list[str]) -> int:
    plan = Plan(**json.loads(arguments[0]))
    die_with_parent()
    try:
        say(doing="torch")
        import torch

        say(doing="device")
        device = torch.device("cuda", plan.rank) if plan.cuda else torch.device("cpu")
        facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "name": "CPU"}
        if plan.cuda:
            seen = torch.cuda.device_count()
            if seen <= plan.rank:
                say(error=f"{seen} GPU(s) are visible")
                return 1
            torch.cuda.set_device(device)
            free, total = torch.cuda.mem_get_info(device)
            facts |= {"name": torch.cuda.get_device_name(device), "free_bytes": free, "total_bytes": total}
        else:
            torch.set_num_threads(1)
        say(device=facts)
        for name, measure in (("memory", _memory), ("matmul", _matmul), ("all-reduce", _all_reduce)):
            if name != "all-reduce" or plan.size > 1:
                say(doing=name)
                say(**{name: measure(plan, device)})
        say(doing="done")
    except Exception as e:  # told to the parent, whatever a driver raises
        say(error=f"{type(e).__name__}: {' '.join(str(e).split())[:400]}")
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
