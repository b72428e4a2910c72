"""Recipes with their widths cut: every part is of the recipe's own kind, small, with random weights, on the shipped emoji."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from data.build import build
from data.reader import open_dataset
from data.schema import Resize
from data.source import open_source
from ops.bench.recipes import cut_model
from tests.numerics.lpips_reference import random_weights
from tests.text_models import write_clip, write_t5
from trainer.config import (
    AutoencoderConfig,
    AutoencoderModelConfig,
    CodecConfig,
    DatasetConfig,
    DenoiserConfig,
    EncoderConfig,
    FrozenTextConfig,
    InitFromConfig,
    LatentDiffusionConfig,
    LPIPSConfig,
    RunConfig,
    TextConfig,
    replace,
    resolve_url,
)
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import mmdit_to_diffusers
from trainer.recipes import load

EMOJI = "repo://data/assets/emoji_64"
NUM_CLASSES = 2
WIDTHS = (8, 8, 16, 16, 16)
"""Of autoencoders, as many as they have levels."""


def write_assets(root: Path) -> None:
    """All files that cut recipes read: classes, codecs, text encoders."""
    dataset = open_dataset(resolve_url(EMOJI), name="emoji")
    for i in range(12):
        folder = root / "classes-source" / f"class{i % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.webp").write_bytes(dataset.read(i).image)
    build(open_source(root / "classes-source"), str(root / "classes"), name="classes", resize=Resize())
    torch.manual_seed(0)
    widths = WIDTHS[:4]
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=widths, norm_num_groups=4, latent_channels=16,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    ).save_pretrained(root / "codec16")  # fmt: skip
    AsymmetricAutoencoderKL(
        down_block_types=down, up_block_types=up, down_block_out_channels=widths, up_block_out_channels=(16, 16, 24, 24),
        norm_num_groups=4,
    ).save_pretrained(root / "asymmetric")  # fmt: skip
    AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=widths, norm_num_groups=4, latent_channels=4,
    ).save_pretrained(root / "sd-vae")  # fmt: skip
    for network in ("vgg16", "alex"):
        (root / "lpips" / network).mkdir(parents=True)
        torch.save(random_weights(network), root / "lpips" / network / "weights.pth")
    write_clip(root / "clip", width=16)
    write_clip(root / "clip_projected", width=16, projection=16)
    write_t5(root / "t5", width=16)


def cut(name: str, root: Path) -> RunConfig:
    """The recipe's run, three steps of it: every phase, at an eighth of its resolution."""
    run = load(name)
    task = run.task
    if isinstance(task, AutoencoderConfig):
        return _cut_autoencoder(run, task, root)
    assert isinstance(task, LatentDiffusionConfig)
    model, text = cut_model(task.model), _cut_text(task.text, root)
    steps = {1: (3,), 2: (2, 1), 3: (1, 1, 1)}[len(run.phases)]
    phases = tuple(
        replace(
            phase, steps=n, resolution=_cut_resolution(phase.resolution), batch_size=4, rate_schedule={}, data_mix=None
        )
        for phase, n in zip(run.phases, steps, strict=True)
    )
    url = str(root / "classes") if text.kind == "classes" else EMOJI
    return replace(
        run,
        task=replace(task, model=model, text=text, codec=_cut_codec(task.codec, root)),
        data=replace(run.data, datasets={name: {"url": url} for name in run.data.datasets}, num_workers=0),
        phases=phases,
        init_from=_init_from(run.init_from, task.codec.latent_channels, model, text, root),
        optim=replace(run.optim, warmup_steps=1),
        parallel=replace(
            run.parallel, compile=False, shard_one_rank=True
        ),  # has tests of its own, and takes a minute a recipe here
        metrics=replace(run.metrics, every_steps=1),
        samples=replace(run.samples, num_steps=2, count=2, prompts=()) if run.samples else None,
        prompt_accuracy=None,
    )


