"""`loupe data recaption`."""

import os
import re
from dataclasses import replace

import click
from click.core import ParameterSource

from data.commands.stage import StageOptions, run, stage_options
from data.commands.watching import StageCommand


@click.command(cls=StageCommand)
@click.argument("source", metavar="IN")
@click.argument("out")
@click.option("--model", required=True,
              help="Florence-2 in transformers' own format: a folder, or a model hub's id such as "
              "florence-community/Florence-2-base.")  # fmt: skip
@click.option("--revision", help="Of a hub's id: a branch, tag or commit.")
@click.option("--allow-download", is_flag=True, help="Fetch the model from the hub if it is not in the local cache.")
@click.option("--prompt", "prompts", multiple=True, default=("<MORE_DETAILED_CAPTION>",), show_default=True,
              help="<CAPTION> gives the kind short, <DETAILED_CAPTION> detailed, <MORE_DETAILED_CAPTION> long; KIND=PROMPT any "
              "other. Repeatable: images are encoded once.")  # fmt: skip
@click.option("--beams", type=click.IntRange(1, 16), default=1, show_default=True, help="Of the search; 1: greedy.")
@click.option("--max-new-tokens", type=click.IntRange(2, 4096), show_default="256, or what the model can hold",
              help="Longest caption.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="auto: bfloat16 on a GPU, float32 on a CPU.")  # fmt: skip
@click.option("--batch-images", type=click.IntRange(1), show_default="32 on a GPU, 1 on a CPU",
              help="That are encoded together.")  # fmt: skip
@click.option("--batch-captions", type=click.IntRange(1), show_default="256 on a GPU, 32 on a CPU",
              help="That are written together; more need more memory.")  # fmt: skip
@click.option("--resize", type=click.Choice(["fast", "exact"]), default="fast", show_default=True,
              help="exact: with Pillow, as the model's own processor does; several times slower.")  # fmt: skip
@click.option("--compile", "compiled", is_flag=True,
              help="Static cache and compiled decoding, in fixed batches; for GPUs.")  # fmt: skip
@click.option("--drop-flawed", is_flag=True,
              help="Leave out captions that repeat themselves or are cut off; they are counted in any case.")  # fmt: skip
@stage_options
def recaption(
    source: str,
    out: str,
    model: str,
    revision: str | None,
    allow_download: bool,
    prompts: tuple[str, ...],
    beams: int,
    max_new_tokens: int | None,
    device: str,
    dtype: str,
    batch_images: int | None,
    batch_captions: int | None,
    resize: str,
    compiled: bool,
    drop_flawed: bool,
    options: StageOptions,
) -> None:
    """Caption the images of IN, the output of `loupe data ingest` or `faces`, with Florence-2; captions are at OUT.

    Captions are kept beside the images, by kind; those that the images came with stay, as the kind original. Give OUT to
    `loupe data build --captions`, and say at training how often each kind is taken.

    Empty captions, such as repeat themselves, and such as reach the limit of tokens are counted in the receipts.

    Examples:

    \b
      loupe data recaption out/ingested out/captions --model models/Florence-2-base
      loupe data recaption s3://bucket/blurred s3://bucket/captions --model models/Florence-2-large \\
          --prompt '<CAPTION>' --prompt '<MORE_DETAILED_CAPTION>' --cluster slurm --array 16 --gpus-per-task 1
      loupe data recaption out/ingested out/captions --model florence-community/Florence-2-base --allow-download
    """
    from data.commands.begun import absolute
    from data.commands.sources import check_samples
    from data.recaption.captioner import Decoding
    from data.recaption.model import choose_device, choose_dtype, choose_new_tokens, find_model
    from data.recaption.stage import Recaption

    source = absolute(source)
    check_samples(source)  # before OUT is begun for it
    by_kind = prompts_by_kind(prompts)
    device = choose_device(device)
    on_gpu = device == "cuda"
    if on_gpu:
        options = _one_worker_a_gpu(options)
    files = find_model(model, hub_revision=revision, allow_download=allow_download)
    decoding = Decoding(
        beams=beams,
        max_new_tokens=choose_new_tokens(max_new_tokens, files.folder),
        batch_images=batch_images or (32 if on_gpu else 1),
        batch_captions=batch_captions or (256 if on_gpu else 32),
        compiled=compiled,
    )
    stage = Recaption(
        source,
        files,
        by_kind,
        device=device,
        dtype=choose_dtype(dtype, device),
        decoding=decoding,
        resize="exact" if resize == "exact" else "fast",
        drop_flawed=drop_flawed,
        threads=max(1, len(os.sched_getaffinity(0)) // max(1, options.workers)),
    )
    run(stage, out, options)


def prompts_by_kind(prompts: tuple[str, ...]) -> dict[str, str]:
    """
    Raises:
        UserError: a kind is missing, taken, or no word.
    """
    from data.recaption.text import KINDS
    from data.stages.samples import ORIGINAL
    from trainer.errors import UserError

    found: dict[str, str] = {}
    for prompt in prompts:
        kind, equals, text = (KINDS[prompt], "=", prompt) if prompt in KINDS else prompt.partition("=")
        if not equals or not text or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", kind) or kind == ORIGINAL:
            raise UserError(f"--prompt {prompt}: none of {', '.join(KINDS)}; write any other as KIND=PROMPT")
        if kind in found:
            raise UserError(f"--prompt {prompt}: there is a prompt for the kind {kind} already; name another kind")
        found[kind] = text
    return found


def _one_worker_a_gpu(options: StageOptions) -> StageOptions:
    import torch

    source = click.get_current_context().get_parameter_source("workers")
    return replace(options, workers=torch.cuda.device_count()) if source == ParameterSource.DEFAULT else options
