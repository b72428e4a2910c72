"""`loupe evaluate run`."""

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from trainer.config.sampling import SAMPLERS
from trainer.errors import ExitCode, UserError
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
from trainer.run_names import run_or_checkpoint
from trainer.sampling.options import Options
from trainer.sampling.prompts import check_kinds, check_words, num_classes_of, read_prompts
from trainer.sampling.source import check_weights

if TYPE_CHECKING:
    from trainer.evaluate.images_run import Evaluation


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("source", metavar="RUN|CHECKPOINT")
@click.option("--root", "roots", multiple=True, metavar="URL", show_default=False, help="Where RUN is looked for.  [default: "
              "$LOUPE_RUNS, or runs]")  # fmt: skip
@click.option("--reference", metavar="IMAGES", show_default=False, help="Real images: a dataset of `loupe data build`, whose "
              "captions are drawn; or a folder, with --prompts.  [default: the run's held-out images, or else what it trains "
              "on]")  # fmt: skip
@click.option(
    "--out", required=True, metavar="FOLDER", help="For samples, evaluation.json and its pictures; can be continued."
)
@click.option("--prompts", metavar="FILE", help="Draw these instead, as `loupe sample` takes them.")
@click.option("--count", type=click.IntRange(min=2), metavar="N", show_default=False, help="So many pictures, of captions "
              "drawn by the seed.  [default: one of each]")  # fmt: skip
@click.option(
    "--weights", default="ema", metavar="ema|raw|ema:SIGMA|FILE", help="Of the model, as `loupe sample` has them."
)
@click.option("--sampler", metavar="|".join(SAMPLERS), show_default=False, help="[default: the run's]")
@click.option("--steps", type=int, show_default=False, help="[default: the run's]")
@click.option("--guidance", type=float, show_default=False, help="[default: the run's]")
@click.option(
    "--guidance-interval", type=(float, float), metavar="FROM TO", show_default=False, help="[default: the run's]"
)
@click.option("--guidance-rescale", type=float, show_default=False, help="[default: the run's]")
@click.option("--noise-seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the noise.")
@click.option("--size", type=click.IntRange(16, 4096), show_default=False, help="Side of the pictures, in pixels.  [default: "
              "the last phase's]")  # fmt: skip
@click.option("--lot", type=click.IntRange(1, 4096), show_default=False, help="Pictures that the model draws at once.  "
              "[default: 8]")  # fmt: skip
