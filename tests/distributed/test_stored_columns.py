"""Whole runs on stored latents: the same as on images, on any number of ranks, and after a stop."""

import io
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import shape_of
from data.encode.stage import Encode, LatentsJob, TextJob
from data.images import read_image
from data.stages.runner import Worker
from data.stages.store import StageStore
from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.distributed.test_training import losses
from tests.stored_columns import Given, emoji, sidecars, write_dataset, write_samples
from tests.text_models import write_clip
from tests.tiny import DEMO_SIZES, tiny
from trainer.config import EncoderConfig, FrozenTextConfig, RunConfig, resolve_url
from trainer.errors import ExitCode, UserError
from trainer.models.autoencoders import Codec
from trainer.models.frozen_encoder import FrozenEncoder
from trainer.parallel.world import World
from trainer.precompute import LoadCodec, LoadText, latents_column, text_column, text_revision

pytestmark = pytest.mark.slow
"""Of ranks that train or measure: half a minute and more."""

CODEC = resolve_url("repo://trainer/assets/demo_autoencoder")
SHORT = (
    *DEMO_SIZES,
    "phases.low_resolution.steps=2", "phases.full_resolution.steps=2", "phases.perceptual.steps=2",
    "checkpoint.every_steps=100", "data.num_workers=0",
)  # fmt: skip


def config(folder: Path, *overrides: str) -> RunConfig:
    """6 steps at 32 px, 64 px, and 64 px with the latent perceptual loss."""
    return tiny(*SHORT, f"data.datasets.emoji.url={folder / 'set'}", *overrides)


WIDE = "data.latents=[wide_32, wide_64]"
MEANS, MOMENTS = "data.latents=[mean_32, mean_64]", "data.latents=[moments_32, moments_64]"


def text_section(base: Path) -> str:
    encoder = EncoderConfig.model_validate_json((base / "clip.json").read_text())
    return "task.text=" + FrozenTextConfig(encoders=(encoder,)).model_dump_json()


