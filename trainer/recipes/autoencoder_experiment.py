"""The runs of `loupe experiment autoencoder`: small autoencoders of photos that two CPU cores train. No torch.

Two of them at length, one with continuous latents and one with a codebook; and short ones from scratch that each lack a term
of the loss or have one more. All see the same images in the same order. Last, latent diffusion with LPL on the first.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.config import (
    AutoencoderConfig,
    ByteTextConfig,
    CheckpointConfig,
    CodebookConfig,
    CodecConfig,
    DataConfig,
    DatasetConfig,
    DiscriminatorConfig,
    EMAConfig,
    EquivarianceConfig,
    KLModelConfig,
    LPIPSConfig,
    LPLConfig,
    MetricsConfig,
    OptimConfig,
    OutlierPenaltyConfig,
    ParallelConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    ReconstructionsConfig,
    RunConfig,
    VQModelConfig,
    replace,
)
from trainer.config_text import suggest
from trainer.errors import UserError
from trainer.recipes.demo import demo

LPIPS_NETWORK = "alex_shift_tolerant"
KL, VQ, LPL = "kl", "vq", "lpl"
ABLATION, VQ_ABLATION = "all", "vq_all"
"""The short runs that the others of their group are compared with."""


@dataclass(frozen=True)
class Size:
    """How much of everything. Seconds: docs/experiments/autoencoder.md."""

    resolution: int = 128
    low_batch_size: int = 16
    low_steps: int = 950
    """First, at half of the resolution: a quarter of the cost of an image."""
    batch_size: int = 8
    steps: int = 320
    """Then, of each of the two long runs."""
    ablation_low_batch_size: int = 12
    ablation_low_steps: int = 200
    ablation_batch_size: int = 6
    ablation_steps: int = 40
    settle_share: float = 0.4
    """Of the later steps, at the end, at `settle_rate`."""
    learning_rate: float = 1.5e-3
    settle_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    """Of the autoencoder. The default, (0.5, 0.9), is for long games with a discriminator; these learn faster from scratch."""
    warmup_steps: int = 50
    lpips_weight: float = 0.3
    """In short runs 1.0 gave 1.7 dB less PSNR than this, and an LPIPS smaller by 0.02."""
    ema_decay: float = 0.99
    ablation_ema_decay: float = 0.97
    """A short run's average has to forget its beginning sooner."""
    block_out_channels: tuple[int, ...] = (16, 32, 64, 128)
    norm_num_groups: int = 8
    latent_channels: int = 4
    num_codes: int = 1024
    restart_below: float = 0.1
    """Choices a step, by running count: a code with fewer is dead. A step has batch_size latents' pixels."""
    restart_every_steps: int = 20
    discriminator_width: int = 32
    discriminator_layers: int = 3
    discriminator_weight: float = 0.1
    """A fifth of the default: at rates of 1e-3 a young discriminator of weight 0.5 undid a third of the reconstruction."""
    discriminator_from: float = 0.6
    """Share of the steps after which it begins."""
    heldout_images: int = 96
    evaluate_every_steps: int = 400
    lpl_steps: int = 60
    lpl_batch_size: int = 16
    grid: int = 8
    """Held-out images shown."""
    threads: int = 1
    """Of a long run, and cores that it takes; two runs of one thread each wait less than one of two."""

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def latent_side(self) -> int:
        return self.resolution // self.downsampling

    @property
    def latent_values(self) -> int:
        return self.latent_channels * self.latent_side**2


FULL = Size()
SMOKE = Size(
    resolution=64, low_batch_size=4, low_steps=2, batch_size=4, steps=2, ablation_low_batch_size=4, ablation_low_steps=1,
    ablation_steps=1, ablation_batch_size=4, warmup_steps=1,
    block_out_channels=(8, 8, 8, 16), num_codes=16, discriminator_width=8, discriminator_layers=1, heldout_images=6,
    evaluate_every_steps=8, lpl_steps=2, lpl_batch_size=4, grid=3,
)  # fmt: skip
"""Every part of the path in seconds; its figures mean nothing."""


@dataclass(frozen=True)
class Photos:
    """As `loupe data split` builds them."""

    folder: str
    train: Mapping[str, int]
    """Images of each dataset."""
    heldout: int

    @classmethod
    def read(cls, folder: str) -> "Photos":
        tree = json.loads(Path(folder, "split.json").read_text(encoding="utf-8"))
        return cls(folder, {name: row["images"] for name, row in tree["train"].items()}, tree["heldout"])

    @property
    def heldout_url(self) -> str:
        return os.path.join(self.folder, "heldout")

    def datasets(self) -> dict[str, DatasetConfig]:
        return {name: DatasetConfig(url=os.path.join(self.folder, "train", name)) for name in self.train}

    def mix(self) -> dict[str, float]:
        """By the square root of their sizes, as the held-out ones are: else the larger folder would be nearly all."""
        return {name: round(count**0.5, 3) for name, count in self.train.items()}


