"""Weights of our `MMDiT` to and from diffusers' `SD3Transformer2DModel`: the same tensors under other names.

Ours keeps queries, keys and values in one matrix, and orders a final modulation (shift, scale) as every other one;
diffusers has three matrices, and (scale, shift) in its `AdaLayerNormContinuous`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.config import MMDiTConfig
from trainer.errors import UserError
from trainer.models.layers import cropped_axes, sincos_positions
from trainer.models.mmdit import MMDiT

POSITIONS = "pos_embed.pos_embed"
"""diffusers' table of positions, (1, grid * grid, D). Ours are reckoned, so the table is only compared."""

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
        "dual.qkv.proj": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "dual.qkv.q_norm": "attn2.norm_q",
        "dual.qkv.k_norm": "attn2.norm_k",
        "dual.out": "attn2.to_out.0",
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


def _our_names(config: MMDiTConfig) -> Iterator[str]:
    """Names of the tensors of an `MMDiT` in SD3's layout."""
    with torch.device("meta"):  # only names: no width of another model matters, no memory is taken
        yield from MMDiT(config, latent_channels=1, token_width=1, pooled_width=1).state_dict()


def _swap_halves(ours: str, tensor: Tensor, num_blocks: int) -> Tensor:
    """(shift, scale) <-> (scale, shift), where diffusers has the other order. Its own inverse."""
    if ours.startswith((f"blocks.{num_blocks - 1}.text.modulation", "final_modulation")):
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor


# --------------------------------------------------------------------------------------------------------- to diffusers


