"""Florence-2 captions: ours against the obvious loop on the same model, whatever the batches."""

import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from click.testing import CliRunner
from PIL import Image

from data.commands.recaption import prompts_by_kind
from data.commands.recaption import recaption as command
from data.images import ImageError, read_image
from data.recaption import captioner as captioner_module
from data.recaption.captioner import Caption, Captioner, Decoding
from data.recaption.images import InputFormat, input_format, model_input, prepared
from data.recaption.model import ModelFiles, choose_dtype, find_model, load
from data.recaption.stage import Recaption
from data.recaption.text import KINDS, clean, flaw
from data.stages.receipts import done_receipts
from data.stages.runner import Worker
from data.stages.store import StageStore
from tests.florence import write_chatty_model
from tests.sample_stages import read_parquets, write_samples
from trainer.errors import UserError

PROMPTS = list(KINDS)
NUM_PHOTOS = 21
TOKENS = 40


@pytest.fixture(scope="module")
def model_folder(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatty_model(shared_dir, tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture(scope="module")
def photos(shared_dir: Path) -> list[Path]:
    return sorted((shared_dir / "data/coco_open/images").iterdir())[:NUM_PHOTOS]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def the_obvious_loop(folder: Path, photos: list[Path], prompt: str, max_new_tokens: int, beams: int = 1) -> list[str]:
    """As the model's documentation has it, one batch for all."""
    return _looped(folder, tuple(photos), prompt, max_new_tokens, beams)


@cache
def _looped(folder: Path, photos: tuple[Path, ...], prompt: str, max_new_tokens: int, beams: int) -> list[str]:
    model, processor = load(folder, "cpu", "float32")
    images = [Image.fromarray(read_image(path.read_bytes())) for path in photos]
    inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=beams)
    return [clean(text) for text in processor.batch_decode(ids, skip_special_tokens=True)]


def ours(folder: Path, photos: list[Path], prompts: list[str], decoding: Decoding) -> list[Caption]:
    captioner = Captioner(folder, prompts, device="cpu", dtype="float32", decoding=decoding)
    form = captioner.form
    images = [model_input(path.read_bytes(), form.height, form.width, "exact") for path in photos]
    return sorted(captioner.captions(images), key=lambda c: (c.prompt, c.image))


@pytest.mark.shared
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=TOKENS, batch_images=21, batch_captions=21),
        Decoding(max_new_tokens=TOKENS, batch_images=4, batch_captions=6),
        Decoding(max_new_tokens=TOKENS, batch_images=8, batch_captions=3),
        Decoding(max_new_tokens=TOKENS, batch_images=5, batch_captions=7, regroup=False),
    ],
)
def test_same_captions_as_the_obvious_loop(
    decoding: Decoding, model_folder: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioner_module, "LENGTHS", (3, 6, 12, 24))
    made = ours(model_folder, photos, PROMPTS, decoding)
    expected = [the_obvious_loop(model_folder, photos, prompt, TOKENS) for prompt in PROMPTS]
    assert [(c.prompt, c.image) for c in made] == list(itertools.product(range(3), range(NUM_PHOTOS)))
    assert [clean(c.text) for c in made] == list(itertools.chain(*expected))


@pytest.mark.shared
def test_inputs_are_bit_for_bit_the_processors(model_folder: Path, photos: list[Path]) -> None:
    captioner = Captioner(model_folder, PROMPTS[:1], device="cpu", dtype="float32", decoding=Decoding(max_new_tokens=9))
    images = [Image.fromarray(read_image(path.read_bytes())) for path in photos]
    theirs = captioner.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    exact = [model_input(path.read_bytes(), 64, 64, "exact") for path in photos]
    assert torch.equal(captioner.pixels(exact), theirs)


@pytest.mark.shared
def test_captions_differ_in_words_and_length(model_folder: Path, photos: list[Path]) -> None:
    """Else the comparison above says little."""
    made = ours(model_folder, photos, PROMPTS[:1], Decoding(max_new_tokens=TOKENS))
    assert len({c.text for c in made}) > NUM_PHOTOS / 2
    assert len({c.tokens for c in made}) > 8
    assert 0 < sum(c.ended for c in made) < NUM_PHOTOS


