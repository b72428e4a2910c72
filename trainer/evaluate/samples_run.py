"""`loupe evaluate run`: pictures of a run's model for the captions of real images, and what they are worth.

OUT/prompts.jsonl      what was drawn
    samples/           as `loupe sample` writes it
    rows/              what networks gave of the samples
    evaluation.json    last, and the pictures beside it
RUN/evaluations/       the same figures, by step: `loupe runs report` shows them
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import draws
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.errors import UserError, one_line, storage_errors
from trainer.evaluate.image_sets import ImageSet
from trainer.evaluate.images_run import Evaluation
from trainer.run_folder import EVALUATIONS, RunFolder
from trainer.sampling.output import SampleFolder
from trainer.sampling.prompts import Prompt
from trainer.sampling.source import opened
from trainer.whole_files import write_whole

PROMPTS, SAMPLES = "prompts.jsonl", "samples"


def open_reference(url: str | None, config: RunConfig) -> ImageSet:
    """What a run's pictures are compared with.

    Args:
        url: absent: the run's held-out images, or else those it trains on.

    Raises:
        UserError: it is not there, or not what it should be.
    """
    if url is not None:
        return ImageSet(url)
    held_out = config.validation.dataset if config.validation else None
    own = held_out or next(iter(config.data.datasets.values()))
    return ImageSet(own.url, own.max_samples)


def prompts_of(reference: ImageSet, count: int | None, seed: int, *, classes: bool) -> list[Prompt]:
    """First captions, or classes, of `count` of the real images, drawn by the seed; of all, in their order; where more are
    wanted than there are, all of them again.

    Raises:
        UserError: an image has none.
    """
    total = len(reference)
    if count is not None and count < total:
        order = draws.permutation(seed, "evaluated prompts", length=total)[:count]
    else:
        order = np.arange(count or total) % total
    of_index: dict[int, Prompt] = {}
    for index in sorted(set(order.tolist())):
        found: Prompt = reference.label(index) if classes else reference.prompt(index)
        if found is None or found == -1:
            what = "class" if classes else "caption"
            raise UserError(f"--reference: {reference.url}: {reference.name(index)} has no {what}; give --prompts FILE")
        of_index[index] = found
    return [of_index[index] for index in order.tolist()]


def drawn_again(option: str, count: int | None, reference: ImageSet) -> list[str]:
    """A line where more pictures are wanted than there are captions, which `prompts_of` then repeats."""
    total = len(reference)
    if count is None or count <= total:
        return []
    often = f"{count // total}" if count % total == 0 else f"{count // total} to {count // total + 1}"
    return [f"{option} {count}: {reference.url} has {total} images, and what they show is drawn {often} times each"]


def prompt_numbers(prompts: Sequence[Prompt]) -> dict[str, int]:
    """How many different ones there are, for the evaluation's numbers."""
    times = Counter(prompts)
    return {"pictures": len(prompts), "different": len(times), "most_repeated": max(times.values())}


def takes_classes(source: str) -> bool:
    """Whether the model is told classes, not captions."""
    task = opened(source).config.task
    return isinstance(task, LatentDiffusionConfig) and task.text.kind == "classes"


def write_prompts(out: Path, prompts: list[Prompt]) -> str:
    """As `loupe sample --prompts` takes them.

    Raises:
        UserError: it cannot be written.
    """
    lines = (json.dumps({"class" if isinstance(p, int) else "prompt": p}, ensure_ascii=False) for p in prompts)
    try:
        write_whole(out / PROMPTS, ("\n".join(lines) + "\n").encode())
    except OSError as e:
        raise UserError(f"--out: {out / PROMPTS} cannot be written ({one_line(e)}); give another folder") from None
    return str(out / PROMPTS)


def model_numbers(samples: Path) -> dict[str, Any]:
    """What was drawn with what, for the evaluation's numbers."""
    about = SampleFolder(str(samples)).about()
    assert about is not None
    return {key: about[key] for key in ("identity", "source", "cost", "truncated", "seconds", "drawn") if key in about}


def record_of(numbers: Mapping[str, Any], identity: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(file of the run's folder, what goes into it), by step; the same evaluation again has the same file.

    Args:
        numbers: of an `Evaluation`, with what was drawn as `model`.
        identity: what was drawn with what, as samples.json has it.
    """
    name = {"identity": identity, "definition": numbers["definition"]}
    digest = hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()[:12]
    return f"{EVALUATIONS}/step-{identity['step']:08d}-{digest}.json", {
        "step": identity["step"],
        "weights": identity["weights"],
        "checkpoint": identity["checkpoint"],
        "time": time.time(),
        "figures": numbers["figures"],
        "counts": {"generated": numbers["generated"]["used"], "real": numbers["real"]["used"]},
        "reference": numbers["real"]["url"],
        "size": numbers["settings"]["size"],
        "definition": numbers["definition"],
        "sampling": identity["settings"],
        "truncated": numbers["model"]["truncated"],
        "networks": numbers["networks"],
        "warnings": numbers["warnings"],
        "versions": numbers["versions"],
    }


def record(source: str, found: Evaluation, model: Mapping[str, Any]) -> str:
    """Into the run's folder, if it is not there. Returns the file's URL.

    Raises:
        UserError: the run's folder cannot be written.
    """
    file, tree = record_of(found.numbers, model["identity"])
    folder = RunFolder(opened(source).url)
    try:
        if not folder.exists(file):
            folder.write_json(file, tree)
    except storage_errors() as e:
        raise UserError(
            f"{folder.url}/{file}: cannot be written ({one_line(e)}); --no-record leaves the run as it is"
        ) from None
    return f"{folder.url}/{file}"
