"""Captions a second with Florence-2, side by side in one process: ours, and the obvious batched transformers loop.

    python -m ops.bench.recaption --photos FOLDER --processor FOLDER [--size tiny|base] [--images 96] [--device cpu|cuda]
    python -m ops.bench.recaption --photos FOLDER --model FOLDER --device cuda --dtype bfloat16

The obvious loop: Pillow opens a fixed batch of images, the model's processor makes inputs of them, `generate` writes captions
until the longest of the batch has ended. The best of several batch sizes counts.
Ours: `data.recaption`, all of what the stage does but reading and writing shards.

Model, images, prompt, dtype and decoding (greedy) are the same. Without --model the model is of random weights: the real
architecture and the real processor (768 x 768), at its real size or a tiny one. Such a model does not end its captions, so
that is done for both loops alike: after a number of tokens that a hash of the caption's first tokens draws from --tokens.

Loops take turns; times are medians. Then captions are compared. On a GPU the share of its peak follows, from FLOPs that are
counted as operations run, of one image alone (so that what batches compute in vain is no achievement).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.images import read_image
from data.recaption.captioner import Captioner, Decoding
from data.recaption.images import Resize, model_input, prepared
from data.recaption.model import load
from data.recaption.text import clean

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"embed_dim": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2), "depths": (1, 1, 1, 1)},
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 1},
    ),
    "base": ({}, {}),
}  # fmt: skip
"""What a size changes of the real configuration: of the image encoder, and of the language model."""


# -------------------------------------------------------------------------------------------------------------- a model


def write_model(processor: Path, out: Path, size: str, *, spread: float = 1.0) -> None:
    """A Florence-2 of random weights with the published configuration, processor and token ids, in transformers' own format.

    Args:
        processor: has config.json, preprocessor_config.json and tokenizer.json as published.
        spread: of the language model's weights; larger makes captions differ more from image to image.
    """
    from tokenizers import Tokenizer
    from transformers import (
        BartConfig,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        Florence2VisionConfig,
        GenerationConfig,
        PreTrainedTokenizerFast,
    )

    published = json.loads((processor / "config.json").read_text())
    backend = Tokenizer.from_file(str(processor / "tokenizer.json"))
    backend.add_special_tokens(_location_tokens())
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=1024, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_tree = json.loads((processor / "preprocessor_config.json").read_text())
    names = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "image_mean", "image_std", "resample", "size")
    images: Any = CLIPImageProcessorPil(**{name: image_tree[name] for name in names}, rescale_factor=1 / 255)
    images.image_seq_length = image_tree["image_seq_length"]
    vision_changes, text_changes = SIZES[size]
    text = {k: v for k, v in published["text_config"].items() if k in BartConfig().to_dict()} | text_changes
    text["vocab_size"] = len(tokenizer)
    vision = {"projection_dim": text["d_model"], **vision_changes}
    config = Florence2Config(
        vision_config=Florence2VisionConfig(**vision, drop_path_rate=0.0),
        text_config=BartConfig(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    model.generation_config = GenerationConfig(
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_bos_token_id=0,
        forced_eos_token_id=2, no_repeat_ngram_size=published["text_config"]["no_repeat_ngram_size"],
    )  # fmt: skip
    model.save_pretrained(out)
    Florence2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(out)


def _location_tokens() -> list[str]:
    pairs = ("od", "ocr", "cap", "ncap", "dcap", "grounding", "seg", "region_cap", "region_to_desciption", "proposal")
    tags = [tag for name in pairs for tag in (f"<{name}>", f"</{name}>")]
    return [*tags, *(f"<loc_{i}>" for i in range(1000)), "<sep>", "<poly>", "</poly>", "<and>"]


class EndsBetween:
    """A logits processor: a caption ends after a number of tokens that its first ones draw."""

    FIRST = 18

    def __init__(self, low: int, high: int, eos: int) -> None:
        self.low, self.span, self.eos = low, high - low + 1, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made = input_ids.shape[1] - 1
        if made < self.FIRST:
            scores[:, self.eos] = -torch.inf
            return scores
        first = input_ids[:, 1 : self.FIRST + 1].long()
        weights = 2 * torch.arange(1, self.FIRST + 1, device=first.device) ** 3 + 1
        length = self.low + (first * weights).sum(1) * 2654435761 % 4294967291 % self.span
        scores[:, self.eos] = torch.where(made >= length, torch.inf, -torch.inf)
        return scores


# ---------------------------------------------------------------------------------------------------------------- loops


@dataclass
class Obvious:
    model: Any
    processor: Any
    max_new_tokens: int
    more_processors: list[Any]


def the_obvious_loop(theirs: Obvious, files: Sequence[Path], prompts: Sequence[str], batch_size: int) -> list[str]:
    """Captions of all images for the first prompt, then for the next."""
    model, processor, made = theirs.model, theirs.processor, []
    for prompt in prompts:
        for i in range(0, len(files), batch_size):
            images = [Image.open(file).convert("RGB") for file in files[i : i + batch_size]]
            inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
            inputs = inputs.to(model.device, model.dtype)
            ids = model.generate(
                **inputs, max_new_tokens=theirs.max_new_tokens, do_sample=False, num_beams=1,
                logits_processor=theirs.more_processors,
            )  # fmt: skip
            made += processor.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [clean(text) for text in made]


def ours(captioner: Captioner, lengths: list[int], files: Sequence[Path], how: Resize, threads: int) -> list[str]:
    """As the other; the captions' lengths in tokens go into `lengths`."""
    data = ((file, file.read_bytes()) for file in files)
    ahead = max(8, 3 * captioner.decoding.batch_images)
    images = prepared(data, captioner.form, how, threads=threads, ahead=ahead)
    made = list(captioner.captions(image_HWC for _, image_HWC in images))  # type: ignore[misc]
    lengths[:] = sorted(c.tokens for c in made)
    return [clean(c.text) for c in sorted(made, key=lambda c: (c.prompt, c.image))]


