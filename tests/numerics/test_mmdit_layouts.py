"""What MMDiT's layouts and positions promise: sizes, positions by closed form, any aspect ratio, padding."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config import ClassLabelConfig, MMDiTConfig, replace
from trainer.errors import UserError
from trainer.models.condition import Condition
from trainer.models.layers import Axis, cropped_axes, rotary_positions, rotate, sincos_positions, stretched_axes
from trainer.models.mmdit import MMDiT
from trainer.models.text_encoders import build_text_encoder

CPU = torch.device("cpu")
BASE = MMDiTConfig(num_blocks=2, num_heads=2, head_dim=16, patch_size=2, position_grid=24, base_grid=16)
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3_rotary": {"positions": "rotary"},
    "sd3_dual_rotary": {"positions": "rotary", "num_dual_attention_blocks": 1},
    "sd3_stretch": {"position_growth": "stretch"},
    "shared": {"layout": "shared"},
    "shared_rotary": {"layout": "shared", "positions": "rotary", "position_growth": "stretch"},
}


def build(**changes: Any) -> MMDiT:
    model = MMDiT(replace(BASE, **changes), latent_channels=4, token_width=12, pooled_width=20)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1 + (1.0 if "_norm" in name else 0.0))
    return model


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(height * 100 + width)
    z = torch.randn(2, 4, height, width, generator=g)
    condition = Condition(torch.randn(2, 5, 12, generator=g), torch.randn(2, 20, generator=g))
    return z, torch.tensor([3.0, 777.5]), condition


# ---------------------------------------------------------------------------------------------------------------- sizes


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_shared_layout_has_the_papers_796_million_parameters() -> None:
    """Section 4 of the perceptual loss's paper: 28 blocks of 1,536, class-conditional."""
    config = MMDiTConfig(num_blocks=28, num_heads=24, head_dim=64, layout="shared")
    with torch.device("meta"):
        text = build_text_encoder(ClassLabelConfig(num_classes=1000, width=768))
        model = MMDiT(config, latent_channels=4, token_width=text.token_width, pooled_width=text.pooled_width)
    assert count(model) + count(text) == pytest.approx(796e6, rel=0.03)


def test_sd3_layout_at_this_size_is_three_times_as_large() -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(num_blocks=28, num_heads=24), latent_channels=4, token_width=768, pooled_width=768)
    assert count(model) == pytest.approx(2.37e9, rel=0.03)


@pytest.mark.parametrize(("qk_norm", "num_dual", "grid"), [(False, 0, 192), (True, 13, 384)])
def test_stable_diffusion_3_mediums_size(qk_norm: bool, num_dual: int, grid: int) -> None:
    """3 and 3.5 medium: as many parameters as diffusers' own."""
    config = MMDiTConfig(
        num_blocks=24, num_heads=24, qk_norm=qk_norm, num_dual_attention_blocks=num_dual, position_grid=grid
    )
    with torch.device("meta"):
        ours = MMDiT(config, latent_channels=16, token_width=4096, pooled_width=2048)
        peer = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
            pos_embed_max_size=grid, dual_attention_layers=tuple(range(num_dual)),
            qk_norm="rms_norm" if qk_norm else None,
        )  # fmt: skip
    assert count(ours) == count(peer)
    assert num_dual or 2.0e9 < count(ours) < 2.1e9


# ------------------------------------------------------------------------------------------------------------ positions


def coordinates(axis: Axis) -> list[float]:
    return [(axis.start + i) * axis.step for i in range(axis.length)]


def test_extending_positions_keep_a_places_code_and_stretching_keep_the_range() -> None:
    small, large = (cropped_axes(n, n, table=16, base=8)[0] for n in (4, 8))
    assert coordinates(large)[2:6] == coordinates(small) == [3.0, 3.5, 4.0, 4.5]
    assert coordinates(stretched_axes(4, 4, base=8)[0]) == [0, 2, 4, 6]
    assert coordinates(stretched_axes(8, 8, base=8)[0]) == [0, 1, 2, 3, 4, 5, 6, 7]
    rows, columns = stretched_axes(2, 8, base=8)
    assert coordinates(rows) == [3, 4]  # in the middle, and as far apart as the columns
    assert coordinates(columns) == list(range(8))
    assert stretched_axes(8, 2, base=8) == (columns, rows)