def on_one(world: World, base: Path) -> dict[str, Any]:
    out: dict[str, Any] = {
        "images": train(world, config(base), str(base / "images")),
        "means": train(world, config(base, MEANS), str(base / "means")),
        "half": train(world, config(base, "data.latents=[mean_32, half_64]"), str(base / "half")),
        "moments": train(world, config(base, MOMENTS), str(base / "moments")),
        "stopped": train(world, config(base, MOMENTS), str(base / "stopped"), stop_after=3),
    }
    shutil.copytree(base / "stopped", base / "elastic")  # for two ranks to go on with
    out |= {
        "resumed": train(world, config(base, MOMENTS), str(base / "stopped")),
        "workers": train(world, config(base, MOMENTS, "data.num_workers=1"), str(base / "workers")),
    }
    rows, forward = {"text": 0, "states": 0}, FrozenEncoder.forward

    def counted(name: str) -> Any:
        def counting(self: FrozenEncoder, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            rows[name] += len(ids)
            return forward(self, ids, mask)

        return counting

    wide, text = f"data.datasets.emoji.url={base / 'wide'}", text_section(base)
    out |= {
        "wide images": train(world, config(base, wide, "data.buckets=true"), str(base / "wide-images")),
        "wide": train(world, config(base, wide, "data.buckets=true", WIDE), str(base / "wide-stored")),
    }
    for name, overrides in {"text": (text,), "states": (text, "data.text_states=text_0")}.items():
        FrozenEncoder.forward = counted(name)  # type: ignore[method-assign]
        out[name] = train(world, config(base, *overrides), str(base / name))
    FrozenEncoder.forward = forward  # type: ignore[method-assign]
    out["captions encoded"] = rows
    for name, overrides in {
        "other codec": (MEANS, f"task.codec.url={base / 'other'}"),
        "other decoder": (MEANS, f"task.codec.url={base / 'decoder'}"),
        "no column": ("data.latents=z",),
    }.items():
        try:
            out[name] = train(world, config(base, *overrides), str(base / name.replace(" ", "-")))
        except UserError as e:
            out[name] = str(e)
    return out


def on_two(world: World, base: Path) -> dict[str, Any]:
    return {
        "moments": train(world, config(base, MOMENTS), str(base / "moments-2")),
        "stopped": train(world, config(base, MOMENTS), str(base / "elastic")),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with five columns, and two codecs beside the demo's."""
    folder = tmp_path_factory.mktemp("stored")
    codec, given = Codec.load(CODEC), emoji(16)
    write_samples(str(folder / "in"), given)
    parts = []
    for name, holds, dtype, resolution in (
        ("mean_32", "mean", "float32", 32), ("mean_64", "mean", "float32", 64), ("half_64", "mean", "float16", 64),
        ("moments_32", "moments", "float32", 32), ("moments_64", "moments", "float32", 64),
    ):  # fmt: skip
        column = latents_column(codec, CODEC, holds=holds, dtype=dtype, resolution=resolution)  # type: ignore[arg-type]
        job = LatentsJob(column, LoadCodec(CODEC, column.holds, column.revision, "cpu"), batch_size=8)
        out = str(folder / name)
        assert Worker(Encode(str(folder / "in"), latents={name: job}), StageStore(out)).run() == []
        parts.append(sidecars(out, folder))
    clip = write_clip(folder / "clip", width=16)
    (folder / "clip.json").write_text(clip.model_dump_json())
    text = text_column(clip, "x", dtype="float32", captions_per_kind=None, revision=text_revision(clip, "x"))
    states = Encode(str(folder / "in"), text={"text_0": TextJob(text, LoadText(clip, text.revision, device="cpu"))})
    assert Worker(states, StageStore(str(folder / "states-out"))).run() == []
    parts.append(sidecars(str(folder / "states-out"), folder))
    write_dataset(folder / "set", given, parts)
    _write_wide(folder, codec, given)
    for name, part in (("other", codec.vae.encoder), ("decoder", codec.vae.decoder)):
        changed = Codec.load(CODEC)
        weight = next((changed.vae.encoder if part is codec.vae.encoder else changed.vae.decoder).parameters())
        with torch.no_grad():
            weight.mul_(1.01)
        changed.vae.save_pretrained(folder / name)
    return folder


def _write_wide(folder: Path, codec: Codec, given: list[Given]) -> None:
    """A dataset of two aspect buckets: emoji, and pairs of them side by side."""
    aspects = {"1:1": 1.0, "2:1": 2.0}
    pairs = []
    for (key, left, captions), (_, right, _) in pairwise(given):
        both = np.concatenate([read_image(left), read_image(right)], axis=1)
        file = io.BytesIO()
        Image.fromarray(both).save(file, "PNG")
        pairs.append((f"{key}-pair", file.getvalue(), captions))
    write_samples(str(folder / "wide-in"), [*given, *pairs])
    parts = []
    for resolution in (32, 64):
        buckets = {name: shape_of(aspect, resolution, 8) for name, aspect in aspects.items()}
        column = latents_column(codec, CODEC, holds="mean", dtype="float32", resolution=resolution, buckets=buckets)
        job = LatentsJob(column, LoadCodec(CODEC, column.holds, column.revision, "cpu"), 8, aspects)
        out = str(folder / f"wide_{resolution}")
        stage = Encode(str(folder / "wide-in"), latents={f"wide_{resolution}": job})
        assert Worker(stage, StageStore(out)).run() == []
        parts.append(sidecars(out, folder))
    counts = [("1:1", 1.0, len(given)), ("2:1", 2.0, len(pairs))]
    write_dataset(folder / "wide", [*given, *pairs], parts, buckets=counts)


@pytest.fixture(scope="module")
def one(base: Path) -> dict[str, Any]:
    [found] = run_ranks(1, on_one, base)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def two(base: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(2, on_two, base)


def same(base: Path, a: str, b: str, tolerance: float) -> None:
    first, second = losses(str(base / a)), losses(str(base / b))
    assert len(first) == len(second) == 6
    assert "lpl" in first[-1]
    for step, (x, y) in enumerate(zip(first, second, strict=True)):
        assert x.keys() == y.keys()
        for term in x:
            assert x[term] == pytest.approx(y[term], rel=tolerance, abs=tolerance), (step, term)


def test_stored_means_train_as_images_do(base: Path, one: dict[str, Any]) -> None:
    assert one["images"]["code"] == one["means"]["code"] == one["half"]["code"] == ExitCode.DONE
    same(base, "means", "images", 1e-5)
    same(base, "half", "images", 5e-3)
    assert losses(str(base / "half")) != losses(str(base / "means"))


def test_buckets_of_latents_train_as_buckets_of_images_do(base: Path, one: dict[str, Any]) -> None:
    assert one["wide images"]["code"] == one["wide"]["code"] == ExitCode.DONE
    same(base, "wide-stored", "wide-images", 1e-5)


def test_stored_text_trains_as_the_encoder_does(base: Path, one: dict[str, Any]) -> None:
    assert one["text"]["code"] == one["states"]["code"] == ExitCode.DONE
    same(base, "states", "text", 1e-5)
    assert one["captions encoded"]["text"] > 30
    assert one["captions encoded"]["states"] <= 6  # the empty caption, once a step


def test_moments_are_drawn_from(base: Path, one: dict[str, Any]) -> None:
    drawn, means = losses(str(base / "moments")), losses(str(base / "means"))
    assert max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(drawn, means, strict=True)) > 3e-5


def test_a_resume_is_bit_equal(base: Path, one: dict[str, Any]) -> None:
    assert (one["stopped"]["code"], one["stopped"]["step"]) == (ExitCode.REQUEUE, 3)
    assert one["resumed"]["code"] == ExitCode.DONE
    assert losses(str(base / "stopped")) == losses(str(base / "moments"))


def test_workers_change_nothing(base: Path, one: dict[str, Any]) -> None:
    assert losses(str(base / "workers")) == losses(str(base / "moments"))


def test_two_ranks_are_one(base: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert all(found["moments"]["code"] == found["stopped"]["code"] == ExitCode.DONE for found in two)
    same(base, "moments-2", "moments", 1e-5)
    same(base, "elastic", "moments", 1e-5)


def test_another_codec_is_refused_and_another_decoder_is_not(base: Path, one: dict[str, Any]) -> None:
    assert "data.latents: column 'mean_32' of dataset emoji was encoded by" in one["other codec"]
    assert f"task.codec.url is {base / 'other'}" in one["other codec"]
    assert CODEC in one["other codec"]
    assert "data.latents: dataset emoji has no column 'z' (it has mean_32, mean_64, half_64" in one["no column"]
    assert one["other decoder"]["code"] == ExitCode.DONE
