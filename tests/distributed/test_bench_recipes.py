"""The benchmark of recipes, as it is called, with narrow models: it measures what the recipes are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.bench.recipes import RANKS, RandomText, cut, encoder_bytes, published_codec, shapes, share
from tests.text_models import write_sd3
from trainer.config import CODE_ROOT, LatentDiffusionConfig
from trainer.models.frozen_text import FrozenText
from trainer.recipes import RECIPES, load

pytestmark = pytest.mark.long

NAMES = ("cc12m_512_lpl_flow", "sd3_medium_512", "imagenet_256_dit")
TRAINED = [name for name in RECIPES if load(name).task.kind == "latent_diffusion"]


@pytest.fixture(scope="module")
def table() -> list[list[str]]:
    command = [sys.executable, "-m", "ops.bench.recipes", *NAMES, "--cut", "--device", "cpu", "--steps", "2"]
    done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_a_line_for_every_phase_of_another_shape(table: list[list[str]]) -> None:
    rows = [row for row in table if row[0] in NAMES]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("cc12m_512_lpl_flow", "pretrain_256", "no"), ("cc12m_512_lpl_flow", "post_512_lpl", "yes"),
        ("sd3_medium_512", "low_resolution", "no"), ("sd3_medium_512", "full_resolution", "no"),
        ("sd3_medium_512", "perceptual", "yes"),
        ("imagenet_256_dit", "pretrain", "no"), ("imagenet_256_dit", "perceptual", "yes"),
    ]  # fmt: skip
    for row in rows:
        state_gib, peak, per_rank, ms, images_per_s, loss = row[7:]
        assert peak == per_rank == "-"
        assert float(state_gib) >= 0
        assert float(ms) > 0
        assert float(images_per_s) == pytest.approx(int(row[4]) / float(ms) * 1000, rel=0.02, abs=0.1)
        assert 0 < float(loss) < 100
    assert sum("left" in row for row in table) == 2  # classes have no encoder


@pytest.mark.parametrize("name", TRAINED)
def test_codec_and_shares_are_the_recipes(name: str) -> None:
    config = load(name)
    assert isinstance(config.task, LatentDiffusionConfig)
    narrow = cut(config)
    assert [p.name for p in shapes(narrow)] == [p.name for p in shapes(config)]
    codec = published_codec(config.task.codec, narrow=True)
    assert (codec.latent_channels, codec.downsampling) == (
        config.task.codec.latent_channels,
        config.task.codec.downsampling,
    )
    ranks = RANKS.get(name, 64)
    assert f"{ranks} " in (RECIPES[name].__doc__ or "") or ranks == 2, "the docstring names the ranks"
    for phase in config.phases:
        assert share(name, phase, config) * ranks == phase.batch_size
    assert (encoder_bytes(config.task) > 0) == (config.task.text.kind == "frozen")


def test_random_text_is_of_the_real_ones_shape(tmp_path: Path) -> None:
    config = write_sd3(tmp_path)
    real, random = FrozenText(config), RandomText(config, torch.device("cpu"))
    want, got = (text(text.prepare(["a red fox", None])) for text in (real, random))
    for field in ("tokens_BLT", "pooled_BP", "mask_BL"):
        a, b = getattr(want, field), getattr(got, field)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), field
