"""Distances between sets of images, against closed forms and plain computations; what a comparison over seeds says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.images import read_image
from trainer.errors import UserError
from trainer.evaluate import metrics
from trainer.experiments.results import BY_NAME, LEVELS, METRICS, Comparison, Results, Spread
from trainer.models.efficientnet import EfficientNetLite0, SamePadConv, features_of, load_efficientnet_lite0

WEIGHTS = "data/efficientnet_lite0/efficientnet-lite0-57934424.pth"


def draws(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d) + rng.normal(size=d)


def frechet_by_roots(a: np.ndarray, b: np.ndarray) -> float:
    """The formula with matrix square roots: Tr((C_a^1/2 C_b C_a^1/2)^1/2), by eigenvalues."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(ca)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cb @ root), 0.0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2.0 * cross)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 8), (12, 9, 40), (30, 60, 40)])
def test_frechet_distance_is_the_formula_with_matrix_roots(n: int, m: int, d: int) -> None:
    a, b = draws(n, d, 1), draws(m, d, 2)
    # square roots of eigenvalues that are zero but for rounding limit the plain formula, not ours
    assert metrics.frechet_distance(a, b) == pytest.approx(frechet_by_roots(a, b), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(50, 6), (20, 300)])
def test_frechet_distance_in_closed_form(n: int, d: int) -> None:
    a = draws(n, d)
    shift = np.linspace(-1, 1, d)
    total = np.trace(np.cov(a.T))
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9 * total)
    assert metrics.frechet_distance(a + shift, a) == pytest.approx(np.square(shift).sum())
    centred = a - a.mean(0)
    assert metrics.frechet_distance(1.5 * centred, centred) == pytest.approx(0.25 * total)
    assert metrics.frechet_distance(centred, 0.0 * centred) == pytest.approx(total)


def test_frechet_distance_of_many_features_in_float32_is_not_spoilt_by_rounding() -> None:
    a = (draws(40, 500) * 1e-3 + 100.0).astype(np.float32)
    assert metrics.frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-9)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    a, b = draws(7, 5, 1), draws(6, 5, 2)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1.0) ** 3)

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(6) for j in range(6) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert metrics.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_a_wave_has_its_power_at_its_frequency() -> None:
    side, frequency, amplitude = 32, 5, 40.0
    x = np.arange(side)
    wave = 128 + amplitude * np.cos(2 * np.pi * frequency * x / side)
    pixels = np.broadcast_to(np.rint(wave)[None, None, :, None], (3, side, side, 3)).astype(np.uint8)
    log_power = metrics.radial_power_spectrum(pixels)
    assert log_power.shape == (16,)
    assert log_power.argmax() == frequency - 1
    # |FFT|^2 / side^2 of A cos is (A side / 2)^2 at two points; the ring holds the mean over all its points
    grid = np.rint(np.hypot(*np.meshgrid(np.fft.fftfreq(side, 1 / side), np.fft.fftfreq(side, 1 / side))))
    expected = 2 * (amplitude / 255 * side / 2) ** 2 / (grid == frequency).sum()
    assert 10 ** log_power[frequency - 1] == pytest.approx(expected, rel=0.03)  # whole pixel values
    assert np.delete(log_power, frequency - 1).max() < log_power.max() - 3


def test_spectrum_of_white_noise_is_flat_and_knows_its_variance() -> None:
    rng = np.random.default_rng(0)
    grey = rng.normal(128, 20, size=(64, 32, 32, 1)).clip(0, 255)
    log_power = metrics.radial_power_spectrum(np.repeat(grey, 3, axis=3).astype(np.uint8))
    assert 10**log_power == pytest.approx(np.full(16, (20 / 255) ** 2), rel=0.15)


def test_spectrum_errors_by_third() -> None:
    real = np.zeros(9)
    log_power = np.array([0.1, 0.1, 0.1, -0.2, -0.2, 0.2, -0.3, -0.3, -0.3])
    errors = metrics.spectrum_errors(log_power, real)
    assert errors["spectrum_low"] == pytest.approx(0.1)
    assert errors["spectrum_mid"] == pytest.approx(0.2)
    assert errors["spectrum_high"] == pytest.approx(0.3)
    assert errors["spectrum_high_signed"] == pytest.approx(-0.3)
    assert errors["spectrum"] == pytest.approx(0.2)


def test_squared_distances() -> None:
    a, b = draws(4, 12).reshape(4, 3, 2, 2), draws(5, 12, 1).reshape(5, 3, 2, 2)
    expected = [[np.square(x - y).mean() for y in b] for x in a]
    assert metrics.squared_distances(a, b) == pytest.approx(np.array(expected))
    assert np.diagonal(metrics.squared_distances(a, a)) == pytest.approx(np.zeros(4), abs=1e-12)


