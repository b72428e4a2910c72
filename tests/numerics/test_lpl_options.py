"""What the options of the latent perceptual loss mean, the public SDXL code's number among them, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from tests.numerics.lpl_cases import OUTLIER, fixed, make_codec, make_latents, make_loss, run
from tests.tiny import tiny
from trainer.config import LatentDiffusionConfig, LPLConfig
from trainer.errors import UserError
from trainer.losses.lpl import LatentPerceptualLoss, build_lpl, depth_weights
from trainer.models.frozen_decoder import FrozenDecoder
from trainer.tasks.latent_diffusion import LatentDiffusionTask

# ------------------------------------------------------------------------------------------------------------- weights


def test_depth_weights() -> None:
    scales = make_codec().map_scales()
    assert scales == (1, 2, 4, 8, 8)
    assert depth_weights(scales, "inverse_scale") == (1, 1 / 2, 1 / 4, 1 / 8, 1 / 8)
    assert depth_weights(scales, "printed") == (2**-1, 2**-2, 2**-4, 2**-8, 2**-8)
    assert depth_weights(scales, "uniform") == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("rule", ["inverse_scale", "printed", "uniform"])
def test_a_maps_weight_is_the_same_whatever_others_are_used(rule) -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    all_B, all_terms = run(codec, z0_hat, z0, [1.0, 1.0], fixed(depth_weights=rule))
    alone = [run(codec, z0_hat, z0, [1.0, 1.0], fixed(depth_weights=rule, maps=(name,))) for name in codec.map_names]
    torch.testing.assert_close(sum(loss_B for loss_B, _ in alone), all_B, rtol=1e-5, atol=0.0)
    for name, (_, terms) in zip(codec.map_names, alone, strict=True):
        assert set(terms) == {"gate", f"lpl_{name}"}
        torch.testing.assert_close(terms[f"lpl_{name}"], all_terms[f"lpl_{name}"], rtol=1e-5, atol=0.0)


def test_the_decoder_runs_as_deep_as_the_last_map_and_order_does_not_matter() -> None:
    codec = make_codec()
    loss = build_lpl(fixed(maps=("up1", "mid")), codec)
    assert loss.map_names == ("mid", "up1")
    assert loss.depth_weights == (1.0, 1 / 4)
    assert loss.decoder.map_names == ("mid", "up0", "up1")
    assert len(loss.decoder(torch.zeros(1, 4, 4, 4))) == 3
    assert build_lpl(fixed(maps=("mid",)), codec).decoder.map_names == ("mid",)


# ---------------------------------------------------------------------------------------------------------- reductions


def test_gated_is_the_mean_over_maps_and_over_the_samples_inside() -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=5, side=8)
    levels = [0.5, 9.0, 1.0, 9.0, 9.0]
    z0_hat.requires_grad_()
    gated_B, terms = run(codec, z0_hat, z0, levels, fixed(over_batch="gated"))
    all_B, all_terms = run(codec, z0_hat, z0, levels, fixed())
    torch.testing.assert_close(gated_B.mean(), all_B[[0, 2]].mean() / 5)
    torch.testing.assert_close(gated_B, all_B * 5 / 2 / 5)
    # terms stay those of the maps, so that runs compare
    assert terms.keys() == all_terms.keys()
    assert all(torch.equal(terms[name], all_terms[name]) for name in terms)
    gradients = [torch.autograd.grad(loss_B.sum(), z0_hat)[0] for loss_B in (gated_B, all_B)]
    torch.testing.assert_close(gradients[0], gradients[1] / 2)


def test_gated_with_none_inside_is_zero() -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    loss_B, _ = run(codec, z0_hat.requires_grad_(), z0, [9.0, 9.0], fixed(over_batch="gated"))
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0, 0.0]


def test_a_sum_over_pixels_is_the_mean_times_their_number() -> None:
    codec = make_codec()
    z0_hat, z0 = make_latents(codec, batch=2, side=8)
    _, sums = run(codec, z0_hat, z0, [1.0, 1.0], fixed(over_pixels="sum", mask_outliers="none"))
    _, means = run(codec, z0_hat, z0, [1.0, 1.0], fixed(mask_outliers="none"))
    for name, scale in zip(codec.map_names, codec.map_scales(), strict=True):
        torch.testing.assert_close(sums[f"lpl_{name}"], means[f"lpl_{name}"] * (8 * scale) ** 2)


def test_equal_features_up_to_scale_and_shift_are_equal_where_each_map_has_its_own_statistics() -> None:
    """Why separate statistics are worse: an estimate of half the contrast has no loss."""
    codec = make_codec()
    _, z0 = make_latents(codec, batch=2, side=8)
    shared, separate = (make_loss(codec, fixed(statistics=s, mask_outliers="none")) for s in ("shared", "separate"))
    targets = shared.decoder(z0)
    halves = [0.5 * target + 3.0 for target in targets]
    assert separate.of_features(halves, targets)[0].max() < 1e-4
    assert shared.of_features(halves, targets)[0].min() > 1.0


# -------------------------------------------------------------------------------------------------- the public SDXL code


PUBLIC = {"statistics": "target_norm", "mask_source": "target", "over_batch": "gated"}
"""With depth_weights=uniform, or inverse_scale where it is run with `--lpl_pow_law`, and a phase's tau=null, max_time=200."""
ITS_KERNELS = {0: None, 1: None, 2: (1, 3), 3: (3, 5), 4: (3, 5)}
"""(closing, opening) by a map's place, whatever its size: 5 and 3 over a `down_f` of 2, then 1; None: no mask."""


