"""Training on stored columns: what the task makes of them, and what is refused before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import ValidationError

from data.batches import Batch
from data.encode.columns import LatentsColumn, states_to_bytes
from data.encode.stored import Stored
from data.reader import Dataset, open_dataset
from data.schema import Sample
from tests.stored_columns import EMOJI
from tests.text_models import write_clip, write_t5
from tests.tiny import DEMO_SIZES, tiny
from trainer.config import FrozenTextConfig, RunConfig, replace, resolve_url
from trainer.errors import UserError
from trainer.micro_batches import split
from trainer.models.autoencoders import Codec
from trainer.models.frozen_encoder import FrozenEncoder
from trainer.models.frozen_text import FrozenText
from trainer.precompute import codec_revision, encoder_revision, text_column
from trainer.rng import normal
from trainer.step_plan import StepPlanner
from trainer.stored import stored_columns
from trainer.stored_batch import known_states, scaled_latents
from trainer.tasks.latent_diffusion import LatentDiffusionTask

CPU = torch.device("cpu")
ONE_SIZE = (*DEMO_SIZES, "phases.low_resolution.resolution=64", "data.latents=z")


def batch(latents: torch.Tensor | None, positions: list[int], size: int = 0) -> Batch:
    count = len(positions)
    return Batch(
        step=0, resolution=64, positions_B=torch.tensor(positions),
        images_BCHW=torch.zeros(count, 3, size, size, dtype=torch.uint8), captions=["dog"] * count,
        labels_B=torch.full((count,), -1), keys=["x"] * count, substitutions=(), latents_BCHW=latents,
    )  # fmt: skip


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(resolve_url("repo://trainer/assets/demo_autoencoder"))


def test_means_are_scaled_and_shifted_by_the_runs_codec(codec: Codec) -> None:
    raw = torch.randn(2, 4, 8, 8).half()
    scaled = scaled_latents(batch(raw, [3, 4]), codec, seed=0, device=CPU)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, (raw.float() - codec.shift_factor) * codec.scaling_factor)


def test_moments_are_drawn_from_by_stream_position(codec: Codec) -> None:
    moments = torch.cat([torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8) - 2], dim=1)
    scaled = scaled_latents(batch(moments, [10, 11, 12]), codec, seed=5, device=CPU)
    posterior = DiagonalGaussianDistribution(moments)
    noise = normal(5, [10, 11, 12], "posterior", (4, 8, 8), device=CPU)
    torch.testing.assert_close(scaled, codec.raw_to_scaled(posterior.mean + posterior.std * noise))
    later = scaled_latents(batch(moments[1:], [11, 12]), codec, seed=5, device=CPU)
    assert torch.equal(later, scaled[1:])
    other = scaled_latents(batch(moments, [20, 21, 22]), codec, seed=5, device=CPU)
    assert (other - scaled).abs().max() > 0.01
    many = scaled_latents(batch(moments[:1].expand(400, -1, -1, -1), [*range(400)]), codec, seed=5, device=CPU)
    raw = codec.scaled_to_raw(many)
    assert ((raw.mean(0) - posterior.mean[0]).abs() / posterior.std[0]).max() < 5 / 400**0.5
    torch.testing.assert_close(raw.std(0), posterior.std[0], rtol=0.25, atol=0)


def test_a_step_on_stored_latents_is_the_step_on_images(codec: Codec) -> None:
    """Of the demo's task with the latent perceptual loss, in micro-batches."""
    run = tiny(*ONE_SIZE)
    sample = open_dataset(resolve_url(EMOJI), name="x")
    pixels = torch.stack([torch.from_numpy(_pixels(sample, i)) for i in range(4)])
    with torch.no_grad():
        raw = codec.encode_raw(pixels.float() / 127.5 - 1.0)
    plan = StepPlanner(run, {"emoji": (100,)}).plan(15)  # of the last phase
    assert plan.phase.perceptual
    found = []
    for latents in (None, raw):
        task = LatentDiffusionTask(run, CPU)
        whole = batch(latents, [0, 1, 2, 3])
        if latents is None:
            whole.images_BCHW = pixels
        terms = [task.forward_backward(part, plan, scale=0.25) for part in split(whole, 2)]
        gradient = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
        found.append(({name: torch.cat([t[name] for t in terms]) for name in terms[0]}, gradient))
    (images, of_images), (stored, of_stored) = found
    assert stored.keys() == images.keys() >= {"lpl"}
    for name in images:
        torch.testing.assert_close(stored[name], images[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_stored, of_images, rtol=1e-3, atol=1e-6)


def _pixels(dataset: Dataset, index: int) -> Any:
    from data.images import read_image
    from data.transforms import training_image

    return training_image(read_image(dataset.read(index).image), 64).transpose(2, 0, 1).copy()


# ------------------------------------------------------------------------------------------------------- what is refused


def column(codec: Codec, **more: Any) -> dict[str, Any]:
    tree = {
        "holds": "mean", "dtype": "float32", "codec": "models/vae", "codec_class": "AutoencoderKL", "channels": 4,
        "revision": codec_revision(codec), "downsampling": 8, "resolution": 64, **more,
    }  # fmt: skip
    return LatentsColumn(**tree).model_dump(mode="json")


def dataset(columns: dict[str, Any], name: str = "emoji") -> Dataset:
    found = open_dataset(resolve_url(EMOJI), name=name)
    found.info = found.info.model_copy(update={"columns": columns})
    return found


def check(run: RunConfig, columns: dict[str, Any], more: dict[str, Any] | None = None) -> Stored:
    task = LatentDiffusionTask(run, CPU)
    sets = {"emoji": dataset(columns)} | ({"more": dataset(more, "more")} if more else {})
    return stored_columns(run, sets, task, StepPlanner(run, {name: (10,) for name in sets}))


def test_a_column_that_fits_is_taken(codec: Codec) -> None:
    stored = check(tiny(*ONE_SIZE), {"z": column(codec), "other": {"kind": "unknown"}})
    assert stored.latents["emoji"][64][0] == "z"
    assert stored.names == ("z",)
    assert check(tiny(), {"z": column(codec)}) == Stored()


def test_each_resolution_has_its_column(codec: Codec) -> None:
    run = tiny(*DEMO_SIZES, "data.latents=[small, large]")
    stored = check(run, {"small": column(codec, resolution=32), "large": column(codec)})
    assert {px: name for px, (name, _) in stored.latents["emoji"].items()} == {32: "small", 64: "large"}
    with pytest.raises(UserError, match=r"phase low_resolution is of 32 px, the columns of dataset emoji of 64 px"):
        check(tiny(*DEMO_SIZES, "data.latents=large"), {"large": column(codec)})
    with pytest.raises(UserError, match=r"'large' of dataset emoji is of 64 px, as 'small' is"):
        check(run, {"small": column(codec), "large": column(codec)})


def test_what_the_run_would_not_compute_is_refused(codec: Codec) -> None:
    run = tiny(*ONE_SIZE)
    for columns, why in (
        ({}, r"data\.latents: dataset emoji has no column 'z' \(it has none\); encode with"),
        (
            {"z": column(codec, revision="f" * 64)},
            r"column 'z' of dataset emoji was encoded by models/vae \(AutoencoderKL, 4 channels, f8, weights ffffffffffff\), "
            rf"and task\.codec\.url is repo://trainer/assets/demo_autoencoder \(.* weights {codec_revision(codec)[:12]}\)",
        ),
        ({"z": column(codec, channels=16)}, "16 channels"),
        ({"z": column(codec, downsampling=16)}, "f16"),
        ({"z": column(codec, buckets={"1:1": (64, 64)})}, r"is of aspect buckets; set data\.buckets=true"),
        ({"z": {**column(codec), "crop": "random"}}, r"data\.latents: column 'z' of dataset emoji: crop"),
    ):
        with pytest.raises(UserError, match=why):
            check(run, columns)
    with pytest.raises(UserError, match=r"dtype is float32 in dataset emoji and float16 in dataset more, at 64 px"):
        check(run, {"z": column(codec)}, {"z": column(codec, dtype="float16")})


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("data.latents=z", "data.random_crop=true"), "random_crop: True, but data.latents are of centre crops"),
        (("data.latents=z", "data.flip_probability=0.5"), "flip_probability: 0.5, but data.latents"),
        (("data.text_states=t",), "data.text_states: are of frozen text encoders"),
        (
            ("data.latents=z", "task.perceptual={kind: image_space, lpips: {url: x}}"),
            "image_space compares with images",
        ),
    ],
)
def test_configs_that_do_not_go_with_it(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises((UserError, ValidationError), match=why):
        tiny(*overrides)


# ------------------------------------------------------------------------------------------------------------------ text

PROMPTS = ["a red fox", "two dogs", "a red fox", "a lighthouse"]


def test_stored_states_stand_for_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two encoders: all captions of the first are stored, of the second two of three; one sample's caption is dropped."""
    configs = (
        write_clip(tmp_path / "clip", width=16),
        replace(write_t5(tmp_path / "t5", width=16), pooled_width=None),
    )
    text = FrozenText(FrozenTextConfig(encoders=configs))
    encoders = [encoder for encoder in text.encoders if isinstance(encoder, FrozenEncoder)]
    columns = [
        text_column(c, "x", dtype="float32", captions_per_kind=None, revision=encoder_revision(e))
        for c, e in zip(configs, encoders, strict=True)
    ]
    values: dict[str, dict[str, bytes]] = {}
    for caption in set(PROMPTS):
        values[caption] = {}
        for i, encoder in enumerate(encoders):
            tokens = encoder.tokenize([caption])
            states, pooled = encoder(tokens.ids_BL, tokens.mask_BL)
            length = int(tokens.mask_BL.sum()) if encoder.zero_padding else states.shape[1]
            pooled_P = None if pooled is None else pooled[0]
            kept = {} if i == 1 and caption == "a lighthouse" else {caption: (states[0, :length], pooled_P)}
            values[caption][f"t{i}"] = states_to_bytes(kept)
    stored = Stored(text={"x": [(f"t{i}", column) for i, column in enumerate(columns)]})
    samples = [("x", Sample(key=c, image=b"", captions={}, label=-1, columns=values[c]), c) for c in PROMPTS]
    known = known_states(stored.states_of(samples))
    assert [set(of_encoder) for of_encoder in known] == [set(PROMPTS), {"a red fox", "two dogs"}]

    captions: list[str | None] = [*PROMPTS[:3], None, PROMPTS[3]]
    expected = text(text.prepare(captions))
    ran: list[tuple[int, tuple[str, ...]]] = []
    encode = text._encode

    def watched(i: int, encoder: FrozenEncoder, given: Any, length: int) -> Any:
        ran.append((i, given.captions))
        return encode(i, encoder, given, length)

    monkeypatch.setattr(text, "_encode", watched)
    found = text(text.prepare(captions, known=known))
    assert ran == [(0, ("",)), (1, ("", "a lighthouse"))]
    torch.testing.assert_close(found.tokens_BLT, expected.tokens_BLT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled_BP, expected.pooled_BP, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.mask_BL, expected.mask_BL)


def test_text_columns_are_matched_to_the_runs_encoders(tmp_path: Path) -> None:
    clip, t5 = write_clip(tmp_path / "clip", width=16), write_t5(tmp_path / "t5", width=16)
    run = tiny(
        "data.text_states=[b, a]", "task.text={kind: frozen, encoders: [" + _yaml(clip) + ", " + _yaml(t5) + "]}"
    )
    task = LatentDiffusionTask(run, CPU)
    described = {}
    for name, config, encoder in zip("ab", (clip, t5), task.text.encoders, strict=True):  # type: ignore[arg-type]
        of = text_column(config, "x", dtype="float16", captions_per_kind=2, revision=encoder_revision(encoder))
        described[name] = of.model_dump(mode="json")
    planner = StepPlanner(run, {"emoji": (10,)})
    stored = stored_columns(run, {"emoji": dataset(described)}, task, planner)
    assert [found and found[0] for found in stored.text["emoji"]] == ["a", "b"]
    described["a"] = {**described["a"], "hidden_state": -2}
    with pytest.raises(
        UserError,
        match=r"column 'a' of dataset emoji is of x#text_encoder \(family clip, .*hidden_state -2.* and task\.text",
    ):
        stored_columns(run, {"emoji": dataset(described)}, task, planner)


def _yaml(config: Any) -> str:
    import json

    return json.dumps(config.model_dump(mode="json"))
