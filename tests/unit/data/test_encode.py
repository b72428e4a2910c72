"""Encode: what is stored is what the network itself gives for the sample, whoever stood beside it, and says what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import data.encode.stage as stage_module
from data.buckets import shape_of
from data.encode.columns import (
    LATENTS,
    LatentsColumn,
    TextColumn,
    bytes_to_latents,
    bytes_to_states,
    cast,
    latents_to_bytes,
    parse_column,
    parse_latents,
    read_sidecar,
    states_to_bytes,
    write_sidecar,
)
from data.encode.stage import Encode, LatentsJob, TextJob
from data.images import read_image
from data.stages.receipts import done_receipts
from data.stages.runner import Worker
from data.stages.store import StageStore
from data.transforms import training_image
from tests.stored_columns import Captions, Given, emoji, sidecars, write_samples
from tests.text_models import write_clip, write_t5
from trainer.config import EncoderConfig, FrozenTextConfig, resolve_url
from trainer.errors import UserError
from trainer.models.autoencoders import Codec
from trainer.models.frozen_text import FrozenText
from trainer.precompute import LoadCodec, LoadText, codec_revision, latents_column, text_column, text_revision

from .conftest import encoded, picture

CODEC = resolve_url("repo://trainer/assets/demo_autoencoder")
BATCH = 4


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(CODEC)


def latents_job(
    codec: Codec, *, url: str = CODEC, batch_size: int = BATCH, aspects: Any = None, **options: Any
) -> LatentsJob:
    settings: dict[str, Any] = {"holds": "mean", "dtype": "float32", "resolution": 64, **options}
    column = latents_column(codec, url, **settings)
    load = LoadCodec(url, column.holds, column.revision, "cpu")
    return LatentsJob(column, load, batch_size, aspects or {})


def encode(source: str, out: str, **jobs: Any) -> list[str]:
    return Worker(Encode(source, **jobs), StageStore(out), attempts=1).run()


def stored(url: str, folder: Path, column: LatentsColumn, shapes: dict[str, tuple[int, int]] | None = None) -> Any:
    """Key -> latents, of all sidecars."""
    found = {}
    for sidecar in sidecars(url, folder):
        for key, values in sidecar.values.items():
            assert key not in found
            height, width = (shapes or {}).get(key, (column.resolution, column.resolution))
            found[key] = bytes_to_latents(values[LATENTS], column, height, width, where=key)
    return found


@torch.no_grad()
def by_itself(codec: Codec, image: bytes, size: int | tuple[int, int] = 64) -> torch.Tensor:
    """Raw moments that diffusers' own encoder gives for one image, after its centre crop. In a batch of as many as the jobs
    here have, of itself alone: from one batch size to another float32 differs by up to 1e-5."""
    pixels = torch.from_numpy(training_image(read_image(image), size))
    images = pixels.permute(2, 0, 1).expand(BATCH, -1, -1, -1).contiguous().float() / 127.5 - 1.0
    posterior = codec.vae.encode(images).latent_dist  # type: ignore[union-attr]
    return torch.cat([posterior.mean, posterior.logvar], dim=1)[0]


# ---------------------------------------------------------------------------------------------------------------- values


def latents_of(dtype: str = "float16", **more: Any) -> LatentsColumn:
    return LatentsColumn(
        **{
            "holds": "mean", "dtype": dtype, "codec": "x", "codec_class": "AutoencoderKL", "revision": "0" * 64, "channels": 4,
            "downsampling": 8, "resolution": 64, **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_come_back_as_they_were(dtype: str) -> None:
    column = latents_of(dtype)
    latents = cast(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)), column, "k")
    value = latents_to_bytes(latents)
    back = bytes_to_latents(value, column, 64, 64, where="k")
    assert back.dtype == column.torch_dtype
    assert torch.equal(back, latents)
    assert len(value) - latents.nbytes < 100


def test_a_value_of_another_shape_or_kind_is_refused() -> None:
    column = latents_of()
    value = latents_to_bytes(torch.zeros(4, 6, 10, dtype=torch.float16))
    assert bytes_to_latents(value, column, 48, 80, where="k").shape == (4, 6, 10)
    with pytest.raises(
        UserError, match=r"x/7: latents of shape \(4, 6, 10\), expected \(4, 10, 6\) for images of 80 x 48"
    ):
        bytes_to_latents(value, column, 80, 48, where="x/7")
    with pytest.raises(UserError, match="not what the column's description says"):
        bytes_to_latents(value, latents_of("float32"), 48, 80, where="k")
    for damaged in (value[:-1], value[:5], b"\xff" * 100, states_to_bytes({})):
        with pytest.raises(UserError, match="x/7: "):
            bytes_to_latents(damaged, column, 48, 80, where="x/7")


def test_what_does_not_fit_the_dtype_is_an_error_that_names_the_sample() -> None:
    big = torch.tensor([1.0, -7e4])
    with pytest.raises(UserError, match=r"key-3: holds 7e\+04, too large for float16; take --dtype"):
        cast(big, latents_of(), "key-3")
    assert torch.equal(cast(big, latents_of("float32"), "key-3"), big)
    assert cast(big, latents_of("bfloat16"), "key-3").isfinite().all()
    with pytest.raises(UserError, match="key-3: the network gives values that are not finite"):
        cast(torch.tensor([float("nan")]), latents_of("float32"), "key-3")


def test_descriptions_are_checked() -> None:
    tree = latents_of().model_dump(mode="json")
    assert parse_latents(tree, where="w") == latents_of()
    for broken in (
        {**tree, "downsampling": 0},
        {**tree, "resolution": 60},
        {**tree, "dtype": "int8"},
        {**tree, "new": 1},
        7,
    ):
        with pytest.raises(UserError, match=r"^w: "):
            parse_column(broken, where="w")
    with pytest.raises(UserError, match="holds states of a text encoder"):
        parse_latents(text_of(32).model_dump(mode="json"), where="w")


def text_of(width: int, **more: Any) -> TextColumn:
    return TextColumn(
        **{
            "dtype": "float32",
            "encoder": "x",
            "family": "clip",
            "revision": "0" * 64,
            "width": width,
            "max_tokens": 77,
            **more,
        }
    )


def test_states_are_found_by_caption_and_checked() -> None:
    column = text_of(6, pooled_width=3)
    tokens, pooled = torch.randn(5, 6), torch.randn(3)
    value = states_to_bytes({"a cat": (tokens, pooled), "": (tokens[:1], pooled)})
    found = bytes_to_states(value, column, "a cat", where="k")
    assert found is not None
    assert found[1] is not None
    assert torch.equal(found[0], tokens)
    assert torch.equal(found[1], pooled)
    assert bytes_to_states(value, column, "a dog", where="k") is None
    assert bytes_to_states(b"", column, "a cat", where="k") is None
    for other in (
        text_of(7, pooled_width=3),
        text_of(6),
        text_of(6, pooled_width=3, max_tokens=4),
        text_of(6, pooled_width=4),
    ):
        with pytest.raises(UserError, match="k: is not what"):
            bytes_to_states(value, other, "a cat", where="k")


def test_a_sidecar_knows_which_image_it_is_of(tmp_path: Path) -> None:
    column, value = latents_of(), latents_to_bytes(torch.zeros(4, 8, 8, dtype=torch.float16))
    write_sidecar(tmp_path / "s", ["a", "b"], [b"1" * 16, b"2" * 16], {"z": [value, value]}, {"z": column})
    sidecar = read_sidecar(tmp_path / "s", where="s")
    assert sidecar.columns == {"z": column}
    assert sidecar.described == {"z": column.model_dump(mode="json")}
    assert sidecar.of("b", b"2" * 16) == {"z": value}
    assert sidecar.of("c", b"2" * 16) is None
    with pytest.raises(UserError, match="s: b: the latents are of another image"):
        sidecar.of("b", b"1" * 16)
    (tmp_path / "s").write_bytes(b"PAR1" * 9)
    with pytest.raises(UserError, match="t: not a file of columns"):
        read_sidecar(tmp_path / "s", where="t")


# ---------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("holds", ["mean", "moments"])
def test_stored_latents_are_the_codecs_own(
    tmp_path: Path, codec: Codec, holds: str, dtype: str, tolerance: float
) -> None:
    given = emoji(6)
    write_samples(str(tmp_path / "in"), given)
    job = latents_job(codec, holds=holds, dtype=dtype)
    assert encode(str(tmp_path / "in"), str(tmp_path / "out"), latents={LATENTS: job}) == []
    found = stored(str(tmp_path / "out"), tmp_path, job.column)
    assert sorted(found) == [key for key, _, _ in given]
    for key, image, _ in given:
        expected = by_itself(codec, image)
        expected = expected if holds == "moments" else expected[:4]
        assert found[key].dtype == job.column.torch_dtype
        assert expected.abs().max() > 1.0
        torch.testing.assert_close(found[key].float(), expected, rtol=tolerance, atol=tolerance)


def test_neighbours_do_not_matter(tmp_path: Path, codec: Codec) -> None:
    """Bit for bit: in another order, in other shards, and in a batch that is not full."""
    given = emoji(7)
    job = latents_job(codec, batch_size=3)
    results = []
    for name, samples, shards in (("a", given, 2), ("b", [*reversed(given)], 1), ("c", given[4:5], 1)):
        write_samples(str(tmp_path / f"in-{name}"), samples, shards)
        encode(str(tmp_path / f"in-{name}"), str(tmp_path / f"out-{name}"), latents={LATENTS: job})
        results.append(stored(str(tmp_path / f"out-{name}"), tmp_path, job.column))
    first, second, alone = results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(alone["0004"], first["0004"])


def test_buckets_have_the_crop_of_their_own_shape(tmp_path: Path, codec: Codec) -> None:
    sizes = {"wide": (48, 96), "tall": (90, 60), "even": (64, 66)}
    given: list[Given] = [(k, encoded(picture(i, *s), "PNG"), {}) for i, (k, s) in enumerate(sizes.items())]
    write_samples(str(tmp_path / "in"), given, shards=1)
    aspects = {"1:2": 0.5, "2:3": 2 / 3, "1:1": 1.0, "2:1": 2.0}
    buckets = {name: shape_of(aspect, 64, 16) for name, aspect in aspects.items()}
    job = latents_job(codec, buckets=buckets, aspects=aspects)
    encode(str(tmp_path / "in"), str(tmp_path / "out"), latents={LATENTS: job})
    shapes = {"wide": buckets["2:1"], "tall": buckets["2:3"], "even": (64, 64)}
    assert len(set(shapes.values())) == 3
    found = stored(str(tmp_path / "out"), tmp_path, job.column, shapes)
    for key, image, _ in given:
        expected = by_itself(codec, image, shapes[key])[:4]
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-6)


def test_images_that_cannot_be_read_are_counted_and_left_out(tmp_path: Path, codec: Codec) -> None:
    given = [*emoji(3), ("bad", encoded(picture(1))[:900], {}), ("text", b"no image", {})]
    write_samples(str(tmp_path / "in"), given, shards=1)
    encode(str(tmp_path / "in"), str(tmp_path / "out"), latents={LATENTS: latents_job(codec)})
    [receipt] = done_receipts(StageStore(str(tmp_path / "out")), "encode")
    assert receipt["counts"] == {"read": 5, "kept": 3, "rejected/undecodable": 1, "rejected/unknown_format": 1}
    [sidecar] = sidecars(str(tmp_path / "out"), tmp_path)
    assert list(sidecar.values) == ["0000", "0001", "0002"]


def test_latents_that_overflow_end_the_item(tmp_path: Path, codec: Codec) -> None:
    """A real autoencoder whose latents are too large: the stage says which sample, and what to do."""
    loud = Codec.load(CODEC)
    with torch.no_grad():
        loud.vae.quant_conv.weight.mul_(1e5)  # type: ignore[union-attr]
    loud.vae.save_pretrained(tmp_path / "loud")
    write_samples(str(tmp_path / "in"), emoji(2), shards=1)
    half = latents_job(loud, url=str(tmp_path / "loud"), dtype="float16")
    [failure] = encode(str(tmp_path / "in"), str(tmp_path / "half"), latents={LATENTS: half})
    assert "0000: holds" in failure
    assert "too large for float16; take --dtype bfloat16 or float32" in failure
    wide = latents_job(loud, url=str(tmp_path / "loud"), dtype="bfloat16")
    assert encode(str(tmp_path / "in"), str(tmp_path / "wide"), latents={LATENTS: wide}) == []


def test_another_codec_at_the_same_place_is_refused(tmp_path: Path, codec: Codec) -> None:
    other = Codec.load(CODEC)
    with torch.no_grad():
        next(other.vae.decoder.parameters()).mul_(2.0)
    assert codec_revision(other) == codec_revision(codec)  # its latents are the same
    job = latents_job(other)
    with torch.no_grad():
        next(other.vae.encoder.parameters()).mul_(2.0)
    assert codec_revision(other) != codec_revision(codec)
    other.vae.save_pretrained(tmp_path / "moved")
    load = LoadCodec(str(tmp_path / "moved"), "mean", job.column.revision, "cpu")
    with pytest.raises(UserError, match="--codec: its weights here are"):
        load()


def test_parts_are_small_and_a_worker_goes_on_behind_the_last(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = emoji(7)
    write_samples(str(tmp_path / "in"), given, shards=1)
    monkeypatch.setattr(stage_module, "MAX_PART_BYTES", 2 * 4 * 8 * 8 * 4)  # two samples
    job, out = latents_job(codec, batch_size=2), StageStore(str(tmp_path / "out"))
    calls: list[int] = []

    class Dies(Encode):
        def _part(self, chunk: Any, work: Any) -> Any:
            calls.append(len(chunk))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super()._part(chunk, work)

    with pytest.raises(KeyboardInterrupt):
        Worker(Dies(str(tmp_path / "in"), latents={LATENTS: job}), out, lease_s=0.5).run()
    assert len(out.names("work/encode/parts/shard0-0000")) == 2
    encode(str(tmp_path / "in"), out.url, latents={LATENTS: job})
    assert [len(sidecar.values) for sidecar in sidecars(out.url, tmp_path)] == [2, 2, 2, 1]
    assert sorted(stored(out.url, tmp_path, job.column)) == [key for key, _, _ in given]


def test_moments_need_a_posterior_and_sizes_a_multiple(codec: Codec) -> None:
    with pytest.raises(
        UserError, match="--resolution: 60 px is no multiple of the autoencoder's downsampling, 8; take 56 or 64"
    ):
        latents_job(codec, resolution=60)


# ------------------------------------------------------------------------------------------------------------------ text

TEXTS = [
    "a photo of a red fox on fresh snow",
    "two dogs run along the beach",
    "an old lighthouse",
    "two dogs run along the beach",
]


def text_job(config: EncoderConfig, **options: Any) -> TextJob:
    settings: dict[str, Any] = {"dtype": "float32", "captions_per_kind": None, **options}
    column = text_column(config, config.url, revision=text_revision(config, "--text"), **settings)
    return TextJob(column, LoadText(config, column.revision, device="cpu"), batch_size=2)


def captioned(count: int = 4) -> list[Given]:
    return [
        (f"{i}", encoded(picture(i)), {"original": [TEXTS[i], f"{TEXTS[i]} again"], "short": ["fox"]})
        for i in range(count)
    ]


@pytest.mark.parametrize("family", ["clip", "t5"])
def test_stored_states_are_the_runs_own(tmp_path: Path, family: str) -> None:
    config = write_clip(tmp_path / "m", width=16) if family == "clip" else write_t5(tmp_path / "m", width=16)
    write_samples(str(tmp_path / "in"), captioned(), shards=1)
    job = text_job(config)
    encode(str(tmp_path / "in"), str(tmp_path / "out"), text={"text_0": job})
    [sidecar] = sidecars(str(tmp_path / "out"), tmp_path)
    [receipt] = done_receipts(StageStore(str(tmp_path / "out")), "encode")
    assert receipt["counts"]["captions"] == 7  # of 12: what repeats is encoded once
    text = FrozenText(FrozenTextConfig(encoders=(config,)))
    for i in range(4):
        for caption in (TEXTS[i], f"{TEXTS[i]} again", "fox"):
            found = bytes_to_states(sidecar.values[f"{i}"]["text_0"], job.column, caption, where="k")
            assert found is not None
            assert found[1] is not None
            expected = text(text.prepare([caption]))
            length = len(found[0])
            assert expected.mask_BL is not None
            assert expected.pooled_BP is not None
            assert length == (int(expected.mask_BL.sum()) if family == "t5" else config.max_tokens)
            torch.testing.assert_close(found[0], expected.tokens_BLT[0, :length], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[1], expected.pooled_BP[0], rtol=1e-5, atol=1e-5)


def test_the_first_captions_of_each_kind(tmp_path: Path) -> None:
    write_samples(str(tmp_path / "in"), captioned(2), shards=1)
    job = text_job(write_clip(tmp_path / "m", width=16), captions_per_kind=1)
    encode(str(tmp_path / "in"), str(tmp_path / "out"), text={"text_0": job})
    [sidecar] = sidecars(str(tmp_path / "out"), tmp_path)
    value = sidecar.values["0"]["text_0"]
    there = [c for c in (TEXTS[0], f"{TEXTS[0]} again", "fox") if bytes_to_states(value, job.column, c, where="k")]
    assert there == [TEXTS[0], "fox"]


def test_captions_of_recaption_are_encoded_too(tmp_path: Path) -> None:
    write_samples(str(tmp_path / "in"), captioned(2), shards=1)
    rows = [("0", "detailed", "a lighthouse by the sea"), ("0", "short", "a dog"), ("1", "detailed", "two foxes")]
    assert Worker(Captions(str(tmp_path / "in"), rows), StageStore(str(tmp_path / "captions"))).run() == []
    job = text_job(write_clip(tmp_path / "m", width=16), captions_per_kind=1)
    encode(str(tmp_path / "in"), str(tmp_path / "out"), text={"text_0": job}, captions=[str(tmp_path / "captions")])
    [sidecar] = sidecars(str(tmp_path / "out"), tmp_path)
    captions = [TEXTS[0], "fox", "a dog", "a lighthouse by the sea", "two foxes"]
    there = {
        key: [c for c in captions if bytes_to_states(sidecar.values[key]["text_0"], job.column, c, where="k")]
        for key in ("0", "1")
    }
    assert there == {"0": [TEXTS[0], "fox", "a lighthouse by the sea"], "1": ["fox", "two foxes"]}  # one of each kind
    with pytest.raises(UserError, match=r"--captions: .* is the output of `ingest`, give that of `recaption`"):
        encode(str(tmp_path / "in"), str(tmp_path / "o"), text={"text_0": job}, captions=[str(tmp_path / "in")])


def test_an_encoder_is_the_same_in_both_its_precisions(tmp_path: Path) -> None:
    from trainer.models.frozen_encoder import load_encoder
    from trainer.precompute import encoder_revision

    config = write_t5(tmp_path / "m", width=16)
    revisions = {encoder_revision(load_encoder(config, "x", dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert revisions == {text_revision(config, "x")}


# --------------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path: Path, codec: Codec) -> None:
    from data.commands.encode import encode as command

    write_samples(str(tmp_path / "in"), emoji(5))
    clip = write_clip(tmp_path / "m", width=16)
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(clip.model_dump(mode="json")))
    base = [str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]
    arguments = [
        *base,
        "--codec",
        CODEC,
        "--resolution",
        "64",
        "--text",
        str(tmp_path / "text.yaml"),
        "--dtype",
        "float32",
        "--batch-size",
        str(BATCH),
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = sidecars(str(tmp_path / "out"), tmp_path)
    assert sum(len(sidecar.values) for sidecar in found) == 5
    assert set(found[0].columns) == {"latents", "text_0"}
    column = found[0].columns["latents"]
    assert isinstance(column, LatentsColumn)
    assert column.revision == codec_revision(codec)
    latents = stored(str(tmp_path / "out"), tmp_path, column)
    torch.testing.assert_close(latents["0002"], by_itself(codec, emoji(3)[2][1])[:4], rtol=1e-6, atol=1e-6)
    # other settings are refused, and so is nothing at all
    with pytest.raises(UserError, match=r"was begun with --dtype of the column latents .*--resolution"):
        CliRunner().invoke(command, [*base, "--codec", CODEC, "--resolution", "32"], catch_exceptions=False)
    with pytest.raises(UserError, match="--codec: give an autoencoder"):
        CliRunner().invoke(command, base, catch_exceptions=False)
    for text, why in (("[", "not YAML"), ("clip", "neither a file"), ("{family: clip}", "Field required")):
        with pytest.raises(UserError, match=f"--text: .*{why}"):
            CliRunner().invoke(command, [*base, "--text", text], catch_exceptions=False)
    with pytest.raises(UserError, match=r"--buckets: .*3x4"):
        CliRunner().invoke(command, [*base, "--codec", CODEC, "--buckets", "1:1,3x4"], catch_exceptions=False)


def test_a_build_takes_the_columns_and_a_run_reads_them(tmp_path: Path, codec: Codec) -> None:
    """encode, build with buckets and the loader, as commands and runs call them."""
    from data.batches import BatchRequest
    from data.commands.build import build as command
    from data.encode.stored import Stored
    from data.loader import Loader
    from data.plan import SampleRef
    from data.reader import open_dataset

    sizes = [(48, 96), (50, 99), (64, 64), (80, 82), (66, 64)]
    given: list[Given] = [(f"{i}", encoded(picture(i, *size)), {"original": ["x"]}) for i, size in enumerate(sizes)]
    write_samples(str(tmp_path / "in"), given)
    aspects = {"1:1": 1.0, "2:1": 2.0}
    buckets = {name: shape_of(aspect, 64, 16) for name, aspect in aspects.items()}
    job = latents_job(codec, dtype="float16", buckets=buckets, aspects=aspects)
    assert encode(str(tmp_path / "in"), str(tmp_path / "z"), latents={"z": job}) == []
    arguments = [str(tmp_path / "in"), str(tmp_path / "set"), "--columns", str(tmp_path / "z"), "--buckets", "1:1,2:1",
                 "--min-samples-of-a-bucket", "1", "--workers", "0"]  # fmt: skip
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    dataset = open_dataset(str(tmp_path / "set"), name="x")
    column = parse_latents(dataset.info.columns["z"], where="z")
    assert column == job.column
    images = {key: image for key, image, _ in given}
    seen = []
    first = 0
    for bucket in dataset.info.buckets:
        count = int(sum(dataset.shard_sizes[bucket.first_shard : bucket.first_shard + bucket.num_shards]))
        refs = tuple(SampleRef("x", i) for i in range(first, first + count))
        request = BatchRequest(0, 0, refs, 64, buckets[bucket.name])
        loader = Loader({"x": dataset}, lambda _, request=request: request, seed=0, random_crop=False,  # type: ignore[misc]
                        flip_probability=0.0, num_workers=0, prefetch_steps=1, timeout_s=60,
                        stored=Stored({"x": {64: ("z", column)}}))  # fmt: skip
        [batch] = loader.steps(0, 1)
        assert batch.images_BCHW.shape == (count, 3, 0, 0)
        assert batch.latents_BCHW is not None
        assert batch.latents_BCHW.dtype == torch.float16
        for key, latents in zip(batch.keys, batch.latents_BCHW, strict=True):
            expected = by_itself(codec, images[key.removeprefix("x/")], buckets[bucket.name])[:4]
            torch.testing.assert_close(latents.float(), expected, rtol=1e-3, atol=1e-3)
            seen.append(key)
        first += count
    assert sorted(seen) == [f"x/{i}" for i in range(5)]


@pytest.mark.shared
def test_photos_are_seen_as_training_sees_them(tmp_path: Path, codec: Codec, shared_dir: Path) -> None:
    """The loader's own pixels, of real photos, which it decodes at part of their size."""
    from data.batches import BatchRequest
    from data.loader import Loader
    from data.plan import SampleRef
    from data.reader import open_dataset
    from tests.stored_columns import write_dataset

    files = sorted((shared_dir / "data" / "coco_open" / "images").glob("*.jpg"))[:4]
    given: list[Given] = [(file.stem, file.read_bytes(), {}) for file in files]
    write_samples(str(tmp_path / "in"), given, shards=1)
    job = latents_job(codec, resolution=128)
    encode(str(tmp_path / "in"), str(tmp_path / "out"), latents={LATENTS: job})
    found = stored(str(tmp_path / "out"), tmp_path, job.column)
    dataset = open_dataset(
        write_dataset(tmp_path / "set", given, [sidecars(str(tmp_path / "out"), tmp_path)]), name="x"
    )
    request = BatchRequest(0, 0, tuple(SampleRef("x", i) for i in range(4)), 128)
    loader = Loader({"x": dataset}, lambda _: request, seed=0, random_crop=False, flip_probability=0.0, num_workers=0,
                    prefetch_steps=1, timeout_s=60)  # fmt: skip
    [batch] = loader.steps(0, 1)
    with torch.no_grad():
        expected = codec.encode_raw(batch.images_BCHW.float() / 127.5 - 1.0)
    for i, (key, _, _) in enumerate(given):
        torch.testing.assert_close(found[key], expected[i], rtol=1e-5, atol=1e-5)
