"""`loupe analyze`: what a codec's latents and decoder are like."""

import click


@click.group("analyze")
def cli() -> None:
    """Look into autoencoders."""


@cli.command(context_settings={"show_default": True})
@click.argument("codec")
@click.argument("images")
@click.option("--out", required=True, metavar="FOLDER", help="For pictures and analysis.json.")
@click.option("--size", type=click.IntRange(8, 4096), default=256, help="Side of the images, in pixels.")
@click.option("--count", type=click.IntRange(1, 100_000), default=16, help="Images to measure.")
@click.option("--only", "parts", multiple=True, metavar="PART",
              type=click.Choice(["outliers", "sensitivity", "interpolation", "amplitude", "gate"]),
              help="Take this measure alone: outliers, sensitivity, interpolation, amplitude or gate. Repeatable.")  # fmt: skip
@click.option("--paradigm", type=click.Choice(["ddpm_eps", "ddpm_v", "flow"]), default="ddpm_eps",
              help="Whose share inside the gate is told; the picture has all.")  # fmt: skip
@click.option("--tau", type=float, default=3.0, help="Largest sigma/alpha at which the perceptual loss counts.")
@click.option("--tau-reference-px", type=click.IntRange(0), default=512,
              help="Resolution at which tau is meant; 0: tau is fixed.")  # fmt: skip
@click.option("--scale", "scales", type=float, multiple=True, default=(1.3, 2.0, 4.0),
              help="Of the interpolation study: sides go to 1/SCALE and back. Repeatable.")  # fmt: skip
@click.option("--grid", type=click.IntRange(1, 512), default=8, help="Perturbed positions along a side.")
@click.option("--patch", type=click.IntRange(1, 64), default=1, help="Side of what is perturbed, in latent pixels.")
@click.option("--halo", type=click.IntRange(0, 64), default=2,
              help="Latent pixels around a perturbed one that still count as its own place.")  # fmt: skip
@click.option("--sensitivity-images", type=click.IntRange(1, 64), default=4, help="Images whose latents are perturbed.")
@click.option("--batch-size", type=click.IntRange(1, 256), default=4, help="Images at a time; memory grows with it.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Chooses the images, and draws the noise.")
@click.option("--overwrite", is_flag=True, help="Replace an analysis in FOLDER.")
def latents(
    codec: str,
    images: str,
    out: str,
    size: int,
    count: int,
    parts: tuple[str, ...],
    paradigm: str,
    tau: float,
    tau_reference_px: int,
    scales: tuple[float, ...],
    grid: int,
    patch: int,
    halo: int,
    sensitivity_images: int,
    batch_size: int,
    device: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Diagnose the latents and the decoder of CODEC on IMAGES, as the latent perceptual loss's paper does.

    CODEC is the folder or URL of a diffusers autoencoder (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny).
    IMAGES is a folder of images, or a dataset that `loupe data build` wrote.

    \b
    outliers.png       decoder maps: what the loss masks, and the worst channels
    sensitivity.png    how much of the image changes with one latent pixel, by place
    interpolation.png  latents or pixels interpolated down and back: latent and image errors
    amplitude.png      size of the loss's terms by depth, before and after omega
    gate.png           share of training samples inside the gate, by tau and paradigm
    analysis.json      all numbers, with their meaning and what is needed to repeat them

    Most of the time goes to decoding: with the defaults about 830 images. On a CPU a large autoencoder wants smaller
    --count, --size and --grid, or --only.

    Examples:

    \b
      loupe analyze latents repo://trainer/assets/demo_autoencoder photos --out runs/analysis --size 128
      loupe analyze latents models/sdxl-vae runs/photos-data --out runs/sdxl --size 512 --device cuda
      loupe analyze latents models/sdxl-vae photos --out runs/gate --only gate --only outliers --count 4
    """
    from trainer.evaluate.chosen_images import Images
    from trainer.evaluate.codec_report import choose_device, progress_bar
    from trainer.evaluate.latent_report import NUMBERS, PARTS, Settings, analyze, claim, write
    from trainer.models.autoencoders import Codec

    settings = Settings(
        size=size, count=count, seed=seed, paradigm=paradigm, tau=tau, tau_reference_px=tau_reference_px or None,
        parts=tuple(part for part in PARTS if part in parts or not parts), batch_size=batch_size,
        scales=tuple(sorted(set(scales))), sensitivity_images=sensitivity_images, grid=grid, patch=patch, halo=halo,
    )  # fmt: skip
    place = choose_device(device)
    source = Images(images)
    loaded = Codec.load(codec)
    settings.check(loaded)
    folder = claim(out, overwrite=overwrite)

    with progress_bar() as progress:
        found = analyze(loaded, source, settings, codec_url=codec, device=place, progress=progress)
    write(folder, found)
    for line in summary(found.numbers):
        click.echo(line)
    click.echo(f"{folder / NUMBERS}, {', '.join(sorted(found.pictures))}")


def summary(numbers: dict) -> list[str]:  # type: ignore[type-arg]
    """What was found, a line a measure."""
    from trainer.evaluate.codec_report import images_line

    lines = []
    if "images" in numbers:
        lines += images_line(numbers["images"], numbers["settings"]["count"])
    if "outliers" in numbers:
        worst = max(numbers["outliers"]["maps"], key=lambda m: m["largest_peak_sd"] or 0.0)
        shares = ", ".join(f"{m['name']} {100 * m['masked_share']:.2g} %" for m in numbers["outliers"]["maps"])
        lines.append(
            f"outliers:      {worst['name']} goes farthest, {worst['largest_peak_sd']:.0f} sd; masked pixels {shares}"
        )
    if "sensitivity" in numbers:
        ratios = [image["error_norm"]["largest_over_smallest"] or 0.0 for image in numbers["sensitivity"]["images"]]
        elsewhere = [image["elsewhere_share"]["mean"] for image in numbers["sensitivity"]["images"]]
        lines.append(
            f"sensitivity:   by place up to {max(ratios):.1f} times; {100 * sum(elsewhere) / len(elsewhere):.0f} % of the "
            f"change beyond {numbers['settings']['halo']} latent pixels"
        )
    if "interpolation" in numbers:
        least = min(numbers["settings"]["scales"])
        rows = [r for r in numbers["interpolation"]["rows"] if r["scale"] == least]
        decibels = ", ".join(f"{r['method']} {r['psnr_db']:.1f} dB" for r in rows)
        lines.append(
            f"interpolation: codec alone {numbers['interpolation']['codec_psnr_db']:.1f} dB; at 1/{least:g}: {decibels}"
        )
    if "amplitude" in numbers:
        growth = [r["growth_per_doubling"] for r in numbers["amplitude"]["rows"] if r["growth_per_doubling"]]
        if growth:
            lines.append(f"amplitude:     terms grow {min(growth):.2f} to {max(growth):.2f} times as the side doubles")
    if "gate" in numbers:
        gate = numbers["gate"]
        share = gate["share_by_paradigm"][gate["paradigm"]][gate["taus"].index(gate["tau"])]
        lines.append(f"gate:          {100 * share:.1f} % of {gate['paradigm']} samples at tau = {gate['tau']:g}")
        if not share:
            lines.append("warning:       nothing would ever pass this gate; take a larger --tau")
    return lines
