"""What recomputation and compilation cost and save: an MMDiT's training step each way, side by side in one process.

    python -m ops.bench.layouts [--blocks 12] [--heads 12] [--resolution 256] [--batch-size 8] [--repeats 5] [--compile]

Prints, per layout: seconds a step (median; forward and backward pass without the optimizer), the memory that the forward
pass leaves for the backward pass, and the most that the step holds at once, gradients included; both beyond weights and
inputs, and all as ratios to plain training. Unsharded: gathered weights would hide what is compared. On a GPU that is the
allocator's account. On CPU live tensors are followed, operation by operation; inside compiled code they cannot be seen,
and no figure is given.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from trainer.config import MMDiTConfig
from trainer.live_tensors import LiveTensors
from trainer.models.condition import Condition
from trainer.models.mmdit import MMDiT
from trainer.parallel.apply import apply_activation_checkpointing, apply_compile, autocast

MIB = 1 << 20
LATENT_CHANNELS, TEXT_TOKENS, TEXT_WIDTH = 16, 77, 768
CODEC_DOWNSAMPLING = 8

Mode = Literal["none", "selective", "full"]


@dataclass
class Layout:
    forward: Callable[[], Tensor]
    """Returns the loss."""
    zero_grad: Callable[[], None]
    compiled: bool
    seconds: list[float] = field(default_factory=list)
    kept_bytes: int = 0
    peak_bytes: int = 0
    """0: not measured."""

    def step(self, after_forward: Callable[[], None] = lambda: None) -> None:
        loss = self.forward()
        after_forward()
        loss.backward()
        self.zero_grad()

    def measure_memory(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

            def kept() -> None:
                self.kept_bytes = torch.cuda.memory_allocated() - before

            self.step(kept)
            self.peak_bytes = torch.cuda.max_memory_allocated() - before
        elif not self.compiled:
            with LiveTensors() as live:

                def kept() -> None:
                    self.kept_bytes = live.bytes

                self.step(kept)
            self.peak_bytes = live.peak_bytes


def build(options: argparse.Namespace, mode: Mode, compiled: bool, device: torch.device) -> Layout:
    torch.manual_seed(0)
    config = MMDiTConfig(num_blocks=options.blocks, num_heads=options.heads)
    model = MMDiT(config, latent_channels=LATENT_CHANNELS, token_width=TEXT_WIDTH, pooled_width=TEXT_WIDTH)
    model.init_weights()
    for parameter in model.parameters():  # as after some training: at its beginning a block's output is zero
        nn.init.normal_(parameter, std=0.02)
    model.to(device)
    blocks = list(model.blocks)
    apply_activation_checkpointing(blocks, mode)
    if compiled:
        apply_compile(blocks)
    size, side = options.batch_size, options.resolution // CODEC_DOWNSAMPLING
    zt_BCHW = torch.randn(size, LATENT_CHANNELS, side, side, device=device)
    t_B = torch.rand(size, device=device) * 1000
    text = Condition(
        torch.randn(size, TEXT_TOKENS, TEXT_WIDTH, device=device), torch.randn(size, TEXT_WIDTH, device=device)
    )

    def forward() -> Tensor:
        with autocast(device):
            prediction: Tensor = model(zt_BCHW, t_B, text)
        return prediction.float().square().mean()

    return Layout(forward, model.zero_grad, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12, help="of 64 channels each")
    parser.add_argument("--resolution", type=int, default=256, help="in pixels, of an autoencoder that divides by 8")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="each way compiled too")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layouts: dict[str, Layout] = {}
    for compiled in (False, True) if options.compile else (False,):
        for mode in get_args(Mode):
            name = ("plain" if mode == "none" else mode) + (", compiled" if compiled else "")
            layouts[name] = build(options, mode, compiled, device)
    for layout in layouts.values():
        layout.step()  # warms up, and compiles
        layout.measure_memory(device)
    for _ in range(options.repeats):
        for layout in layouts.values():  # in turns, so that noise of the machine falls on all alike
            started = time.perf_counter()
            layout.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            layout.seconds.append(time.perf_counter() - started)

    plain = layouts["plain"]
    plain_s = statistics.median(plain.seconds)
    print(
        f"device {device}, {torch.get_num_threads()} thread(s), {options.blocks} blocks of width "
        f"{64 * options.heads}, batch {options.batch_size}, {options.resolution} px"
    )
    for name, layout in layouts.items():
        seconds = statistics.median(layout.seconds)
        line = f"{name:20s} {seconds * 1000:9.1f} ms a step  x {seconds / plain_s:.2f}"
        if layout.peak_bytes:
            line += f"  kept {layout.kept_bytes / MIB:8.1f} MiB  x {layout.kept_bytes / plain.kept_bytes:.2f}"
            line += f"  peak {layout.peak_bytes / MIB:8.1f} MiB  x {layout.peak_bytes / plain.peak_bytes:.2f}"
        print(line)


if __name__ == "__main__":
    main()
