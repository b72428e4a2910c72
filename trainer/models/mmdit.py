"""MMDiT, the multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, section 4 and figure 2), and a
leaner layout of it with one set of weights for both modalities.

B batch, C latent channels, H W latent sides, N image tokens, L text tokens, S all tokens, D width, T and P widths of the text
tokens and the pooled text, K half of a head's channels. A plain module: sharding, recomputation and compilation come from
outside.
"""

from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainer.config import MMDiTConfig
from trainer.errors import UserError
from trainer.models.condition import Condition
from trainer.models.denoisers import Denoiser, init_transformer
from trainer.models.layers import (
    MLP,
    QKV,
    Axis,
    cropped_axes,
    gated,
    joint_attention,
    modulated_norm,
    rotary_positions,
    sincos_positions,
    stretched_axes,
    timestep_features,
    unpatchify,
)

# ------------------------------------------------------------------------------------------------------------ sd3 layout


class ImageAttention(nn.Module):
    """Stable Diffusion 3.5 medium's second attention of a block, among the image's tokens alone."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.qkv = QKV(width, num_heads, norm=qk_norm)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, rotation_2NK: Tensor | None) -> Tensor:
        out: Tensor = self.out(joint_attention([(self.qkv, x_BND)], None, rotation_2NK))
        return out


class Stream(nn.Module):
    """One modality's weights in a joint block: modulation, attention projections and MLP."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, ends: bool = False, dual: bool = False) -> None:
        super().__init__()
        self.ends = ends
        """The text's last block only feeds the attention: nothing reads its output."""
        self.num_modulations = 2 if ends else 9 if dual else 6
        self.modulation = nn.Linear(width, self.num_modulations * width)
        self.qkv = QKV(width, num_heads, norm=qk_norm)
        self.dual = ImageAttention(width, num_heads, qk_norm=qk_norm) if dual else None
        if not ends:
            self.out = nn.Linear(width, width)
            self.mlp = MLP(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def before_attention(self, x_BSD: Tensor, c_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        shift, scale, *rest = self.modulation(c_BD).chunk(self.num_modulations, dim=-1)
        return modulated_norm(x_BSD, shift, scale), rest

    def after_attention(
        self, x_BSD: Tensor, attended_BSD: Tensor, rest: list[Tensor], rotation_2NK: Tensor | None = None
    ) -> Tensor:
        gate1, shift, scale, gate2, *of_dual = rest
        out_BSD = gated(x_BSD, gate1, self.out(attended_BSD))
        if self.dual is not None:
            dual_shift, dual_scale, dual_gate = of_dual
            among_image = self.dual(modulated_norm(x_BSD, dual_shift, dual_scale), rotation_2NK)
            out_BSD = gated(out_BSD, dual_gate, among_image)
        return gated(out_BSD, gate2, self.mlp(modulated_norm(out_BSD, shift, scale)))


class JointBlock(nn.Module):
    """Image and text tokens, each with its own weights, attend to each other in one attention."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.image = Stream(width, num_heads, qk_norm=qk_norm, dual=dual)
        self.text = Stream(width, num_heads, qk_norm=qk_norm, ends=last)

    def forward(
        self, image_BND: Tensor, text_BLD: Tensor, c_BD: Tensor, mask_BS: Tensor | None, rotation_2SK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Both streams; no text from the last block."""
        num_image = image_BND.shape[1]
        image_in, image_rest = self.image.before_attention(image_BND, c_BD)
        text_in, text_rest = self.text.before_attention(text_BLD, c_BD)
        streams = [(self.image.qkv, image_in), (self.text.qkv, text_in)]
        num_queries = num_image if self.text.ends else None  # of the text's last block nothing is read
        out_BSD = joint_attention(streams, mask_BS, rotation_2SK, num_queries)
        rotation_2NK = None if rotation_2SK is None else rotation_2SK[:, :num_image]
        if self.text.ends:
            return self.image.after_attention(image_BND, out_BSD, image_rest, rotation_2NK), None
        image_out, text_out = out_BSD.split([num_image, text_BLD.shape[1]], dim=1)
        image_BND = self.image.after_attention(image_BND, image_out, image_rest, rotation_2NK)
        return image_BND, self.text.after_attention(text_BLD, text_out, text_rest)


class SharedBlock(nn.Module):
    """One set of weights for image and text tokens. Shifts, scales and gates are the model's, which all blocks share, plus
    this block's own table (adaLN-single: Chen et al. 2024, section 2.3)."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.modulation_table = nn.Parameter(torch.empty(6, width))
        self.qkv = QKV(width, num_heads, norm=qk_norm)
        self.out = nn.Linear(width, width)
        self.mlp = MLP(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def forward(
        self, x_BSD: Tensor, modulation_B6D: Tensor, mask_BS: Tensor | None, rotation_2SK: Tensor | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation_B6D + self.modulation_table).unbind(dim=1)
        attended_BSD = joint_attention([(self.qkv, modulated_norm(x_BSD, shift1, scale1))], mask_BS, rotation_2SK)
        x_BSD = gated(x_BSD, gate1, self.out(attended_BSD))
        return gated(x_BSD, gate2, self.mlp(modulated_norm(x_BSD, shift2, scale2)))


# ---------------------------------------------------------------------------------------------------------------- model


class MMDiT(Denoiser):
    def __init__(self, config: MMDiTConfig, *, latent_channels: int, token_width: int, pooled_width: int) -> None:
        super().__init__(
            latent_channels=latent_channels, latent_multiple=config.latent_multiple, token_width=token_width
        )
        if pooled_width < 1:
            raise UserError("task.text: mmdit needs a pooled text, and the encoders give none; give one a pooled_width")
        width, heads, patch, qk_norm = config.width, config.num_heads, config.patch_size, config.qk_norm
        self.config = config
        self.patch = nn.Conv2d(latent_channels, width, kernel_size=patch, stride=patch)
        self.time = MLP(256, width, width, nn.SiLU())
        self.pooled = MLP(pooled_width, width, width, nn.SiLU())
        self.text = nn.Linear(token_width, width)
        if config.layout == "sd3":
            last, num_dual = config.num_blocks - 1, config.num_dual_attention_blocks
            self.blocks = nn.ModuleList(
                JointBlock(width, heads, qk_norm=qk_norm, dual=i < num_dual, last=i == last)
                for i in range(config.num_blocks)
            )
            self.final_modulation = nn.Linear(width, 2 * width)
        else:
            self.modulation = nn.Linear(width, 6 * width)
            self.blocks = nn.ModuleList(SharedBlock(width, heads, qk_norm=qk_norm) for _ in range(config.num_blocks))
            self.final_modulation_table = nn.Parameter(torch.empty(2, width))
        self.final = nn.Linear(width, patch * patch * latent_channels)

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def cut(self, num_blocks: int) -> None:
        self.blocks = self.blocks[:num_blocks]

    def init_weights(self) -> None:
        """DiT's initialisation (Peebles & Xie 2023): Xavier for linear maps, zeros where a block or the output begins, in
        both layouts: PixArt-alpha's random tables are for weights that come from a DiT."""
        init_transformer(self)
        for mlp in (self.time, self.pooled):
            nn.init.normal_(mlp.fc1.weight, std=0.02)
            nn.init.normal_(mlp.fc2.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "modulation" in name:
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final.weight)

    def forward(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int | None = None) -> Tensor:
        """The network's prediction, (B, C, H, W); t in 0..1000. With `num_blocks`: the image's tokens behind so many."""
        self.check_inputs(zt_BCHW, condition)
        rows, columns = (side // self.config.patch_size for side in zt_BCHW.shape[-2:])
        axes = self.axes(rows, columns)
        image_BND = rearrange(self.patch(zt_BCHW), "b d h w -> b (h w) d")
        rotation_2SK = None
        if self.config.positions == "sincos":
            image_BND = image_BND + sincos_positions(*axes, self.config.width, image_BND.device)
        else:
            # as added positions would do: under autocast the residual stream stays wide
            image_BND = image_BND.to(self.patch.weight.dtype)
            # the text is turned by nothing: cosine 1, sine 0
            num_text = condition.tokens_BLT.shape[1]
            cos, sin = rotary_positions(*axes, self.config.head_dim, image_BND.device)
            rotation_2SK = torch.stack([F.pad(cos, (0, 0, 0, num_text), value=1.0), F.pad(sin, (0, 0, 0, num_text))])
        text_BLD = self.text(condition.tokens_BLT)
        c_BD = self.time(timestep_features(t_B)) + self.pooled(condition.pooled_BP)
        mask_BS = None
        if condition.mask_BL is not None:
            mask_BS = torch.cat([condition.mask_BL.new_ones(image_BND.shape[:2]), condition.mask_BL], dim=1)
        trunk = self._joint_blocks if self.config.layout == "sd3" else self._shared_blocks
        image_BND, shift_BD, scale_BD = trunk(image_BND, text_BLD, c_BD, mask_BS, rotation_2SK, num_blocks)
        if num_blocks is not None:
            return image_BND
        out = self.final(modulated_norm(image_BND, shift_BD, scale_BD))
        return unpatchify(out, rows, columns, self.config.patch_size)

    def _joint_blocks(
        self, image_BND: Tensor, text_BLD: Tensor, c_BD: Tensor, mask_BS: Tensor | None, rotation_2SK: Tensor | None,
        num_blocks: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The image's tokens, and the final shift and scale."""
        c_BD = F.silu(c_BD)
        for block in islice(self.blocks, num_blocks):
            image_BND, text_BLD = block(image_BND, text_BLD, c_BD, mask_BS, rotation_2SK)
        shift_BD, scale_BD = self.final_modulation(c_BD).chunk(2, dim=-1)
        return image_BND, shift_BD, scale_BD

    def _shared_blocks(
        self, image_BND: Tensor, text_BLD: Tensor, c_BD: Tensor, mask_BS: Tensor | None, rotation_2SK: Tensor | None,
        num_blocks: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The image's tokens, and the final shift and scale."""
        num_image = image_BND.shape[1]
        modulation_B6D = self.modulation(F.silu(c_BD)).unflatten(-1, (6, -1))
        x_BSD = torch.cat([image_BND, text_BLD.to(image_BND.dtype)], dim=1)
        for block in islice(self.blocks, num_blocks):
            x_BSD = block(x_BSD, modulation_B6D, mask_BS, rotation_2SK)
        shift_BD, scale_BD = (self.final_modulation_table + c_BD[:, None]).unbind(dim=1)
        return x_BSD[:, :num_image], shift_BD, scale_BD

    def axes(self, rows: int, columns: int) -> tuple[Axis, Axis]:
        """Coordinates of the patches' rows and columns."""
        grid, base = self.config.position_grid, self.config.base_grid
        if self.config.position_growth == "stretch":
            return stretched_axes(rows, columns, base=base)
        if max(rows, columns) > grid:
            raise UserError(
                f"task.model.position_grid: {grid} is less than the {rows} x {columns} patches of the latents"
            )
        return cropped_axes(rows, columns, table=grid, base=base)

    def check_inputs(self, zt_BCHW: Tensor, condition: Condition) -> None:
        super().check_inputs(zt_BCHW, condition)
        given = 0 if condition.pooled_BP is None else condition.pooled_BP.shape[-1]
        if given != self.pooled.fc1.in_features:
            raise UserError(
                f"task.text: pooled text has {given} channels, the denoiser takes {self.pooled.fc1.in_features}"
            )
