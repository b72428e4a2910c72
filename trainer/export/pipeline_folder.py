"""A trained text-to-image model as the folder of a diffusers pipeline: Stable Diffusion 3's own class where the run is of its
layout, else a small pipeline whose code lies in the folder."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from trainer.config import FrozenTextConfig, LatentDiffusionConfig, SamplesConfig
from trainer.errors import UserError
from trainer.export.bundle import Symbol, bundle
from trainer.export.components import (
    Component,
    fields_of,
    write_json,
    write_scheduler,
    write_text_encoders,
    write_vae,
    write_weights,
)
from trainer.export.target import MODEL_INDEX
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import mmdit_to_diffusers
from trainer.sampling.model import SamplingModel

STEM = "diffusion_pytorch_model"
SD3 = "StableDiffusion3Pipeline"
_DENOISERS = {"mmdit": "trainer.models.mmdit", "dit": "trainer.models.diffusers_denoisers"}
_FROZEN = (Symbol("trainer.models.frozen_text", "FrozenText"), Symbol("trainer.models.frozen_encoder", "FrozenEncoder"))
_LOADING = Symbol("trainer.models.frozen_encoder", "load_encoder")
_MOST_ENCODERS = 3


def why_not_sd3(model: SamplingModel) -> list[str]:
    """What keeps a run out of `StableDiffusion3Pipeline`, by fields of its config; nothing: it is of that layout."""
    task, text = model.task, model.task.text
    wrong = []
    if task.model.kind != "mmdit":
        wrong.append(f"task.model.kind is {task.model.kind}, not mmdit")
    else:
        for field, sd3s in (("layout", "sd3"), ("positions", "sincos"), ("position_growth", "extend")):
            if getattr(task.model, field) != sd3s:
                wrong.append(f"task.model.{field} is {getattr(task.model, field)}, not {sd3s}")
    if task.paradigm.kind != "flow":
        wrong.append(f"task.paradigm.kind is {task.paradigm.kind}, not flow")
    if not isinstance(model.codec.vae, AutoencoderKL):
        wrong.append(f"the codec is of {type(model.codec.vae).__name__}, not AutoencoderKL")
    wrong += (
        _of_other_text(text) if isinstance(text, FrozenTextConfig) else [f"task.text.kind is {text.kind}, not frozen"]
    )
    return wrong


def _of_other_text(text: FrozenTextConfig) -> list[str]:
    families = [(e.family, e.join, e.hidden_state) for e in text.encoders]
    if families != [("clip", "tokens", -2), ("clip", "channels", -2), ("t5", "tokens", -1)]:
        return ["task.text.encoders are not two CLIPs beside each other (hidden_state -2), then a T5"]
    *clips, t5 = text.encoders
    wrong = [
        f"task.text.encoders.{i}.max_tokens is {e.max_tokens}, not 77"
        for i, e in enumerate(clips)
        if e.max_tokens != 77
    ]
    wrong += [f"task.text.encoders.{i}.pooled_width is absent" for i, e in enumerate(clips) if e.pooled_width is None]
    if t5.pooled_width is not None:
        wrong.append("task.text.encoders.2.pooled_width is set: that pipeline takes no pooled text of T5")
    if sum(e.width for e in clips) > t5.width:
        wrong.append("task.text.encoders: the CLIPs together are wider than T5")
    masked = [str(i) for i, e in enumerate(text.encoders) if e.padding != "seen"]
    if masked:
        wrong.append(f"task.text.encoders.{masked[0]}.padding is masked, and that pipeline lets the model see padding")
    return wrong


def guided_alike(text: FrozenTextConfig) -> bool:
    """Whether guidance means the same to `StableDiffusion3Pipeline`, which goes away from the empty caption."""
    return all(encoder.null_text == "empty" for encoder in text.encoders)


def write_pipeline(
    model: SamplingModel, folder: Path, dtype: torch.dtype, *, sd3: bool, encoders: Path
) -> dict[str, Component]:
    """All but the documents. The model's weights, and the codec's, are rounded to `dtype` already.

    Args:
        encoders: where frozen text encoders go: this folder, or one beside it that will not be part of it.

    Returns:
        The frozen encoders and tokenizers.
    """
    task, resolution = model.task, model.config.phases[-1].resolution
    components: dict[str, Any] = {"vae": write_vae(model.codec, folder, dtype)}
    components["scheduler"] = write_scheduler(task.paradigm, resolution, folder)
    frozen: dict[str, Component] = {}
    if isinstance(task.text, FrozenTextConfig):
        if len(task.text.encoders) > _MOST_ENCODERS:
            raise UserError(f"task.text.encoders: {len(task.text.encoders)}, and a pipeline has room for {_MOST_ENCODERS}; "
                            "export with --format safetensors")  # fmt: skip
        frozen = write_text_encoders(task.text, encoders)
    if sd3:
        components["transformer"] = _write_sd3(model, folder, dtype)
        components |= {"image_encoder": (None, None), "feature_extractor": (None, None)}
        class_name: Any = SD3
    else:
        components["transformer"] = _write_portable(model, folder, dtype)
        class_name = ["pipeline", "TextToImagePipeline"]
        absent = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        components |= dict.fromkeys(absent, (None, None))
    components |= frozen if encoders == folder else dict.fromkeys(frozen, (None, None))
    index = {"_class_name": class_name, "_diffusers_version": version("diffusers")}
    write_json(folder / MODEL_INDEX, {**index, **{name: list(part) for name, part in sorted(components.items())}})
    return frozen


def _write_sd3(model: SamplingModel, folder: Path, dtype: torch.dtype) -> Component:
    denoiser = model.module.denoiser
    assert isinstance(denoiser, MMDiT)
    arguments, state = mmdit_to_diffusers(denoiser)
    _write_model("SD3Transformer2DModel", arguments, {name: tensor.to(dtype) for name, tensor in state.items()}, folder)
    return "diffusers", "SD3Transformer2DModel"


def _write_portable(model: SamplingModel, folder: Path, dtype: torch.dtype) -> Component:
    source, arguments = portable_model(model)
    # by its content: diffusers imports such files from one folder, where another export's of the same name would be in the way
    module = f"loupe_model_{hashlib.blake2b(source.encode(), digest_size=6).hexdigest()}"
    state = {name: tensor.to(dtype) for name, tensor in model.module.state_dict().items()}
    _write_model("TextToImageModel", arguments, state, folder)
    (folder / "transformer" / f"{module}.py").write_text(source)
    pipeline = bundle("trainer.export.portable.pipeline", title=_title("Pictures from prompts, as the run drew them."))
    (folder / "pipeline.py").write_text(pipeline)
    return module, "TextToImageModel"


def _write_model(class_name: str, arguments: dict[str, Any], state: dict[str, Tensor], folder: Path) -> None:
    config = {"_class_name": class_name, "_diffusers_version": version("diffusers"), **arguments}
    write_json(folder / "transformer" / "config.json", config)
    write_weights(state, folder / "transformer", STEM)


def portable_model(model: SamplingModel) -> tuple[str, dict[str, Any]]:
    """Source of the file with the model's class and all that it is made of, and the arguments of that class."""
    task: LatentDiffusionConfig = model.task
    denoiser, text = model.module.denoiser, model.module.text
    parts = [Symbol(_DENOISERS.get(task.model.kind, _DENOISERS["dit"]), type(denoiser).__name__)]
    if text is None:
        parts += _FROZEN
    else:
        parts.append(Symbol("trainer.models.text_encoders", type(text).__name__))
    source = bundle(
        "trainer.export.portable.model", parts=parts, stubs=[_LOADING], title=_title("A text-to-image model."),
        tail=[f"PARTS.update({', '.join(f'{part.name}={part.name}' for part in parts)})"],
    )  # fmt: skip
    given: dict[str, Any] = {"latent_channels": task.codec.latent_channels}
    pooled = task.text.pooled_width if isinstance(task.text, FrozenTextConfig) else task.text.width
    if task.model.kind == "dit":
        given["num_classes"] = task.text.num_classes if task.text.kind == "classes" else None
    else:
        given |= {"token_width": task.text.width} | ({"pooled_width": pooled} if task.model.kind == "mmdit" else {})
    samples, codec = model.config.samples, model.codec
    if samples is None:
        samples = SamplesConfig(sampler="euler" if task.paradigm.kind == "flow" else "ddim")
    return source, {
        "network": {"class": type(denoiser).__name__, "config": fields_of(task.model), "arguments": given},
        "encoder": {
            "class": type(text).__name__ if text is not None else "FrozenText",
            "config": fields_of(task.text),
            "arguments": {"labels_only": task.model.kind == "dit"} if task.text.kind == "classes" else {},
            "frozen": text is None,
        },
        "latents": {
            "channels": codec.latent_channels, "downsampling": codec.downsampling, "scale": codec.scaling_factor,
            "shift": codec.shift_factor,
        },
        "noise": {"kind": task.paradigm.kind, "shift_base_px": task.paradigm.shift_base_px},
        "defaults": {
            "resolution": model.config.phases[-1].resolution, "num_steps": samples.num_steps,
            "guidance_scale": samples.guidance_scale, "guidance_interval": samples.guidance_interval,
            "guidance_rescale": samples.guidance_rescale,
        },
    }  # fmt: skip


def _title(what: str) -> str:
    return (
        f"{what} Needs diffusers and torch alone.\n\nWritten by `loupe export` (loupe {version('loupe')}) from its own "
        "modules' sources: mend those, not this file.\n"
    )
