"""Our MMDiT is SD3's: the same weights give the same output as diffusers' model, in both directions."""

import re

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from trainer.config import MMDiTConfig, replace
from trainer.errors import UserError
from trainer.models.condition import Condition
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import mmdit_from_diffusers, mmdit_to_diffusers, sd3_state_to_mmdit

CONFIG = MMDiTConfig(num_blocks=3, num_heads=4, head_dim=16, patch_size=2, position_grid=24, base_grid=16)


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(height * 100 + width)
    z = torch.randn(2, 16, height, width, generator=g)
    condition = Condition(torch.randn(2, 7, 40, generator=g), torch.randn(2, 24, generator=g))
    return z, torch.tensor([3.0, 777.5]), condition


def theirs(model: SD3Transformer2DModel, z: Tensor, t: Tensor, c: Condition) -> Tensor:
    out: Tensor = model(z, c.tokens_BLT, c.pooled_BP, t, return_dict=False)[0]
    return out


def randomised(module: torch.nn.Module) -> None:
    """Every tensor, those of zero initialisation and the norms' scales too, must matter."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.05 + (1.0 if p.dim() == 1 and p.shape[0] == 16 else 0.0))


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
@pytest.mark.parametrize(("qk_norm", "num_dual"), [(True, 0), (False, 0), (True, 2), (False, 3)])
@torch.no_grad()
def test_equal_to_diffusers_in_both_directions(size: tuple[int, int], qk_norm: bool, num_dual: int) -> None:
    """With second attentions: Stable Diffusion 3.5 medium's blocks."""
    config = replace(CONFIG, qk_norm=qk_norm, num_dual_attention_blocks=num_dual)
    ours = MMDiT(config, latent_channels=16, token_width=40, pooled_width=24)
    randomised(ours)
    arguments, state = mmdit_to_diffusers(ours)
    peer = SD3Transformer2DModel(**arguments)
    peer.load_state_dict(state)
    z, t, c = inputs(*size)
    expected = theirs(peer, z, t, c)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(z, t, c), expected, atol=1e-5, rtol=0)

    randomised(peer)
    back = mmdit_from_diffusers(peer.config, peer.state_dict())
    assert back.config == config
    torch.testing.assert_close(back(z, t, c), theirs(peer, z, t, c), atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_tokens_change_nothing() -> None:
    model = MMDiT(CONFIG, latent_channels=16, token_width=40, pooled_width=24)
    randomised(model)
    z, t, c = inputs(16, 16)
    padded = torch.cat([c.tokens_BLT, torch.full((2, 5, 40), 9.0)], dim=1)
    mask = torch.arange(12).expand(2, -1) < 7
    torch.testing.assert_close(model(z, t, Condition(padded, c.pooled_BP, mask)), model(z, t, c), atol=1e-5, rtol=0)
    assert (model(z, t, Condition(padded, c.pooled_BP)) - model(z, t, c)).abs().max() > 1e-3


def test_starts_at_zero_and_every_parameter_learns() -> None:
    model = MMDiT(CONFIG, latent_channels=16, token_width=40, pooled_width=24)
    model.init_weights()
    z, t, c = inputs(16, 16)
    out = model(z, t, c)
    assert out.abs().max() == 0
    randomised(model)
    model(z, t, c).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert idle == {"blocks.2.text.qkv.q_norm.weight"}  # nothing reads what the text's last queries find


def test_foreign_weights_are_named() -> None:
    arguments, state = mmdit_to_diffusers(MMDiT(CONFIG, latent_channels=16, token_width=40, pooled_width=24))
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.ff\.net\.2\.bias: missing"):
        mmdit_from_diffusers(arguments, {k: v for k, v in state.items() if k != "transformer_blocks.1.ff.net.2.bias"})
    with pytest.raises(UserError, match=r"extra\.weight: 1 SD3 tensors"):
        mmdit_from_diffusers(arguments, {**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="not the first blocks"):
        mmdit_from_diffusers({**arguments, "dual_attention_layers": (1, 2)}, state)


def test_weights_map_without_a_model() -> None:
    model = MMDiT(replace(CONFIG, num_dual_attention_blocks=1), latent_channels=16, token_width=40, pooled_width=24)
    randomised(model)
    back = sd3_state_to_mmdit(mmdit_to_diffusers(model)[1], model.config)
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 4, "num_dual_attention_blocks": 1},
         "weights have num_blocks 3, num_dual_attention_blocks 0, this model has num_blocks 4, num_dual_attention_blocks 1;"),
        ({"num_heads": 8, "qk_norm": False},
         "weights have width 64, qk_norm True, this model has width 128, qk_norm False;"),
        ({"num_heads": 2, "head_dim": 32}, "weights have head_dim 16, this model has head_dim 32;"),
        ({"patch_size": 1}, "weights have patch_size 2, this model has patch_size 1;"),
        ({"position_grid": 20}, "weights have position_grid 24, this model has position_grid 20;"),
        ({"base_grid": 8}, "base_grid: the SD3 weights' positions run from 0 to about 16, this model's to 8"),
        ({"layout": "shared"}, "layout: this model has shared, SD3's weights have sd3"),
        ({"positions": "rotary"}, "positions: this model has rotary, SD3's weights have sincos"),
    ],
)  # fmt: skip
def test_weights_of_another_layout_are_refused_with_both_sides(changes: dict[str, object], message: str) -> None:
    state = mmdit_to_diffusers(MMDiT(CONFIG, latent_channels=16, token_width=40, pooled_width=24))[1]
    with pytest.raises(UserError, match=re.escape(message)):
        sd3_state_to_mmdit(state, replace(CONFIG, **changes))


def test_weights_of_another_kind_are_named() -> None:
    with pytest.raises(UserError, match="not an SD3Transformer2DModel's weights"):
        sd3_state_to_mmdit({"conv_in.weight": torch.zeros(1)}, CONFIG)