# ---------------------------------------------------------------------------------------------------- the feature network


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1)])
def test_padding_is_tensorflows(side: int, kernel: int, stride: int) -> None:
    """Output side ceil(n / stride), and an uneven padding has its larger half behind: the first output sees pixel 0 on."""
    conv = SamePadConv(1, 1, kernel, stride, bias=False)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        out = conv(torch.ones(1, 1, side, side))
        assert out.shape[-1] == -(-side // stride)
        total = (out.shape[-1] - 1) * stride + kernel - side
        conv.weight[0, 0, total // 2, total // 2] = 1.0  # the tap on pixel 0
        image = torch.zeros(1, 1, side, side)
        image[0, 0, 0, 0] = 1.0
        assert conv(image)[0, 0, 0, 0] == 1.0


@pytest.mark.shared
def test_the_network_knows_what_photos_show(shared_dir: Path) -> None:
    """ImageNet's numbers of what COCO's people wrote: bear, skis, tennis, apples, bananas, sheep, airliner, traffic light."""
    folder = shared_dir / "data/coco_open"
    network = load_efficientnet_lite0(str(shared_dir / WEIGHTS))
    words = {"grizzly bear": {294}, "standing on skis": {795}, "male tennis player": {752}, "green apples": {948},
             "bunches of bananas": {954}, "white sheep": {348, 349}, "air plane on a terminal": {404}, "street sign": {920},
             "couple of baseball": {981, 429}}  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for word, classes in words.items():
        name = next(row["file_name"] for row in rows if any(word in caption for caption in row["captions"]))
        photo = read_image((folder / "images" / name).read_bytes())
        height, width = photo.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = torch.from_numpy(photo[top : top + side, left : left + side].copy())
        images = square.permute(2, 0, 1)[None].float() / 127.5 - 1.0
        assert int(network(images).argmax()) in classes, (word, name)


@pytest.mark.shared
def test_norms_are_folded_exactly(shared_dir: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, size=(3, 64, 64, 3), dtype=np.uint8)
    plain = EfficientNetLite0()
    plain.load_state_dict(torch.load(shared_dir / WEIGHTS, weights_only=True), strict=True)
    folded = load_efficientnet_lite0(str(shared_dir / WEIGHTS))
    expected = features_of(plain, pixels)
    assert expected.shape == (3, 1280)
    assert expected.std() > 0.1
    torch.testing.assert_close(features_of(folded, pixels, batch_size=2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("content", [None, {"_fc.weight": torch.zeros(1)}])
def test_other_weights_are_refused(tmp_path: Path, content: dict[str, torch.Tensor] | None) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"--features-weights: .*weights\.pth"):
        load_efficientnet_lite0(str(path))


# --------------------------------------------------------------------------------------------------------- over the seeds


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((-1.0, -1.1, -0.9), "better"),  # t = 17.3 against 4.303
        ((1.0, 1.1, 0.9), "worse"),
        ((-1.0, -0.2, -0.4), "not told apart"),  # t = 2.2
        ((-1.0,), "not told apart"),
        ((0.0, 0.0, 0.0), "not told apart"),
        ((-1.0, -1.2), "not told apart"),  # t = 11 against 12.7
        ((-1.0, -1.1), "better"),  # t = 21
    ],
)
def test_verdict_is_a_paired_t_test(values: tuple[float, ...], verdict: str) -> None:
    assert Comparison("flow", "lpl", BY_NAME["frechet"], Spread(values)).verdict == verdict


def write_results(folder: Path, values: dict[str, float]) -> None:
    """An experiment's folder with runs named VARIANT-SEED, each metric at the run's value."""
    runs = []
    for name, value in values.items():
        variant, _, seed = name.partition("-")
        runs.append({"name": name, "variant": variant, "paradigm": "flow", "seed": int(seed)})
        measured = [metric.name for metric in METRICS]
        measured += [f"{m}_{level}" for m in ("estimate_lpips", "estimate_latent", "denoising") for level in LEVELS]
        figures = dict.fromkeys(measured, value)
        (folder / "evaluations").mkdir(parents=True, exist_ok=True)
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(figures))
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "summary.json").write_text(json.dumps({"images_per_s": 20.0 / abs(value)}))
    runs.append({"name": "lpl-9", "variant": "lpl", "paradigm": "flow", "seed": 9})
    variants = {name: {"label": name, "group": "main"} for name in ("baseline", "lpl")}
    (folder / "experiment.json").write_text(json.dumps({"size": {}, "variants": variants, "runs": runs}))
    (folder / "reference.json").write_text("{}")
    (folder / "failures.json").write_text(json.dumps({"lpl-9": "its last line"}))


def test_differences_are_between_runs_of_equal_seed(tmp_path: Path) -> None:
    write_results(tmp_path, {"baseline-0": 10.0, "baseline-1": 20.0, "lpl-0": 9.0, "lpl-1": 18.0, "lpl-2": 5.0})
    results = Results(tmp_path)
    comparison = results.compare("flow", "lpl", BY_NAME["frechet"])
    assert comparison is not None
    assert sorted(comparison.difference.values) == [-2.0, -1.0], "seed 2 has no baseline"
    assert comparison.difference.text(BY_NAME["frechet"], signed=True) == "-1.5 ± 0.7"
    spread = results.spread("flow", "lpl", "estimate_lpips")
    assert spread is not None
    assert spread.mean == pytest.approx(32 / 3)
    assert results.step_cost("flow", "lpl") == pytest.approx(9.0 / 15.0)
    assert results.missing == {"lpl-9": "its last line"}
    assert results.compare("ddpm_v", "lpl", BY_NAME["frechet"]) is None


def test_of_a_signed_metric_nearer_to_zero_is_better(tmp_path: Path) -> None:
    write_results(tmp_path, {"baseline-0": -0.5, "baseline-1": 0.5, "lpl-0": -0.1, "lpl-1": 0.11})
    comparison = Results(tmp_path).compare("flow", "lpl", BY_NAME["spectrum_high_signed"])
    assert comparison is not None
    assert sorted(comparison.difference.values) == pytest.approx([-0.4, -0.39])
    assert comparison.verdict == "better"
