"""`loupe sample`: pictures from a trained text-to-image model."""

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from trainer.config.sampling import SAMPLERS
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.sampling.options import Part

WAIT_S = 7200.0
"""Longest that a rank waits for another's pictures."""


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("source", metavar="RUN|CHECKPOINT")
@click.option("--root", "roots", multiple=True, metavar="URL", show_default=False,
              help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]")  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Draw this. Repeatable.")
@click.option("--prompts", "files", multiple=True, metavar="FILE",
              help="Prompts, one a line; or .jsonl, or .json; - is the standard input. Repeatable.")  # fmt: skip
@click.option("--classes", multiple=True, metavar="LIST", help="Of a model of classes: numbers, as 0,5-9. Repeatable.")
@click.option("--per-prompt", type=click.IntRange(1, 1_000_000), default=1, help="Pictures of each prompt.")
@click.option("--out", metavar="FOLDER", help="For the pictures, samples.json and samples.jsonl; can be continued.")
@click.option("--grid", metavar="FILE.png", help="The first 64 pictures with their prompts, in one.")
@click.option("--weights", default="ema", metavar="ema|raw|ema:SIGMA|FILE",
              help="The average, the last step's, the average of another width, or a .safetensors file.")  # fmt: skip
@click.option("--sampler", metavar="|".join(SAMPLERS), show_default=False,
              help="[default: the run's of its sample grids, else euler for flow and ddim for DDPM]")  # fmt: skip
@click.option("--steps", type=int, show_default=False, help="[default: the run's, else 50]")
@click.option("--guidance", type=float, show_default=False, help="Scale; 1 is none.  [default: the run's, else 2]")
@click.option("--guidance-interval", type=(float, float), metavar="FROM TO", show_default=False,
              help="Guide at these times only: 0 is data, 1 is noise.  [default: the run's, else always]")  # fmt: skip
@click.option("--guidance-rescale", type=float, show_default=False,
              help="0 to 1: back towards the unguided deviation (Lin et al. 2024).  [default: the run's, else 0]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the noise, with a picture's position.")
@click.option("--size", metavar="N|WxH", show_default=False, help="In pixels.  [default: the last phase's]")
@click.option("--batch-size", type=click.IntRange(1, 65536), default=8,
              help="Pictures of a rank between two looks at the others; changes none of them.")  # fmt: skip
@click.option("--lot", type=click.IntRange(1, 4096), show_default=False,
              help="Pictures that the network computes at once, all of them alike in rounding: more is faster on a GPU with a "
              "small model, less needs less memory.  [default: 8, or as many as there are]")  # fmt: skip
@click.option("--part", metavar="I/N|array", show_default=False,
              help="Draw the I-th, from 0, of N shares of the pictures; `array`: as SLURM numbers this job.")  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--overwrite", is_flag=True, help="Replace other pictures in FOLDER.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be drawn, and stop.")
def sample(
    source: str, roots: tuple[str, ...], size: str | None, part: str | None, device: str, **options: Any
) -> int:  # fmt: skip
    """Draw pictures with the trained model of RUN, or of one of its checkpoints. RUN: a run folder, its URL, or its name below
    a root.

    A picture follows from prompt, seed and position in the list; not from batch size, ranks or restarts. The same command
    goes on where it ended: after a kill, or SIGTERM, upon which it ends with 75. Ranks, started by torchrun, share the work.

    \b
    Examples:
      loupe sample runs/demo --prompt dog --prompt "red heart" --grid out.png
      loupe sample runs/demo --prompts prompts.txt --out runs/demo-samples --guidance 3 --steps 50
      loupe sample runs/classes --classes 0,5-9 --per-prompt 10 --sampler dpm-solver --steps 20 --out digits
      loupe sample runs/demo/checkpoints/step-00000600-c91d94ec --weights raw --prompt cat --grid out.png
      torchrun --nproc-per-node 8 -m launch.cli sample s3://b/runs/first --prompts coco.jsonl --out coco
      loupe job --array 4 --gpus-per-task 1 -- loupe sample runs/first --prompts coco.jsonl --out coco --part array
    """
    from trainer.run_names import run_or_checkpoint
    from trainer.sampling.options import Options

    # before what takes seconds to import
    asked = Options(source=source.rstrip("/"), size=_size(size), part=_part(part), **options)
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ranked and device != "auto":
        raise UserError(f"--device: {device} is for one process; ranks take a device each by themselves")
    if not ranked or os.environ["RANK"] == "0":
        asked.check()
    asked = replace(asked, source=run_or_checkpoint(asked.source, roots))
    asked.check_run()

    from trainer.evaluate.codec_report import choose_device, progress_bar
    from trainer.parallel.world import init_world
    from trainer.preemption import listening
    from trainer.sampling.job import run

    place = choose_device(device)
    with listening() as stop:
        world = init_world(timeout_s=WAIT_S) if ranked else None
        with progress_bar() as progress:
            code = run(
                asked, world.device if world else place, world=world, stop=lambda: stop.received is not None,
                say=click.echo, progress=progress if world is None or world.is_main else lambda what, done, total: None,
            )  # fmt: skip
        if world:
            import torch.distributed as dist

            # after an error they are left as they are: another rank may never answer
            dist.destroy_process_group()
    return int(code)


def _size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of `N` or `WxH`."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})(?:[xX]([1-9]\d{0,5}))?", text, flags=re.ASCII)
    if not match:
        raise UserError(f"--size: {text!r} is no size; give a side, as 256, or width and height, as 320x192")
    width, height = int(match[1]), int(match[2] or match[1])
    return height, width


def _part(text: str | None) -> "Part":
    from trainer.sampling.options import Part

    if text is None:
        return Part()
    if text == "array":
        text = f"{os.environ.get('SLURM_ARRAY_TASK_ID', '')}/{os.environ.get('SLURM_ARRAY_TASK_COUNT', '')}"
        if text == "/":
            raise UserError("--part array: this is no job of a SLURM array; give I/N")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, flags=re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--part: {text!r}; give the part's number, from 0, and how many there are, as 0/4")
    return Part(int(match[1]), int(match[2]))
