"""Other models with the same trainer: Stable Diffusion 3's, a fine-tuning, and the denoisers that the paper compares with.

Hours are counted, not measured, as in `trainer/recipes/paper.py`, of the H100s that each names and with the text encoders'
forward pass. Hyper-parameters are ours where no source is named.
"""

from trainer.config import (
    CheckpointConfig,
    ClassLabelConfig,
    CodecConfig,
    DataConfig,
    DatasetConfig,
    DiTConfig,
    InitFromConfig,
    LatentDiffusionConfig,
    MMDiTConfig,
    OptimConfig,
    ParadigmConfig,
    ParallelConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    PixArtConfig,
    RateScheduleConfig,
    RunConfig,
    SamplesConfig,
    SpikeConfig,
    UNetConfig,
    replace,
)
from trainer.recipes.paper import phase
from trainer.recipes.text_presets import clip_l_text, sd3_text, t5_text

SD3_ROOT = "models/stable-diffusion-3.5-medium"
"""A Stable Diffusion 3.5 medium pipeline as diffusers writes it: vae, transformer, three text encoders and tokenizers."""


def sd3_medium_512() -> RunConfig:
    """Stable Diffusion 3.5 medium's model from scratch: flow matching, 16-channel latents, three text encoders.

    256 px, then 512 px, then 512 px with LPL. Hardware: 64 H100 with 80 GB (16 images a rank at 512 px); about 34 + 19 + 9
    hours. 2.2B parameters. `datasets/images`; codec and text encoders from `models/stable-diffusion-3.5-medium`.
    Widths, blocks, timestep density and caption dropout are SD3's (Esser et al. 2024), the rest ours.
    """
    return RunConfig(
        name="sd3_medium_512",
        task=LatentDiffusionConfig(
            model=MMDiTConfig(
                num_blocks=24, num_heads=24, head_dim=64, num_dual_attention_blocks=13, position_grid=384, base_grid=64
            ),
            text=sd3_text(SD3_ROOT, t5_tokens=77),
            codec=CodecConfig(url=f"{SD3_ROOT}/vae", latent_channels=16),
            paradigm=ParadigmConfig(kind="flow", timestep_density="logit_normal", shift_base_px=256),
            caption_dropout=0.0,  # each encoder is dropped by itself
        ),
        data=DataConfig(datasets={"images": DatasetConfig(url="datasets/images")}, flip_probability=0.5, num_workers=8),
        phases=(
            phase("low_resolution", 500_000, 256),
            phase("full_resolution", 200_000, 512),
            phase("perceptual", 50_000, 512, lpl=True),
        ),
        optim=OptimConfig(weight_decay=0.03, warmup_steps=5000, spikes=SpikeConfig()),
        parallel=ParallelConfig(activation_checkpointing="selective", compile=True),
        checkpoint=CheckpointConfig(every_steps=1000),
        samples=SamplesConfig(every_steps=5000, sampler="euler", num_steps=28, guidance_scale=4.5),
    )  # fmt: skip


def finetune() -> RunConfig:
    """Stable Diffusion 3.5 medium on a folder of captioned images, with LPL.

    Hardware: 8 H100 with 80 GB; 5,000 steps of 32 images at 512 px are a third of an hour by their FLOPs. `loupe data build
    FOLDER datasets/images --size 512` first. Each rank keeps the encoded captions that fit into 4 GiB, some 1,700.
    """
    run = sd3_medium_512()
    assert run.task.kind == "latent_diffusion"
    return replace(
        run,
        name="finetune",
        task=replace(
            run.task,
            caption_dropout=0.1,
            text=replace(sd3_text(SD3_ROOT, t5_tokens=256, dropout=0.1, padding="seen"), cache_mib=4096),
        ),
        init_from=InitFromConfig(url=f"{SD3_ROOT}/transformer"),
        phases=(
            PhaseConfig(
                name="tune", steps=5000, resolution=512, batch_size=32, learning_rate=1e-5, perceptual=PhasePerceptualConfig(),
                ema_decay=0.999, rate_schedule=RateScheduleConfig(kind="cosine", warmup_steps=100, final_factor=0.1),
            ),
        ),
        optim=OptimConfig(weight_decay=0.0, warmup_steps=0, spikes=SpikeConfig()),
        checkpoint=CheckpointConfig(every_steps=500),
        samples=SamplesConfig(every_steps=500, sampler="euler", num_steps=28, guidance_scale=4.5),
    )  # fmt: skip


def _compared(name: str, task: LatentDiffusionConfig, dataset: str, learning_rate: float, steps: int) -> RunConfig:
    return RunConfig(
        name=name,
        task=task,
        data=DataConfig(datasets={dataset: DatasetConfig(url=f"datasets/{dataset}")}, flip_probability=0.5, num_workers=8),
        phases=(
            PhaseConfig(name="pretrain", steps=steps, resolution=256, batch_size=1024, learning_rate=learning_rate),
            PhaseConfig(
                name="perceptual", steps=steps // 5, resolution=256, batch_size=1024, learning_rate=learning_rate,
                perceptual=PhasePerceptualConfig(), ema_decay=0.99975,
            ),
        ),
        optim=OptimConfig(betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=1000, spikes=SpikeConfig()),
        parallel=ParallelConfig(activation_checkpointing="selective", compile=True),
        samples=SamplesConfig(every_steps=5000, sampler="ddim", num_steps=50, guidance_scale=2.0),
    )  # fmt: skip


def imagenet_256_dit() -> RunConfig:
    """DiT-XL/2 on ImageNet classes at 256 px, then with LPL (Peebles & Xie 2023).

    Hardware: 32 H100; about 14 hours. DiT's own sizes, batch is ours. `models/sd-vae` (Stable Diffusion 1's autoencoder),
    `datasets/imagenet` with labels.
    """
    task = LatentDiffusionConfig(
        model=DiTConfig(), text=ClassLabelConfig(num_classes=1000, width=8), codec=CodecConfig(url="models/sd-vae"),
        paradigm=ParadigmConfig(kind="ddpm_eps"),
    )  # fmt: skip
    return _compared("imagenet_256_dit", task, "imagenet", 1e-4, 400_000)


def cc12m_256_unet() -> RunConfig:
    """Stable Diffusion 1's U-Net with CLIP-L on CC12M at 256 px, then with LPL (Rombach et al. 2022).

    Hardware: 32 H100; about 12 hours. The U-Net's own sizes, batch is ours. `models/sd-vae`, `models/clip-l` (a CLIP text
    encoder and its tokenizer), `datasets/cc12m`.
    """
    task = LatentDiffusionConfig(
        model=UNetConfig(), text=clip_l_text("models/clip-l"), codec=CodecConfig(url="models/sd-vae"),
        paradigm=ParadigmConfig(kind="ddpm_eps"),
    )  # fmt: skip
    return _compared("cc12m_256_unet", task, "cc12m", 1e-4, 400_000)


def cc12m_256_pixart() -> RunConfig:
    """PixArt-alpha's transformer with T5-XXL on CC12M at 256 px, then with LPL (Chen et al. 2024).

    Hardware: 32 H100; about 28 hours. PixArt's own sizes, batch is ours. `models/sd-vae`, `models/t5-xxl` (encoder and
    tokenizer), `datasets/cc12m`.
    """
    task = LatentDiffusionConfig(
        model=PixArtConfig(), text=t5_text("models/t5-xxl", 4096), codec=CodecConfig(url="models/sd-vae"),
        paradigm=ParadigmConfig(kind="ddpm_v"),
    )  # fmt: skip
    return _compared("cc12m_256_pixart", task, "cc12m", 1e-4, 400_000)
