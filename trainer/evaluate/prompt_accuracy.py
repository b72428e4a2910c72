"""Are prompts obeyed? Each prompt is the caption of a training image; its picture should lie near that image.

The share of generated images for which an image with the prompted caption is among the k nearest training images, by the
Euclidean distance of autoencoder latents. A check that a small run has learnt its data; not a measure of quality.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.images import read_image
from data.reader import Dataset
from data.transforms import training_image
from trainer.config import RunConfig
from trainer.evaluate.sampling import sample_prompts
from trainer.models.autoencoders import Codec
from trainer.parallel.world import World
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import pixels_to_images


def prompt_accuracy(
    generated_NCHW: Tensor, prompts: Sequence[str], training_MCHW: Tensor, captions: Sequence[Sequence[str]], k: int
) -> tuple[float, float]:
    """(accuracy, chance). `captions[m]`: those of training image m. Chance: the same for k images drawn at random."""
    distances_NM = torch.cdist(generated_NCHW.flatten(1).double(), training_MCHW.flatten(1).double())
    nearest_NK = distances_NM.topk(min(k, len(captions)), largest=False).indices.tolist()
    hits = [any(prompt in captions[m] for m in nearest) for prompt, nearest in zip(prompts, nearest_NK, strict=True)]
    chances = [_chance(sum(prompt in c for c in captions), len(captions), k) for prompt in prompts]
    return sum(hits) / len(hits), sum(chances) / len(chances)


def _chance(matching: int, total: int, k: int) -> float:
    """Probability that at least one of `matching` images is among k of `total` drawn without replacement."""
    miss = 1.0
    for i in range(min(k, total)):
        miss *= max(total - matching - i, 0) / (total - i)
    return 1.0 - miss


@torch.no_grad()
def encode_dataset(
    dataset: Dataset, codec: Codec, *, resolution: int, device: torch.device
) -> tuple[Tensor, list[list[str]]]:
    """Latents of all images at their centre crop, (M, C, h, w) on the CPU, and their captions."""
    latents, captions = [], []
    for index in range(dataset.num_samples):
        sample = dataset.read(index)
        pixels = torch.from_numpy(training_image(read_image(sample.image), resolution))
        images = pixels_to_images(pixels.permute(2, 0, 1)[None].to(device))
        latents.append(codec.encode(images).float().cpu())
        captions.append(list(sample.texts))
    return torch.cat(latents), captions


def accuracy_of_run(
    config: RunConfig, task: LatentDiffusionTask, world: World, prompts: Sequence[str], dataset: Dataset
) -> dict[str, float]:
    """Of the weights that the module has now, for `summary.json`. A collective."""
    assert config.prompt_accuracy is not None
    assert config.samples is not None
    resolution, k = config.phases[-1].resolution, config.prompt_accuracy.num_neighbours
    generated = sample_prompts(task, world, prompts, config.samples, resolution=resolution)
    training, captions = encode_dataset(dataset, task.codec, resolution=resolution, device=world.device)
    accuracy, chance = prompt_accuracy(generated, prompts, training, captions, k)
    return {"prompt_accuracy": accuracy, "prompt_accuracy_chance": chance}
