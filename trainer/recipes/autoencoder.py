"""Stage 1 at full size: autoencoders of images, as latent-diffusion (Rombach et al. 2022) trains them, and what is made of a
trained one.

Widths, blocks, channels, codes, losses and their weights, Adam's betas, 4.5e-6 of learning rate an image of the batch, and
steps (rounded) are those of latent-diffusion's published configs; 8 GPUs with 4 images each, warm-up, clipping, the average
and the evaluation are ours (latent-diffusion clips nothing and averages nothing; how many GPUs it used is not said). So is
attention in the middle block alone: diffusers' `AutoencoderKL` and `VQModel` are built without it in the levels, where
published f16 and VQ f8 models have some. rFID and PSNR are latent-diffusion's, of models trained on OpenImages, on
ImageNet's validation images (its table of pre-trained autoencoders); ours have not been trained at this size.

Hours are counted, not measured: three times the forward pass's FLOPs, LPIPS and the discriminator on top, at 40 % of 8
H100s' data sheet. Group norms over large maps are slow: expect two to three times as many.

What they need beside this code, in the folder that they are submitted from, or anywhere with `--set`:
    datasets/images   what `loupe data build FOLDER datasets/images --size 256` wrote
    models/lpips      a folder with one file, the weights of LPIPS on VGG16 (docs/perceptual-losses.md: known forms);
                      torchvision's trunk needs `--set task.lpips.heads_url=FILE` as well
    models/sd-vae     of those that begin with it: Stable Diffusion's autoencoder, as diffusers wrote it
"""

from typing import Any

from trainer.config import (
    AsymmetricKLModelConfig,
    AutoencoderConfig,
    CodebookConfig,
    CodecConfig,
    ConsistencyConfig,
    DataConfig,
    DatasetConfig,
    DiscriminatorConfig,
    ImageSpaceTermsConfig,
    InitFromConfig,
    KLModelConfig,
    LPIPSConfig,
    OptimConfig,
    PhaseConfig,
    RateScheduleConfig,
    ReconstructionsConfig,
    RunConfig,
    VQModelConfig,
)

RATE_PER_IMAGE = 4.5e-6
BATCH = 32
F4, F8, F16 = (128, 256, 512), (128, 256, 512, 512), (128, 128, 256, 256, 512)
VQ_F8 = (128, 256, 256, 512)
X1_5 = (192, 384, 768, 768)
"""The decoder's widths of Zhu et al. (2023) that is 1.5 times as wide."""
LIGHT = (64, 64, 128, 128)

SD_VAE = "models/sd-vae"
LPIPS_VGG16 = LPIPSConfig(network="vgg16", url="models/lpips")


def _run(name: str, task: AutoencoderConfig, steps: int, **options: Any) -> RunConfig:
    """At 256 px, at latent-diffusion's constant rate; `options`: of the run, or in place of these."""
    phase = PhaseConfig(
        name="train", steps=steps, resolution=256, batch_size=BATCH, learning_rate=options.pop("rate", RATE_PER_IMAGE * BATCH),
        rate_schedule=options.pop("rate_schedule", RateScheduleConfig()),
    )  # fmt: skip
    given: dict[str, Any] = dict(
        data=DataConfig(
            datasets={"images": DatasetConfig(url="datasets/images")}, random_crop=True, flip_probability=0.5, num_workers=8
        ),
        # no `spikes`: the game's loss moves by itself
        optim=OptimConfig(betas=(0.5, 0.9), weight_decay=0.0, warmup_steps=1000),
        reconstructions=ReconstructionsConfig(every_steps=5000),
    )  # fmt: skip
    return RunConfig(name=name, task=task, phases=(phase,), **given | options)


def _kl(widths: tuple[int, ...], channels: int) -> KLModelConfig:
    return KLModelConfig(block_out_channels=widths, layers_per_block=2, latent_channels=channels)


def _vq(widths: tuple[int, ...], channels: int, codes: int) -> VQModelConfig:
    codebook = CodebookConfig(size=codes)
    return VQModelConfig(block_out_channels=widths, layers_per_block=2, latent_channels=channels, codebook=codebook)


# ---------------------------------------------------------------------------------------------------- from fresh weights


def autoencoder_kl_f8() -> RunConfig:
    """Stable Diffusion's autoencoder: f8, 4 channels, weak KL penalty.

    `python launch/slurm.py autoencoder_kl_f8 --cluster slurm --gpus-per-node 8`. Hardware: 8 H100; about 2 hours. 83.7M
    parameters. Latent-diffusion: rFID 0.90, PSNR 24.19 dB after 247k steps.
    """
    return _run("autoencoder_kl_f8", AutoencoderConfig(model=_kl(F8, 4), lpips=LPIPS_VGG16), 250_000)