def public_loss(estimates: list[np.ndarray], targets: list[np.ndarray], kernels: dict, pow_law: bool) -> float:
    """The public formula on the maps (B, C, H, W) of the samples that it has picked, in float64."""
    of_maps = []
    for i, (x, y) in enumerate(zip(estimates, targets, strict=True)):
        mask = np.ones(y.shape, bool) if kernels[i] is None else public_mask(y, *kernels[i])
        y = y * mask
        norm = np.sqrt((y**2).sum(1, keepdims=True)) + 1e-6
        square = (x / norm - y / norm) ** 2 * mask
        weight = 2.0 ** -min(i, 3) if pow_law else 1.0
        of_maps.append((square.sum((2, 3)) * weight / mask.sum((2, 3))).mean(1))
    return float((sum(of_maps) / len(of_maps)).mean())


def public_mask(y: np.ndarray, closing: int, opening: int) -> np.ndarray:
    n = y.shape[2] * y.shape[3]
    flat = np.sort(y.reshape(*y.shape[:2], n), -1)
    low, high = (flat[..., int(n * q) - 1][..., None, None] for q in (0.02, 1 - 0.02))
    margin = 2 * y.reshape(*y.shape[:2], n).std(-1, ddof=1)[..., None, None]
    mask = (low - margin < y) & (y < high + margin)
    for kernel, neutral, reduce in ((closing, False, np.any), (opening, True, np.all)):
        reach = kernel // 2
        padded = np.pad(mask, ((0, 0), (0, 0), (reach, reach), (reach, reach)), constant_values=neutral)
        mask = reduce(sliding_window_view(padded, (kernel, kernel), axis=(2, 3)), (-2, -1))
    return mask


@pytest.mark.parametrize("resolution", [512, 256])
@pytest.mark.parametrize("pow_law", [False, True])
def test_the_public_codes_number(resolution: int, pow_law: bool) -> None:
    """Ours equals it at 512 px. Its kernels belong to a map's place, ours to its size, so at another resolution it is
    equal with our kernels in its formula and another number with its own. It also returns NaN for a channel without
    inliers, and nothing where no sample is inside."""
    codec = make_codec(channels=(4, 4, 4, 4))
    z0_hat, z0 = make_latents(codec, batch=3, side=resolution // 8)
    config = fixed(**PUBLIC, depth_weights="inverse_scale" if pow_law else "uniform")
    loss = make_loss(codec, config)
    with torch.no_grad():
        estimates, targets = loss.decoder(z0_hat), loss.decoder(z0)
    for i in (2, 3, 4):  # a patch, and pixels alone that closing forgives
        for maps in (estimates, targets):
            maps[i][:, 0, 10:14, 20:25] += OUTLIER
            maps[i][:, 1, ::40, ::50] -= OUTLIER
    inside = [0, 2]
    loss_B, _ = loss.of_features([m[inside] for m in estimates], [m[inside] for m in targets])

    estimate_maps, target_maps = ([m[inside].double().numpy() for m in maps] for maps in (estimates, targets))
    by_size = {256: ITS_KERNELS | {3: (1, 3), 4: (1, 3)}, 512: ITS_KERNELS}
    assert loss_B.mean().item() == pytest.approx(
        public_loss(estimate_maps, target_maps, by_size[resolution], pow_law), rel=1e-5
    )
    its_own = public_loss(estimate_maps, target_maps, ITS_KERNELS, pow_law)
    assert (abs(loss_B.mean().item() / its_own - 1) < 1e-5) == (resolution == 512)


def test_the_public_codes_mean_over_the_samples_inside() -> None:
    codec = make_codec(channels=(4, 4, 4, 4))
    z0_hat, z0 = make_latents(codec, batch=4, side=8)
    config = fixed(**PUBLIC | {"mask_outliers": "none", "mask_source": "estimate"}, depth_weights="uniform")
    loss_B, _ = run(codec, z0_hat, z0, [1.0, 9.0, 1.0, 1.0], config)
    with torch.no_grad():
        estimates, targets = ([m[[0, 2, 3]].double().numpy() for m in codec.decode_features(z)] for z in (z0_hat, z0))
    expected = public_loss(estimates, targets, dict.fromkeys(range(5)), pow_law=False)
    assert loss_B.mean().item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------- what a user can mend


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{maps: []}", "maps: name at least one decoder map"),
        ("{maps: [mid], num_maps: 2}", "leave num_maps out"),
        ("{maps: [mid, up0, mid]}", "maps: names a map twice"),
        ("{num_maps: 0}", "num_maps"),
        ("{statistics: target_norm, detach_deviation: true}", "detach_deviation: target_norm has no deviation"),
        ("{mask_outliers: none, mask_source: target}", "mask_source: no outliers are masked"),
        ("{statistics: both}", "statistics"),
    ],
)
def test_combinations_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny("task.perceptual={kind: lpl, " + text[1:])
    assert "task.perceptual" in str(error.value)


