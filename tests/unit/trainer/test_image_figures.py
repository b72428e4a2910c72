"""Figures of pairs of images and prompts, neighbours that are shown, and intervals that hold what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import feature_networks
from tests.feature_networks import Blocks
from tests.image_sets import SIDE, Counting, drawn, network, values, written
from trainer.errors import UserError
from trainer.evaluate import metrics
from trainer.evaluate.features.networks import build_network
from trainer.evaluate.image_measures import Comparison
from trainer.evaluate.image_pictures import nearest_rows
from trainer.evaluate.image_sets import ImageSet, Selection
from trainer.evaluate.images_run import Settings, evaluate_images
from trainer.evaluate.judges import Judge, NetworkJudge, PixelJudge


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("real"), drawn(150, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("made"), drawn(130, 2))


def test_prompts_and_clip(real: Path, tmp_path: Path) -> None:
    """A folder of samples gives CLIP its prompts; the score is of pairs, and what is cut is counted."""
    feature_networks.write_clip(tmp_path / "clip")
    clip = build_network("clip", str(tmp_path / "clip"))
    samples = tmp_path / "samples"
    written(samples / "images", drawn(30, 5))
    prompts = [f"a red fox number {i}" if i else "two dogs " * 60 for i in range(30)]
    # not in the order of the files' names
    rows = [{"position": i, "prompt": prompts[i], "file": f"images/{29 - i:04d}.png"} for i in range(30)]
    (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    (samples / "samples.json").write_text("{}")
    found = evaluate_images(
        ImageSet(str(samples)), ImageSet(str(real)), Settings(SIDE, allow_few=True, resamples=20), [clip], Counting(),
        out=tmp_path / "out", cache=tmp_path / "cache",
    )  # fmt: skip
    assert found is not None
    pixels = torch.from_numpy(drawn(30, 5)[::-1].copy()).permute(0, 3, 1, 2)
    network: Any = clip.network
    image_ND, (text_ND, cut) = clip.features(pixels).numpy(), network.text_features(prompts)
    assert cut == [True] + 29 * [False]
    assert found.figures["clip_score"]["prompts_cut"] == 1
    expected = metrics.cosines(image_ND, text_ND.numpy())
    assert values(found)["clip_score"] == pytest.approx(100 * expected.mean(), rel=1e-5)
    assert values(found)["clip_s"] == pytest.approx(2.5 * np.maximum(expected, 0).mean(), rel=1e-5)
    of_real = clip.features(torch.from_numpy(drawn(150, 1)).permute(0, 3, 1, 2)).numpy()
    assert values(found)["cmmd"] == pytest.approx(metrics.cmmd(image_ND, of_real), rel=1e-4)
    assert {"fd_clip", "kd_clip", "precision_clip"} <= set(found.figures)

    (samples / "samples.jsonl").write_text(json.dumps({"position": 0, "prompt": "x", "file": "../../x.png"}))
    with pytest.raises(UserError, match="is not in the folder"):
        ImageSet(str(samples))
    (samples / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="the sampling is not finished"):
        ImageSet(str(samples))


def test_nearest_rows() -> None:
    rng = np.random.default_rng(0)
    made_ND, real_MD = rng.normal(size=(30, 6)), rng.normal(size=(50, 6))
    rows, nearest = nearest_rows(made_ND, real_MD, block=7)
    assert len(rows) == 8
    for row, near in zip(rows, nearest, strict=True):
        distances = np.linalg.norm(real_MD - made_ND[row], axis=1)
        assert near.tolist() == np.argsort(distances)[:4].tolist()


@pytest.fixture
def judged(made: Path, real: Path, tmp_path: Path) -> Any:
    judging = Counting()
    judges: list[Judge] = [PixelJudge(), NetworkJudge(network())]
    return [
        judging.judged(Selection(ImageSet(str(folder)), SIDE, "training"), judges, tmp_path, "real")
        for folder in (made, real)
    ]


def test_intervals_hold_what_they_say(judged: Any) -> None:
    """Of KID: the error that subsets tell is that of fresh draws."""
    generated, real = judged
    figures = Comparison(generated, real, ["blocks"], resamples=200).figures(("kid", "precision"))
    kid = figures["kd_blocks"]["interval"]
    spread = []
    features = real["blocks"].features
    for seed in range(40):
        pixels = torch.from_numpy(drawn(130, 100 + seed)).permute(0, 3, 1, 2)
        spread.append(metrics.kernel_distance(Blocks().features(pixels).numpy(), features))
    error = (kid["high"] - kid["low"]) / 2 / 1.96
    # subsets vary with both sets, the draws here with one
    assert np.std(spread) / 2 < error < 3 * np.std(spread)
    precision = figures["precision_blocks"]
    share = precision["value"]
    width = precision["interval"]["high"] - precision["interval"]["low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 130), rel=0.4)