def autoencoder_kl_f4() -> RunConfig:
    """f4, 3 channels, weak KL penalty: larger latents, finer reconstructions.

    Hardware: 8 H100; about 1.6 hours. 55.3M parameters. Latent-diffusion: rFID 0.27, PSNR 27.53 dB after 177k steps.
    """
    return _run("autoencoder_kl_f4", AutoencoderConfig(model=_kl(F4, 3), lpips=LPIPS_VGG16), 180_000)


def autoencoder_kl_f16() -> RunConfig:
    """f16, 16 channels, weak KL penalty: a quarter of f8's latent pixels.

    Hardware: 8 H100; about 1.7 hours. 64.3M parameters. Latent-diffusion: rFID 0.87, PSNR 24.08 dB after 443k steps.
    """
    return _run("autoencoder_kl_f16", AutoencoderConfig(model=_kl(F16, 16), lpips=LPIPS_VGG16), 450_000)


def autoencoder_kl_f8_16ch() -> RunConfig:
    """f8 with 16 channels, as Stable Diffusion 3 and FLUX.1 have: four times f8's values, far better reconstructions.

    Hardware: 8 H100; about 2 hours. 83.8M parameters. Theirs have no 1x1 convolutions around the latents; how they were
    trained is not published, so all but the channels is `autoencoder_kl_f8`'s, and no figure is promised.
    """
    return _run("autoencoder_kl_f8_16ch", AutoencoderConfig(model=_kl(F8, 16), lpips=LPIPS_VGG16), 250_000)


def autoencoder_kl_f8_32ch() -> RunConfig:
    """f8 with 32 channels, as FLUX.2 has.

    Hardware: 8 H100; about 2 hours. 84.0M parameters. All but the channels is `autoencoder_kl_f8`'s; no figure is promised.
    """
    return _run("autoencoder_kl_f8_32ch", AutoencoderConfig(model=_kl(F8, 32), lpips=LPIPS_VGG16), 250_000)


def autoencoder_vq_f8() -> RunConfig:
    """f8, 4 channels, a codebook of 16,384 codes.

    Hardware: 8 H100; about 6 hours. 62.5M parameters. Latent-diffusion: rFID 1.14, PSNR 23.07 dB after 971k steps. Its
    published config has the discriminator from step 1, of a run that went on from another: here it begins at 50,001, as of
    KL.
    """
    discriminator = DiscriminatorConfig(weight=0.6, num_layers=2)
    task = AutoencoderConfig(model=_vq(VQ_F8, 4, 16384), lpips=LPIPS_VGG16, discriminator=discriminator)
    return _run("autoencoder_vq_f8", task, 970_000)


def autoencoder_vq_f4() -> RunConfig:
    """f4, 3 channels, a codebook of 8,192 codes.

    Hardware: 8 H100; about 4.8 hours. 55.3M parameters. Latent-diffusion: rFID 0.58, PSNR 27.43 dB after 533k steps; its
    published config has the discriminator from step 0, here it begins at 50,001.
    """
    discriminator = DiscriminatorConfig(weight=0.75)
    task = AutoencoderConfig(model=_vq(F4, 3, 8192), lpips=LPIPS_VGG16, discriminator=discriminator)
    return _run("autoencoder_vq_f4", task, 530_000)


def autoencoder_vq_f16() -> RunConfig:
    """f16, 8 channels, a codebook of 16,384 codes.

    Hardware: 8 H100; about 4.1 hours. 64.3M parameters. Latent-diffusion: rFID 5.15, PSNR 20.83 dB after 1.1M steps.
    """
    discriminator = DiscriminatorConfig(start_step=250_001, weight=0.75, num_layers=2)
    task = AutoencoderConfig(model=_vq(F16, 8, 16384), lpips=LPIPS_VGG16, discriminator=discriminator)
    return _run("autoencoder_vq_f16", task, 1_100_000)


# ---------------------------------------------------------------------------------- from a trained one, models/sd-vae

ENCODER = ("autoencoder.encoder.*", "autoencoder.quant_conv.*")
FRESH_DECODER = InitFromConfig(url=SD_VAE, include=ENCODER)