def test_an_unknown_map() -> None:
    expected = r"task\.perceptual\.maps: up7, decoder\.mid: no such block; this decoder has mid, up0, up1, up2, up3"
    with pytest.raises(UserError, match=expected):
        build_lpl(LPLConfig(maps=("up1", "up7", "decoder.mid")), make_codec())


def test_more_maps_than_the_decoder_has() -> None:
    with pytest.raises(UserError, match=r"task\.perceptual\.num_maps: 6, but this decoder has 5 maps: mid, up0"):
        build_lpl(LPLConfig(num_maps=6), make_codec())


def test_unknown_maps_of_a_run() -> None:
    with pytest.raises(UserError, match=r"task\.perceptual\.maps: up9: no such block; this decoder has mid"):
        LatentDiffusionTask(tiny("task.perceptual.maps=[mid, up9]"), torch.device("cpu"))


def test_resolutions_are_checked_at_the_start() -> None:
    def loss(**options: Any) -> LatentPerceptualLoss:
        return LatentPerceptualLoss(FrozenDecoder(make_codec()), LPLConfig(**options))

    loss(mask_outliers="all").check(64)
    loss(mask_outliers="all").check(16)
    with pytest.raises(UserError, match="resolution 60: not a multiple"):
        loss().check(60)
    with pytest.raises(
        UserError, match="resolution 8: the decoder's map mid has 1 pixels a side, of which no deviation"
    ):
        loss().check(8)
    loss(statistics="target_norm").check(8)  # the deep maps have 4 and 8
    with pytest.raises(UserError, match="resolution 8: the decoder's map mid has 1 pixels a side, fewer than the 2"):
        loss(statistics="target_norm", mask_outliers="all").check(8)
    build_lpl(LPLConfig(maps=("up0", "up2"), mask_outliers="all"), make_codec()).check(8)


def test_a_run_whose_maps_are_too_small_is_refused_at_its_start() -> None:
    task = tiny().task
    assert isinstance(task, LatentDiffusionConfig)
    f = task.codec.downsampling
    run_config = tiny(f"phases.perceptual.resolution={f}", "task.perceptual.mask_outliers=all")
    with pytest.raises(UserError, match=rf"resolution {f}: the decoder's map \w+ has 1 pixels a side.*; train larger"):
        LatentDiffusionTask(run_config, torch.device("cpu")).check()


def test_a_tau_below_every_noise_level_is_warned_of_with_the_share_inside() -> None:
    def warnings(tau: float) -> list[str]:
        return LatentDiffusionTask(tiny(f"phases.perceptual.perceptual.tau={tau}"), torch.device("cpu")).check()

    (warning,) = warnings(1e-9)
    assert warning.startswith("phases.2.perceptual: 0.00% of the samples have a noise level of 1e-09 or less")
    assert "raise tau" in warning
    assert warnings(3.0) == []
