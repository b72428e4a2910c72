"""Weights of our `MMDiT` to and from diffusers' `SD3Transformer2DModel`: the same tensors under other names.

Ours keeps queries, keys and values in one matrix, and orders a final modulation (shift, scale) as every other one;
diffusers has three matrices, and (scale, shift) in its `AdaLayerNormContinuous`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.config import MMDiTConfig
from trainer.errors import UserError
from trainer.models.mmdit import MMDiT

_OUTER = {
    "patch": "pos_embed.proj",
    "time.fc1": "time_text_embed.timestep_embedder.linear_1",
    "time.fc2": "time_text_embed.timestep_embedder.linear_2",
    "pooled.fc1": "time_text_embed.text_embedder.linear_1",
    "pooled.fc2": "time_text_embed.text_embedder.linear_2",
    "text": "context_embedder",
    "final_modulation": "norm_out.linear",
    "final": "proj_out",
}
_STREAMS = {
    "image": {
        "modulation": "norm1.linear",
        "qkv.proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "qkv.q_norm": "attn.norm_q",
        "qkv.k_norm": "attn.norm_k",
        "out": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    "text": {
        "modulation": "norm1_context.linear",
        "qkv.proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "qkv.q_norm": "attn.norm_added_q",
        "qkv.k_norm": "attn.norm_added_k",
        "out": "attn.to_add_out",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}


def _names(ours: str) -> tuple[str, ...]:
    """diffusers' names for one of our tensors; three for a joint query-key-value tensor."""
    module, _, kind = ours.rpartition(".")
    if module in _OUTER:
        return (f"{_OUTER[module]}.{kind}",)
    _, index, stream, part = module.split(".", 3)
    theirs = _STREAMS[stream][part]
    prefix = f"transformer_blocks.{index}."
    return tuple(f"{prefix}{name}.{kind}" for name in ([theirs] if isinstance(theirs, str) else theirs))


def _swap_halves(ours: str, tensor: Tensor, num_blocks: int) -> Tensor:
    """(shift, scale) <-> (scale, shift), where diffusers has the other order. Its own inverse."""
    if ours.startswith((f"blocks.{num_blocks - 1}.text.modulation", "final_modulation")):
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


def mmdit_to_diffusers(model: MMDiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and state dict for `SD3Transformer2DModel`."""
    config, state = model.config, model.state_dict()
    out: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        names = _names(ours)
        parts = _swap_halves(ours, tensor, config.num_blocks).chunk(len(names))
        out |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    out["pos_embed.pos_embed"] = model.positions.flatten(0, 1)[None].clone()
    arguments = {
        "sample_size": config.base_grid * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": model.latent_channels,
        "out_channels": model.latent_channels,
        "num_layers": config.num_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": model.text.in_features,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": model.pooled.fc1.in_features,
        "pos_embed_max_size": config.position_grid,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
    return arguments, out


def mmdit_from_diffusers(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> MMDiT:
    """An `MMDiT` with the weights of an `SD3Transformer2DModel`, given its config and state dict.

    Raises:
        UserError: a layout that MMDiT does not have, or tensors that are missing or left over.
    """
    if arguments.get("dual_attention_layers"):
        raise UserError(
            f"dual_attention_layers: {arguments['dual_attention_layers']} is not in MMDiT; take an SD3 layout"
        )
    patch = arguments["patch_size"]
    config = MMDiTConfig(
        num_blocks=arguments["num_layers"],
        num_heads=arguments["num_attention_heads"],
        head_dim=arguments["attention_head_dim"],
        patch_size=patch,
        position_grid=arguments["pos_embed_max_size"],
        base_grid=arguments["sample_size"] // patch,
        qk_norm=arguments["qk_norm"] == "rms_norm",
    )
    model = MMDiT(
        config,
        latent_channels=arguments["in_channels"],
        token_width=arguments["joint_attention_dim"],
        pooled_width=arguments["pooled_projection_dim"],
    )
    left_over = set(state) - {"pos_embed.pos_embed"}
    loaded: dict[str, Tensor] = {}
    for ours in model.state_dict():
        names = _names(ours)
        missing = [name for name in names if name not in state]
        if missing:
            raise UserError(
                f"{missing[0]}: missing from the SD3 weights, wanted for {ours}; are they of another layout?"
            )
        left_over -= set(names)
        loaded[ours] = _swap_halves(ours, torch.cat([state[name] for name in names]), config.num_blocks)
    if left_over:
        raise UserError(
            f"{min(left_over)}: {len(left_over)} SD3 tensors have no place in MMDiT; are they of another layout?"
        )
    model.load_state_dict(loaded)
    return model
