"""Frozen networks of a recipe as sizes alone: codecs by their `config.json` where it is there, all else as published."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from trainer.config import CodecConfig, EncoderConfig
from trainer.errors import UserError
from trainer.models.autoencoders import Codec
from trainer.models.codec_files import meta_autoencoder
from trainer.models.published_codecs import PUBLISHED


def published_name(config: CodecConfig) -> str:
    """Which of `PUBLISHED` a codec is taken for, by its URL's words and its channels."""
    if "asymmetric" in config.url:
        return "asymmetric_x1.5"
    return "sd3" if config.latent_channels == 16 else "sd15"


def codec_of(config: CodecConfig) -> tuple[Codec, str | None]:
    """The autoencoder on the meta device, and what was assumed of it.

    Raises:
        UserError: it is not there, and no published one has its channels and downsampling.
    """
    assumed = None
    try:
        vae = meta_autoencoder(config.url)
    except UserError:
        name = published_name(config)
        with torch.device("meta"):
            vae = PUBLISHED[name]()
        assumed = f"{config.url}/config.json is not here: the sizes of {name} are taken"
    codec = Codec(vae)
    for field in ("latent_channels", "downsampling"):
        declared, found = getattr(config, field), getattr(codec, field)
        if declared != found:
            given = "the published one" if assumed else "the autoencoder there"
            raise UserError(f"task.codec.{field}: {declared}, and {given} for {config.url} has {found}; set it to {found}, or "
                            "give the URL of one that is there")  # fmt: skip
    return codec, assumed


CLIP_SIZES = {768: (12, 12, 3072, "quick_gelu"), 1280: (32, 20, 5120, "gelu")}
"""Layers, heads, width of the MLP, its function: CLIP-L and OpenCLIP's bigG."""
T5_SIZES = {512: (8, 6, 1024), 768: (12, 12, 2048), 1024: (24, 16, 2816), 2048: (24, 32, 5120), 4096: (24, 64, 10240)}
"""Layers, heads of 64 channels, width of the MLP: T5 v1.1 small to XXL."""


def text_encoder_of(config: EncoderConfig) -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]] | None:
    """A published text encoder in bf16, by family and width, and how to call it; None: there is none of that width. To be
    called within `trainer.plan.counting.fake`."""
    build: Callable[[], nn.Module]
    if config.family == "clip" and config.width in CLIP_SIZES:
        layers, heads, inner, function = CLIP_SIZES[config.width]
        clip = CLIPTextConfig(
            hidden_size=config.width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
            hidden_act=function, projection_dim=config.width, max_position_embeddings=max(77, config.max_tokens),
        )  # fmt: skip
        clip._attn_implementation = "sdpa"
        build = lambda: CLIPTextModelWithProjection(clip)  # noqa: E731
    elif config.family == "t5" and config.width in T5_SIZES:
        layers, heads, inner = T5_SIZES[config.width]
        t5 = T5Config(
            d_model=config.width, d_kv=64, d_ff=inner, num_layers=layers, num_heads=heads,
            feed_forward_proj="gated-gelu", use_cache=False, vocab_size=32128,
        )  # fmt: skip
        build = lambda: T5EncoderModel(t5)  # noqa: E731
    else:
        return None

    def call(model: nn.Module, images: int) -> Tensor:
        out: Any = model(input_ids=torch.zeros(images, config.max_tokens, dtype=torch.long))
        states: Tensor = out.last_hidden_state
        return states

    with building_in(torch.bfloat16):
        return build().requires_grad_(False).eval(), call


@contextmanager
def building_in(dtype: torch.dtype) -> Iterator[None]:
    """Parameters that are made within have this type: fake ones cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