@dataclass(frozen=True)
class Variant:
    """A run, and how it differs from the first of its group."""

    name: str
    label: str
    """In the report."""
    group: Literal["main", "ablation", "codebook", "lpl"]
    cost: float = 1.0
    """Seconds of a step over `all`'s, about; for estimates before anything is measured."""
    task: Mapping[str, object] = field(default_factory=dict)
    """Fields of the task that differ."""
    codebook: Mapping[str, object] = field(default_factory=dict)
    """Likewise."""
    seed: int = 0

    @property
    def is_vq(self) -> bool:
        return self.name.startswith(VQ)


VARIANTS = (
    Variant(KL, "KL, continuous", "main"),
    Variant(VQ, "VQ, codebook", "main"),
    Variant(ABLATION, "all terms", "ablation"),
    Variant("all_again", "all terms, another seed", "ablation", seed=1),
    Variant("no_l1", "without L1", "ablation", task={"pixel_weight": 0.0}),
    Variant("no_lpips", "without LPIPS", "ablation", 0.7, task={"lpips": None}),
    Variant("no_discriminator", "without discriminator", "ablation", 0.9, task={"discriminator": None}),
    Variant("no_kl", "without KL", "ablation", task={"kl_weight": 0.0}),
    Variant("outliers", "with the outlier penalty", "ablation", 1.2, task={"outliers": OutlierPenaltyConfig()}),
    Variant("equivariance", "with equivariance", "ablation", 1.5, task={"equivariance": EquivarianceConfig()}),
    Variant(VQ_ABLATION, "VQ, all terms", "codebook"),
    Variant("vq_no_commitment", "VQ, without commitment", "codebook", codebook={"commitment_weight": 0.0}),
    Variant("vq_no_restart", "VQ, without restarts of dead codes", "codebook", codebook={"restart_below": 0.0}),
    Variant("vq_gradient", "VQ, codes by the codebook loss, no restarts", "codebook",
            codebook={"restart_below": 0.0, "update": "gradient"}),
    Variant(LPL, "latent diffusion with LPL, on the KL model", "lpl", 1.0),
)  # fmt: skip
BY_NAME = {variant.name: variant for variant in VARIANTS}


def config_of(variant: Variant, size: Size, photos: Photos, *, lpips_weights: str | None, exports: str) -> RunConfig:
    """The run of a variant.

    Args:
        lpips_weights: file of the shift-tolerant AlexNet's.
        exports: folder in which `kl` is an export of that run.
    """
    if variant.name == LPL:
        return lpl(size, photos, os.path.join(exports, KL))
    recipe = vq if variant.is_vq else kl
    if variant.group == "main":
        return recipe(size, photos, lpips_weights)
    run = recipe(
        dataclasses.replace(
            size,
            low_steps=size.ablation_low_steps,
            low_batch_size=size.ablation_low_batch_size,
            steps=size.ablation_steps,
            batch_size=size.ablation_batch_size,
            ema_decay=size.ablation_ema_decay,
            threads=1,
        ),
        photos,
        lpips_weights,
    )
    task = run.task
    assert isinstance(task, AutoencoderConfig)
    if variant.codebook:
        assert isinstance(task.model, VQModelConfig)
        task = replace(task, model=replace(task.model, codebook=replace(task.model.codebook, **variant.codebook)))
    return replace(run, name=variant.name, seed=variant.seed, task=replace(task, **variant.task), reconstructions=None)


def kl(size: Size, photos: Photos, lpips_weights: str | None) -> RunConfig:
    """f8, 4 channels, diffusers' `AutoencoderKL`: L1 + LPIPS + PatchGAN from 60 % of the steps + a weak KL penalty.

    `loupe experiment autoencoder --photos FOLDER --only kl --features-weights FILE --lpips-weights FILE`, on two CPU cores;
    minutes and PSNR: docs/experiments/autoencoder.md, whose first table is this run's.
    """
    model = KLModelConfig(
        block_out_channels=size.block_out_channels, latent_channels=size.latent_channels, norm_num_groups=size.norm_num_groups,
    )  # fmt: skip
    return _autoencoder(KL, size, photos, _task(model, size, lpips_weights))


