"""The model card of an export: README.md, in the form that model hubs read."""

import itertools
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from data.schema import DatasetInfo
from trainer.config import FrozenTextConfig, LatentDiffusionConfig
from trainer.export.facts import HIDDEN, Facts, public_text
from trainer.export.parity import Parity

README, SAMPLES = "README.md", "samples.png"
_MOST_LICENCES = 20
_CLASS_NAMES = {"mmdit": "MMDiT", "unet": "U-Net", "dit": "DiT", "pixart": "PixArt-alpha"}
_PARADIGMS = {"flow": "flow matching", "ddpm_eps": "DDPM, predicting the noise", "ddpm_v": "DDPM, predicting v"}


def card(
    facts: Facts, *, step: int, weights: str, dtype: str, pipeline: str, licence: str | None, parity: Parity,
    prompts: Sequence[str], notes: Sequence[str], missing: Sequence[str],
) -> str:  # fmt: skip
    """
    Args:
        pipeline: name of diffusers' class; empty: the code in the folder.
        licence: of the weights, as the user names it.
        prompts: of samples.png.
        missing: components that are to be given when it is loaded.
    """
    config, task = facts.config, facts.config.task
    assert isinstance(task, LatentDiffusionConfig)
    head = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "license": licence or "other"}
    sections = [
        "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---"]),
        f"# {_plain(config.name)}\n\n{_about(facts, task, step, weights)}",
        f"![pictures of this model]({SAMPLES})\n\n" + "\n".join(f"{i}. {_quoted(p)}" for i, p in enumerate(prompts, 1)),
        f"## Use\n\n```python\n{usage(pipeline, parity, prompts, missing)}\n```\n\n" + "\n\n".join(notes),
        "## Training\n\n" + _phases(facts, step),
        "## Results\n\n" + _results(facts, step),
        "## Data\n\n" + "\n".join(f"- {line}" for line in _data(facts)),
        "## Licence\n\n" + _licence(facts, licence),
        "## This export\n\n" + _export(facts, step, weights, dtype, parity),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def usage(pipeline: str, parity: Parity, prompts: Sequence[str], missing: Sequence[str], folder: str = "FOLDER") -> str:
    """Lines of Python that draw the pictures that were compared."""
    settings = parity.settings
    given = ", ".join(["dtype=torch.float32", *(f"{name}=..." for name in missing)])
    ask = f"prompts, num_inference_steps={settings.steps}, guidance_scale={settings.guidance:g}"
    listed = json.dumps(list(prompts[:2]), ensure_ascii=False)
    if pipeline:
        return (
            f"import torch\nfrom diffusers import {pipeline}\n\n"
            f"pipe = {pipeline}.from_pretrained({folder!r}, {given})\nprompts = {listed}\n"
            f"sigmas = [1 - i / {settings.steps} for i in range({settings.steps})]\n"
            f"images = pipe({ask}, sigmas=sigmas, height={settings.size[0]}, width={settings.size[1]}).images"
        )
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({folder!r}, custom_pipeline={folder!r}, trust_remote_code=True, {given})\n"
        f"prompts = {listed}\nimages = pipe({ask}, seed={settings.seed}).images"
    )


# -------------------------------------------------------------------------------------------------------------- sections


def _about(facts: Facts, task: LatentDiffusionConfig, step: int, weights: str) -> str:
    text = task.text
    reads = {"bytes": "captions, by a small transformer over bytes that was trained with it",
             "classes": f"{getattr(text, 'num_classes', 0)} classes"}  # fmt: skip
    if isinstance(text, FrozenTextConfig):
        reads["frozen"] = "captions, by frozen " + " and ".join(encoder.family.upper() for encoder in text.encoders)
    resolution = facts.config.phases[-1].resolution
    which = (
        "averaged weights"
        if weights == "ema"
        else "weights of the last step"
        if weights == "raw"
        else f"weights {weights}"
    )
    return (
        f"{_CLASS_NAMES[task.model.kind]} for {resolution} x {resolution} px, trained by {_PARADIGMS[task.paradigm.kind]} on "
        f"{task.codec.latent_channels}-channel latents. It reads {reads[text.kind]}. These are the {public_text(which)} of "
        f"step {step}."
    )


