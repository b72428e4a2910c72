"""The network that E-LatentLPIPS compares features of (Kang et al. 2024, section 3.2): a classifier of latents, to be trained.

Its authors' own weights may not be used commercially. One network goes with one latent space: train one for each
autoencoder. Then

    loupe export runs/latent_network models/latent-lpips
    ... --set task.perceptual='{kind: latent_lpips, url: models/latent-lpips}'

The exported network has uniform heads, 1/C a channel: not calibrated on human judgements, as Kang et al.'s are.
"""

from trainer.config import (
    CheckpointConfig,
    CodecConfig,
    DataConfig,
    DatasetConfig,
    EMAConfig,
    LatentNetworkConfig,
    LatentVGGConfig,
    MetricsConfig,
    OptimConfig,
    PhaseConfig,
    RateScheduleConfig,
    RunConfig,
    SpikeConfig,
)


def latent_network() -> RunConfig:
    """A VGG16 over the latents of ImageNet at 256 px: 90 epochs of 1.28M images.

    Hardware: 8 H100 with 80 GB (128 images a rank); about 3 hours, counted as the paper's recipes are, nine tenths of it the
    frozen encoder. 15M parameters. Kang et al. give the network alone; group norm, optimizer, rate, epochs and label smoothing
    are ours, and no accuracy is promised: it has not been trained at this size. `models/asymmetric-autoencoder`, whose latents
    are Stable Diffusion 1's (for SDXL's: `--set task.codec.url=models/sdxl-vae`), `datasets/imagenet` with labels.
    """
    return RunConfig(
        name="latent_network",
        task=LatentNetworkConfig(codec=CodecConfig(url="models/asymmetric-autoencoder"), num_classes=1000),
        data=DataConfig(
            datasets={"imagenet": DatasetConfig(url="datasets/imagenet")}, random_crop=True, flip_probability=0.5,
            num_workers=12,
        ),
        phases=(
            PhaseConfig(
                name="train", steps=112_600, resolution=256, batch_size=1024, learning_rate=1e-3,
                rate_schedule=RateScheduleConfig(kind="cosine"),
            ),
        ),
        optim=OptimConfig(betas=(0.9, 0.999), weight_decay=0.05, warmup_steps=5000, spikes=SpikeConfig()),
        checkpoint=CheckpointConfig(every_steps=2500),
        metrics=MetricsConfig(every_steps=50),
    )  # fmt: skip


def demo_latent_network() -> RunConfig:
    """A small one over the demo autoencoder's latents at 64 px, on a folder of yours with a folder per class.

    `loupe data build FOLDER runs/classes-data`, then `python launch/slurm.py demo_latent_network --cluster local
    --gpus-per-node 2 --cpu --set task.num_classes=6`. About three minutes on two CPU cores, 0.7M parameters. On 2,527 photos
    of six classes of waste, expect half of the images right, of those held out as of those learned (the largest class is a
    quarter): enough for features, from an autoencoder that has seen emoji alone.
    """
    return RunConfig(
        name="demo_latent_network",
        task=LatentNetworkConfig(
            model=LatentVGGConfig(widths=(32, 64, 96, 128, 128), convs_per_stage=(1, 1, 2, 2, 2), norm_num_groups=8),
            codec=CodecConfig(url="repo://trainer/assets/demo_autoencoder"),
            num_classes=6,
        ),
        data=DataConfig(
            datasets={"classes": DatasetConfig(url="runs/classes-data")}, random_crop=True, flip_probability=0.5
        ),
        phases=(
            PhaseConfig(
                name="train", steps=400, resolution=64, batch_size=64, learning_rate=1e-3, ema_decay=0.99,
                rate_schedule=RateScheduleConfig(kind="cosine"),
            ),
        ),
        optim=OptimConfig(betas=(0.9, 0.99), weight_decay=0.05, warmup_steps=20),
        ema=EMAConfig(start_step=20),
        checkpoint=CheckpointConfig(every_steps=100),
        metrics=MetricsConfig(every_steps=10),
    )  # fmt: skip
