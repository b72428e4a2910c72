"""Every trainable parameter in one named group, so that weight decay and optimizers can speak of them."""

import re

from torch import nn

from trainer.config.training import ParameterGroup

MODULATION = re.compile(
    r"(^|\.)(modulation|modulation_table|final_modulation|final_modulation_table"  # MMDiT
    r"|norm1\.linear|proj_out_1"  # diffusers' DiT
    r"|scale_shift_table|adaln_single\.linear"  # diffusers' PixArt
    r"|time_emb_proj)(\.|$)"  # diffusers' U-Net
)
"""Parts of names of what turns a condition into shifts, scales and gates. What embeds the condition before is a matrix."""


def parameter_groups(module: nn.Module) -> dict[ParameterGroup, dict[str, nn.Parameter]]:
    """Trainable parameters of any of our modules by group, by name. A parameter is in exactly one.

    | group | decided by | of |
    |---|---|---|
    | vectors | one dimension or none | biases, the norms' scales |
    | embeddings | `nn.Embedding`, or the name `positions` | tables of bytes, classes, positions |
    | modulation | the names in `MODULATION` | what makes shifts, scales and gates: matrices, PixArt's tables |
    | matrices | all else | linear maps and convolutions |
    """
    groups: dict[ParameterGroup, dict[str, nn.Parameter]] = {
        "matrices": {}, "modulation": {}, "embeddings": {}, "vectors": {},
    }  # fmt: skip
    tables = {
        f"{name}.weight".removeprefix(".") for name, part in module.named_modules() if isinstance(part, nn.Embedding)
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() <= 1:
            group: ParameterGroup = "vectors"
        elif name in tables or name.rpartition(".")[2] == "positions":
            group = "embeddings"
        elif MODULATION.search(name):
            group = "modulation"
        else:
            group = "matrices"
        groups[group][name] = parameter
    return groups