def test_sincos_positions_by_hand() -> None:
    axes = Axis(2, 1, 0.5), Axis(3, 0, 2.0)
    table = sincos_positions(*axes, 8, CPU).view(2, 3, 8)
    row, column = 1.0, 4.0  # the last patch
    expected = [f(x * w) for x in (column, row) for f in (torch.sin, torch.cos) for w in torch.tensor([1.0, 0.01])]
    torch.testing.assert_close(table[1, 2], torch.stack(expected))


def rotated_products(rows: Axis, columns: Axis, q_D: Tensor, k_D: Tensor) -> Tensor:
    """Products of the same query and key at every pair of patches, (N, N)."""
    rotation = rotary_positions(rows, columns, 16, CPU)
    n = rows.length * columns.length
    q, k = (rotate(x.expand(1, 1, n, -1), rotation)[0, 0] for x in (q_D, k_D))
    return q @ k.T


def test_rotary_products_depend_on_differences_of_positions_alone() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(16, generator=g), torch.randn(16, generator=g)
    products = rotated_products(Axis(3, 0, 1.0), Axis(4, 0, 1.0), q, k)
    moved = rotated_products(Axis(3, 5, 1.0), Axis(4, -7, 1.0), q, k)
    torch.testing.assert_close(moved, products, atol=1e-5, rtol=0)
    torch.testing.assert_close(products[0, 5], products[6, 11], atol=1e-5, rtol=0)  # one row and one column further
    assert (products[0, 1] - products[1, 0]).abs() > 1e-3  # there is a direction
    assert (products[0, 1] - products[0, 4]).abs() > 1e-3  # a row is no column
    assert torch.linalg.vector_norm(rotate(q.expand(1, 1, 12, -1), rotary_positions(Axis(3, 0, 1), Axis(4, 0, 1), 16, CPU)),
                                    dim=-1).std() < 1e-5  # fmt: skip


def test_half_of_a_head_turns_by_the_row_and_half_by_the_column() -> None:
    """With cosine 1 where the coordinate is 0: along the first row only the column's channels move."""
    ones = torch.ones(1, 1, 12, 16)
    turned = rotate(ones, rotary_positions(Axis(3, 0, 1), Axis(4, 0, 1), 16, CPU))[0, 0].view(3, 4, 16)
    by_column, by_row = ((turned[place] - 1).abs() > 1e-6 for place in ((0, 1), (1, 0)))
    assert by_row.nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert by_column.nonzero().flatten().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize("changes", [{}, {"num_dual_attention_blocks": 1}, {"layout": "shared"}])
@torch.no_grad()
def test_images_see_each_other_by_differences_of_rotary_positions(changes: dict[str, Any]) -> None:
    """The same step between patches, another place in the grid: the same output where no text is looked at, since text
    stands at no place. Not so with sine-cosine codes."""
    z, t, c = inputs(12, 8)
    no_text = Condition(c.tokens_BLT, c.pooled_BP, torch.zeros(2, 5, dtype=torch.bool))

    def moved_by(condition: Condition, positions: str) -> float:
        at = [build(positions=positions, position_grid=g, base_grid=b, **changes) for g, b in ((24, 16), (48, 32))]
        return float((at[0](z, t, condition) - at[1](z, t, condition)).abs().max())

    assert moved_by(no_text, "rotary") < 1e-5
    assert moved_by(c, "rotary") > 1e-3
    assert moved_by(no_text, "sincos") > 1e-3


@pytest.mark.parametrize("layout", ["sd3", "shared"])
@torch.no_grad()
def test_text_is_not_turned(layout: str) -> None:
    """Its order tells nothing: the text encoder's own positions do that."""
    model = build(layout=layout, positions="rotary", patch_size=1)
    z, t, c = inputs(8, 8)
    shuffled = Condition(c.tokens_BLT.flip(1), c.pooled_BP)
    torch.testing.assert_close(model(z, t, shuffled), model(z, t, c), atol=1e-5, rtol=0)
    assert (model(z.flip(-1), t, c).flip(-1) - model(z, t, c)).abs().max() > 1e-3  # while the image's order does