@click.option("--record/--no-record", default=True, help="Write the figures into the run's folder too, for its report.")
@measuring_options
def run(
    source: str, roots: tuple[str, ...], reference: str | None, out: str, prompts: str | None, count: int | None, weights: str,
    sampler: str | None, steps: int | None, guidance: float | None, guidance_interval: tuple[float, float] | None,
    guidance_rescale: float | None, noise_seed: int, size: int | None, lot: int | None, record: bool, **options: Any,
) -> int:  # fmt: skip
    """Draw pictures with the model of RUN for the captions of real images, and measure them against those. RUN: a run folder,
    its URL, or its name below a root; or one of its checkpoints.

    First OUT/samples is drawn, as by `loupe sample`, then measured, as by `loupe evaluate images`; both go on where they ended
    when the same command is given again, after a kill or SIGTERM, upon which it ends with 75. Ranks, started by torchrun,
    share both. The figures go into the run's folder too, and `loupe runs report` shows them.

    \b
    Examples:
      loupe evaluate run runs/demo --out demo-evaluation
      loupe evaluate run runs/first --reference s3://b/heldout --out e --network inception=inception.pth
      loupe evaluate run runs/first --reference coco --count 30000 --out e --guidance 2 --network clip=models/clip-l
      loupe evaluate run runs/classes --reference imagenet --count 50000 --out e --network inception=inception.pth
      torchrun --nproc-per-node 8 -m launch.cli evaluate run runs/first --reference coco --out e --network dinov2=dinov2
      loupe job --gpus-per-task 1 -- loupe evaluate run runs/first --reference coco --out e --network dinov2=dinov2
    """
    if prompts is not None and count is not None:
        raise UserError("--count: goes without --prompts; the file says how many there are")
    # before what takes seconds to import
    source = run_or_checkpoint(source.rstrip("/"), roots)
    asked = Options(
        source, weights, sampler=sampler, steps=steps, guidance=guidance,
        guidance_interval=guidance_interval, guidance_rescale=guidance_rescale, seed=noise_seed,
        size=(size, size) if size else None, lot=lot, overwrite=options["overwrite"], dry_run=options["dry_run"],
    )  # fmt: skip
    asked.check_run()
    check_weights(weights)
    if reference is not None:
        check_there("--reference", reference)
    if prompts is not None and os.environ.get("RANK", "0") == "0":  # which alone reads it
        check_words((), (prompts,), ())

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
    from trainer.evaluate.samples_run import (
        PROMPTS,
        SAMPLES,
        drawn_again,
        model_numbers,
        open_reference,
        prompt_numbers,
        prompts_of,
        takes_classes,
        write_prompts,
    )
    from trainer.evaluate.samples_run import record as record_in_run
    from trainer.sampling import job
    from trainer.sampling.source import opened

    metrics = tuple(name.strip() for name in (options["metrics"] or "").split(",") if name.strip())
    dry_run = options["dry_run"]
    with process(options["device"], options["batch_size"]) as here, ExitStack() as stack:
        judging, ranks = here.judging, here.judging.ranks
        truth = ranks.on_all(lambda: open_reference(reference, opened(source).config))
        networks = load_networks(options["networks"], options["sums"], judging)
        cache = ranks.on_rank_0(lambda: cache_of(options["cache"]))
        of_real = min(options["reference_count"] or len(truth), len(truth))
        wanted = ranks.on_rank_0(
            lambda: (
                read_prompts(prompts)
                if prompts is not None
                else prompts_of(truth, count, options["seed"], classes=takes_classes(source))
            )
        )
        if prompts is not None:
            ranks.on_rank_0(lambda: check_kinds(wanted, num_classes_of(opened(source).config), lambda i: "--prompts"))

        def settings_at(side: int) -> Settings:
            return Settings(
                side, options["resize"], metrics, len(wanted), of_real, options["seed"], options["batch_size"],
                options["resamples"], options["allow_few"],
            )  # fmt: skip

        captioned = all(isinstance(prompt, str) for prompt in wanted)
        chosen = settings_at(16).chosen([n.name for n in networks], has_prompts=captioned)
        check_enough(len(wanted), of_real, networks, chosen, allow_few=options["allow_few"])
        folder = stack.enter_context(
            claimed(out, here, overwrite=options["overwrite"], dry_run=dry_run, made=(PROMPTS,))
        )
        for line in (
            *drawn_again("--count", count, truth),
            *more_than_there("--reference-count", options["reference_count"], len(truth), truth.url),
        ):
            here.warn(line)
        asked = replace(
            asked, prompts=tuple(p for p in wanted if isinstance(p, str)) if dry_run else (),
            files=() if dry_run else (str(folder / PROMPTS),),
            classes=tuple(str(p) for p in wanted if isinstance(p, int)) if dry_run else (), out=str(folder / SAMPLES),
        )  # fmt: skip
        if not dry_run:
            ranks.on_rank_0(lambda: write_prompts(folder, wanted))
        code = job.run(
            asked, judging.device, world=judging.world, stop=judging.stop, say=here.say, progress=judging.progress
        )
        if dry_run:
            here.say(f"would measure {', '.join(chosen)} against {of_real} real images into {folder}")
        if dry_run or code != ExitCode.DONE:
            return int(code)
        made = ranks.on_all(lambda: ImageSet(str(folder / SAMPLES)))
        side = ranks.on_rank_0(lambda: uniform_size(made, "--size"))
        model = ranks.on_rank_0(lambda: model_numbers(folder / SAMPLES))
        settings = settings_at(side)

        def note(found: "Evaluation") -> None:
            if record and not model["identity"]["step"]:
                here.say(f"not recorded in the run: {weights} does not say of which step it is")
            elif record:
                here.say(record_in_run(source, found, model))

        def was_finished() -> bool:
            there = finished(folder, made, truth, settings, networks)
            if not tell_finished(there, folder, here):
                return False
            assert there is not None
            note(there)  # the command may have ended between the two
            return True

        if not options["overwrite"] and ranks.on_rank_0(was_finished):
            return int(ExitCode.DONE)
        try:
            found = evaluate_images(
                made, truth, settings, networks, judging, out=folder, cache=cache,
                more={"kind": "run", "model": model, "prompts": prompt_numbers(wanted)},
            )  # fmt: skip
        except Stopped:
            here.say("stopped; the same command goes on")
            return int(ExitCode.REQUEUE)
        if found is not None:
            write(folder, found)
            tell(found, folder, here)
            note(found)
    return int(ExitCode.DONE)
