"""Export a trained latent network as the folder that `LatentLPIPSConfig.url` loads."""

import torch

from trainer.errors import UserError
from trainer.export.target import free_target, put_in_place
from trainer.export.weights import config_of, pixels_of, read_average
from trainer.models.latent_network_files import LatentNetworkInfo, write_latent_network
from trainer.tasks.latent_network import LatentNetworkTask
from trainer.tensors import pixels_to_images


@torch.no_grad()
def export_latent_network(run_dir: str, out: str, *, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Write `config.json` and `model.safetensors` of a run's averaged latent network, without its classifier; returns what
    was measured: `accuracy` is on up to 512 images of the run's own data, which it has seen. The heads are not written, so
    whoever reads it takes uniform ones.

    Raises:
        UserError: not a run of the latent_network task, no checkpoint, or `out` holds something else.
    """
    config = config_of(run_dir)
    if config.task.kind != "latent_network":
        raise UserError(f"{run_dir}: a run of {config.task.kind}; a latent network comes of the latent_network task")
    target = free_target(out)
    task = LatentNetworkTask(config, torch.device("cpu"))
    step = read_average(run_dir, task.module)
    info = LatentNetworkInfo(
        latent_channels=task.module.latent_channels,
        model=config.task.model,
        scaling_factor=task.codec.scaling_factor,
        shift_factor=task.codec.shift_factor,
        resolution=config.phases[-1].resolution,
    )
    network = task.module.eval()
    pixels, samples = pixels_of(config)
    latents = [task.codec.encode(pixels_to_images(chunk)) for chunk in pixels.split(64)]
    classes = torch.cat([network(chunk).argmax(1) for chunk in latents])
    labels = torch.tensor([sample.label for sample in samples])
    put_in_place(target, lambda folder: write_latent_network(folder, info, network, dtype))
    return {"step": step, "accuracy": (classes == labels).double().mean().item()}