def preparation(captioner: Captioner, files: Sequence[Path]) -> dict[str, float]:
    """Images a second and core, from files to the model's inputs."""

    def with_processor() -> None:
        for file in files:
            captioner.processor.image_processor([Image.open(file).convert("RGB")], return_tensors="pt")

    def our_own() -> None:
        for file in files:
            captioner.pixels([model_input(file.read_bytes(), captioner.form.height, captioner.form.width)])

    speeds = {}
    for name, function in [("processor, Pillow", with_processor), ("ours", our_own)]:
        began = _now()
        function()
        speeds[name] = len(files) / (_now() - began)
    return speeds


def flops_per_image(theirs: Obvious, files: Sequence[Path], prompts: Sequence[str]) -> float:
    """Of images one by one; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        the_obvious_loop(theirs, files, prompts, 1)
    return counter.get_total_flops() / len(files)


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = args.threads or len(os.sched_getaffinity(0))
    with _model(args) as folder, _plain(args.photos) as photos:
        settings = {
            "max_new_tokens": args.max_new_tokens, "batch_images": args.batch_images, "batch_captions": args.batch_captions,
        }  # fmt: skip
        captioner, fixed = (
            Captioner(folder, args.prompt, device=args.device, dtype=args.dtype, decoding=decoding)
            for decoding in (Decoding(**settings, compiled=args.compile), Decoding(**settings, regroup=False))
        )
        model, processor = load(folder, args.device, args.dtype)
        files = list(islice(cycle(photos), args.images))
        _run(args, captioner, fixed, model, processor, files, threads)


def _run(
    args: argparse.Namespace,
    captioner: Captioner,
    fixed: Captioner,
    model: Any,
    processor: Any,
    files: list[Path],
    threads: int,
) -> None:
    low_high: tuple[int, int] | None = tuple(args.tokens) if args.tokens else None
    ends = [EndsBetween(low_high[0], low_high[1], model.generation_config.eos_token_id)] if low_high else []
    captioner.more_processors = fixed.more_processors = ends
    theirs = Obvious(model, processor, args.max_new_tokens, ends)
    loops: dict[str, Callable[[], list[str]]] = {
        f"obvious, batches of {size}": partial(the_obvious_loop, theirs, files, args.prompt, size)
        for size in args.batch
    }
    lengths: list[int] = []
    loops["ours, resized exactly"] = partial(ours, captioner, lengths, files, "exact", threads)
    loops["ours, not regrouped"] = partial(ours, fixed, lengths, files, "fast", threads)
    loops["ours"] = partial(ours, captioner, lengths, files, "fast", threads)
    speed = _compare(loops, len(files), len(args.prompt), args)
    print(f"tokens of a caption: {lengths[0]} to {lengths[-1]}, median {statistics.median(lengths):.0f}")
    for name, each in (("ours", captioner), ("ours, not regrouped", fixed)):
        work = each.work
        print(f"decoding, {name}: {work.useful / work.rows:.0%} of the rows computed were of captions that had not ended; "
              f"{work.rows / work.steps:.1f} rows a step")  # fmt: skip
    for name, images_per_s in preparation(captioner, files[: min(len(files), 32)]).items():
        print(f"inputs from files, {name}: {images_per_s:.0f} images/s in one thread")
    flops = flops_per_image(theirs, files[:4], args.prompt)
    print(f"\n{flops / 1e9:.1f} GFLOP an image")
    if args.device == "cpu":
        equal = _equal_in_double(theirs, captioner, files[:16], args.prompt, threads)
        print(f"in float64, resized exactly: {equal} captions equal of {min(16, len(files)) * len(args.prompt)}")
    else:
        share = speed * flops / (args.peak_tflops * 1e12)
        print(
            f"{share:.1%} of {args.peak_tflops:g} TFLOP/s; 30 % would be {0.3 * args.peak_tflops * 1e12 / flops:.0f} images/s"
        )


def _equal_in_double(
    theirs: Obvious, captioner: Captioner, files: Sequence[Path], prompts: Sequence[str], threads: int
) -> int:
    """Wild weights turn float32's rounding into other words; in float64 both loops must agree."""
    theirs.model.double()
    captioner.model.double()
    expected = the_obvious_loop(theirs, files, prompts, 8)
    return sum(a == b for a, b in zip(expected, ours(captioner, [], files, "exact", threads), strict=True))


