"""Algorithm 1 against a slow reference, and its parts: exact selection, and pooling by shifts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.numerics import lpl_reference
from tests.numerics.lpl_cases import OUTLIER, PlantedCodec, make_codec, make_latents
from trainer.losses.feature_loss import feature_loss
from trainer.losses.outliers import _any_near, inlier_mask, kernel_sizes, smallest


@pytest.mark.parametrize("size", [(512, 512), (320, 350), (128, 128), (64, 64), (5, 9), (2, 2)], ids=str)
def test_mask_is_algorithm_1(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    channel = rng.standard_normal(size)
    channel[:6, :4] *= OUTLIER  # at the border, where padding would show
    channel[size[0] // 2, size[1] // 2] = OUTLIER
    channel[rng.random(size) < 1e-3] *= -OUTLIER
    mask = inlier_mask(torch.from_numpy(channel)[None, None])[0, 0].numpy()
    np.testing.assert_array_equal(mask, lpl_reference.inliers(channel))


@pytest.mark.parametrize(("side", "single", "beside_a_block"), [(512, 1, 0), (256, 0, 0), (64, 0, 1)])
def test_what_the_kernels_do_to_an_outlier(side: int, single: int, beside_a_block: int) -> None:
    """Closing forgives a lone pixel on a large map; opening widens what is left."""
    channel = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    channel[20, 20] = OUTLIER
    channel[40:46, 40:46] = OUTLIER
    mask = inlier_mask(channel[None, None])[0, 0]
    assert mask[20, 20] == single
    assert mask[43, 43] == 0
    assert mask[43, 46] == beside_a_block


def test_reference_and_fast_path_agree_where_the_kernels_are_at_work() -> None:
    codec = make_codec(PlantedCodec, channels=(4, 8))  # f = 2: maps of 110, 220 and 220 pixels a side
    z0_hat, z0 = make_latents(codec, batch=1, side=110)
    with torch.no_grad():
        estimates, targets = (
            [m[:, :2].contiguous() for m in codec.decode_features(z)] for z in (z0_hat.float(), z0.float())
        )
    assert [kernel_sizes(*m.shape[-2:]) for m in estimates] == [(1, 3), (1, 3), (1, 3)]
    for estimate, target in zip(estimates, targets, strict=True):
        estimate[0, 0, 40:42, 17] *= OUTLIER
        fast = feature_loss(estimate, target, mask_outliers=True)
        (slow,), _ = lpl_reference.reference_loss(
            [estimate.numpy()], [target.numpy()], [0.0], 1.0, latents_side=estimate.shape[-1], mask_outliers="all"
        )
        np.testing.assert_allclose(fast.item(), slow, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 49, 50, 4096])
def test_selection_is_exact(n: int, dtype: torch.dtype) -> None:
    """Where values repeat, as in bf16, and are not finite; whatever the layout."""
    values = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    values[0, 0, 0], values[0, 1, n // 2] = torch.nan, -torch.inf
    wanted = values.to(torch.promote_types(dtype, torch.float32)).sort(-1).values
    before = values.clone()
    for layout in (values, values.transpose(1, 2).contiguous().transpose(1, 2)):
        for first, second in ((1, 1), (1, n), (max(1, n * 2 // 100), max(1, n * 98 // 100))):
            low, high = smallest(layout, first, second)
            torch.testing.assert_close(low, wanted[..., first - 1], rtol=0.0, atol=0.0, equal_nan=True)
            torch.testing.assert_close(high, wanted[..., second - 1], rtol=0.0, atol=0.0, equal_nan=True)
        torch.testing.assert_close(layout, before, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (20, 33)], ids=str)
@pytest.mark.parametrize("reach", [0, 1, 2, 5])
def test_pooling_by_shifts_is_max_pooling(size: tuple[int, int], reach: int) -> None:
    mask = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(reach)) < 0.05
    for layout in (mask, mask.contiguous(memory_format=torch.channels_last)):
        before = layout.clone()
        pooled = F.max_pool2d(layout.float(), 2 * reach + 1, stride=1, padding=reach).bool()
        assert torch.equal(_any_near(layout, reach), pooled)
        assert torch.equal(layout, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mask_is_the_same_in_either_layout(dtype: torch.dtype) -> None:
    features = torch.randn(2, 5, 128, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    features[:, ::2, 40:43, 7] = OUTLIER
    mask = inlier_mask(features)
    assert mask.dtype == torch.bool
    assert 0 < (~mask).sum() < 0.01 * mask.numel()
    assert torch.equal(inlier_mask(features.contiguous(memory_format=torch.channels_last)), mask)
    assert torch.equal(inlier_mask(features.float()), mask)


@pytest.mark.parametrize(
    ("side", "closing", "opening"),
    [(1024, 7, 11), (768, 5, 9), (512, 3, 5), (384, 3, 5), (342, 3, 5), (341, 1, 5), (307, 1, 3), (256, 1, 3),
     (128, 1, 3), (103, 1, 3), (102, 1, 1), (64, 1, 1), (32, 1, 1), (8, 1, 1), (1, 1, 1)],
)  # fmt: skip
def test_kernel_sizes(side: int, closing: int, opening: int) -> None:
    assert kernel_sizes(side, side) == (closing, opening)


def test_kernel_sizes_follow_the_geometric_mean_side() -> None:
    assert kernel_sizes(256, 1024) == kernel_sizes(512, 512)
