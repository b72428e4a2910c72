"""Parts that the transformers share. B batch, N image tokens, L text tokens, D width."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (Peebles & Xie 2023)."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def timestep_features(t_B: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of t at geometric frequencies; t in 0..1000, may be fractional. Returns (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(width: int, table: int, base: int) -> Tensor:
    """2-D sine-cosine positions of a table x table grid that spans 0..base on each side: (table, table, width) float32.

    The first half of the channels encodes the column and the second the row, as SD3's tables do.
    """
    coordinates = torch.arange(table, dtype=torch.float64) * (base / table)
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = coordinates[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (table, width / 2)
    columns = line[None, :, :].expand(table, -1, -1)
    rows = line[:, None, :].expand(-1, table, -1)
    return torch.cat([columns, rows], dim=-1).float()


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
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if norm else nn.Identity()

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three tensors of shape (B, heads, N, head_dim)."""
        q, k, v = rearrange(self.proj(x_BND), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.q_norm(q), self.k_norm(k), v


def attention(q: Tensor, k: Tensor, v: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Full attention over S tokens; `mask_BS` is true where a token may be looked at. Returns (B, S, D)."""
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")