def autoencoder_decoder() -> RunConfig:
    """Stable Diffusion's decoder alone, tuned on your images: L1 + LPIPS + PatchGAN. Latents of existing data stay valid.

    Hardware: 8 H100; about 1.9 hours. 49.5M of 83.7M parameters are trained. Stability's `sd-vae-ft-ema`, tuned on LAION
    and humans for 313k steps by the original's loss, took rFID on COCO at 256 px from 4.99 to 4.42 and PSNR from 23.4 to
    23.8 dB (its model card). Rate, batch, steps and the discriminator's start are ours.
    """
    task = AutoencoderConfig(
        model=_kl(F8, 4), trained="decoder", lpips=LPIPS_VGG16, discriminator=DiscriminatorConfig(start_step=5001)
    )
    return _run("autoencoder_decoder", task, 300_000, rate=5e-5, init_from=InitFromConfig(url=SD_VAE))


def autoencoder_asymmetric() -> RunConfig:
    """A decoder 1.5 times as wide for Stable Diffusion's latents, from fresh weights, behind its frozen encoder.

    Hardware: 8 H100; about 3.8 hours. 160.1M parameters in the decoder, of which those of its branch for masked images are
    neither used nor trained. Widths and layers are Zhu et al.'s (2023), whose own training has that branch; the rest is
    ours.
    """
    model = AsymmetricKLModelConfig(
        block_out_channels=F8, layers_per_block=2, decoder_block_out_channels=X1_5, decoder_layers_per_block=3
    )
    task = AutoencoderConfig(model=model, trained="decoder", lpips=LPIPS_VGG16)
    return _run("autoencoder_asymmetric", task, 250_000, init_from=FRESH_DECODER)


def autoencoder_light_decoder() -> RunConfig:
    """A light decoder that agrees with the full one: for previews, and for LPL (`task.perceptual.decoder_url`).

    Hardware: 8 H100; about 0.3 hours. 3.4M parameters in the decoder, against 49.5M. All of it is ours: widths, and L1 and
    LPIPS both to the image and to what Stable Diffusion's decoder makes of the same latents.
    """
    model = AsymmetricKLModelConfig(
        block_out_channels=F8, layers_per_block=2, decoder_block_out_channels=LIGHT, decoder_layers_per_block=1
    )
    task = AutoencoderConfig(
        model=model, trained="decoder", teacher=CodecConfig(url=SD_VAE), lpips=LPIPS_VGG16, discriminator=None,
        consistency=ConsistencyConfig(pixel_weight=1.0, lpips_weight=1.0),
    )  # fmt: skip
    return _run("autoencoder_light_decoder", task, 100_000, init_from=FRESH_DECODER)


def autoencoder_encoder() -> RunConfig:
    """Stable Diffusion's encoder alone, tuned on your images by the image-space latent perceptual loss (CogVideo).

    Hardware: 8 H100; about 0.6 hours. 34.2M of 83.7M parameters are trained. Latents are held to those of the encoder as it
    was, and their images by the frozen decoder to its images of those and to the input. A use that the text names and gives
    no values for: weights, rate and steps are ours.
    """
    task = AutoencoderConfig(
        model=_kl(F8, 4), trained="encoder", teacher=CodecConfig(url=SD_VAE), lpips=LPIPS_VGG16, discriminator=None,
        image_space=ImageSpaceTermsConfig(lpips=LPIPS_VGG16, latent_weight=1.0, decoded_weight=0.5, input_weight=0.5),
    )  # fmt: skip
    return _run("autoencoder_encoder", task, 50_000, rate=1e-5, init_from=InitFromConfig(url=SD_VAE))


def autoencoder_second_stage() -> RunConfig:
    """Latents of a first stage refined by a second: f8 with 4 channels to f16 with 16, and back.

    Hardware: 8 H100; about 0.7 hours, nearly all of it Stable Diffusion's encoder and decoder, which are frozen. 13.4M
    parameters. Reconstruction in latent space, LPIPS of the frozen decoder's images, and LPIPS to the input (CogVideo);
    sizes and weights are ours.
    """
    task = AutoencoderConfig(
        model=_kl((128, 256), 16), reconstructs="latents", teacher=CodecConfig(url=SD_VAE), lpips=None, discriminator=None,
        image_space=ImageSpaceTermsConfig(lpips=LPIPS_VGG16, latent_weight=1.0, decoded_weight=0.5, input_weight=0.5),
    )  # fmt: skip
    evaluation = ReconstructionsConfig(every_steps=5000, lpips=LPIPS_VGG16)
    return _run("autoencoder_second_stage", task, 100_000, reconstructions=evaluation)