@contextmanager
def _plain(photos: Path) -> Iterator[list[Path]]:
    """The photos as JPEGs without orientation and colour profile, which the obvious loop ignores and ours does not."""
    found = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    with tempfile.TemporaryDirectory(prefix="loupe-photos-") as folder:
        plain = [Path(folder) / f"{i:06d}.jpg" for i in range(len(found))]
        for file, target in zip(found, plain, strict=True):
            Image.fromarray(read_image(file.read_bytes())).save(target, quality=92)
        yield plain


def _compare(
    loops: dict[str, Callable[[], list[str]]], num_images: int, num_prompts: int, args: argparse.Namespace
) -> float:
    """Time and print; returns our images a second."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    cpu_times: dict[str, list[float]] = {name: [] for name in loops}
    texts: dict[str, list[str]] = {}
    for number in range(args.rounds + 1):
        for name, loop in loops.items():
            began, cpu_began = _now(), time.process_time()
            texts[name] = loop()
            if number:  # the first warms up
                times[name].append(_now() - began)
                cpu_times[name].append(time.process_time() - cpu_began)
    speed = {name: num_images / statistics.median(seconds) for name, seconds in times.items()}
    best = max((name for name in loops if name.startswith("obvious")), key=lambda name: speed[name])
    print(f"ours / obvious loop: {speed['ours'] / speed[best]:.2f}x images/s")
    cpu_s = {name: statistics.median(seconds) / num_images for name, seconds in cpu_times.items()}
    print(f"in CPU time: {cpu_s[best] / cpu_s['ours']:.2f}x; what other programs do to the machine is not in it")
    threads = torch.get_num_threads()
    print(
        f"{num_images} images, {num_prompts} prompts, {args.device}, {args.dtype}, {threads} threads, {args.rounds} rounds\n"
    )
    print(f"{'loop':30s} {'images/s':>9s} {'CPU ms/image':>13s}  captions equal to the obvious loop's")
    for name in loops:
        equal = sum(a == b for a, b in zip(texts[name], texts[best], strict=True))
        print(f"{name:30s} {speed[name]:9.2f} {1e3 * cpu_s[name]:13.0f}  {equal} of {len(texts[best])}")
    print(f"\n{len(set(texts['ours']))} different captions")
    return speed["ours"]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _model(args: argparse.Namespace) -> Iterator[Path]:
    if args.model:
        yield args.model
        return
    with tempfile.TemporaryDirectory(prefix="loupe-florence-") as folder:
        write_model(args.processor, Path(folder), args.size, spread=args.spread)
        yield Path(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ops.bench.recaption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of image files")
    parser.add_argument("--model", type=Path, help="a Florence-2 in transformers' own format")
    parser.add_argument("--processor", type=Path, help="folder with the published config, preprocessor and tokenizer")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of the random model (%(default)s)")
    parser.add_argument("--spread", type=float, default=16.0, help="of the random model's weights (%(default)s)")
    parser.add_argument("--images", type=int, default=96, help="photos are repeated up to it (%(default)s)")
    parser.add_argument("--prompt", action="append", help="repeatable (<MORE_DETAILED_CAPTION>)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("LOW", "HIGH"),
                        help="captions of the random model end between them (20 100)")  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", help="of the obvious loop (8 16 on a CPU, 32 128 on a GPU)")
    parser.add_argument("--batch-images", type=int, help="of ours (1 on a CPU, 32 on a GPU)")
    parser.add_argument("--batch-captions", type=int, help="of ours (32 on a CPU, 256 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up (%(default)s)")
    parser.add_argument("--threads", type=int, help="all cores when absent")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="static cache and compiled steps for ours")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the GPU at the dtype; H100, bfloat16: %(default)s"
    )
    args = parser.parse_args()
    if not args.model and not args.processor:
        parser.error("give --model, or --processor to make one of random weights")
    args.prompt = args.prompt or ["<MORE_DETAILED_CAPTION>"]
    on_gpu = args.device == "cuda"
    args.batch = args.batch or ([32, 128] if on_gpu else [8, 16])
    args.batch_images = args.batch_images or (32 if on_gpu else 1)
    args.batch_captions = args.batch_captions or (256 if on_gpu else 32)
    if not args.model and not args.tokens:
        args.tokens = [20, 100]
    return args


if __name__ == "__main__":
    main()
