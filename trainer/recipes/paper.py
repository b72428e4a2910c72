"""The runs of the latent perceptual loss's paper (Berrada et al., ICLR 2025), each as DDPM-eps, DDPM-v and flow matching.

The paper gives phases, EMA, LPL, guidance and the MMDiT's size. Batch size, learning rate, weight decay, warm-up, the text
encoders, and how positions grow are not given: those here are ours, and so is the reading of the 796M parameters (here 816M:
one set of weights for image and text, one modulation for all blocks). Hours are counted, not measured: FLOPs of the step at
40 % of 64 H100s' data sheet. Expect more where storage or network is slow.

What they need beside this code, in the folder that they are submitted from, or anywhere with `--set`:
    models/asymmetric-autoencoder   the x1.5 asymmetric autoencoder, as diffusers wrote it (config.json and safetensors)
    models/sdxl                     a Stable Diffusion XL pipeline's text_encoder, text_encoder_2 and both tokenizers
    datasets/NAME                   what `loupe data build` or a data stage wrote
"""

from typing import Literal

from trainer.config import (
    CheckpointConfig,
    ClassLabelConfig,
    CodecConfig,
    DataConfig,
    DatasetConfig,
    InitFromConfig,
    LatentDiffusionConfig,
    MMDiTConfig,
    OptimConfig,
    ParadigmConfig,
    ParallelConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    RunConfig,
    SamplesConfig,
    SpikeConfig,
    TextConfig,
)
from trainer.recipes.text_presets import sdxl_text

Paradigm = Literal["ddpm_eps", "ddpm_v", "flow"]

SUFFIXES: dict[Paradigm, str] = {"ddpm_eps": "", "ddpm_v": "_v", "flow": "_flow"}
"""Of a recipe's name, and so of its run folder. The paper's own baseline is DDPM-eps."""

EMA, EMA_WITH_LPL = 0.9999, 0.99975
"""The paper's, section 4.1."""


def mmdit_796m() -> MMDiTConfig:
    """28 blocks, 1,536 wide: the paper's size, in the layout that comes nearest to 796M parameters: 816M with classes."""
    return MMDiTConfig(
        num_blocks=28, num_heads=24, head_dim=64, layout="shared", position_grid=64, base_grid=16,
        position_growth="stretch",
    )  # fmt: skip


def paper_run(
    name: str, paradigm: Paradigm, dataset: str, text: TextConfig, phases: tuple[PhaseConfig, ...], guidance: float,
    init_from: str | None = None,
) -> RunConfig:  # fmt: skip
    return RunConfig(
        name=name + SUFFIXES[paradigm],
        task=LatentDiffusionConfig(
            model=mmdit_796m(),
            text=text,
            codec=CodecConfig(url="models/asymmetric-autoencoder"),
            paradigm=ParadigmConfig(kind=paradigm),
        ),
        data=DataConfig(
            datasets={dataset: DatasetConfig(url=f"datasets/{dataset}")}, random_crop=text.kind == "classes",
            flip_probability=0.5, num_workers=8,
        ),
        phases=phases,
        init_from=InitFromConfig(url=init_from + SUFFIXES[paradigm], strict=False) if init_from else None,
        optim=OptimConfig(betas=(0.9, 0.95), weight_decay=0.03, warmup_steps=5000, spikes=SpikeConfig()),
        parallel=ParallelConfig(activation_checkpointing="selective", compile=True),
        checkpoint=CheckpointConfig(every_steps=1000),
        samples=SamplesConfig(
            every_steps=5000, sampler="euler" if paradigm == "flow" else "ddim", num_steps=50, guidance_scale=guidance
        ),
    )  # fmt: skip


def phase(name: str, steps: int, resolution: int, *, lpl: bool = False) -> PhaseConfig:
    """Our batch and rate at 256 and 512 px, the paper's EMA."""
    return PhaseConfig(
        name=name, steps=steps, resolution=resolution, batch_size=2048 if resolution == 256 else 1024, learning_rate=1e-4,
        perceptual=PhasePerceptualConfig() if lpl else None, ema_decay=EMA_WITH_LPL if lpl else EMA,
    )  # fmt: skip


PRETRAIN = phase("pretrain_256", 600_000, 256)
POST_256 = phase("post_256", 200_000, 256)
POST_512_LPL = phase("post_512_lpl", 120_000, 512, lpl=True)
CLASSES = ClassLabelConfig(num_classes=1000, width=768)


def imagenet_256(paradigm: Paradigm = "ddpm_eps") -> RunConfig:
    """ImageNet classes at 256 px: 600k steps, then 200k more without LPL, the paper's baseline.

    Hardware: 64 H100 with 80 GB (32 images a rank); about 28 hours. The paper: FID 2.98 as DDPM-eps (Table 2).
    `datasets/imagenet` with labels.
    """
    return paper_run("imagenet_256", paradigm, "imagenet", CLASSES, (PRETRAIN, POST_256), 1.5)


def imagenet_512_lpl(paradigm: Paradigm = "ddpm_eps") -> RunConfig:
    """ImageNet classes: 600k steps at 256 px, then 120k at 512 px with LPL, as one job.

    Hardware: 64 H100 with 80 GB (16 images a rank at 512 px); about 21 + 36 hours. The paper: FID 3.79 as DDPM-eps, 3.84 as
    DDPM-v, 3.61 as flow, against 4.88, 4.72, 4.54 without LPL (Table 3). `datasets/imagenet` with labels.
    """
    return paper_run("imagenet_512_lpl", paradigm, "imagenet", CLASSES, (PRETRAIN, POST_512_LPL), 2.0)


def cc12m_256(paradigm: Paradigm = "ddpm_eps") -> RunConfig:
    """Captions of CC12M at 256 px, from an ImageNet model: 200k steps without LPL, the paper's baseline.

    Hardware: 64 H100 with 80 GB (32 images a rank); about 9 hours. The paper: FID 7.81, CLIPScore 25.06 as DDPM-eps (Table 2).
    Recaptioned, faces blurred. Begins with `runs/imagenet_256`; what text has in place of classes begins afresh.
    """
    text = sdxl_text("models/sdxl")
    return paper_run("cc12m_256", paradigm, "cc12m", text, (POST_256,), 1.5, init_from="runs/imagenet_256")


def cc12m_512_lpl(paradigm: Paradigm = "ddpm_eps") -> RunConfig:
    """Captions of CC12M: 600k steps at 256 px, then 120k at 512 px with LPL, as one job.

    Hardware: 64 H100 with 80 GB (16 images a rank at 512 px); about 27 + 37 hours. The paper, from ImageNet pre-training: FID
    6.22, CLIPScore 25.12 as DDPM-eps (Table 2). Recaptioned, faces blurred.
    """
    return paper_run("cc12m_512_lpl", paradigm, "cc12m", sdxl_text("models/sdxl"), (PRETRAIN, POST_512_LPL), 2.0)


def s320m_512_lpl(paradigm: Paradigm = "ddpm_eps") -> RunConfig:
    """Hundreds of millions of captioned images: 600k steps at 256 px, then 120k at 512 px with LPL, as one job.

    Hardware: 64 H100 with 80 GB (16 images a rank at 512 px); about 27 + 37 hours. The paper, on 320M stock images of its own:
    FID 8.30 and CLIPScore 24.41 against 8.81 and 24.39 without LPL, as DDPM-eps (Table 2).
    """
    return paper_run("s320m_512_lpl", paradigm, "s320m", sdxl_text("models/sdxl"), (PRETRAIN, POST_512_LPL), 2.0)
