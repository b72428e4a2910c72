"""The parts of a pipeline's folder: weights in files of bounded size, autoencoder, scheduler, frozen text encoders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from trainer.config import FrozenTextConfig, ParadigmConfig
from trainer.diffusion.paradigms import DDPM, FlowOT, build_paradigm
from trainer.models.autoencoders import Codec
from trainer.models.frozen_encoder import load_encoder
from trainer.models.text_files import encoder_files

MAX_FILE_BYTES = 5_000_000_000
"""Of weights, as diffusers has it; what is more goes into further files, with an index."""
COMPUTED = {"mmdit": ("width", "latent_multiple"), "frozen": ("width", "pooled_width", "groups")}
"""Properties of a section that the modules ask for as if they were fields."""

Component = tuple[str, str]
"""Library and class, as model_index.json names them."""


def write_weights(
    state: Mapping[str, Tensor], folder: Path, stem: str, metadata: Mapping[str, str] | None = None
) -> None:
    """`STEM.safetensors`, or where that were too large `STEM-00001-of-00002.safetensors` and so on with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=stem + "{suffix}.safetensors", max_shard_size=MAX_FILE_BYTES
    )
    for name, tensors in split.filename_to_tensors.items():
        part = {tensor: state[tensor].contiguous().cpu() for tensor in tensors}
        safetensors.torch.save_file(part, folder / name, metadata={"format": "pt", **(metadata or {})})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n")


def fields_of(section: Any) -> dict[str, Any]:
    """A section of the config as JSON, with what its modules compute of it."""
    tree: dict[str, Any] = section.model_dump(mode="json")
    names = COMPUTED.get(section.kind, ("width", "latent_multiple"))
    tree |= {name: getattr(section, name) for name in names if hasattr(section, name)}
    if "groups" in tree:
        tree["groups"] = [[encoder.model_dump(mode="json") for encoder in group] for group in section.groups]
    for encoder in [*tree.get("encoders", []), *(e for group in tree.get("groups", []) for e in group)]:
        for name in ("url", "weights_folder", "tokenizer_folder"):  # of the machine that trained
            del encoder[name]
    return tree


def write_vae(codec: Codec, folder: Path, dtype: torch.dtype) -> Component:
    """The codec, rounded to `dtype` as `round_to` has rounded it."""
    vae: Any = codec.vae
    before = next(vae.parameters()).dtype
    vae.register_to_config(scaling_factor=codec.scaling_factor, shift_factor=codec.shift_factor)
    nn.Module.to(vae, dtype)  # diffusers' own `to` warns of nothing
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    nn.Module.to(vae, before)
    return "diffusers", type(vae).__name__


def write_scheduler(config: ParadigmConfig, resolution: int, folder: Path) -> Component:
    """diffusers' own, with the noise levels that the run has at this resolution."""
    paradigm = build_paradigm(config, resolution=resolution)
    scheduler: Any
    if isinstance(paradigm, FlowOT):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=paradigm.shift_ratio)
    else:
        assert isinstance(paradigm, DDPM)
        alphas = paradigm.alphas_cumprod
        betas = [float(1.0 - alphas[0]), *(1.0 - alphas[1:] / alphas[:-1]).tolist()]
        scheduler = DDIMScheduler(
            num_train_timesteps=len(betas), trained_betas=betas, clip_sample=False, set_alpha_to_one=True,
            prediction_type="epsilon" if config.kind == "ddpm_eps" else "v_prediction", timestep_spacing="trailing",
        )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    return "diffusers", type(scheduler).__name__


def write_text_encoders(config: FrozenTextConfig, folder: Path) -> dict[str, Component]:
    """Each encoder and its tokenizer, as transformers writes them, in the precision of the files they came from.

    Raises:
        UserError: an encoder's files are missing or damaged.
    """
    components: dict[str, Component] = {}
    for i, encoder in enumerate(config.encoders):
        field, suffix = f"task.text.encoders.{i}", f"_{i + 1}" if i else ""
        loaded = load_encoder(encoder, field, _stored_dtype(encoder_files(encoder, field).weights[0]))
        loaded.model.save_pretrained(folder / f"text_encoder{suffix}", safe_serialization=True)
        # what the published pipelines ask it for: the length that captions are padded to
        loaded.tokenizer.model_max_length = encoder.max_tokens
        loaded.tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        components[f"text_encoder{suffix}"] = ("transformers", type(loaded.model).__name__)
        components[f"tokenizer{suffix}"] = ("transformers", "PreTrainedTokenizerFast")
    return components


def _stored_dtype(path: Path) -> torch.dtype:
    with safetensors.safe_open(path, framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return torch.float16 if dtypes == {"F16"} else torch.bfloat16 if dtypes == {"BF16"} else torch.float32
