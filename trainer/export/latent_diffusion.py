"""Export a trained text-to-image model as a pipeline that diffusers opens."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from trainer.errors import UserError
from trainer.export.card import README, SAMPLES, card, usage
from trainer.export.components import Component, write_json
from trainer.export.facts import Facts, captions_of, facts_of, public
from trainer.export.parity import Parity, check_pictures
from trainer.export.pipeline_folder import SD3, guided_alike, why_not_sd3, write_pipeline
from trainer.export.target import RECORD, files_of, free_target, put_in_place
from trainer.export.weights import round_to
from trainer.models.text_files import encoder_files
from trainer.pictures import sample_grid
from trainer.run_folder import CONFIG, RunFolder
from trainer.sampling.model import SamplingModel
from trainer.sampling.settings import SampleSettings
from trainer.sampling.source import opened

PICTURES = 8


@dataclass(frozen=True)
class Exported:
    step: int
    pipeline: str
    """diffusers' class, or empty: its code is in the folder."""
    why_not_sd3: tuple[str, ...]
    parity: Parity
    usage: str
    """Lines of Python that load it."""
    notes: tuple[str, ...]


@torch.no_grad()
def export_latent_diffusion(
    run: str, out: str, *, dtype: torch.dtype = torch.float16, weights: str = "ema", layout: str = "auto",
    without_text_encoders: bool = False, prompts: Sequence[str] = (), pictures: int = PICTURES, steps: int | None = None,
    licence: str | None = None, device: torch.device | None = None,
) -> Exported:  # fmt: skip
    """Write a run's model as a pipeline's folder at `out`, a path or any fsspec URL, where it appears whole.

    It is `StableDiffusion3Pipeline`'s where the run is of its layout, else one with its own code. What was written draws the
    same pictures as the trained model, each 8-bit value within 1, or nothing is put in place: in another process, from
    diffusers alone, both computing in float32 with the weights as they were written.

    Args:
        weights: ema, raw, ema:SIGMA or a file, as `SamplingModel.open` takes it.
        layout: auto, sd3 or custom.
        without_text_encoders: leave frozen ones out; README.md says how to add them.
        prompts: of the pictures that are compared and shown; absent, the run's own.
        steps: of those pictures; absent, the run's own.

    Raises:
        UserError: not such a run, no such weights, `out` holds something else, or the pictures are not the same.
    """
    if layout not in ("auto", "sd3", "custom"):
        raise UserError(f"--layout: {layout!r}; take auto, sd3 or custom")
    target = free_target(out)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SamplingModel.open(run, device, weights=weights)
    model.exact = True  # as the pipeline that it is compared with
    wrong = why_not_sd3(model)
    if layout == "sd3" and wrong:
        raise UserError(f"--layout sd3: {'; '.join(wrong)}; leave it out, and the pipeline has its own code")
    sd3 = layout != "custom" and not wrong
    if without_text_encoders and model.task.text.kind != "frozen":
        raise UserError(f"--without-text-encoders: the run's text encoder ({model.task.text.kind}) was trained with the model "
                        "and is part of it; leave the option out")  # fmt: skip
    round_to(model.module, dtype)
    round_to(model.codec.vae, dtype)
    facts = facts_of(RunFolder(opened(run).url), model.step)
    settings = _settings(model, steps)
    given = list(prompts)[:pictures] if prompts else captions_of(model.config, pictures)

    def write(folder: Path) -> tuple[Parity, str, tuple[str, ...]]:
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".encoders-")) if without_text_encoders else folder
        try:
            frozen = write_pipeline(model, folder, dtype, sd3=sd3, encoders=beside)
            absent = {name: (part, beside / name) for name, part in frozen.items()} if without_text_encoders else {}
            parity, images = check_pictures(model, folder, given, settings, sd3=sd3, components=absent)
        finally:
            if beside is not folder:
                shutil.rmtree(beside, ignore_errors=True)
        notes = _notes(model, sd3, absent)
        if parity.settings != settings:  # compared without guidance, or the like; shown as the run draws
            images = model.images(given, range(len(given)), settings).cpu().numpy()
        _write_documents(folder, facts, model, parity, images, given, notes, sorted(absent), dtype, sd3, licence)
        return parity, usage(SD3 if sd3 else "", parity, given, sorted(absent), out), notes

    parity, lines, notes = put_in_place(target, write)
    return Exported(model.step, SD3 if sd3 else "", tuple(wrong), parity, lines, notes)


