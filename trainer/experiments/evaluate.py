"""What an experiment measures of a run, and of the real images it is compared with.

    python -m trainer.experiments.evaluate OUT reference
    python -m trainer.experiments.evaluate OUT RUN

OUT/experiment.json says how much; OUT/reference.npz and OUT/evaluations/RUN.npz hold images, the .json beside each its
figures. Every run samples the same captions from the same noise, so runs are compared in pairs.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images import read_image
from data.reader import open_dataset
from data.transforms import training_image
from trainer.config import InitFromConfig, LatentDiffusionConfig, LPIPSConfig, RunConfig, replace, resolve_url
from trainer.config_text import from_yaml
from trainer.diffusion.guidance import Guidance, guided
from trainer.diffusion.paradigms import FlowOT, Paradigm
from trainer.diffusion.samplers import build_sampler
from trainer.ema import EMA
from trainer.errors import ExitCode, UserError
from trainer.evaluate import metrics
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.condition import Condition
from trainer.models.efficientnet import features_of, load_efficientnet_lite0
from trainer.models.lpips import LPIPS
from trainer.models.lpips_weights import build_lpips
from trainer.parallel.world import init_world
from trainer.rng import normal
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import images_to_pixels, pixels_to_images
from trainer.warm_start import warm_start
from trainer.whole_files import write_whole

NOISE_LEVELS = (0.5, 1.0, 2.0, 4.0)
"""sigma/alpha at which held-out images are noised and estimated in one step."""
BATCH = 64
SAMPLE_SEED = 0
Pixels = NDArray[np.uint8]


# ------------------------------------------------------------------------------------------------------------ experiment


@dataclass(frozen=True)
class Experiment:
    """OUT/experiment.json, as the driver wrote it."""

    out: Path
    size: dict[str, Any]
    features_weights: str
    lpips_weights: str
    run_names: list[str]

    @classmethod
    def read(cls, out: str) -> "Experiment":
        tree = json.loads(Path(out, "experiment.json").read_text(encoding="utf-8"))
        names = [run["name"] for run in tree["runs"]]
        return cls(Path(out), tree["size"], tree["features_weights"], tree["lpips_weights"], names)

    def config(self, name: str) -> RunConfig:
        path = self.out / "configs" / f"{name}.yaml"
        return from_yaml(path.read_text(encoding="utf-8"), source=str(path))

    def lpips(self) -> LPIPS:
        return build_lpips(LPIPSConfig(network="alex_shift_tolerant", url=self.lpips_weights))


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


# ----------------------------------------------------------------------------------------------------------- real images


def real_images(config: RunConfig, first: int, count: int) -> tuple[Pixels, list[str]]:
    """Rows `first`, `first + 1`, ... of the run's dataset, whether it trains on them or not, and their captions."""
    name, source = next(iter(config.data.datasets.items()))
    dataset = open_dataset(resolve_url(source.url), name=name)
    if first + count > dataset.num_samples:
        raise UserError(f"{source.url}: {first + count} images are needed, it has {dataset.num_samples}")
    samples = [dataset.read(i) for i in range(first, first + count)]
    resolution = config.phases[-1].resolution
    pixels = np.stack([training_image(read_image(sample.image), resolution) for sample in samples])
    return pixels, [sample.texts[0] if sample.texts else "" for sample in samples]


def to_images(pixels_NHWC: Pixels) -> Tensor:
    return pixels_to_images(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2))