def _cut_autoencoder(run: RunConfig, task: AutoencoderConfig, root: Path) -> RunConfig:
    """The discriminator from the second step, and an evaluation at the end alone: pictures take longer than steps."""
    steps = {1: (3,), 2: (2, 1)}[len(run.phases)]
    codebook = {"codebook": replace(task.model.codebook, size=16)} if task.model.kind == "vq" else {}
    teacher = task.teacher and replace(task.teacher, url=str(root / "sd-vae"))
    image_space = task.image_space and replace(task.image_space, lpips=_cut_lpips(task.image_space.lpips, root))
    assert run.reconstructions is not None
    lpips, heldout = run.reconstructions.lpips, run.reconstructions.dataset
    # one that begins with the shipped weights is small already
    shipped = run.init_from is not None and run.init_from.url.startswith("repo://")
    init_from = run.init_from and replace(run.init_from, url=str(root / "sd-vae"))
    return replace(
        run,
        task=replace(
            task, model=task.model if shipped else replace(cut_autoencoder_model(task.model), **codebook), teacher=teacher,
            image_space=image_space, lpips=task.lpips and _cut_lpips(task.lpips, root),
            discriminator=task.discriminator and replace(task.discriminator, start_step=1, width=4),
        ),
        data=replace(run.data, datasets={name: {"url": EMOJI} for name in run.data.datasets}, num_workers=0),
        phases=tuple(
            replace(phase, steps=n, resolution=_cut_resolution(phase.resolution), batch_size=4)
            for phase, n in zip(run.phases, steps, strict=True)
        ),
        init_from=run.init_from if shipped else init_from,
        optim=replace(run.optim, warmup_steps=1),
        metrics=replace(run.metrics, every_steps=1),
        reconstructions=replace(
            run.reconstructions, every_steps=10, count=4, lpips=lpips and _cut_lpips(lpips, root),
            dataset=heldout and DatasetConfig(url=EMOJI, max_samples=8),
        ),
    )  # fmt: skip


def cut_autoencoder_model(model: AutoencoderModelConfig) -> AutoencoderModelConfig:
    """As many levels and latent channels; an asymmetric decoder of another width still."""
    levels = len(model.block_out_channels)
    decoder: dict[str, Any] = {}
    if model.kind == "asymmetric_kl":
        decoder = {"decoder_block_out_channels": (12,) * levels, "decoder_layers_per_block": 1}
    return replace(model, block_out_channels=WIDTHS[:levels], layers_per_block=1, norm_num_groups=4, **decoder)


def _cut_lpips(config: LPIPSConfig, root: Path) -> LPIPSConfig:
    """Random weights in a folder; of the plain AlexNet for the shift-tolerant one, which blurs besides."""
    network = config.network.removesuffix("_shift_tolerant")
    return replace(config, network=network, url=str(root / "lpips" / network), heads_url=None)


def _cut_resolution(resolution: int) -> int:
    return resolution // 8 if resolution >= 256 else resolution


def _cut_text(text: TextConfig, root: Path) -> TextConfig:
    if text.kind == "classes":
        return replace(text, num_classes=NUM_CLASSES, width=16)
    if text.kind == "bytes":
        return replace(text, width=16, num_blocks=1, num_heads=2)

    def small(encoder: EncoderConfig) -> EncoderConfig:
        folder = "t5" if encoder.family == "t5" else "clip" if encoder.hidden_state == -1 else "clip_projected"
        return replace(
            encoder, url=str(root / folder), weights_folder="text_encoder", tokenizer_folder="tokenizer", width=16,
            pooled_width=16 if encoder.pooled_width else None, max_tokens=min(encoder.max_tokens, 77),
        )  # fmt: skip

    return FrozenTextConfig(encoders=tuple(map(small, text.encoders)), cache_mib=text.cache_mib and 1)


def _cut_codec(codec: CodecConfig, root: Path) -> CodecConfig:
    if codec.latent_channels == 16:
        return replace(codec, url=str(root / "codec16"))
    if "asymmetric" in codec.url:
        return replace(codec, url=str(root / "asymmetric"))
    return replace(codec, url="repo://trainer/assets/demo_autoencoder")


def _init_from(
    given: InitFromConfig | None, channels: int, model: DenoiserConfig, text: TextConfig, root: Path
) -> InitFromConfig | None:
    """A run that was cut as well; or a transformer of diffusers, written here."""
    if given is None:
        return None
    if given.url.startswith("runs/"):
        return replace(given, url=str(root / given.url))
    assert model.kind == "mmdit"
    assert text.kind == "frozen"
    torch.manual_seed(1)
    ours = MMDiT(model, latent_channels=channels, token_width=text.width, pooled_width=text.pooled_width)
    ours.init_weights()
    arguments, state = mmdit_to_diffusers(ours)
    theirs: Any = SD3Transformer2DModel(**arguments)
    theirs.load_state_dict(state)
    theirs.save_pretrained(root / "transformer")
    return replace(given, url=str(root / "transformer"))
