"""Parts that the transformers share. B batch, N image tokens, L text tokens, S all tokens, D width, K frequencies."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainer.models.fused import Gated, JoinedHeads, ModulatedNorm

EPS = 1e-6
"""Of the denoisers' norms."""


def modulated_norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Adaptive layer norm (Peebles & Xie 2023), float32: no weights, then scaled and shifted sample by sample."""
    out: Tensor = ModulatedNorm.apply(x_BND, shift_BD, scale_BD, EPS)
    return out


def gated(x_BND: Tensor, gate_BD: Tensor, branch_BND: Tensor) -> Tensor:
    """Residual stream plus a gated branch."""
    out: Tensor = Gated.apply(x_BND, gate_BD, branch_BND)
    return out


def timestep_features(t_B: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of t at geometric frequencies; t in 0..1000, may be fractional. Returns (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ------------------------------------------------------------------------------------------------------------ positions


class Axis(NamedTuple):
    """Coordinates of the patches along one side of an image: (start + i) * step for i < length."""

    length: int
    start: float
    step: float


def cropped_axes(rows: int, columns: int, *, table: int, base: int) -> tuple[Axis, Axis]:
    """Rows and columns in the centre of a table x table grid over 0..base (Esser et al. 2024): a larger image has new
    positions around those of a smaller one."""
    assert max(rows, columns) <= table, f"{rows} x {columns} patches, positions for {table} x {table}"
    return Axis(rows, (table - rows) // 2, base / table), Axis(columns, (table - columns) // 2, base / table)


def stretched_axes(rows: int, columns: int, *, base: int) -> tuple[Axis, Axis]:
    """Rows and columns where the longer side spans 0..base at any size; the shorter has the same step, in the middle."""
    longer = max(rows, columns)
    return Axis(rows, (longer - rows) / 2, base / longer), Axis(columns, (longer - columns) / 2, base / longer)


@lru_cache(maxsize=1024)  # some kilobytes each; an image size has two
def sinusoids(axis: Axis, num_frequencies: int, device: torch.device) -> Tensor:
    """Cosines and sines of coordinates times 10000^(-k / K): (2, length, K) float32, reckoned in float64."""
    with torch.device("cpu"):  # also for a model that is being built elsewhere
        coordinates = (torch.arange(axis.length, dtype=torch.float64) + axis.start) * axis.step
        omega_K = 10_000.0 ** -(torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
        angles = coordinates[:, None] * omega_K
        return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def sincos_positions(rows: Axis, columns: Axis, width: int, device: torch.device) -> Tensor:
    """2-D sine-cosine positions, (rows * columns, width) float32: the first half of the channels encodes the column and the
    second the row, sines before cosines, as SD3's and DiT's tables do."""
    (row_cos, row_sin), (column_cos, column_sin) = (sinusoids(axis, width // 4, device) for axis in (rows, columns))
    row_lines = torch.cat([row_sin, row_cos], dim=-1)[:, None].expand(-1, columns.length, -1)
    column_lines = torch.cat([column_sin, column_cos], dim=-1)[None].expand(rows.length, -1, -1)
    return torch.cat([column_lines, row_lines], dim=-1).flatten(0, 1)


def rotary_positions(rows: Axis, columns: Axis, head_dim: int, device: torch.device) -> Tensor:
    """2-D axial rotary positions (Su et al. 2021, each half of the channels for one side) for `rotate`: cosines and sines,
    (2, rows * columns, head_dim / 2) float32. Tokens that are not turned, a text's, stand at (0, 0)."""
    row_2RK, column_2CK = (sinusoids(axis, head_dim // 4, device) for axis in (rows, columns))
    row_2RCK = row_2RK[:, :, None].expand(-1, -1, columns.length, -1)
    column_2RCK = column_2CK[:, None].expand(-1, rows.length, -1, -1)
    return torch.cat([row_2RCK, column_2RCK], dim=-1).flatten(1, 2)


def rotate(x_BHND: Tensor, rotation_2NK: Tensor) -> Tensor:
    """Turn channels k and K + k of every token by its k-th angle; K is half the channels. Products of two rotated vectors
    depend on the difference of their coordinates alone."""
    cos, sin = rotation_2NK
    a, b = x_BHND.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BHND.dtype)


# --------------------------------------------------------------------------------------------------------------- layers


class PatchEmbedding(nn.Module):
    """Patches of latents as tokens, with sine-cosine positions of which each side spans 0..base at any size, as DiT's and
    PixArt's. In place of diffusers' `PatchEmbed`, whose table is a buffer and would not survive the meta device."""

    def __init__(self, latent_channels: int, width: int, patch_size: int, base: int) -> None:
        super().__init__()
        self.width, self.base = width, base
        self.proj = nn.Conv2d(latent_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, zt_BCHW: Tensor) -> Tensor:
        """(B, N, D)."""
        x_BDRC: Tensor = self.proj(zt_BCHW)
        rows, columns = (Axis(side, 0, self.base / side) for side in x_BDRC.shape[-2:])
        positions_ND = sincos_positions(rows, columns, self.width, x_BDRC.device)
        return x_BDRC.flatten(2).transpose(1, 2) + positions_ND


class MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width_in: int, hidden: int, width_out: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class QKV(nn.Module):
    """Queries, keys and values of one stream of tokens, normalised per head (RMS) where asked."""

    def __init__(self, width: int, num_heads: int, *, norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS) if norm else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        """All three before the norm, (B, N, 3 D)."""
        out: Tensor = self.proj(x_BND)
        return out

    @property
    def norm_weights_2d(self) -> Tensor | None:
        norms = self.q_norm, self.k_norm
        if not isinstance(norms[0], nn.RMSNorm):
            return None
        return torch.stack([norm.weight for norm in norms if isinstance(norm, nn.RMSNorm)])


def joint_attention(
    streams: Sequence[tuple[QKV, Tensor]],
    mask_BS: Tensor | None,
    rotation_2SK: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """Full attention of all streams' tokens to all. Each stream is its weights and its tokens (B, N, D); `mask_BS` is true
    where a token may be looked at; queries and keys are turned where a rotation is given. Returns (B, S, D); with
    `num_queries`, of the first so many tokens alone."""
    num_heads = streams[0][0].num_heads
    projected = [qkv(x_BND) for qkv, x_BND in streams]
    weights = [qkv.norm_weights_2d for qkv, _ in streams]
    normed = [weight_2d for weight_2d in weights if weight_2d is not None]
    if normed:
        q, k, v = JoinedHeads.apply(num_heads, EPS, torch.stack(normed), *projected)
    else:
        joined = projected[0] if len(projected) == 1 else torch.cat(projected, dim=1)
        q, k, v = rearrange(joined, "b s (three h d) -> three b h s d", three=3, h=num_heads)
    if rotation_2SK is not None:
        q, k = rotate(q, rotation_2SK), rotate(k, rotation_2SK)
    if num_queries is not None:
        q = q[:, :, :num_queries]
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h s d -> b s (h d)")


def unpatchify(x_BNE: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Tokens of patch x patch x C values to latents, (B, C, H, W)."""
    p = patch_size
    latents_BCHW = rearrange(x_BNE, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)
    return latents_BCHW.contiguous()  # of patches of one pixel it is a view, which sharding warns of
