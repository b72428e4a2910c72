"""The report of `loupe experiment autoencoder`: Markdown, pictures, and all figures as JSON. Every sentence with a result in it
is made from the figures.

    python -m trainer.experiments.autoencoder_report OUT REPORT
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.experiments import autoencoder_pictures as draw
from trainer.experiments.autoencoder_baselines import BITS_A_VALUE, LATENT_RANGE_STD, code_bits, latent_bits
from trainer.experiments.autoencoder_measure import size_of
from trainer.experiments.autoencoder_results import FIRST_OF, METRICS, ROWS, Results, Run
from trainer.experiments.report import notes, report_command
from trainer.experiments.results import table
from trainer.recipes.autoencoder_experiment import ABLATION, KL, LPIPS_NETWORK, VQ
from trainer.whole_files import write_whole

NAME = "autoencoder"
PICTURES, NOTES = NAME, f"{NAME}_notes.md"
"""Beside the page: the folder of its pictures, and what people add to it by hand."""


def write_report(folder: Path, target: Path) -> None:
    """Raises:
    UserError: the folder holds no experiment, or one without a single result.
    """
    results = Results(folder)
    pictures = {name: data for name, data in _pictures(results) if data is not None}
    for name, data in pictures.items():
        write_whole(target / PICTURES / name, data)
    write_whole(target / f"{NAME}.json", (json.dumps(results.figures(), indent=1) + "\n").encode())
    page = [*_page(results, pictures), *notes(target / NOTES)]
    write_whole(target / f"{NAME}.md", ("\n".join(page) + "\n").encode())


def _pictures(results: Results) -> Iterator[tuple[str, bytes | None]]:
    yield "reconstructions.png", draw.reconstructions(results)
    yield "curves.png", draw.curves(results)
    yield "ablations.png", draw.ablations(results)
    maps = results.folder / "analysis" / KL / "outliers.png"
    yield "decoder_maps.png", maps.read_bytes() if maps.exists() else None


# ------------------------------------------------------------------------------------------------------------- the page


def _page(results: Results, pictures: dict[str, bytes]) -> Iterator[str]:
    def picture(name: str, what: str) -> Iterator[str]:
        if name in pictures:
            yield from (f"![{what}]({PICTURES}/{name})", "")

    yield from ("# What an autoencoder gives back, trained on two CPU cores", "")
    yield from (
        f"Written by `loupe experiment autoencoder` from the figures in `{NAME}.json`; do not edit it, run the command again. "
        f"What stands in `{NOTES}` beside it comes last.", "",
    )  # fmt: skip
    yield from _setup(results)
    yield from _in_words(results)
    yield from _models(results)
    yield from picture("reconstructions.png", "Held-out photos, and what each model makes of them")
    yield from picture("curves.png", "While they train")
    yield from _group(results, "ablation", "Without each term of the loss")
    yield from picture("ablations.png", "Differences to all terms")
    yield from _group(results, "codebook", "The codebook")
    yield from _latents(results)
    yield from _maps(results)
    yield from picture("decoder_maps.png", "Decoder maps of the KL model, and what LPL masks of them")
    yield from _lpl(results)
    yield from _missing(results)
    yield from _times(results)


def _setup(results: Results) -> Iterator[str]:
    size, split = results.size, results.split
    side = size["resolution"]
    photos = ", ".join(f"{row['images']} of `{name}`" for name, row in split["train"].items())
    widths = "-".join(map(str, size["block_out_channels"]))
    yield from ("## Setup", "")
    yield (
        f"- Photos at {side} px: {photos} to train on, mixed by the square root of their numbers, with random crops and flips; "
        f"{split['heldout']} held out, by a hash of their file names, and taken at the centre. {split['twins']} equal to a "
        "held-out one were left out."
    )
    yield (
        f"- Both models: f{size_of(size).downsampling}, {size['latent_channels']} channels, widths {widths}; L1, LPIPS "
        f"({LPIPS_NETWORK}, weight {size['lpips_weight']:g}) and a PatchGAN (weight "
        f"{size['discriminator_weight']:g}, adaptive; hinge, width {size['discriminator_width']}, "
        f"{size['discriminator_layers']} layers); KL with its weak penalty, VQ with "
        f"{size['num_codes']} codes, running means and restarts of dead codes."
    )
    for name, what in ((KL, "The long runs"), (VQ, "The long runs"), (ABLATION, "The short runs, all from scratch")):
        if name in results.configs and not (name == VQ and KL in results.configs):
            yield f"- {what}: {_schedule(results.configs[name])}"
    yield (
        f"- All figures are of all {split['heldout']} held-out photos, compared as 8-bit images, by `loupe evaluate "
        "autoencoder` or its code. PSNR and SSIM: higher is better; LPIPS and Fréchet: lower. LPIPS is the network of the "
        "training loss, shift-tolerant, on another scale than standard LPIPS. Fréchet is of EfficientNet-Lite0's features, "
        "**not FID**, and with so few images comparable within this page only."
    )
    yield ""


def _schedule(config: RunConfig) -> str:
    phases = ", then ".join(
        f"{phase.steps} steps of {phase.batch_size} images at {phase.resolution} px and a rate of {phase.learning_rate:g}"
        for phase in config.phases
    )
    assert config.task.kind == "autoencoder"
    start = config.task.discriminator.start_step if config.task.discriminator else None
    return (
        f"{phases}; the discriminator from step {start} on; EMA decay {config.phases[-1].ema_decay:g}; "
        f"{config.parallel.num_threads} thread(s); seed {config.seed}. Runs of equal seed and length see the same images in "
        "the same order."
    )


def _in_words(results: Results) -> Iterator[str]:
    yield from ("## What came out", "")
    for model, name, label in (("kl", "kl_8bit", "KL, in 8 bits"), ("vq", "vq", "VQ")):
        ours = results.evaluation(name)
        run = results.runs.get(model)
        if ours is None or run is None:
            continue
        others = []
        for other, what in ((f"thumbnail_{model}", "an enlarged thumbnail"), (f"webp_{model}", "WebP")):
            base = results.evaluation(other)
            if base:
                gain, perceived = ours["psnr_db"] - base["psnr_db"], ours["lpips"] - base["lpips"]
                others.append(f"{gain:+.2f} dB and LPIPS {perceived:+.4f} against {what}")
        top = results.evaluation("ceiling")
        if top:
            others.append(f"{ours['psnr_db'] - top['psnr_db']:+.2f} dB against the pre-trained one")
        yield f"- **{label}**: {ours['psnr_db']:.2f} dB after {run.minutes:.1f} minutes; {', '.join(others)}."
    for run in results.of("ablation"):
        gain = results.difference(run, "psnr_db")
        perceived = results.difference(run, "lpips")
        if gain is not None and perceived is not None:
            yield f"- {run.label}: {gain:+.2f} dB, LPIPS {perceived:+.4f}."
    yield ""


def _models(results: Results) -> Iterator[str]:
    side = results.size["resolution"]
    yield from ("## At an equal number of bits", "")
    header = ["", "values an image", "bits an image", *(label for label, _ in METRICS.values()), "minutes"]
    rows = []
    for name, label in ROWS.items():
        found = results.evaluation(name)
        if found is not None:
            run = results.runs.get(name)
            figures = [f"{found[metric]:.{digits}f}" for metric, (_, digits) in METRICS.items()]
            rows.append([label, *_amount(results, name, found), *figures, f"{run.minutes:.1f}" if run else "-"])
    yield from table(header, rows)
    yield from ("", _footing(results, f"loupe evaluate autoencoder OUT/exports/NAME OUT/data/heldout --size {side} --count "
                             f"{results.split['heldout']} --lpips-network {LPIPS_NETWORK} --lpips-weights FILE "
                             "--features-weights FILE"), "")  # fmt: skip
    yield (
        f"Latents in {BITS_A_VALUE} bits: even levels over mean ± {LATENT_RANGE_STD:g} standard deviations of each channel, "
        f"both from training images{_clamped(results)}. Codes take log2 of their number. A thumbnail is the largest square RGB "
        "image of the budget, 8 bits a colour, bicubic both ways and antialiased down; WebP is lossy, at the best of seven "
        "sizes and of all qualities that fit, entropy coding and header included, which latents and codes here do without."
    )
    yield ""


def _clamped(results: Results) -> str:
    found = results.baselines.get("kl_8bit")
    return f" ({found['clamped_share']:.2%} of values were clamped)" if found else ""


def _amount(results: Results, name: str, found: dict[str, Any]) -> tuple[str, str]:
    """Values and bits of an image."""
    size = size_of(results.size)
    if name == KL:
        return str(size.latent_values), "floats"
    if name == VQ:
        return f"{size.latent_side**2} codes", str(code_bits(size.num_codes, size.latent_side))
    if name == "kl_8bit":
        return str(size.latent_values), str(latent_bits(size.latent_channels, size.latent_side))
    if name == "ceiling":
        return str(found["values"]), "floats"
    if "side" in found:
        return f"{3 * found['side'] ** 2} ({found['side']} px)", str(found["bits"])
    over = f", {found['too_large']} images over" if found["too_large"] else ""
    return "-", f"{found['bits']:.0f} of {found['budget']}{over}"


def _footing(results: Results, command: str) -> str:
    """Below a table: of how many images, with which seed, by which command."""
    return f"{results.split['heldout']} held-out images; training seed 0, unless a row says another; `{command}`."


def _group(results: Results, group: str, title: str) -> Iterator[str]:
    runs = results.of(group)
    if not runs:
        return
    first = results.runs.get(FIRST_OF[group])
    yield from (f"## {title}", "")
    if first:
        noise = "; what a seed alone changes is in the row of another seed" if any(run.seed for run in runs) else ""
        yield from (f"Figures, and below them differences to *{first.label}*. One seed each{noise}.", "")
    codes = group == "codebook"
    more = ["codes used", "perplexity"] if codes else ["latents' std", "most masked map"]
    rows = []
    for run in runs:
        row = [run.label]
        for metric, (_, digits) in METRICS.items():
            assert run.evaluation is not None
            difference = results.difference(run, metric)
            text = f"{run.evaluation[metric]:.{digits}f}"
            row.append(text if difference is None else f"{text}<br>{difference:+.{digits}f}")
        rows.append([*row, *(_of_codes(run) if codes else _of_latents(run)), f"{run.minutes:.1f}"])
    yield from table(["", *(label for label, _ in METRICS.values()), *more, "minutes"], rows)
    only = " ".join(f"--only {run.name}" for run in runs[:2])
    yield from ("", _footing(results, f"loupe experiment autoencoder {only} ..."), "")


def _of_codes(run: Run) -> list[str]:
    assert run.evaluation is not None
    book = run.evaluation["codebook"]
    return [f"{book['usage']:.1%} of {book['num_codes']}", f"{book['perplexity']:.1f}"]


def _of_latents(run: Run) -> list[str]:
    assert run.evaluation is not None
    std = run.evaluation["latents"]["std"]
    name, share = run.worst_map()
    return [f"{min(std):.2f} to {max(std):.2f}", f"{name} {share:.2%}"]


def _latents(results: Results) -> Iterator[str]:
    found = [run for run in (results.runs.get(KL), results.runs.get(VQ)) if run]
    if not found:
        return
    yield from ("## Latents", "", "Raw, over images and pixels, by channel; of VQ before quantisation.", "")
    rows = []
    for run in found:
        assert run.evaluation is not None
        latents = run.evaluation["latents"]
        rows.append([
            run.label, ", ".join(f"{m:.3f}" for m in latents["mean"]), ", ".join(f"{s:.3f}" for s in latents["std"]),
            f"{latents['shift_factor']:.4f}", f"{latents['scaling_factor']:.4f}",
        ])  # fmt: skip
    yield from table(["", "means", "standard deviations", "shift", "scale"], rows)
    yield from ("", _footing(results, "loupe evaluate autoencoder"), "")
    book = results.runs.get(VQ)
    if book:
        usage, perplexity = _of_codes(book)
        yield from (f"VQ chooses {usage} codes on these images, with a perplexity of {perplexity}.", "")


def _maps(results: Results) -> Iterator[str]:
    if results.maps is None:
        return
    side = results.size["resolution"]
    yield from ("## Outliers of the KL model's decoder", "")
    yield from ("Share of pixels that LPL masks (Algorithm 1), and how far the farthest value lies from the inliers' mean, in "
                "their standard deviations.", "")  # fmt: skip
    rows = [
        [m["name"], f"{m['masked_share']:.3%}", "-" if m["largest_peak_sd"] is None else f"{m['largest_peak_sd']:.1f}"]
        for m in results.maps["outliers"]["maps"]
    ]
    yield from table(["map", "masked", "farthest"], rows)
    yield from ("", _footing(results, f"loupe analyze latents OUT/exports/kl OUT/data/heldout --size {side} --count "
                             f"{results.split['heldout']} --only outliers"), "")  # fmt: skip


def _lpl(results: Results) -> Iterator[str]:
    run = results.lpl()
    if run is None:
        return
    first, last = run.summary["phases"][0]["losses_first"], run.last_losses
    yield from ("## LPL on the KL model", "")
    yield (
        f"The demo's MMDiT on the photos' captions, flow matching with LPL (w = 3) over the KL model's latents: "
        f"{run.summary['steps']} steps of {results.size['lpl_batch_size']} images at {results.size['resolution']} px, "
        f"{run.minutes:.1f} minutes on one thread, seed 0. It shows that LPL runs on this decoder, not what it is worth."
    )
    yield ""
    rows = [[name, f"{first[name]:.4f}", f"{last[name]:.4f}"] for name in sorted(last) if name in first]
    yield from table(["loss", "first", "last"], rows)
    yield from ("", "`loupe experiment autoencoder --only kl --only lpl ...`; means over the first and the last interval of "
                "metrics.", "")  # fmt: skip


def _missing(results: Results) -> Iterator[str]:
    if results.missing:
        yield from ("## Not there", "", "These have no result, and no table above counts them:", "")
        yield from (f"- `{name}`: {why}" for name, why in results.missing.items())
        yield ""


def _times(results: Results) -> Iterator[str]:
    yield from (
        "## Seconds",
        "",
        "Of each run, from its first start to its end; whatever else the machine did is in them.",
        "",
    )
    rows = [
        [f"`{run.name}`", str(run.summary["steps"]), str(results.configs[run.name].parallel.num_threads),
         f"{run.summary['wall_s']:.0f}", f"{run.summary['images_per_s']:.1f}", str(run.summary["restarts"])]
        for run in results.runs.values()
    ]  # fmt: skip
    yield from table(["run", "steps", "threads", "seconds", "images/s", "restarts"], rows)


if __name__ == "__main__":
    sys.exit(report_command(__doc__, write_report))
