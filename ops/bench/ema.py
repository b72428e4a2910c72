"""What power-function averages cost a training: time of a step and memory, with none, one and two beside the plain average.

    OMP_NUM_THREADS=1 python -m ops.bench.ema [--device cuda|cpu] [--offload] [--million 20] [--images 8]

Whole steps of a small transformer (forward, backward, AdamW, averages), in turns, so that other load on the machine meets all
of them alike; on CPU it is the process's own time; medians of rounds. Memory is counted: a float32 copy of this rank's shard
for each average, on the device or with --offload on the host. Under FSDP both are divided by the ranks that the model is
sharded over.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.ema import EMA
from trainer.power_profiles import combine
from trainer.tensors import locals_of

WIDTHS = {"none": (), "one": (0.05,), "two": (0.05, 0.10)}
DIM, TOKENS = 512, 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(DIM, 8, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class Step:
    """A model, its optimizer and its averages."""

    def __init__(
        self, widths: tuple[float, ...], million: float, images: int, device: torch.device, offload: bool
    ) -> None:
        torch.manual_seed(0)
        per_layer = sum(p.numel() for p in Layer().parameters())
        self.model = nn.Sequential(*[Layer() for _ in range(max(1, round(million * 1e6 / per_layer)))]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ema = EMA(self.model, offload=offload, profiles=widths)
        self.x = torch.randn(images, TOKENS, DIM, device=device)
        self.skip = torch.zeros((), device=device)
        self.steps = 0

    def take(self) -> None:
        self.model(self.x).square().mean().backward()
        self.ema.wait_for_copy()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.ema.update(0.999, self.skip, self.steps)

    @property
    def bytes_of_profiles(self) -> int:
        return sum(part.nbytes for of_it in self.ema.profiles.values() for part in locals_of(of_it.values()))


def seconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Of one call, mean: on a GPU by the clock, on CPU this process's own, of its threads together."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begun = clock()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - begun) / times


def main() -> None:
    parser = argparse.ArgumentParser(description="What power-function averages cost.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--million", type=float, default=20, help="Parameters, in millions.")
    parser.add_argument("--images", type=int, default=8, help="Rows of 64 tokens a step.")
    parser.add_argument("--steps", type=int, default=4, help="Of a round.")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device(options.device)
    found = {
        name: Step(widths, options.million, options.images, device, options.offload) for name, widths in WIDTHS.items()
    }
    parameters = sum(p.numel() for p in found["none"].model.parameters())
    times: dict[str, list[float]] = {name: [] for name in WIDTHS}
    for _ in range(options.rounds + 1):
        for name, step in found.items():
            times[name].append(seconds(step.take, options.steps, device))
    plain = statistics.median(times["none"][1:])
    where = "host" if options.offload else device.type
    print(
        f"{parameters / 1e6:.1f} M parameters, {options.images * TOKENS} tokens a step, {device.type}, averages: {where}"
    )
    for name, step in found.items():
        # of the same round, so that what disturbs one disturbs the other
        ratio = statistics.median(mine / none for mine, none in zip(times[name][1:], times["none"][1:], strict=True))
        taken = statistics.median(times[name][1:])
        size = step.bytes_of_profiles
        print(f"{name:>4}: {1e3 * taken:8.1f} ms a step, {ratio:.3f} times that of none; {size / 2**20:.0f} MiB, "
              f"{size / parameters:.1f} bytes a parameter")  # fmt: skip
    weights, averages = [p.detach() for p in found["two"].model.parameters()], found["two"].ema
    update = seconds(lambda: averages.update(0.999, found["two"].skip, found["two"].steps), 8, device)
    alone = seconds(lambda: found["none"].ema.update(0.999, found["none"].skip), 8, device)
    print(
        f"an update alone: {1e3 * update:.1f} ms with two, {1e3 * alone:.1f} without; a step without any {1e3 * plain:.1f}"
    )
    print(f"a snapshot of two in float16: {2 * 2 * sum(w.numel() for w in weights) / 2**20:.0f} MiB")
    for snapshots in (16, 32, 64, 128):
        steps = [i + 1 for i in range(snapshots)] * 2
        widths = [width for width in WIDTHS["two"] for _ in range(snapshots)]
        errors = ", ".join(f"{w:g}: {combine(steps, widths, snapshots, w).error:.2%}" for w in (0.03, 0.07, 0.15, 0.2))
        print(f"{snapshots} snapshots: profile off by {errors}")


if __name__ == "__main__":
    main()