def mmdit_to_diffusers(model: MMDiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and state dict for `SD3Transformer2DModel`.

    Raises:
        UserError: the model has a layout or positions that it does not know.
    """
    config, state = model.config, model.state_dict()
    _check_kind(config)
    out: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        names = _names(ours)
        parts = _swap_halves(ours, tensor, config.num_blocks).chunk(len(names))
        out |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    grid = config.position_grid
    axes = cropped_axes(grid, grid, table=grid, base=config.base_grid)
    out[POSITIONS] = sincos_positions(*axes, config.width, torch.device("cpu"))[None].to(model.final.weight.device)
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
        "dual_attention_layers": tuple(range(config.num_dual_attention_blocks)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
    return arguments, out


def _check_kind(config: MMDiTConfig) -> None:
    for field, sd3s in (("layout", "sd3"), ("positions", "sincos"), ("position_growth", "extend")):
        if getattr(config, field) != sd3s:
            raise UserError(f"task.model.{field}: this model has {getattr(config, field)}, SD3's weights have {sd3s}")


# ------------------------------------------------------------------------------------------------------- from diffusers


def sd3_config(arguments: Mapping[str, Any]) -> MMDiTConfig:
    """Our config of an `SD3Transformer2DModel`, given its arguments: its own config, or its `config.json`.

    Raises:
        UserError: second attentions elsewhere than in the first blocks.
    """
    dual, patch = tuple(arguments.get("dual_attention_layers") or ()), arguments["patch_size"]
    if dual != tuple(range(len(dual))):
        raise UserError(f"dual_attention_layers: {dual} are not the first blocks, which MMDiT's "
                        "num_dual_attention_blocks are")  # fmt: skip
    return MMDiTConfig(
        num_blocks=arguments["num_layers"],
        num_heads=arguments["num_attention_heads"],
        head_dim=arguments["attention_head_dim"],
        patch_size=patch,
        position_grid=arguments["pos_embed_max_size"],
        base_grid=arguments["sample_size"] // patch,
        num_dual_attention_blocks=len(dual),
        qk_norm=arguments.get("qk_norm") == "rms_norm",
    )


def sd3_state_to_mmdit(state: Mapping[str, Tensor], config: MMDiTConfig, *, strict: bool = True) -> dict[str, Tensor]:
    """State dict of an `MMDiT` of this config, from that of an `SD3Transformer2DModel`.

    Widths of latents and text are not looked at: `load_state_dict`, or who picks tensors by name, compares shapes.

    Args:
        strict: Off: what is missing is left out, and what has no place keeps its own name, for a report to tell.

    Raises:
        UserError: the weights are of another layout, in one line that names both; or tensors are missing or left over.
    """
    _check_kind(config)
    _check_layout(state, config, strict=strict)
    left_over = set(state) - {POSITIONS}
    loaded: dict[str, Tensor] = {}
    for ours in _our_names(config):
        names = _names(ours)
        missing = [name for name in names if name not in state]
        if missing and strict:
            raise UserError(
                f"{missing[0]}: missing from the SD3 weights, wanted for {ours}; are they of another layout?"
            )
        if missing:
            continue
        left_over -= set(names)
        joined = torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
        loaded[ours] = _swap_halves(ours, joined, config.num_blocks)
    if left_over and strict:
        raise UserError(
            f"{min(left_over)}: {len(left_over)} SD3 tensors have no place in MMDiT; are they of another layout?"
        )
    return loaded | {name: state[name] for name in sorted(left_over)}


def mmdit_from_diffusers(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> MMDiT:
    """An `MMDiT` with the weights of an `SD3Transformer2DModel`, given its config and state dict.

    Raises:
        UserError: a layout that MMDiT does not have, or tensors that are missing or left over.
    """
    config = sd3_config(arguments)
    model = MMDiT(
        config,
        latent_channels=arguments["in_channels"],
        token_width=arguments["joint_attention_dim"],
        pooled_width=arguments["pooled_projection_dim"],
    )
    model.load_state_dict(sd3_state_to_mmdit(state, config))
    return model


def _check_layout(state: Mapping[str, Tensor], config: MMDiTConfig, *, strict: bool) -> None:
    """What the tensors themselves tell of their layout, against the config's; not strictly, the positions alone."""
    found = dict(_layout_of(state)) if strict else {}
    wanted = {name: getattr(config, name) for name in found}
    differing = [name for name in found if found[name] != wanted[name]]
    if differing:
        theirs, ours = (", ".join(f"{name} {side[name]}" for name in differing) for side in (found, wanted))
        raise UserError(f"task.model: the SD3 weights have {theirs}, this model has {ours}; take the weights' layout")
    if POSITIONS in state and (strict or math.isqrt(state[POSITIONS].shape[1]) == config.position_grid):
        _check_positions(state[POSITIONS], config)


def _layout_of(state: Mapping[str, Tensor]) -> Iterator[tuple[str, object]]:
    """Fields of `MMDiTConfig`, as far as names and shapes tell them."""
    blocks = {int(m[1]) for name in state if (m := re.match(r"transformer_blocks\.(\d+)\.", name))}
    if not blocks or "pos_embed.proj.weight" not in state:
        raise UserError("transformer_blocks: no such tensors, so these are not an SD3Transformer2DModel's weights")
    yield "num_blocks", max(blocks) + 1
    width, _, patch, _ = state["pos_embed.proj.weight"].shape
    yield "width", width
    yield "patch_size", patch
    yield "num_dual_attention_blocks", sum(f"transformer_blocks.{i}.attn2.to_q.weight" in state for i in blocks)
    norm = state.get("transformer_blocks.0.attn.norm_q.weight")
    yield "qk_norm", norm is not None
    if norm is not None:
        yield "head_dim", norm.shape[0]
    if POSITIONS in state:
        yield "position_grid", math.isqrt(state[POSITIONS].shape[1])


def _check_positions(table_1ND: Tensor, config: MMDiTConfig) -> None:
    """The weights mean something only at the positions they were trained with: compare the table's first row."""
    grid = config.position_grid
    _, columns = cropped_axes(grid, grid, table=grid, base=config.base_grid)
    ours = sincos_positions(columns._replace(length=1), columns, config.width, torch.device("cpu"))
    theirs = table_1ND[0, :grid].float().cpu()
    if grid > 1 and not torch.allclose(theirs, ours, atol=0.02):  # they may be stored in bf16
        step = math.asin(min(1.0, max(-1.0, float(theirs[1, 0]))))  # sin of the second column's coordinate
        raise UserError(f"task.model.base_grid: the SD3 weights' positions run from 0 to about {step * grid:.0f}, this "
                        f"model's to {config.base_grid}")  # fmt: skip
