"""The demo: the whole service at a size that two CPU cores train in minutes; its autoencoder; and both on photos of yours."""

from trainer.config import (
    AutoencoderConfig,
    ByteTextConfig,
    CheckpointConfig,
    CodecConfig,
    DataConfig,
    DatasetConfig,
    DiscriminatorConfig,
    EMAConfig,
    InitFromConfig,
    KLModelConfig,
    LatentDiffusionConfig,
    LPIPSConfig,
    LPLConfig,
    MetricsConfig,
    MMDiTConfig,
    OptimConfig,
    ParadigmConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    PromptAccuracyConfig,
    ReconstructionsConfig,
    RunConfig,
    SamplesConfig,
    replace,
)


def demo() -> RunConfig:
    """Flow matching on 3-D emoji with their names: 32 px, then 64 px, then 64 px with the latent perceptual loss.

    `make demo`, or `python launch/slurm.py demo --cluster local --gpus-per-node 2 --cpu`. Seven minutes on two CPU cores,
    2.7M parameters, 96 images. Expect a prompt accuracy of 100 % (chance 5 %) and a denoising loss of about 0.2.
    """
    return RunConfig(
        name="demo",
        task=LatentDiffusionConfig(
            model=MMDiTConfig(
                num_blocks=4, num_heads=4, head_dim=32, patch_size=1, position_grid=16, base_grid=8
            ),
            text=ByteTextConfig(max_bytes=48, width=128, num_blocks=2, num_heads=4),
            codec=CodecConfig(url="repo://trainer/assets/demo_autoencoder"),
            paradigm=ParadigmConfig(kind="flow"),
            perceptual=LPLConfig(tau_reference_px=64),
        ),
        data=DataConfig(
            datasets={"emoji": DatasetConfig(url="repo://data/assets/emoji_64", max_samples=96)}, num_workers=1
        ),
        phases=(
            PhaseConfig(name="low_resolution", steps=120, resolution=32, batch_size=64, learning_rate=2e-3, ema_decay=0.98),
            PhaseConfig(name="full_resolution", steps=480, resolution=64, batch_size=64, learning_rate=2e-3, ema_decay=0.99),
            PhaseConfig(
                name="perceptual", steps=60, resolution=64, batch_size=32, learning_rate=5e-4, ema_decay=0.98,
                perceptual=PhasePerceptualConfig(),
            ),
        ),
        optim=OptimConfig(betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=20),
        ema=EMAConfig(start_step=50),
        checkpoint=CheckpointConfig(every_steps=100),
        metrics=MetricsConfig(every_steps=10),
        samples=SamplesConfig(every_steps=200, count=16, sampler="euler", num_steps=25, guidance_scale=2.0),
        prompt_accuracy=PromptAccuracyConfig(num_prompts=64),
    )  # fmt: skip


def photos() -> RunConfig:
    """The demo's model on captioned photos, as `make photos PHOTOS=FOLDER` builds and trains them.

    A few photos and an autoencoder that has seen emoji alone: shows the path, not pictures to be proud of.
    """
    run = demo()
    assert run.task.kind == "latent_diffusion"
    return replace(
        run,
        name="photos",
        task=replace(run.task, text=ByteTextConfig(max_bytes=96, width=128, num_blocks=2, num_heads=4)),
        data=DataConfig(
            datasets={"photos": DatasetConfig(url="runs/photos-data")}, random_crop=True, flip_probability=0.5
        ),
        prompt_accuracy=None,
    )


def demo_autoencoder() -> RunConfig:
    """The demo's own autoencoder: f8, 4 channels, tuned by L1 + LPIPS + PatchGAN + KL on all 1,854 emoji.

    `make demo-autoencoder` fetches LPIPS's weights (shift-tolerant AlexNet) into `models/stlpips`, trains from scratch by
    L1 + KL for 2,500 steps, then this, and puts the export in the place of the shipped one; `make demo-autoencoder
    LPIPS=FILE` takes weights that are there. 1.0M parameters, about half an hour on two CPU cores; figures in
    docs/benchmarks.md.
    """
    return RunConfig(
        name="demo_autoencoder",
        task=AutoencoderConfig(
            model=KLModelConfig(block_out_channels=(24, 32, 64, 64), norm_num_groups=8),
            lpips=LPIPSConfig(network="alex_shift_tolerant", url="models/stlpips/alex_shift_tolerant.pth"),
            # A logit sees 34 of the 64 px. Lightly: at a rate of 1e-3 and the default weight of 0.5 a young discriminator undid
            # a third of the reconstruction within 25 steps.
            discriminator=DiscriminatorConfig(start_step=100, weight=0.1, width=32, num_layers=2),
        ),
        data=DataConfig(datasets={"emoji": DatasetConfig(url="repo://data/assets/emoji_64")}, flip_probability=0.5),
        phases=(
            PhaseConfig(name="train", steps=200, resolution=64, batch_size=32, learning_rate=5e-4, ema_decay=0.98),
            PhaseConfig(name="settle", steps=100, resolution=64, batch_size=32, learning_rate=1e-4, ema_decay=0.98),
        ),
        init_from=InitFromConfig(url="repo://trainer/assets/demo_autoencoder"),
        optim=OptimConfig(betas=(0.5, 0.9), weight_decay=0.0, warmup_steps=20),
        checkpoint=CheckpointConfig(every_steps=100),
        reconstructions=ReconstructionsConfig(every_steps=100),
    )  # fmt: skip


def photos_autoencoder() -> RunConfig:
    """An autoencoder of your own photos at 128 px: f8, 4 channels, L1 + LPIPS + PatchGAN + KL. docs/autoencoder.md, end to end.

    `loupe data split PHOTOS runs/photos-split --size 160`, `make lpips`, then `python launch/slurm.py photos_autoencoder
    --cluster local --gpus-per-node 2 --cpu --set data.datasets.photos.url=runs/photos-split/train/NAME`. 1.9M parameters.
    """
    run = demo_autoencoder()
    assert run.task.kind == "autoencoder"
    return replace(
        run,
        name="photos_autoencoder",
        task=replace(
            run.task,
            model=KLModelConfig(block_out_channels=(32, 48, 64, 96), norm_num_groups=8),
            discriminator=DiscriminatorConfig(start_step=1000, weight=0.1, width=32),
        ),
        init_from=None,
        data=DataConfig(
            datasets={"photos": DatasetConfig(url="runs/photos-split/train/photos")}, random_crop=True, flip_probability=0.5
        ),
        phases=(
            PhaseConfig(name="train", steps=1000, resolution=128, batch_size=16, learning_rate=1e-3, ema_decay=0.99),
            PhaseConfig(name="settle", steps=400, resolution=128, batch_size=16, learning_rate=2e-4, ema_decay=0.99),
        ),
        reconstructions=ReconstructionsConfig(
            every_steps=200, count=64, dataset=DatasetConfig(url="runs/photos-split/heldout")
        ),
    )  # fmt: skip
