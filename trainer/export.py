"""Export a trained autoencoder as the folder that diffusers and `CodecConfig.url` load."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from data.images import read_image
from data.reader import open_dataset
from data.transforms import training_image
from trainer import optim, train_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import unique_hold
from trainer.config import RunConfig, resolve_url
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.models.autoencoders import Codec
from trainer.run_folder import CHECKPOINTS, CONFIG, RunFolder
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tensors import pixels_to_images

_STATISTICS_SAMPLES = 512


@torch.no_grad()
def export_autoencoder(run_dir: str, out: str, *, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Write `config.json` and safetensors weights of a run's averaged autoencoder; returns what was measured.

    Scale and shift make the latents of the run's own data zero-mean and of unit variance (Rombach et al. 2022, appendix
    G). The folder appears whole, by rename, in place of an earlier one.

    Raises:
        UserError: not a run of the autoencoder task, no checkpoint, or `out` holds something else.
    """
    folder = RunFolder(run_dir)
    if not folder.exists(CONFIG):
        raise UserError(f"{run_dir}: no run folder ({CONFIG} is missing)")
    config = folder.config()
    if config.task.kind != "autoencoder":
        raise UserError(f"{run_dir}: a run of {config.task.kind}; export takes a run of the autoencoder task")
    target = Path(out)
    if target.exists() and not (target / "config.json").is_file():
        raise UserError(f"{out}: exists and is no autoencoder folder; give another")

    task = AutoencoderTask(config, torch.device("cpu"))
    ema, optimizer = EMA(task.module), optim.build_optimizer(task.module, config.optim)
    manager = CheckpointManager(f"{folder.url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version="")
    restored = manager.restore(train_state.tensors(task, ema, optimizer), hold=unique_hold("export"))
    if restored is None:
        raise UserError(f"{run_dir}: no checkpoint to export; train first")

    with ema.in_place_of_weights():
        autoencoder = task.module.autoencoder.eval()
        images = _images(config)
        raw = torch.cat([autoencoder.encode(chunk).latent_dist.mean for chunk in images.split(64)])
        shift, scale = raw.mean().item(), 1.0 / raw.std().item()
        autoencoder.register_to_config(
            shift_factor=shift, scaling_factor=scale, sample_size=config.phases[-1].resolution
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            nn.Module.to(autoencoder, dtype)  # diffusers' own `to` warns of nothing
            autoencoder.save_pretrained(temporary, safe_serialization=True)
            psnr = _psnr(Codec.load(str(temporary)), images)
            for path in (temporary, *temporary.iterdir()):  # made for this user alone
                path.chmod(0o755 if path.is_dir() else 0o644)
            earlier = temporary.with_name(f"{temporary.name}.old")
            if target.exists():
                target.rename(earlier)
            temporary.rename(target)
            shutil.rmtree(earlier, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {"step": restored.step, "scaling_factor": scale, "shift_factor": shift, "psnr_db": psnr}


def _images(config: RunConfig) -> Tensor:
    """Up to 512 images of the run's first dataset, spread over it: (N, 3, H, W) in [-1, 1]."""
    name, d = next(iter(config.data.datasets.items()))
    dataset = open_dataset(resolve_url(d.url), name=name, max_samples=d.max_samples, cache_dir=config.data.cache_dir)
    count = min(_STATISTICS_SAMPLES, dataset.num_samples)
    resolution = config.phases[-1].resolution
    pixels = [
        training_image(
            read_image(dataset.read(i * dataset.num_samples // count).image, min_side=resolution), resolution
        )
        for i in range(count)
    ]
    return pixels_to_images(torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels]))


def _psnr(codec: Codec, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the written files' reconstructions, in dB, over all pixels."""
    error = [
        (codec.decode(codec.encode(chunk)).clamp(-1, 1) - chunk).square().mean((1, 2, 3)) for chunk in images.split(64)
    ]
    return float(10 * torch.log10(4.0 / torch.cat(error).mean()))