@torch.no_grad()
def test_second_attention_is_turned_too() -> None:
    """With the first one silenced: images without positions would be mirrored as their patches are."""
    for positions, rotary in (("rotary", True), ("sincos", False)):
        model: Any = build(num_blocks=1, num_dual_attention_blocks=1, patch_size=1, positions=positions)
        for parameter in model.blocks[0].image.out.parameters():
            parameter.zero_()
        z, t, c = inputs(4, 6)
        model.axes = lambda rows, columns: (Axis(rows, 0, 1.0), Axis(columns, 0, 1.0 if rotary else 0.0))  # noqa: B023
        off = (model(z.flip(-1), t, c).flip(-1) - model(z, t, c)).abs().max()
        assert off > 1e-3 if rotary else off < 1e-5


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_any_aspect_ratio_and_padding(layout: str) -> None:
    model = build(**LAYOUTS[layout])
    for size in [(8, 8), (4, 20), (20, 6), (2, 2)]:
        z, t, c = inputs(*size)
        out = model(z, t, c)
        assert out.shape == z.shape
        assert out.std() > 1e-3
        padded = Condition(
            torch.cat([torch.full((2, 3, 12), 9.0), c.tokens_BLT], dim=1),
            c.pooled_BP,
            torch.arange(8).expand(2, -1) >= 3,
        )
        torch.testing.assert_close(model(z, t, padded), out, atol=1e-5, rtol=0)
        assert (model(z, t, Condition(padded.tokens_BLT, c.pooled_BP)) - out).abs().max() > 1e-4
        one = Condition(c.tokens_BLT[:1], c.pooled_BP[:1] if c.pooled_BP is not None else None)
        torch.testing.assert_close(model(z[:1], t[:1], one), out[:1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_shared_layout_by_the_equations() -> None:
    """PixArt-alpha's adaLN-single, written out once more: shared shifts, scales and gates plus each block's table."""
    model: Any = build(layout="shared", num_blocks=1, positions="rotary", qk_norm=False)
    z, t, c = inputs(4, 6)
    patches = nn.functional.unfold(z, 2, stride=2).transpose(1, 2)
    image = patches @ model.patch.weight.flatten(1).T + model.patch.bias
    x = torch.cat([image, model.text(c.tokens_BLT)], dim=1)
    half = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10_000.0)))
    features = torch.cat([(t[:, None] * half).cos(), (t[:, None] * half).sin()], dim=-1)
    vector = model.time(features) + model.pooled(c.pooled_BP)
    shared = (torch.sigmoid(vector) * vector) @ model.modulation.weight.T + model.modulation.bias
    block = model.blocks[0]
    s1, a1, g1, s2, a2, g2 = ((shared.view(2, 6, -1) + block.modulation_table)[:, i, None] for i in range(6))
    norm = nn.LayerNorm(32, elementwise_affine=False, eps=1e-6)
    q, k, v = (
        y.unflatten(-1, (2, 16)).transpose(1, 2) for y in block.qkv.proj(norm(x) * (1 + a1) + s1).chunk(3, dim=-1)
    )
    rotation = rotary_positions(*cropped_axes(2, 3, table=24, base=16), 16, CPU)
    q, k = (torch.cat([rotate(y[:, :, :6], rotation), y[:, :, 6:]], dim=2) for y in (q, k))
    weights = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)
    x = x + g1 * block.out((weights @ v).transpose(1, 2).flatten(2))
    x = x + g2 * block.mlp(norm(x) * (1 + a2) + s2)
    shift, scale = (model.final_modulation_table[i] + vector[:, None] for i in range(2))
    out = model.final(norm(x[:, :6]) * (1 + scale) + shift).view(2, 2, 3, 2, 2, 4)
    expected = out.permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 4, 6)
    torch.testing.assert_close(model(z, t, c), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_recompute_and_compile_to_the_same(layout: str) -> None:
    """A block is given tensors alone, so that it can be recomputed and compiled from outside."""
    z, t, c = inputs(4, 8)
    plain, wrapped = build(**LAYOUTS[layout]), build(**LAYOUTS[layout])
    for unit in wrapped.units():
        inner = torch.compile(unit.forward, backend="eager", fullgraph=True)
        unit.forward = lambda *a, inner=inner: checkpoint(inner, *a, use_reentrant=False)  # type: ignore[method-assign]
    for model in (plain, wrapped):
        out = model(z, t, c)
        out.square().sum().backward()
    torch.testing.assert_close(wrapped(z, t, c), plain(z, t, c), atol=1e-5, rtol=0)
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_named_with_both_sides() -> None:
    model = build()
    z, t, c = inputs(8, 8)
    with pytest.raises(UserError, match="50 x 8 patches"):
        model(torch.zeros(2, 4, 100, 16), t, c)
    assert build(position_growth="stretch")(torch.zeros(2, 4, 100, 4), t, c).shape == (2, 4, 100, 4)
    with pytest.raises(UserError, match="pooled text has 0 channels, the denoiser takes 20"):
        model(z, t, Condition(c.tokens_BLT))
    with pytest.raises(UserError, match="mmdit needs a pooled text"):
        MMDiT(BASE, latent_channels=4, token_width=12, pooled_width=0)