@pytest.mark.shared
def test_batches_stay_full(model_folder: Path, photos: list[Path]) -> None:
    """The share of computed rows whose captions had not ended yet."""
    shares = {}
    images = [model_input(path.read_bytes(), 64, 64, "fast") for path in photos] * 3
    for regroup in (False, True):
        decoding = Decoding(max_new_tokens=100, batch_images=8, batch_captions=8, regroup=regroup)
        captioner = Captioner(model_folder, PROMPTS[:1], device="cpu", dtype="float32", decoding=decoding)
        made = list(captioner.captions(images))
        assert captioner.work.useful == sum(c.tokens for c in made)
        shares[regroup] = captioner.work.useful / captioner.work.rows
    assert shares[True] > 1.3 * shares[False]


@pytest.mark.shared
@pytest.mark.parametrize("settings", [{"beams": 3}, {"compiled": True}])
def test_beams_and_a_static_cache(settings: dict[str, Any], model_folder: Path, photos: list[Path]) -> None:
    """On a CPU the static cache is used without compiling."""
    decoding = Decoding(max_new_tokens=TOKENS, batch_images=4, batch_captions=8, **settings)
    made = ours(model_folder, photos, PROMPTS[:2], decoding)
    expected = [
        the_obvious_loop(model_folder, photos, prompt, TOKENS, settings.get("beams", 1)) for prompt in PROMPTS[:2]
    ]
    assert [clean(c.text) for c in made] == list(itertools.chain(*expected))


@pytest.mark.parametrize(
    ("text", "ended", "wrong"),
    [
        ("", True, "empty"),
        ("a red bus on a street", True, None),
        ("a red bus on a", False, "over_long"),
        ("a man and a dog and a man and a dog and a man and a dog", True, "repeating"),
        ("very very very very very old", True, "repeating"),
        ("very very very very old", True, None),
        ("a bus in a street, a bus in a garage", True, None),
    ],
)
def test_flaws(text: str, ended: bool, wrong: str | None) -> None:
    assert flaw(text, ended=ended) == wrong


def test_clean() -> None:
    assert clean("  a\tbus\n\u200b and \x00 a dog ") == "a bus and a dog"


# ------------------------------------------------------------------------------------------------------------ images


def real_processor(shared_dir: Path) -> Any:
    from transformers import CLIPImageProcessorPil

    tree = json.loads((shared_dir / "data/florence2_processor/preprocessor_config.json").read_text())
    names = (
        "do_resize", "do_rescale", "do_normalize", "do_center_crop", "image_mean", "image_std", "resample", "size",
    )  # fmt: skip
    return CLIPImageProcessorPil(**{name: tree[name] for name in names}, rescale_factor=1 / 255, do_convert_rgb=True)


@pytest.mark.shared
def test_images_as_the_processor_makes_them(shared_dir: Path, photos: list[Path]) -> None:
    processor = real_processor(shared_dir)
    form = input_format(processor)
    assert (form.height, form.width) == (768, 768)
    mean, std = (np.array(values)[:, None, None] * 255 for values in (form.mean, form.std))
    worst = 99.0
    for path in photos[:8]:
        data = path.read_bytes()
        theirs = processor([Image.fromarray(read_image(data))], return_tensors="np")["pixel_values"][0]
        exact, fast = (model_input(data, 768, 768, how) for how in ("exact", "fast"))
        np.testing.assert_allclose((exact.transpose(2, 0, 1) - mean) / std, theirs, atol=1e-5)
        worst = min(worst, psnr(exact, fast))
    assert worst > 40