def to_pixels(images_NCHW: Tensor) -> Pixels:
    return np.ascontiguousarray(images_to_pixels(images_NCHW).permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def encode(codec: Codec, pixels_NHWC: Pixels) -> Tensor:
    return torch.cat([codec.encode(chunk).float() for chunk in to_images(pixels_NHWC).split(BATCH)])


@torch.no_grad()
def decode(codec: Codec, latents_NCHW: Tensor) -> Pixels:
    return np.concatenate([to_pixels(codec.decode(chunk)) for chunk in latents_NCHW.split(BATCH)])


@torch.no_grad()
def lpips_of(lpips: LPIPS, a_NHWC: Pixels, b_NHWC: Pixels) -> float:
    parts = zip(to_images(a_NHWC).split(BATCH), to_images(b_NHWC).split(BATCH), strict=True)
    return float(torch.cat([lpips(a, b) for a, b in parts]).double().mean())


def measure_reference(experiment: Experiment) -> None:
    """Of the real images: what runs are compared with; and what no run can better, the distance of one half of the real
    images from the other, and of the autoencoder's reconstructions from what they reconstruct."""
    size, config = experiment.size, experiment.config(experiment.run_names[0])
    count = size["num_images"]
    network, lpips = load_efficientnet_lite0(experiment.features_weights), experiment.lpips()
    assert isinstance(config.task, LatentDiffusionConfig)
    codec = load_codec(config.task.codec)
    pixels, _ = real_images(config, 0, count)
    others, _ = real_images(config, count, count)
    heldout, _ = real_images(config, size["train_images"], size["heldout_images"])
    features, other_features = features_of(network, pixels).numpy(), features_of(network, others).numpy()
    spectrum = metrics.radial_power_spectrum(pixels)
    other_spectrum = metrics.radial_power_spectrum(others)
    latents = encode(codec, pixels)
    decoded = decode(codec, latents)
    decoded_features = features_of(network, decoded).numpy()
    decoded_spectrum = metrics.radial_power_spectrum(decoded)
    write_arrays(
        experiment.out / "reference.npz", pixels=pixels, features=features, latents=latents.numpy(), spectrum=spectrum,
        heldout=heldout, reconstructed=decoded,
    )  # fmt: skip
    write_figures(experiment.out / "reference.json", {
        "halves": {
            "frechet": metrics.frechet_distance(other_features, features),
            "kernel": metrics.kernel_distance(other_features, features),
            **metrics.spectrum_errors(other_spectrum, spectrum),
            "log_power": other_spectrum.tolist(),
        },
        "reconstructed": {
            "frechet": metrics.frechet_distance(decoded_features, features),
            "kernel": metrics.kernel_distance(decoded_features, features),
            "lpips_same": lpips_of(lpips, decoded, pixels),
            **metrics.spectrum_errors(decoded_spectrum, spectrum),
            "log_power": decoded_spectrum.tolist(),
        },
        "log_power": spectrum.tolist(),
    })  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- a run


def averaged_task(config: RunConfig, run_dir: str) -> LatentDiffusionTask:
    """The run's task with its averaged weights, without its perceptual loss."""
    plain = replace(config, phases=tuple(replace(phase, perceptual=None) for phase in config.phases))
    world = init_world(num_threads=1)
    task = LatentDiffusionTask(plain, world.device)
    warm_start(task.module, EMA(task.module), InitFromConfig(url=run_dir), world)
    task.module.eval()
    return task


def measure_run(experiment: Experiment, name: str) -> None:
    config, size = experiment.config(name), experiment.size
    target = experiment.out / "evaluations" / f"{name}.npz"
    real = read_arrays(experiment.out / "reference.npz")
    task = averaged_task(config, str(experiment.out / "runs" / name))
    resolution = config.phases[-1].resolution
    started = time.perf_counter()
    _, captions = real_images(config, 0, size["num_images"])
    pixels = decode(task.codec, sample(task, captions, size, resolution))
    sampled = time.perf_counter()
    write_arrays(target, pixels=pixels)

    lpips = experiment.lpips()
    features = features_of(load_efficientnet_lite0(experiment.features_weights), pixels).numpy()
    log_power = metrics.radial_power_spectrum(pixels)
    encoded, real_latents = encode(task.codec, pixels).numpy(), real["latents"]
    distances = metrics.squared_distances(encoded, real_latents)
    figures = {
        "name": name,
        "frechet": metrics.frechet_distance(features, real["features"]),
        "kernel": metrics.kernel_distance(features, real["features"]),
        **metrics.spectrum_errors(log_power, real["spectrum"]),
        "latent_same": float(np.diagonal(distances).mean()),
        "latent_nearest": float(distances.min(1).mean()),
        "lpips_same": lpips_of(lpips, pixels, real["pixels"]),
        "lpips_nearest": lpips_of(lpips, pixels, real["pixels"][distances.argmin(1)]),
        **estimate_errors(task, lpips, config, size),
        "log_power": log_power.tolist(),
        "sampling_s": round(sampled - started, 1),
        "measuring_s": round(time.perf_counter() - sampled, 1),
    }
    write_figures(target.with_suffix(".json"), figures)


@torch.no_grad()
def sample(task: LatentDiffusionTask, captions: Sequence[str], size: dict[str, Any], resolution: int) -> Tensor:
    """Latents, as `task.sample_latents` makes them, with the captions encoded once and not at every step."""
    paradigm, side = task.paradigm(resolution), resolution // task.codec.downsampling
    sampler = build_sampler("euler" if isinstance(paradigm, FlowOT) else "ddim")
    assert task.module.text is not None
    latents = []
    for first in range(0, len(captions), BATCH):
        chunk = captions[first : first + BATCH]
        condition = task.module.text(task.text.prepare([*chunk, *[None] * len(chunk)]))
        positions = range(first, first + len(chunk))
        noise = normal(
            SAMPLE_SEED, positions, "sample", (task.codec.latent_channels, side, side), device=torch.device("cpu")
        )

        def predict(zt: Tensor, t_B: Tensor, condition: Condition = condition) -> Tensor:
            out: Tensor = task.module(zt, paradigm.model_time(t_B), condition.first(len(zt)))
            return out.float()

        guidance = Guidance(size["guidance_scale"])
        latents.append(sampler(guided(predict, guidance), paradigm, noise, size["sampling_steps"]))
    return torch.cat(latents)


@torch.no_grad()
def estimate_errors(
    task: LatentDiffusionTask, lpips: LPIPS, config: RunConfig, size: dict[str, Any]
) -> dict[str, float]:
    """One step on held-out images with their captions, at each noise level: the denoising loss, the squared error of z0_hat,
    and the LPIPS of the decoded z0_hat from the decoded z0."""
    resolution = config.phases[-1].resolution
    pixels, captions = real_images(config, size["train_images"], size["heldout_images"])
    z0 = encode(task.codec, pixels)
    truth = decode(task.codec, z0)
    paradigm = task.paradigm(resolution)
    noise = normal(SAMPLE_SEED, range(len(z0)), "noise", z0.shape[1:], device=z0.device)
    out = {}
    for level in NOISE_LEVELS:
        t_B = time_at(paradigm, level).expand(len(z0))
        zt = paradigm.add_noise(z0, noise, t_B)
        prediction = torch.cat([
            task.module(zt[i : i + BATCH], paradigm.model_time(t_B[i : i + BATCH]), task.text.prepare(captions[i : i + BATCH]))
            for i in range(0, len(z0), BATCH)
        ])  # fmt: skip
        z0_hat = paradigm.to_z0(prediction.float(), zt, t_B)
        out[f"denoising_{level:g}"] = float((prediction - paradigm.target(z0, noise, t_B)).square().mean())
        out[f"estimate_latent_{level:g}"] = float((z0_hat - z0).square().mean())
        out[f"estimate_lpips_{level:g}"] = lpips_of(lpips, decode(task.codec, z0_hat), truth)
    return out


def time_at(paradigm: Paradigm, level: float) -> Tensor:
    """The time whose noise level is nearest to `level`, shape (1,)."""
    if isinstance(paradigm, FlowOT):
        return torch.tensor([level / (1.0 + level)])
    times = torch.arange(1000)
    return times[(paradigm.noise_level(times) - level).abs().argmin()][None]


# ------------------------------------------------------------------------------------------------------------- as a process


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the experiment's folder")
    parser.add_argument("run", help="a run's name, or `reference`")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        experiment = Experiment.read(options.out)
        if options.run == "reference":
            measure_reference(experiment)
        else:
            measure_run(experiment, options.run)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(ExitCode.STOP)
    return 0


if __name__ == "__main__":
    sys.exit(main())