def _phases(facts: Facts, step: int) -> str:
    """Those that the exported step has seen, as far as it has."""
    starts = itertools.accumulate((p.steps for p in facts.config.phases), initial=0)
    task, rows = facts.config.task, []
    for phase, start in zip(facts.config.phases, starts, strict=False):
        if start >= step:
            break
        steps = f"{phase.steps:,}" if start + phase.steps <= step else f"{step - start:,} of {phase.steps:,}"
        loss = "none"
        if phase.perceptual and isinstance(task, LatentDiffusionConfig):
            loss = f"{task.perceptual.kind}, weight {phase.perceptual.weight:g}"
        rows.append((phase.name, steps, f"{phase.resolution} px", phase.batch_size, f"{phase.learning_rate:g}",
                     f"{phase.ema_decay:g}", loss))  # fmt: skip
    return table(("phase", "steps", "resolution", "batch", "learning rate", "EMA decay", "perceptual loss"), rows)


def _results(facts: Facts, step: int) -> str:
    rows = [
        (f"{name}, interval up to step {facts.losses_step}", f"{value:.4g}")
        for name, value in sorted(facts.losses.items())
    ]
    rows += [(name, f"{value:.4g}") for name, value in _numbers(facts.summary) if name.startswith("prompt_accuracy")]
    rows += [(f"{name}, evaluation at step {facts.evaluation['step']}", f"{value:.4g}")
             for name, value in _numbers(facts.evaluation) if name not in ("step", "time")]  # fmt: skip
    for record in facts.measured:
        counts, figures = (part if isinstance(part := record.get(name), dict) else {} for name in ("counts", "figures"))
        drawn = part if isinstance(part := record.get("sampling"), dict) else {}
        about = (
            f"step {record.get('step')}, weights {public_text(str(record.get('weights')))}, drawn by {drawn.get('sampler')} in "
            f"{drawn.get('steps')} steps, guidance {drawn.get('guidance')}, {counts.get('generated')} pictures "
            f"against {counts.get('real')} at {record.get('size')} px, definition {record.get('definition')}"
        )
        rows += [(f"{_plain(name)}; {about}", shown) for name, figure in figures.items() if (shown := _figure(figure))]
    return table(("metric", "value"), rows) if rows else f"The run has left no figures up to step {step}."


def _figure(figure: Any) -> str:
    """`12.5 (12 to 13)`; empty where it is none."""
    value, interval = (figure.get("value"), figure.get("interval")) if isinstance(figure, dict) else (None, None)
    if not isinstance(value, int | float):
        return ""
    low, high = (interval.get("low"), interval.get("high")) if isinstance(interval, dict) else (None, None)
    within = f" ({low:.4g} to {high:.4g})" if isinstance(low, int | float) and isinstance(high, int | float) else ""
    return f"{value:.4g}{within}"


def _data(facts: Facts) -> list[str]:
    lines = []
    for name, info in facts.datasets.items():
        if isinstance(info, str):
            lines.append(f"**{_plain(name)}**: {info}")
            continue
        limit = facts.config.data.datasets[name].max_samples
        used = min(info.num_samples, limit or info.num_samples)
        line = f"**{_plain(info.name)}**: {used:,} of {info.num_samples:,} images, digest `{info.digest}`"
        if info.licences:
            most = sorted(info.licences.items(), key=lambda pair: -pair[1])[:_MOST_LICENCES]
            line += "; licences: " + ", ".join(f"{_plain(licence)} ({count:,})" for licence, count in most)
        else:
            line += "; licences: not given"
        lines.append(line)
    return lines


def _licence(facts: Facts, licence: str | None) -> str:
    given = f"The weights: {_plain(licence)}." if licence else "The weights: not given by whoever exported them."
    notices = [
        f"Notice of {_plain(info.name)}:\n\n" + "\n".join(f"> {_plain(line)}" for line in info.notice.splitlines()[:40])
        for info in facts.datasets.values()
        if isinstance(info, DatasetInfo) and info.notice
    ]
    return "\n\n".join([given, *notices])


def _export(facts: Facts, step: int, weights: str, dtype: str, parity: Parity) -> str:
    settings = parity.settings
    rows = [
        ("run", _plain(facts.config.name)),
        ("step, weights", f"{step:,}, {public_text(weights)}, written as {dtype}"),
        ("written by", f"loupe {version('loupe')}, diffusers {version('diffusers')}, torch {version('torch')}"),
        ("code that trained", facts.commit or "not recorded"),
        ("compared", f"{parity.pictures} pictures by diffusers in a process without loupe: {settings.steps} steps, guidance "
                     f"{settings.guidance:g}, seed {settings.seed}; largest difference {parity.largest}/255, "
                     f"{parity.differing:.3%} of the values differ"),
    ]  # fmt: skip
    return table(("", ""), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _numbers(tree: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(str(k), float(v)) for k, v in tree.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def _plain(text: str | None) -> str:
    """Of the data or the user: quoted, never marked up."""
    flat = " ".join((text or "").split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in flat)[:500] or HIDDEN


def _quoted(text: str) -> str:
    return _plain(text) if text.strip() else "(no text)"
