"""Every denoiser keeps the interface's promises; those of diffusers compute what diffusers' own models compute."""

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config import (
    ByteTextConfig,
    ClassLabelConfig,
    DenoiserConfig,
    DiTConfig,
    MMDiTConfig,
    PixArtConfig,
    UNetConfig,
)
from trainer.errors import UserError
from trainer.models.condition import Condition
from trainer.models.denoisers import Denoiser, build_denoiser
from trainer.models.diffusers_denoisers import DiT, PixArt, UNet
from trainer.models.layers import PatchEmbedding
from trainer.models.parameter_groups import parameter_groups
from trainer.models.text_encoders import build_text_encoder

MMDIT: dict[str, Any] = {"num_blocks": 2, "num_heads": 2, "head_dim": 16, "position_grid": 24, "base_grid": 16}
CONFIGS: dict[str, DenoiserConfig] = {
    "sd3": MMDiTConfig(**MMDIT, num_dual_attention_blocks=1),
    "shared": MMDiTConfig(**MMDIT, layout="shared", positions="rotary"),
    "unet": UNetConfig(block_out_channels=(16, 32), layers_per_block=1, attention_levels=(False, True), head_dim=8,
                       norm_num_groups=4),
    "dit": DiTConfig(num_blocks=2, num_heads=2, head_dim=16, base_grid=4),
    "pixart": PixArtConfig(num_blocks=2, num_heads=2, head_dim=16, base_grid=4),
}  # fmt: skip
TEXT = [kind for kind in CONFIGS if kind != "dit"]
CLASSES = 10


def build(kind: str) -> Denoiser:
    return build_denoiser(CONFIGS[kind], latent_channels=4, token_width=12, pooled_width=20, num_classes=CLASSES)


def randomised(module: nn.Module) -> None:
    """Every tensor, those of zero initialisation too, must matter."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1 + (1.0 if "norm" in name and p.dim() == 1 else 0.0))


def inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(height * 100 + width)
    z = torch.randn(2, 4, height, width, generator=g)
    tokens, pooled = torch.randn(2, 5, 12, generator=g), torch.randn(2, 20, generator=g)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return z, torch.tensor([3.0, 777.5]), Condition(tokens, pooled, mask, torch.tensor([3, CLASSES]))


# ----------------------------------------------------------------------------------------------------------- parity


def peer_of(ours: Denoiser) -> nn.Module:
    """diffusers' model as a user of diffusers would make it, with our weights."""
    if isinstance(ours, UNet):
        peer: nn.Module = UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12, attention_head_dim=(2, 4),
        )  # fmt: skip
        peer.load_state_dict(ours.net.state_dict())
    elif isinstance(ours, DiT):
        peer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8,
            num_embeds_ada_norm=CLASSES,
        )  # fmt: skip
        peer.load_state_dict(ours.diffusers_state())
    else:
        assert isinstance(ours, PixArt)
        peer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=32, sample_size=8, caption_channels=12,
        )  # fmt: skip
        peer.load_state_dict(ours.net.state_dict())
    return peer.eval()


