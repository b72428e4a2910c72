"""What needs a CUDA device: `make test-gpu`.

Where a test says something on a CPU as well, it runs there too, in `make test`: bf16 is then the CPU's autocast. So what a
GPU meets first has run before, and tolerances stand on what bf16 does there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch

from tests.distributed.harness import run_ranks
from trainer import rng
from trainer.tasks import autoencoder, latent_diffusion

BOTH = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
CPU = torch.device("cpu")

Precision = Literal["bf16", "tf32", "fp32"]


@contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Within, a task computes in this precision on whatever device: bf16 autocast, or float32 with or without TF32."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for task in (latent_diffusion, autoencoder):
                patch.setattr(task, "autocast", lambda device: autocast(device, name))
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def autocast(device: torch.device, name: Precision = "bf16") -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16")


@contextmanager
def noise_of_the_host() -> Iterator[None]:
    """Within, noise is drawn on the CPU: a GPU's generator draws other numbers from the same seed."""

    def normal(*arguments: Any, device: torch.device) -> torch.Tensor:
        return rng.normal(*arguments, device=CPU).to(device)

    with pytest.MonkeyPatch.context() as patch:
        for task in (latent_diffusion, autoencoder):
            patch.setattr(task, "normal", normal)
        yield


def on_rank(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(world, *arguments)` in a job of one rank on this kind of device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOUPE_DEVICE", device)
        if device == "cpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return run_ranks(1, function, *arguments)[0]