@pytest.mark.shared
@pytest.mark.parametrize(("tiles", "limit"), [((2, 2), 38), ((4, 4), 36), ((1, 3), 38)])
def test_large_images_as_the_processor_makes_them(tiles: tuple[int, int], limit: float, photos: list[Path]) -> None:
    """Mosaics of photos: shrunk by the JPEG's scaling and OpenCV, or shrunk one way and enlarged the other."""
    rows, columns = tiles
    small = [np.asarray(Image.open(path).convert("RGB").resize((640, 480))) for path in photos[: rows * columns]]
    mosaic_HWC = np.vstack([np.hstack(small[i * columns : (i + 1) * columns]) for i in range(rows)])
    data = bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(mosaic_HWC), quality=92))
    exact, fast = (model_input(data, 768, 768, how) for how in ("exact", "fast"))
    assert psnr(exact, fast) > limit


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_prepared_in_order_with_errors_in_place(tmp_path: Path) -> None:
    good = [png(shade) for shade in (10, 20, 30)]
    files = [("a", good[0]), ("b", b"nothing"), ("c", good[1]), ("d", good[2])]
    form = InputFormat(16, 24, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    made = list(prepared(files, form, "fast", threads=3, ahead=2))
    assert [key for key, _ in made] == ["a", "b", "c", "d"]
    assert isinstance(made[1][1], ImageError)
    shades = [int(np.asarray(image).mean()) for _, image in made if not isinstance(image, ImageError)]
    assert shades == [10, 20, 30]


def png(shade: int) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- stage


@pytest.mark.shared
def test_stage(model_folder: Path, photos: list[Path], tmp_path: Path) -> None:
    source, out = write_samples(str(tmp_path / "in"), photos, shard_samples=8), str(tmp_path / "out")
    prompts = prompts_by_kind(("<CAPTION>", "<MORE_DETAILED_CAPTION>"))
    decoding = Decoding(max_new_tokens=24, batch_images=4, batch_captions=6)
    stage = Recaption(source, find_model(str(model_folder)), prompts, decoding=decoding, resize="exact")
    assert Worker(stage, StageStore(out)).run() == []
    rows = read_parquets(out, "recaption", "captions")
    counts = StageStore(out).read_json("summary.json")["counts"]["recaption"]
    expected = {
        (path.name, kind): text
        for kind, prompt in prompts.items()
        for path, text in zip(photos, the_obvious_loop(model_folder, photos, prompt, 24), strict=True)
    }
    assert {(row["key"], row["kind"]): row["caption"] for row in rows} == {k: v for k, v in expected.items() if v}
    assert counts["read"] == NUM_PHOTOS
    assert counts["captions"] == len(rows)
    assert counts.get("captions/empty", 0) == sum(not text for text in expected.values())
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    (first, *_) = done_receipts(StageStore(out), "recaption")
    file = Path(StageStore(out).path(first["parts"][0]["files"]["captions"]["name"]))
    about = json.loads(pq.read_schema(file).metadata[b"loupe.recaption"])
    assert about["revision"] == find_model(str(model_folder)).revision
    assert about["prompts"] == {"short": "<CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}
    assert about["model"] == model_folder.name
    assert str(model_folder.parent) not in json.dumps(about)


def test_prompts() -> None:
    assert prompts_by_kind(("<CAPTION>", "region=<REGION_PROPOSAL>")) == {
        "short": "<CAPTION>", "region": "<REGION_PROPOSAL>",
    }  # fmt: skip
    for prompts, words in [
        (("caption",), "KIND=PROMPT"),
        (("original=<CAPTION>",), "KIND=PROMPT"),
        (("a b=<CAPTION>",), "KIND=PROMPT"),
        (("<CAPTION>", "short=<DETAILED_CAPTION>"), "already"),
    ]:
        with pytest.raises(UserError, match=words):
            prompts_by_kind(prompts)


@pytest.mark.shared
def test_models_that_cannot_be_used(model_folder: Path, tmp_path: Path) -> None:
    for name, words in [("out/of/the/way", "no such folder"), ("nobody/nothing", "--allow-download")]:
        with pytest.raises(UserError, match=words):
            find_model(name)
    with pytest.raises(UserError, match=r"no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match="--revision"):
        find_model(str(model_folder), hub_revision="main")
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert find_model(str(copy)).revision == find_model(str(model_folder)).revision
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changed = find_model(str(copy))
    assert changed.revision != find_model(str(model_folder)).revision
    weights.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a Florence-2"):
        load(copy, "cpu", "float32")
    with pytest.raises(UserError, match="positions"):
        Captioner(model_folder, ["<CAPTION>"], device="cpu", dtype="float32", decoding=Decoding(max_new_tokens=1000))
    assert isinstance(changed, ModelFiles)


def test_dtype() -> None:
    assert choose_dtype("auto", "cpu") == "float32"
    assert choose_dtype("auto", "cuda") == "bfloat16"
    assert choose_dtype("float16", "cpu") == "float16"


def test_help_has_examples() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert "Examples:" in text
    assert "<MORE_DETAILED_CAPTION>" in text
