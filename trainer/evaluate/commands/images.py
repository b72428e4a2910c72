"""`loupe evaluate images`."""

from contextlib import ExitStack
from typing import Any

import click

from trainer.errors import ExitCode
from trainer.evaluate.commands.common import (
    check_enough,
    check_there,
    claimed,
    load_networks,
    measuring_options,
    process,
    tell,
    tell_finished,
)


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("generated")
@click.argument("real")
@click.option("--out", required=True, metavar="FOLDER", help="For evaluation.json, spectrum.png and nearest.png.")
@click.option("--size", type=click.IntRange(16, 4096), show_default=False, help="Side at which all are compared, in pixels.  "
              "[default: that of the generated images]")  # fmt: skip
@click.option("--count", type=click.IntRange(min=2), metavar="N", show_default=False, help="So many generated images, drawn by "
              "the seed.  [default: all]")  # fmt: skip
@measuring_options
def images(generated: str, real: str, out: str, size: int | None, count: int | None, **options: Any) -> int:
    """Compare the images GENERATED with the images REAL: FID and its like, precision and recall, spectra, fit to prompts.

    Each is a folder of images, a dataset that `loupe data build` wrote, or the folder of a `loupe sample`, whose prompts a CLIP
    score needs. Images are cropped to their centre square. What networks give of real images is kept and found again; a
    killed evaluation goes on with the same command. Ranks, started by torchrun, share the images.

    \b
    Examples:
      loupe evaluate images samples photos --out e --network inception=pt_inception-2015-12-05-6726825d.pth
      loupe evaluate images samples s3://b/set --out e --network dinov2=models/dinov2-large --network clip=models/clip-l
      loupe evaluate images samples photos --out e --metrics fid --network efficientnet_lite0=lite0.pth --allow-few
      loupe evaluate images samples photos --out e --network my_networks:build
      torchrun --nproc-per-node 8 -m launch.cli evaluate images samples photos --out e --network inception=inception.pth
    """
    check_there("GENERATED", generated)
    check_there("REAL", real)
    from trainer.evaluate.image_sets import ImageSet, uniform_size
    from trainer.evaluate.images_run import (
        Settings,
        cache_of,
        evaluate_images,
        finished,
        more_than_there,
        write,
    )
    from trainer.evaluate.judged_sets import Stopped

    metrics = tuple(name.strip() for name in (options["metrics"] or "").split(",") if name.strip())
    with process(options["device"], options["batch_size"]) as here, ExitStack() as stack:
        ranks = here.judging.ranks
        made, truth = ranks.on_all(lambda: (ImageSet(generated), ImageSet(real)))
        side = ranks.on_rank_0(lambda: size or uniform_size(made, "--size"))
        taken, of_real = min(count or len(made), len(made)), min(options["reference_count"] or len(truth), len(truth))
        settings = Settings(
            side, options["resize"], metrics, taken, of_real, options["seed"], options["batch_size"], options["resamples"],
            options["allow_few"],
        )  # fmt: skip
        networks = load_networks(options["networks"], options["sums"], here.judging)
        chosen = settings.chosen([n.name for n in networks], has_prompts=made.prompt(0) is not None)
        check_enough(taken, of_real, networks, chosen, allow_few=settings.allow_few)
        cache = ranks.on_rank_0(lambda: cache_of(options["cache"]))
        folder = stack.enter_context(claimed(out, here, overwrite=options["overwrite"], dry_run=options["dry_run"]))
        for line in (
            *more_than_there("--count", count, len(made), generated),
            *more_than_there("--reference-count", options["reference_count"], len(truth), real),
        ):
            here.warn(line)
        if not options["overwrite"] and ranks.on_rank_0(
            lambda: tell_finished(finished(folder, made, truth, settings, networks), folder, here)
        ):
            return int(ExitCode.DONE)
        if options["dry_run"]:
            here.say(f"{taken} of {len(made)} generated images, {of_real} of {len(truth)} real ones, at {side} px")
            for network in networks:
                about = network.numbers()
                here.say(f"{network.name}: {about['dimensions']} features, sha256 {about.get('sha256', '-')}")
            here.say(f"would measure {', '.join(chosen)} into {folder}; rows of real images in {cache}")
            return int(ExitCode.DONE)
        try:
            found = evaluate_images(made, truth, settings, networks, here.judging, out=folder, cache=cache)
        except Stopped:
            here.say("stopped; the same command goes on")
            return int(ExitCode.REQUEUE)
        if found is not None:
            write(folder, found)
            tell(found, folder, here)
    return int(ExitCode.DONE)