def _settings(model: SamplingModel, steps: int | None) -> SampleSettings:
    """The run's own, by the sampler that the written scheduler is."""
    resolution, samples = model.config.phases[-1].resolution, model.config.samples
    flow = model.task.paradigm.kind == "flow"
    settings = SampleSettings("", 50, 2.0, resolution=resolution)
    if samples:
        settings = SampleSettings.of(samples, resolution=resolution)
    count = steps or settings.steps
    if not flow:
        # diffusers' DDIM goes by whole quotients of the 1000 timesteps, and so to a time beside the next where there are none
        count = max(n for n in range(1, count + 1) if 1000 % n == 0)
    return replace(settings, sampler="euler" if flow else "ddim", steps=count)


def _notes(model: SamplingModel, sd3: bool, absent: dict[str, tuple[Component, Path]]) -> tuple[str, ...]:
    notes, text = [], model.task.text
    if sd3:
        notes.append("`sigmas` are the run's own times. Without them diffusers spaces its steps otherwise, and the pictures "
                     "are others.")  # fmt: skip
        if text.kind == "frozen" and text.encoders[-1].max_tokens != 256:
            notes.append(f"Trained on {text.encoders[-1].max_tokens} tokens of T5: give "
                         f"`max_sequence_length={text.encoders[-1].max_tokens}`.")  # fmt: skip
        if text.kind == "frozen" and not guided_alike(text):
            notes.append("Trained with zeros in place of dropped captions. This pipeline guides away from the empty caption, "
                         "so guided pictures are not those of the run, and the comparison was made without guidance; export "
                         "with `--layout custom` for the run's own guidance.")  # fmt: skip
    else:
        notes.append("The folder's Python files are run when it is loaded: read them before you trust them.")
        if model.task.paradigm.kind != "flow":
            notes.append("Steps that divide 1000, such as 50, go where the run's own go.")
    if absent:
        assert text.kind == "frozen"
        names = []
        for i, encoder in enumerate(text.encoders):
            suffix = f"_{i + 1}" if i else ""
            sizes = encoder_files(encoder, f"task.text.encoders.{i}").config
            hint = f"{sizes.get('model_type')}, hidden size {sizes.get('hidden_size') or sizes.get('d_model')}"
            part = absent[f"text_encoder{suffix}"][0][1]
            names.append(f"`text_encoder{suffix}` ({part}: {hint}) with its `tokenizer{suffix}`")
        notes.append("The text encoders are not in this folder. Load them with transformers from where their authors publish "
                     f"them and hand them in: {', '.join(names)}.")  # fmt: skip
    return tuple(notes)


def _write_documents(
    folder: Path, facts: Facts, model: SamplingModel, parity: Parity, images: np.ndarray, prompts: Sequence[str],
    notes: Sequence[str], missing: Sequence[str], dtype: torch.dtype, sd3: bool, licence: str | None,
) -> None:  # fmt: skip
    kind = str(dtype).removeprefix("torch.")
    grid = sample_grid(images.transpose(0, 2, 3, 1), list(prompts))
    (folder / SAMPLES).write_bytes(grid)
    text = card(
        facts, step=model.step, weights=model.weights, dtype=kind, pipeline=SD3 if sd3 else "", licence=licence, parity=parity,
        prompts=prompts, notes=notes, missing=missing,
    )  # fmt: skip
    (folder / README).write_text(text)
    write_config(folder, model.config)
    record = {
        "run": model.config.name, "step": model.step, "weights": public(model.weights), "dtype": kind, "commit": facts.commit,
        "pipeline": SD3 if sd3 else "custom", "licence": licence, "compared": asdict(parity), "prompts": list(prompts),
    }  # fmt: skip
    write_record(folder, "diffusers", record)


def write_config(folder: Path, config: Any) -> None:
    """The run's config, without what is this machine's or secret."""
    tree = public(config.model_dump(mode="json"))
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def write_record(folder: Path, kind: str, record: dict[str, Any]) -> None:
    """`export.json`, with every other file's size and SHA-256."""
    versions = {name: version(name) for name in ("loupe", "torch", "diffusers", "transformers", "safetensors")}
    head = {"format": "loupe-export", "version": 1, "kind": kind}
    write_json(
        folder / RECORD, json.loads(json.dumps({**head, **record, "versions": versions, "files": files_of(folder)}))
    )
