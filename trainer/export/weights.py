"""A run's newest weights, averaged or raw, as an export reads them."""

import torch
from torch import Tensor, nn

from data.images import ImageError, read_image
from data.reader import open_dataset
from data.schema import Sample
from data.transforms import training_image
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.checkpoint.retention import unique_hold
from trainer.config import RunConfig, resolve_url
from trainer.errors import UserError
from trainer.run_folder import CHECKPOINTS, CONFIG, RunFolder
from trainer.sampling.weights import by_stored_name

_STATISTICS_SAMPLES, _STATISTICS_PIXELS = 512, 512 * 128 * 128
"""Images that are encoded at most, and their pixels: of large images fewer say as much."""


def config_of(run_dir: str) -> RunConfig:
    folder = RunFolder(run_dir)
    if not folder.exists(CONFIG):
        raise UserError(f"{run_dir}: no run folder ({CONFIG} is missing)")
    return folder.config()


def read_average(run_dir: str, module: nn.Module, *, weights: str = "ema") -> int:
    """Fill the module with the newest checkpoint's averaged weights, or with `raw` those of the last step, and nothing else is
    read; returns its step."""
    targets = module.state_dict()

    def choose(index: Index, where: str) -> dict[str, Tensor]:
        averaged = {name for name in targets if weights == "ema" and f"ema.{name}" in index.tensors}
        names = {name: f"ema.{name}" if name in averaged else f"model.{name}" for name in targets}
        return by_stored_name(index, where, names, targets, mend="export with the code that wrote it")

    restored = manager_of(run_dir).read(choose, hold=unique_hold("export"))
    if restored is None:
        raise UserError(f"{run_dir}: no checkpoint to export; train first")
    return restored.step


def manager_of(run_dir: str) -> CheckpointManager:
    return CheckpointManager(
        f"{RunFolder(run_dir).url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version=""
    )


def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """To what is written, and stays in float32."""
    for name, parameter in module.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not parameter.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name}: holds values that are not finite in {kind}; take --dtype float32, and if they are not "
                            "finite in that either, the run has diverged: look at its metrics")  # fmt: skip


def pixels_of(config: RunConfig) -> tuple[Tensor, list[Sample]]:
    """Up to 512 images of the run's first dataset, spread over it, uint8 (N, 3, H, W); and their rows. Unreadable ones, which
    training has counted, are passed over.

    Raises:
        UserError: none can be read.
    """
    name, d = next(iter(config.data.datasets.items()))
    dataset = open_dataset(resolve_url(d.url), name=name, max_samples=d.max_samples, cache_dir=config.data.cache_dir)
    resolution = config.phases[-1].resolution
    count = min(_STATISTICS_SAMPLES, max(1, _STATISTICS_PIXELS // resolution**2), dataset.num_samples)
    samples, pixels = [], []
    for i in range(count):
        sample = dataset.read(i * dataset.num_samples // count)
        try:
            image = read_image(sample.image, min_side=resolution)
        except ImageError:
            continue
        samples.append(sample)
        pixels.append(torch.from_numpy(training_image(image, resolution)).permute(2, 0, 1))
    if not pixels:
        raise UserError(f"data.datasets.{name}: none of {count} images can be read, and scale and shift are measured on "
                        "them; look at it with `loupe data verify`")  # fmt: skip
    return torch.stack(pixels), samples
