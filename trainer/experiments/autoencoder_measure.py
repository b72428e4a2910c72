"""What the autoencoder experiment measures beside `loupe evaluate autoencoder`: baselines, by the same code, on the same
held-out images.

    python -m trainer.experiments.autoencoder_measure OUT NAME...

Names are of `MEASURED`. Writes OUT/evaluations/NAME/evaluation.json, and passes over those that are there.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import LPIPSConfig
from trainer.errors import ExitCode, UserError
from trainer.evaluate.chosen_images import Chosen, Images
from trainer.evaluate.codec_report import plain, provenance
from trainer.evaluate.reconstruction import Judges, Output, Reconstruct, measure, of_codec
from trainer.experiments import autoencoder_baselines as baselines
from trainer.experiments.taef2 import is_taef2, load_taef2
from trainer.models.autoencoders import Codec
from trainer.models.efficientnet import load_efficientnet_lite0
from trainer.models.lpips_weights import build_lpips
from trainer.recipes.autoencoder_experiment import KL, LPIPS_NETWORK, Photos, Size
from trainer.whole_files import write_whole

SEED = 0
"""Of the order of images, here and in `loupe evaluate`: all are taken."""
BATCH = 8
STATISTICS_IMAGES = 256
"""Training images of each dataset that latents' means and deviations are of."""


@dataclass(frozen=True)
class Experiment:
    """OUT/experiment.json, as the driver wrote it."""

    out: Path
    size: Size
    lpips_weights: str
    features_weights: str
    ceiling: str | None
    photos: Photos

    @classmethod
    def read(cls, out: Path) -> "Experiment":
        tree = json.loads((out / "experiment.json").read_text(encoding="utf-8"))
        return cls(
            out, size_of(tree["size"]), tree["lpips_weights"], tree["features_weights"], tree["ceiling"],
            Photos.read(str(out / "data")),
        )  # fmt: skip

    def export(self, name: str) -> Path:
        return self.out / "exports" / name

    def evaluation(self, name: str) -> Path:
        return self.out / "evaluations" / name / "evaluation.json"

    def codec(self, name: str) -> Codec:
        return Codec.load(str(self.export(name)))

    def ceiling_codec(self) -> Codec:
        assert self.ceiling is not None
        return load_taef2(self.ceiling) if is_taef2(self.ceiling) else Codec.load(self.ceiling)

    def heldout(self) -> Iterator[Tensor]:
        chosen = Chosen(Images(self.photos.heldout_url), self.size.resolution)
        return chosen.choose(self.photos.heldout, SEED, BATCH)

    def bits(self) -> dict[str, int]:
        """Of an image's latents, by model; continuous ones at 8 bits a value."""
        return {
            "kl": baselines.latent_bits(self.size.latent_channels, self.size.latent_side),
            "vq": baselines.code_bits(self.size.num_codes, self.size.latent_side),
        }


def size_of(tree: dict[str, Any]) -> Size:
    """As JSON has it."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
    return Size(**values)


# ------------------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Measured:
    reconstruct: Reconstruct
    about: Callable[[], dict[str, Any]] = dict
    """More of it, once all images are through."""


def kl_8bit(experiment: Experiment) -> Measured:
    """The KL model with its latents rounded to 8 bits; the levels' range is of training images."""
    codec = experiment.codec(KL)
    mean_C, std_C = latent_statistics(codec, experiment)
    clamped: list[Tensor] = []

    def reconstruct(images_BCHW: Tensor) -> Output:
        raw_BCHW = codec.encode_raw(images_BCHW)
        rounded = baselines.rounded(raw_BCHW, mean_C, std_C)
        far = (raw_BCHW - mean_C[:, None, None]).abs() > baselines.LATENT_RANGE_STD * std_C[:, None, None]
        clamped.append(far.float().mean((1, 2, 3)))
        return Output(codec.decode(codec.raw_to_scaled(rounded)), rounded)

    def about() -> dict[str, Any]:
        levels = {"mean": mean_C.tolist(), "std": std_C.tolist(), "range_std": baselines.LATENT_RANGE_STD}
        return {"bits": experiment.bits()["kl"], "levels": levels, "clamped_share": float(torch.cat(clamped).mean())}

    return Measured(reconstruct, about)