def vq(size: Size, photos: Photos, lpips_weights: str | None) -> RunConfig:
    """The same with diffusers' `VQModel`: 1,024 codes of 4 channels, moved by running means, dead ones restarted.

    `loupe experiment autoencoder --photos FOLDER --only vq --features-weights FILE --lpips-weights FILE`, on two CPU cores;
    minutes and PSNR: docs/experiments/autoencoder.md.
    """
    codebook = CodebookConfig(
        size=size.num_codes,
        update="ema",
        restart_below=size.restart_below,
        restart_every_steps=size.restart_every_steps,
    )
    model = VQModelConfig(
        block_out_channels=size.block_out_channels, latent_channels=size.latent_channels, norm_num_groups=size.norm_num_groups,
        codebook=codebook,
    )  # fmt: skip
    return _autoencoder(VQ, size, photos, _task(model, size, lpips_weights))


def _task(model: KLModelConfig | VQModelConfig, size: Size, lpips_weights: str | None) -> AutoencoderConfig:
    discriminator = DiscriminatorConfig(
        start_step=int((size.low_steps + size.steps) * size.discriminator_from), width=size.discriminator_width,
        num_layers=size.discriminator_layers, weight=size.discriminator_weight,
    )  # fmt: skip
    lpips = LPIPSConfig(network=LPIPS_NETWORK, url=lpips_weights)
    return AutoencoderConfig(model=model, lpips=lpips, lpips_weight=size.lpips_weight, discriminator=discriminator)


def _autoencoder(name: str, size: Size, photos: Photos, task: AutoencoderConfig) -> RunConfig:
    settle = int(size.steps * size.settle_share)
    low, full = (size.resolution // 2, size.low_batch_size), (size.resolution, size.batch_size)
    schedule = {
        "low_resolution": (size.low_steps, *low, size.learning_rate),
        "full_resolution": (size.steps - settle, *full, size.learning_rate),
        "settle": (settle, *full, size.settle_rate),
    }
    phases = tuple(
        PhaseConfig(
            name=phase, steps=steps, resolution=resolution, batch_size=batch_size, learning_rate=rate,
            ema_decay=size.ema_decay, data_mix=photos.mix(),
        )
        for phase, (steps, resolution, batch_size, rate) in schedule.items() if steps
    )  # fmt: skip
    return RunConfig(
        name=name,
        task=task,
        data=DataConfig(datasets=photos.datasets(), random_crop=True, flip_probability=0.5, num_workers=0),
        phases=phases,
        optim=OptimConfig(betas=size.betas, weight_decay=0.0, warmup_steps=size.warmup_steps),
        ema=EMAConfig(),
        parallel=ParallelConfig(num_threads=size.threads),
        checkpoint=CheckpointConfig(every_steps=200, keep_last=2),
        metrics=MetricsConfig(every_steps=10),
        reconstructions=ReconstructionsConfig(
            every_steps=size.evaluate_every_steps, count=photos.heldout, grid=size.grid,
            dataset=DatasetConfig(url=photos.heldout_url),
        ),
    )  # fmt: skip


def lpl(size: Size, photos: Photos, codec_url: str) -> RunConfig:
    """The demo's model on the photos' captions, flow matching with LPL from the first step, over the latents of a trained
    autoencoder: to see that LPL runs on it, not how well it does."""
    run = demo()
    task = run.task
    assert task.kind == "latent_diffusion"
    assert task.model.kind == "mmdit"
    model = replace(task.model, position_grid=max(task.model.position_grid, size.latent_side))
    codec = CodecConfig(url=codec_url, latent_channels=size.latent_channels, downsampling=size.downsampling)
    phase = PhaseConfig(
        name="perceptual", steps=size.lpl_steps, resolution=size.resolution, batch_size=size.lpl_batch_size,
        learning_rate=5e-4, ema_decay=0.9, data_mix=photos.mix(), perceptual=PhasePerceptualConfig(),
    )  # fmt: skip
    return RunConfig(
        name=LPL,
        task=replace(
            task, model=model, codec=codec, perceptual=LPLConfig(tau_reference_px=size.resolution),
            text=ByteTextConfig(max_bytes=96, width=128, num_blocks=2, num_heads=4),
        ),
        data=DataConfig(datasets=photos.datasets(), random_crop=True, flip_probability=0.5, num_workers=0),
        phases=(phase,),
        optim=OptimConfig(betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=10),
        parallel=ParallelConfig(num_threads=1),
        checkpoint=CheckpointConfig(every_steps=50, keep_last=2),
        metrics=MetricsConfig(every_steps=2),
    )  # fmt: skip


def chosen(names: tuple[str, ...]) -> tuple[Variant, ...]:
    """The variants of these names, all when there are none, in order; with what others of them need.

    Raises:
        UserError: no such variant.
    """
    for name in names:
        if name not in BY_NAME:
            raise UserError(f"--only {name}: no such run{suggest(name, BY_NAME)}")
    needed = {*names, KL} if LPL in names else set(names)
    return tuple(variant for variant in VARIANTS if not names or variant.name in needed)
