"""Run folders of latent diffusion with a checkpoint of random weights, as if trained: to export, sample and compare."""

from pathlib import Path

import torch
from torch import Tensor

from tests.tiny import tiny
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.config_text import to_yaml
from trainer.tasks.latent_diffusion import TextToImage

SMALL_MMDIT = (
    "{kind: mmdit, num_blocks: 2, num_heads: 2, head_dim: 8, patch_size: 1, position_grid: 16, base_grid: 8%s}"
)


def small(*overrides: str) -> RunConfig:
    """Samples of 4 steps, so that they are soon drawn."""
    flow = not any("ddpm" in override for override in overrides)
    samples = f"samples={{sampler: {'euler' if flow else 'ddim'}, num_steps: 5, guidance_scale: 2.0}}"
    return tiny(samples, *overrides)


def module_of(config: RunConfig, seed: int, scale: float = 0.05) -> TextToImage:
    """Away by `scale` from the zeros that blocks begin with: then every tensor tells in a picture."""
    assert isinstance(config.task, LatentDiffusionConfig)
    torch.manual_seed(seed)
    module = TextToImage(config.task)
    module.init_weights()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return module


def run_of(folder: Path, config: RunConfig, *, step: int = 7, scale: float = 0.05) -> Path:
    """Its average is not its weights."""
    weights, average = module_of(config, 1, scale), module_of(config, 2, scale)
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in weights.state_dict().items()}
    tensors |= {f"ema.{name}": parameter.detach() for name, parameter in average.named_parameters()}
    tensors |= {"optim.step": torch.zeros(()), "task.other": torch.zeros(3)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    manager = CheckpointManager(f"{folder}/checkpoints", keep_last=2, config_digest="x", code_version="")
    manager.save(tensors, step=step, images_seen=8 * step, state={})
    return folder
