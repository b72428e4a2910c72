"""Run folders to draw with: the demo cut small, with random weights, whose average is not the last step's."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.config_text import to_yaml
from trainer.sampling.options import Options
from trainer.tasks.latent_diffusion import TextToImage

CLASSES = "task.text={kind: classes, num_classes: 4, width: 32}"
PROMPTS = ["dog", "cat", "pencil", "a house", "", "dog"]
SAMPLES = "samples={sampler: euler, num_steps: 3, guidance_scale: 2.0}"


def weights_of(config: RunConfig, seed: int) -> dict[str, torch.Tensor]:
    """Of a module that predicts something: a fresh one predicts zeros."""
    assert isinstance(config.task, LatentDiffusionConfig)
    module, generator = TextToImage(config.task), torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in module.state_dict().items()}


def save(folder: Path, config: RunConfig, *, step: int, average: bool = True) -> str:
    """A checkpoint of `folder`, which becomes a run's; returns its URL."""
    tensors = {f"model.{name}": tensor for name, tensor in weights_of(config, step).items()}
    if average:
        tensors |= {f"ema.{name}": tensor for name, tensor in weights_of(config, step + 1).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    manager = CheckpointManager(f"{folder}/checkpoints", keep_last=2, config_digest="x", code_version="")
    return manager.save(tensors | {"optim.step": torch.zeros(())}, step=step, images_seen=8 * step, state={})


def run_of(folder: Path, *overrides: str, step: int = 7, average: bool = True) -> Path:
    save(folder, tiny(SAMPLES, *overrides), step=step, average=average)
    return folder


def options(source: Path, out: Path | str | None = None, **changes: Any) -> Options:
    """Six small pictures in lots of four, of two steps each."""
    words: dict[str, Any] = {
        "prompts": tuple(PROMPTS),
        "steps": 2,
        "guidance": 2.0,
        "size": (32, 32),
        "lot": 4,
        "batch_size": 4,
    }
    return Options(**{"source": str(source), "out": str(out) if out else None, **words, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Pictures of an output folder, by name."""
    return {p.name: p.read_bytes() for p in (folder / "images").glob("*.png")}