def thumbnail_of(model: str) -> Callable[[Experiment], Measured]:
    def build(experiment: Experiment) -> Measured:
        budget = experiment.bits()[model]
        side = baselines.thumbnail_side(budget)
        bits = 3 * baselines.BITS_A_VALUE * side * side
        return Measured(
            lambda images: baselines.thumbnail(images, budget), lambda: {"bits": bits, "budget": budget, "side": side}
        )

    return build


def webp_of(model: str) -> Callable[[Experiment], Measured]:
    def build(experiment: Experiment) -> Measured:
        budget, sizes = experiment.bits()[model], list[int]()

        def reconstruct(images_BCHW: Tensor) -> Tensor:
            images, num_bytes = baselines.webp_batch(images_BCHW, budget // 8)
            sizes.extend(num_bytes)
            return images

        return Measured(reconstruct, lambda: {
            "bits": 8 * statistics.fmean(sizes), "budget": budget, "too_large": sum(8 * size > budget for size in sizes),
        })  # fmt: skip

    return build


def ceiling(experiment: Experiment) -> Measured:
    """The pre-trained autoencoder, its latents not rounded."""
    codec = experiment.ceiling_codec()
    side = experiment.size.resolution // codec.downsampling
    return Measured(of_codec(codec), lambda: {
        "values": codec.latent_channels * side * side,
        "latent_channels": codec.latent_channels,
        "parameters": sum(p.numel() for p in codec.vae.parameters()),
    })  # fmt: skip


MEASURED: Mapping[str, Callable[[Experiment], Measured]] = {
    "kl_8bit": kl_8bit,
    "thumbnail_kl": thumbnail_of("kl"),
    "thumbnail_vq": thumbnail_of("vq"),
    "webp_kl": webp_of("kl"),
    "webp_vq": webp_of("vq"),
    "ceiling": ceiling,
}


def reconstruction_of(experiment: Experiment, name: str) -> Reconstruct:
    """Of a baseline, or of a run's export."""
    return MEASURED[name](experiment).reconstruct if name in MEASURED else of_codec(experiment.codec(name))


@torch.no_grad()
def latent_statistics(codec: Codec, experiment: Experiment) -> tuple[Tensor, Tensor]:
    """Mean and deviation by channel of training images' raw latents."""
    latents = []
    for dataset in experiment.photos.datasets().values():
        images = Images(dataset.url)
        chosen = Chosen(images, experiment.size.resolution)
        count = min(STATISTICS_IMAGES, len(images))
        latents += [codec.encode_raw(batch) for batch in chosen.choose(count, SEED, BATCH)]
    std_C, mean_C = torch.std_mean(torch.cat(latents), (0, 2, 3))
    return mean_C, std_C


def judges_of(experiment: Experiment) -> Judges:
    lpips = build_lpips(LPIPSConfig(network=LPIPS_NETWORK, url=experiment.lpips_weights))
    return Judges(lpips, load_efficientnet_lite0(experiment.features_weights))


def measure_one(experiment: Experiment, name: str, judges: Judges) -> None:
    measured = MEASURED[name](experiment)
    numbers = measure(experiment.heldout(), reconstruct=measured.reconstruct, judges=judges, shown=()).numbers()
    tree = plain({
        **numbers, "size": experiment.size.resolution, "seed": SEED, **measured.about(),
        **provenance(torch.device("cpu")),
    })  # fmt: skip
    path = experiment.evaluation(name)
    write_whole(path, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the experiment's folder")
    parser.add_argument("names", nargs="+", choices=sorted(MEASURED), metavar="NAME")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        experiment = Experiment.read(Path(options.out))
        judges = judges_of(experiment)
        for name in options.names:
            if not experiment.evaluation(name).exists():
                measure_one(experiment, name, judges)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(ExitCode.STOP)
    return 0


if __name__ == "__main__":
    sys.exit(main())