def call(kind: str, peer: nn.Module, z: Tensor, t: Tensor, c: Condition) -> Tensor:
    if kind == "dit":
        return Tensor(peer(z, t, c.labels_B, return_dict=False)[0])
    text = {"encoder_hidden_states": c.tokens_BLT, "encoder_attention_mask": c.mask_BL}
    return Tensor(peer(z, timestep=t, return_dict=False, **text)[0])


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, size) for kind in ("unet", "dit", "pixart") for size in ((8, 8), (16, 16), (12, 8))
     if kind != "dit" or size[0] == size[1]],  # diffusers' DiT knows squares alone
)  # fmt: skip
@torch.no_grad()
def test_equal_to_diffusers(kind: str, size: tuple[int, int]) -> None:
    ours = build(kind)
    randomised(ours)
    z, t, c = inputs(*size)
    expected = call(kind, peer_of(ours), z, t, c)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(z, t, c), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_of_any_shape_as_diffusers() -> None:
    """What the DiT's own parity cannot show: positions of images that are not square."""
    peer = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=32)
    ours = PatchEmbedding(4, 32, 2, base=4)
    ours.load_state_dict(peer.state_dict())
    for size in [(8, 8), (12, 8), (6, 20)]:
        z = inputs(*size)[0]
        torch.testing.assert_close(ours(z), peer(z), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------- interface


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_prediction_has_the_latents_shape_at_any_aspect_ratio(kind: str) -> None:
    model = build(kind)
    randomised(model)
    for size in [(8, 8), (4, 12), (16, 6)]:
        z, t, c = inputs(*size)
        out = model(z, t, c)
        assert out.shape == z.shape
        assert out.is_contiguous()
        assert out.std() > 1e-3
        assert (model(z, t + 50, c) - out).abs().max() > 1e-4
    if kind == "dit":  # the images' own rows are told from columns: a square's two readings differ
        z, t, c = inputs(8, 8)
        assert (model(z.mT, t, c).mT - model(z, t, c)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TEXT)
@torch.no_grad()
def test_padding_tokens_change_nothing(kind: str) -> None:
    model = build(kind)
    randomised(model)
    z, t, c = inputs()
    assert c.mask_BL is not None
    other = Condition(c.tokens_BLT.masked_fill(~c.mask_BL[..., None], 50.0), c.pooled_BP, c.mask_BL)
    torch.testing.assert_close(model(z, t, other), model(z, t, c), atol=1e-5, rtol=0)
    real = Condition(c.tokens_BLT.masked_fill(c.mask_BL[..., None], 0.5), c.pooled_BP, c.mask_BL)
    assert (model(z, t, real) - model(z, t, c)).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_built_on_the_meta_device_and_initialised(kind: str) -> None:
    """Equal on all ranks: weights follow from torch's seed alone, whatever memory held before."""
    with torch.device("meta"):
        model = build(kind)
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(7)
    model.init_weights()
    plain = build(kind)
    torch.manual_seed(7)
    plain.init_weights()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
    z, t, c = inputs()
    assert model(z, t, c).abs().max() == 0  # the output begins at zero
    norms = [p for name, p in model.named_parameters() if "norm" in name and name.endswith("weight") and p.dim() == 1]
    assert all((p == 1).all() for p in norms)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_learns(kind: str) -> None:
    model = build(kind)
    randomised(model)
    z, t, c = inputs()
    model(z, t, c).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    keys = {name for name, _ in model.named_parameters() if name.endswith("to_k.bias")}  # softmax is blind to them
    # nothing reads what the text's last queries find
    assert idle - keys <= {"blocks.1.text.qkv.q_norm.weight"}


def test_residual_branches_begin_as_their_authors_begin_them() -> None:
    unet, dit, pixart, mmdit = (build(kind) for kind in ("unet", "dit", "pixart", "shared"))
    for model in (unet, dit, pixart, mmdit):
        torch.manual_seed(0)
        model.init_weights()
    x_BND, time_BD = torch.randn(2, 6, 32), torch.randn(2, 64)
    for unit in unet.units():
        if isinstance(unit, ResnetBlock2D):
            x = torch.randn(2, unit.in_channels, 4, 4)
            assert unit.conv_shortcut is None or unit.conv_shortcut.weight.std() > 0.01
            expected = x if unit.conv_shortcut is None else unit.conv_shortcut(x)
            torch.testing.assert_close(unit(x, time_BD), expected)
        else:
            x = torch.randn(2, 32, 4, 4)
            torch.testing.assert_close(unit(x, torch.randn(2, 3, 12), return_dict=False)[0], x)
    for unit in dit.units():
        torch.testing.assert_close(unit(x_BND, timestep=torch.randn(2, 32)), x_BND)
    for unit in mmdit.units():
        torch.testing.assert_close(unit(x_BND, torch.zeros(2, 6, 32), None, None), x_BND)
    for block in pixart.units():
        table: Tensor = block.scale_shift_table  # type: ignore[assignment]
        assert 0.5 * 32**-0.5 < table.std() < 1.5 * 32**-0.5
        assert block.attn2.to_out[0].weight.abs().max() == 0  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize("kind", CONFIGS)
def test_units_recompute_to_the_same_and_hold_most_weights(kind: str) -> None:
    model, z_t_c = build(kind), inputs()
    randomised(model)
    units = model.units()
    inside = [p for unit in units for p in unit.parameters()]
    assert len({id(p) for p in inside}) == len(inside)  # units share nothing
    plain = torch.autograd.grad(model(*z_t_c).square().sum(), inside, allow_unused=True)
    for unit in units:
        inner = unit.forward
        unit.forward = (  # type: ignore[method-assign]
            lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
        )
    again = torch.autograd.grad(model(*z_t_c).square().sum(), inside, allow_unused=True)
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_dit_drops_no_label_of_its_own() -> None:
    model = build("dit")
    randomised(model)
    z, t, c = inputs()
    z, t = z[:1].expand(64, -1, -1, -1), t[:1].expand(64)
    labels = torch.full((64,), 3)
    conditioned = model.train()(z, t, Condition(c.tokens_BLT, labels_B=labels))
    torch.testing.assert_close(conditioned, conditioned[:1].expand_as(conditioned))  # at 0.1, all stay one time in 850
    free = model(z, t, Condition(c.tokens_BLT, labels_B=torch.full((64,), CLASSES)))
    assert (free - conditioned).abs().max() > 1e-3


def test_dit_xl_2_has_the_papers_675_million_parameters() -> None:
    with torch.device("meta"):
        model = build_denoiser(DiTConfig(), latent_channels=4, token_width=1, pooled_width=0, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(675e6, rel=0.01)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_does_not_fit_is_named_with_both_sides(kind: str) -> None:
    model = build(kind)
    z, t, c = inputs()
    with pytest.raises(UserError, match="latents have 16 channels, the denoiser takes 4"):
        model(torch.zeros(2, 16, 8, 8), t, c)
    with pytest.raises(UserError, match="8 x 7 are no multiple of 2"):
        model(z[..., :7], t, c)
    if kind != "dit":
        with pytest.raises(UserError, match="tokens have 9 channels, the denoiser takes 12"):
            model(z, t, Condition(c.tokens_BLT[..., :9], c.pooled_BP))


def test_dit_without_classes_is_refused() -> None:
    with pytest.raises(UserError, match="dit knows classes alone"):
        build_denoiser(CONFIGS["dit"], latent_channels=4, token_width=12, pooled_width=20, num_classes=None)
    z, t, c = inputs()
    with pytest.raises(UserError, match="the condition has no labels"):
        build("dit")(z, t, Condition(c.tokens_BLT))


# -------------------------------------------------------------------------------------------------- parameter groups


@pytest.mark.parametrize(
    "text", [ByteTextConfig(width=8, num_blocks=1, num_heads=2), ClassLabelConfig(num_classes=CLASSES)]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_is_in_one_group(kind: str, text: ByteTextConfig | ClassLabelConfig) -> None:
    root = nn.ModuleDict({"text": build_text_encoder(text), "denoiser": build(kind)})
    groups = parameter_groups(root)
    assert list(groups) == ["matrices", "modulation", "embeddings", "vectors"]
    names = [name for named in groups.values() for name in named]
    assert sorted(names) == sorted(name for name, _ in root.named_parameters())
    for named in groups.values():
        assert all(root.get_parameter(name) is p for name, p in named.items())
    assert all(p.dim() == 1 for p in groups["vectors"].values())
    assert all(p.dim() >= 2 for group in ("matrices", "modulation", "embeddings") for p in groups[group].values())  # type: ignore[index]


def group_of(module: nn.Module, name: str) -> str:
    return next(group for group, named in parameter_groups(module).items() if name in named)


@pytest.mark.parametrize(
    ("kind", "modulation", "matrix"),
    [
        ("sd3", ["blocks.0.image.modulation.weight", "blocks.1.text.modulation.weight", "final_modulation.weight"],
         ["patch.weight", "time.fc1.weight", "blocks.0.image.dual.out.weight", "final.weight"]),
        ("shared", ["modulation.weight", "blocks.1.modulation_table", "final_modulation_table"], ["blocks.0.out.weight"]),
        ("unet", ["net.mid_block.resnets.0.time_emb_proj.weight"],
         ["net.conv_in.weight", "net.time_embedding.linear_1.weight", "net.mid_block.resnets.0.conv1.weight"]),
        ("dit", ["net.transformer_blocks.0.norm1.linear.weight", "net.proj_out_1.weight"],
         ["net.pos_embed.proj.weight", "net.proj_out_2.weight", "embedder.timestep_embedder.linear_1.weight"]),
        ("pixart", ["net.adaln_single.linear.weight", "net.scale_shift_table", "net.transformer_blocks.1.scale_shift_table"],
         ["net.adaln_single.emb.timestep_embedder.linear_1.weight", "net.caption_projection.linear_1.weight"]),
    ],
)  # fmt: skip
def test_groups_of_denoisers(kind: str, modulation: list[str], matrix: list[str]) -> None:
    model = build(kind)
    assert {group_of(model, name) for name in modulation} == {"modulation"}
    assert {group_of(model, name) for name in matrix} == {"matrices"}
    tables = set(parameter_groups(model)["embeddings"])
    assert tables == ({"embedder.class_embedder.embedding_table.weight"} if kind == "dit" else set())


def test_groups_of_text_encoders() -> None:
    encoder = build_text_encoder(ByteTextConfig(width=8, num_blocks=1, num_heads=2))
    assert set(parameter_groups(encoder)["embeddings"]) == {"embedding.weight", "positions"}
    encoder.requires_grad_(False)
    assert not any(parameter_groups(encoder).values())
