"""`loupe evaluate autoencoder`: its settings, the measurement of a codec, and what is written of it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from trainer.config import LPIPSConfig
from trainer.config.perceptual import LPIPSNetwork
from trainer.errors import UserError
from trainer.evaluate import codec_report
from trainer.evaluate.chosen_images import Chosen, Images
from trainer.evaluate.codec_report import Progress
from trainer.evaluate.reconstruction import MEANING, SSIM_WINDOW, Judges, check_side, measure, of_codec
from trainer.models.autoencoders import Codec
from trainer.models.efficientnet import load_efficientnet_lite0
from trainer.models.lpips_weights import build_lpips
from trainer.pictures import reconstruction_grid

NUMBERS, PICTURE = "evaluation.json", "reconstructions.png"
FILES = (NUMBERS, PICTURE)
SHOWN = 8
"""Images in the picture."""


@dataclass(frozen=True)
class Settings:
    """What is measured. They go into the report, so the same settings repeat it."""

    size: int = 256
    """Of the images: square centre crops, in pixels."""
    count: int = 256
    seed: int = 0
    """Chooses the images."""
    batch_size: int = 8
    lpips_network: str | None = None
    lpips_weights: str | None = None
    """Either of the two: LPIPS is measured."""
    lpips_heads: str | None = None
    features_weights: str | None = None
    """Absent: no Frechet distance."""

    @property
    def network(self) -> LPIPSNetwork | None:
        """Of LPIPS."""
        if self.lpips_network is None and self.lpips_weights is None:
            return None
        named = self.lpips_network or "vgg16"
        return next(network for network in get_args(LPIPSNetwork) if network == named)

    def check(self, codec: Codec) -> None:
        """Raises:
        UserError: the images do not go with the codec, or are too small to be compared.
        """
        codec_report.check_size(self.size, codec.downsampling, smallest_px=SSIM_WINDOW)
        check_side(self.size, "--size", self.network)
        if self.lpips_heads and not self.network:
            raise UserError("--lpips-heads: goes with --lpips-weights; give both, or neither")

    def without(self) -> list[str]:
        """What is not measured, in lines."""
        given = {
            "LPIPS: no --lpips-weights": self.network,
            "the Frechet distance: no --features-weights": self.features_weights,
        }
        return [f"without {what}" for what, value in given.items() if value is None]


@dataclass
class Evaluation:
    numbers: dict[str, Any]
    pictures: dict[str, bytes]
    """File name to PNG."""


def load_judges(settings: Settings) -> Judges:
    """Raises:
    UserError: weights are not there, damaged, or of another network.
    """
    lpips = features = None
    if settings.network:
        config = LPIPSConfig(network=settings.network, url=settings.lpips_weights, heads_url=settings.lpips_heads)
        lpips = build_lpips(config, options=("--lpips-weights", "--lpips-heads"))
    if settings.features_weights is not None:
        features = load_efficientnet_lite0(settings.features_weights)
    return Judges(lpips, features)


def evaluate(
    codec: Codec,
    images: Images,
    settings: Settings,
    judges: Judges,
    *,
    codec_url: str,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Measure, and draw some of the images.

    Raises:
        UserError: fewer than two images can be read, or the codec's reconstructions are not finite.
    """
    settings.check(codec)
    codec, judges = codec.to(device), judges.to(device)
    chosen = Chosen(images, settings.size)
    total = min(settings.count, len(images))

    def batches() -> Iterator[Tensor]:
        for batch in chosen.choose(settings.count, settings.seed, settings.batch_size):
            yield batch
            progress("reconstructing", len(chosen.indices), total)

    measurement = measure(batches(), reconstruct=of_codec(codec), judges=judges, device=device, shown=range(SHOWN))
    if len(measurement) < 2:
        raise UserError(f"{images.url}: {len(measurement)} image can be read, and an evaluation needs 2; give more")
    found = measurement.numbers()
    if found["not_finite"]:
        raise UserError(
            f"{codec_url}: {found['not_finite']} of {found['count']} reconstructions are not finite; this autoencoder cannot "
            f"be measured at {settings.size} px in float32"
        )
    numbers = {
        **found,
        "size": settings.size,
        "judges": judges.numbers(),
        "codec": codec_report.codec_numbers(codec, codec_url),
        "images": chosen.numbers(),
        "settings": asdict(settings),
        "pictures": [PICTURE],
        **codec_report.provenance(device),
        "meaning": MEANING,
    }
    picture = reconstruction_grid(list(measurement.shown.values()))
    return Evaluation(codec_report.plain(numbers), {PICTURE: picture})


def claim(out: str, *, overwrite: bool, dry_run: bool = False) -> Path:
    """`codec_report.claim` of an evaluation."""
    return codec_report.claim(out, FILES, overwrite=overwrite, dry_run=dry_run)


def write(folder: Path, found: Evaluation) -> None:
    """`codec_report.write` of an evaluation."""
    codec_report.write(folder, NUMBERS, found.numbers, found.pictures, FILES)
