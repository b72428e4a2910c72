"""MMDiT, the multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, section 4 and figure 2).

B batch, C latent channels, H W latent sides, N image tokens, L text tokens, D width, T and P widths of the text tokens and
the pooled text. A plain module: sharding, recomputation and compilation come from outside.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from trainer.config import MMDiTConfig
from trainer.models.condition import Condition
from trainer.models.layers import MLP, QKV, attention, grid_positions, modulate, timestep_features


class Stream(nn.Module):
    """One modality's weights in a joint block: modulation, attention projections and MLP."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, ends: bool) -> None:
        super().__init__()
        self.ends = ends
        """The text's last block only feeds the attention: nothing reads its output."""
        self.modulation = nn.Linear(width, (2 if ends else 6) * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = QKV(width, num_heads, norm=qk_norm)
        if not ends:
            self.out = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = MLP(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def before_attention(self, x_BSD: Tensor, c_BD: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        shift, scale, *rest = self.modulation(c_BD).chunk(2 if self.ends else 6, dim=-1)
        return self.qkv(modulate(self.norm1(x_BSD), shift, scale)), rest

    def after_attention(self, x_BSD: Tensor, attended_BSD: Tensor, rest: list[Tensor]) -> Tensor:
        gate1, shift, scale, gate2 = rest
        x_BSD = x_BSD + gate1[:, None] * self.out(attended_BSD)
        return x_BSD + gate2[:, None] * self.mlp(modulate(self.norm2(x_BSD), shift, scale))


class JointBlock(nn.Module):
    """Image and text tokens, each with its own weights, attend to each other in one attention."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, last: bool) -> None:
        super().__init__()
        self.image = Stream(width, num_heads, qk_norm=qk_norm, ends=False)
        self.text = Stream(width, num_heads, qk_norm=qk_norm, ends=last)

    def forward(
        self, image_BND: Tensor, text_BLD: Tensor, c_BD: Tensor, mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Both streams; no text from the last block, whose text nothing reads."""
        image_qkv, image_rest = self.image.before_attention(image_BND, c_BD)
        text_qkv, text_rest = self.text.before_attention(text_BLD, c_BD)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image_qkv, text_qkv, strict=True))
        image_out, text_out = attention(q, k, v, mask_BS).split([image_BND.shape[1], text_BLD.shape[1]], dim=1)
        image_BND = self.image.after_attention(image_BND, image_out, image_rest)
        if self.text.ends:
            return image_BND, None
        return image_BND, self.text.after_attention(text_BLD, text_out, text_rest)


class MMDiT(nn.Module):
    positions: Tensor

    def __init__(self, config: MMDiTConfig, *, latent_channels: int, token_width: int, pooled_width: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.config = config
        self.latent_channels = latent_channels
        self.patch = nn.Conv2d(latent_channels, width, kernel_size=patch, stride=patch)
        table = grid_positions(width, config.position_grid, config.base_grid)
        self.register_buffer("positions", table, persistent=False)
        self.time = MLP(256, width, width, nn.SiLU())
        self.pooled = MLP(pooled_width, width, width, nn.SiLU())
        self.text = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(
            JointBlock(width, config.num_heads, qk_norm=config.qk_norm, last=i == config.num_blocks - 1)
            for i in range(config.num_blocks)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final = nn.Linear(width, patch * patch * latent_channels)

    def init_weights(self) -> None:
        """DiT's initialisation (Peebles & Xie 2023): Xavier for linear maps, zeros where a block or the output begins."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for mlp in (self.time, self.pooled):
            nn.init.normal_(mlp.fc1.weight, std=0.02)
            nn.init.normal_(mlp.fc2.weight, std=0.02)
        zero = [stream.modulation for b in self.blocks for stream in (b.image, b.text)]  # type: ignore[union-attr]
        for linear in (*zero, self.final_modulation, self.final):
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type, union-attr]

    def forward(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The network's prediction, (B, C, H, W); t in 0..1000."""
        rows, columns = (side // self.config.patch_size for side in zt_BCHW.shape[-2:])
        image_BND = rearrange(self.patch(zt_BCHW), "b d h w -> b (h w) d") + self.positions_of(rows, columns)
        text_BLD = self.text(condition.tokens_BLT)
        c_BD = nn.functional.silu(self.time(timestep_features(t_B)) + self.pooled(condition.pooled_BP))
        mask_BS = None
        if condition.mask_BL is not None:
            mask_BS = torch.cat([condition.mask_BL.new_ones(image_BND.shape[:2]), condition.mask_BL], dim=1)
        for block in self.blocks:
            image_BND, text_BLD = block(image_BND, text_BLD, c_BD, mask_BS)
        shift, scale = self.final_modulation(c_BD).chunk(2, dim=-1)
        out = self.final(modulate(self.final_norm(image_BND), shift, scale))
        p = self.config.patch_size
        latents_BCHW = rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)
        return latents_BCHW.contiguous()  # of patches of one pixel it is a view, which sharding warns of

    def positions_of(self, rows: int, columns: int) -> Tensor:
        """The centre of the table of positions: (rows * columns, D). The same place has the same code at any size."""
        side = self.config.position_grid
        top, left = (side - rows) // 2, (side - columns) // 2
        return self.positions[top : top + rows, left : left + columns].flatten(0, 1)
