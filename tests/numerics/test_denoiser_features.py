"""A denoiser's features are what its blocks give in a whole forward pass, and a cut denoiser has them, too."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.test_denoisers import CONFIGS, build, inputs, randomised
from trainer.models.denoisers import Denoiser


def blocks_of(model: Denoiser) -> list[nn.Module]:
    net: Any = getattr(model, "net", model)
    if hasattr(net, "mid_block"):
        return [*net.down_blocks, net.mid_block, *net.up_blocks]
    return list(net.transformer_blocks if hasattr(net, "transformer_blocks") else net.blocks)


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_the_blocks_outputs(kind: str) -> None:
    model = build(kind).eval()
    randomised(model)
    zt, t, condition = inputs()
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    condition = replace(condition, mask_BL=mask, labels_B=torch.tensor([1, 2]))
    seen: list[Tensor] = []
    for block in blocks_of(model):  # hooks, where the model itself has none
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    whole = model(zt, t, condition)
    wanted = [x[:, : zt.shape[-1] ** 2 // 4] if kind == "shared" else x for x in seen]  # tokens of the image alone
    assert len(wanted) == model.num_blocks
    for k, want in enumerate(wanted, start=1):
        seen.clear()
        got = model(zt, t, condition, k)
        assert len(seen) == k
        torch.testing.assert_close(got, want, atol=0, rtol=1e-6)
        cut = copy.deepcopy(model)
        cut.cut(k)
        assert cut.num_blocks == k or kind == "unet"
        assert torch.equal(cut(zt, t, condition, k), got)
        assert cut.state_dict().keys() <= model.state_dict().keys()
    assert torch.equal(model(zt, t, condition), whole)


def test_a_cut_unet_holds_the_way_to_its_block_alone() -> None:
    model = build("unet")
    for k, parts in ((1, (1, False, 0)), (2, (2, False, 0)), (3, (2, True, 0)), (4, (2, True, 1)), (5, (2, True, 2))):
        cut: Any = copy.deepcopy(model)
        cut.cut(k)
        assert (len(cut.net.down_blocks), cut.net.mid_block is not None, len(cut.net.up_blocks)) == parts
