"""One step's batch: images of the bucket's shape, captions by weight, and replacements that fit."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batches import Batch, BatchRequest, Steps, chosen_caption, unwrap
from data.buckets import ASPECTS, row_ranges, shape_of
from data.images import read_image
from data.plan import SampleRef
from data.reader import Dataset, open_dataset
from data.schema import DATASET, LABELS
from data.transforms import crop_to_aspect, training_image
from tests.bucketed import picture, row, write_dataset
from trainer.errors import UserError

WEIGHTS = {"original": 1.0, "short": 1.0, "detailed": 2.0}


def rows(name: str, count: int, first: int) -> list[dict[str, Any]]:
    height, width = shape_of(ASPECTS[name], 64, 1)
    kinds = ("original", "short", "detailed")
    return [
        row(
            f"{i:03d}", picture(i, height, width), label=i % 3,
            **{kind: (f"{kind} of {i}", f"{kind} two of {i}") for kind in kinds[: 1 + i % 3]},
        )
        for i in range(first, first + count)
    ]  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    url = write_dataset(
        tmp_path / "set", {"1:1": rows("1:1", 6, 0), "2:1": rows("2:1", 7, 6), "3:4": rows("3:4", 3, 13)}
    )
    return open_dataset(url, name="x")


def make(dataset: Dataset, request: BatchRequest, **options: Any) -> Batch:
    given: dict[str, Any] = {
        "seed": 5, "random_crop": False, "flip_probability": 0.0, "caption_weights": {}, "substitutions": {}, **options,
    }  # fmt: skip
    return unwrap(Steps({"x": dataset}, lambda step: request, **given)[0])


def request(first: int, count: int, bucket: str | None = None, resolution: int = 32) -> BatchRequest:
    refs = tuple(SampleRef("x", first + i) for i in range(count))
    shape = shape_of(ASPECTS[bucket], resolution, 8) if bucket else None
    return BatchRequest(0, 100, refs, resolution, shape)


def test_a_datasets_buckets_kinds_and_labels_are_read(dataset: Dataset) -> None:
    assert [bucket.name for bucket in dataset.info.buckets] == ["1:1", "2:1", "3:4"]
    assert row_ranges(dataset.shard_sizes, dataset.info.buckets) == {"1:1": (0, 6), "2:1": (6, 13), "3:4": (13, 16)}
    assert dataset.info.caption_kinds == ("detailed", "original", "short")
    assert dataset.read_labels().tolist() == [dataset.read(i).label for i in range(16)]
    assert dataset.read(5).captions == {kind: (f"{kind} of 5", f"{kind} two of 5") for kind in WEIGHTS}
    assert dataset.read(5).texts[2:4] == ("short of 5", "short two of 5")


def test_images_have_the_buckets_shape_and_keep_their_proportions(dataset: Dataset) -> None:
    batch = make(dataset, request(6, 4, "2:1"))
    assert batch.images_BCHW.shape == (4, 3, 24, 40)
    assert batch.resolution == 32
    whole = read_image(dataset.read(6).image)
    assert whole.shape == (45, 90, 3)
    assert crop_to_aspect(whole, 40 / 24).shape == (45, 75, 3)
    assert np.array_equal(batch.images_BCHW[0].permute(1, 2, 0).numpy(), training_image(whole, (24, 40)))
    squares = make(dataset, request(6, 4))
    assert squares.images_BCHW.shape == (4, 3, 32, 32)
    assert torch.equal(squares.positions_B, batch.positions_B)


@pytest.mark.parametrize(("height", "width", "aspect", "shape"), [
    (40, 80, 1.0, (40, 40)), (80, 40, 1.0, (40, 40)), (40, 80, 2.0, (40, 80)), (40, 80, 3.0, (27, 80)),
    (40, 80, 0.5, (40, 20)), (30, 30, 1.5, (20, 30)), (1, 3000, 1.0, (1, 1)), (3000, 1, 2.0, (1, 1)), (1, 1, 0.1, (1, 1)),
])  # fmt: skip
def test_the_largest_part_of_an_aspect(height: int, width: int, aspect: float, shape: tuple[int, int]) -> None:
    image = np.arange(height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3)
    for u in (None, 0.0, 0.5, 0.9999999):
        assert crop_to_aspect(image, aspect, u).shape[:2] == shape
    first, last = crop_to_aspect(image, aspect, 0.0), crop_to_aspect(image, aspect, 0.9999999)
    assert np.array_equal(first, image[: shape[0], : shape[1]])
    assert np.array_equal(last, image[height - shape[0] :, width - shape[1] :])


# ------------------------------------------------------------------------------------------------------------ captions


def test_captions_come_by_the_weights_of_their_kinds() -> None:
    captions = {"original": ("a", "b"), "short": ("c",), "detailed": ("d", "e", "f", "g")}
    grid = (np.arange(8000) + 0.5) / 8000
    found = Counter(chosen_caption(captions, WEIGHTS, u) for u in grid)
    assert found == {"a": 1000, "b": 1000, "c": 2000, "d": 1000, "e": 1000, "f": 1000, "g": 1000}
    without = Counter(chosen_caption({k: captions[k] for k in ("original", "short")}, WEIGHTS, u) for u in grid)
    assert without == {"a": 2000, "b": 2000, "c": 4000}
    others = Counter(chosen_caption(captions, {"short": 5.0}, u) for u in grid)
    assert others == {"c": 8000}


def test_without_weights_all_texts_are_alike() -> None:
    captions = {"original": ("a", "b", "c"), "short": ("d",)}
    assert [chosen_caption(captions, {}, u) for u in (0.0, 0.24, 0.26, 0.51, 0.76, 0.9999999)] == list("aabcdd")
    assert [chosen_caption(captions, {"none": 1.0}, u) for u in (0.0, 0.9999999)] == list("ad")
    assert chosen_caption({}, {}, 0.5) == chosen_caption({}, WEIGHTS, 0.5) == ""
    assert chosen_caption({"short": ("x",)}, WEIGHTS, np.nextafter(1.0, 0.0)) == "x"


def test_a_batch_takes_captions_by_weight(dataset: Dataset) -> None:
    texts = make(dataset, request(0, 6, "1:1"), caption_weights={"detailed": 1.0}).captions
    for i, text in enumerate(texts):
        assert text.startswith("detailed" if i % 3 == 2 else "original" if i % 3 == 0 else ("original", "short")), text


# -------------------------------------------------------------------------------------------------------- replacements


def test_a_replacement_is_of_the_same_bucket(tmp_path: Path) -> None:
    of_bucket = {"1:1": rows("1:1", 9, 0), "2:1": rows("2:1", 5, 9)}
    for i in (0, 3):
        of_bucket["2:1"][i]["image"] = of_bucket["2:1"][i]["image"][:200]
    dataset = open_dataset(write_dataset(tmp_path / "set", of_bucket), name="x")
    batch = make(dataset, request(9, 5, "2:1"))
    assert [s.bad.index for s in batch.substitutions] == [9, 12]
    for substitution in batch.substitutions:
        assert substitution.used.index in (10, 11, 13)
        assert batch.keys[substitution.bad.index - 9] == f"x/{substitution.used.index:03d}"
    again = make(dataset, request(9, 5, "2:1"), substitutions={s.bad: s.used for s in batch.substitutions})
    assert again.keys == batch.keys


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_damaged_labels_are_refused(dataset: Dataset, damage: str) -> None:
    file = Path(dataset.url) / LABELS
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[0] ^= 1
        file.write_bytes(data if damage == "changed" else data[:-4])
    with pytest.raises(UserError, match=r"labels.i32: (is damaged|missing)[^\n]*build"):
        dataset.read_labels()


def test_the_first_samples_alone_have_their_labels(dataset: Dataset) -> None:
    cut = open_dataset(dataset.url, name="x", max_samples=8)
    assert cut.read_labels().tolist() == dataset.read_labels()[:8].tolist()
    assert row_ranges(cut.shard_sizes, cut.info.buckets) == {"1:1": (0, 6), "2:1": (6, 8), "3:4": (8, 8)}


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"first_shard":', '"first_shard":1', "buckets"),
    ('"labels_xxh64":"', '"labels_xxh64":"g', "labels_xxh64"),
    ('"labels":"labels.i32"', '"labels":"../labels.i32"', "labels"),
    ('"labels":"labels.i32"', '"labels":null', "labels and labels_xxh64"),
    ('"name":"3:4"', '"name":"1:1"', "two have the same name"),
    ('"aspect":2.0', '"aspect":-2.0', "aspect"),
])  # fmt: skip
def test_a_description_that_does_not_hold_together_is_refused(
    dataset: Dataset, old: str, new: str, message: str
) -> None:
    file = Path(dataset.url) / DATASET
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        open_dataset(dataset.url, name="x")


def test_buckets_that_leave_shards_out_are_refused(dataset: Dataset) -> None:
    file = Path(dataset.url) / DATASET
    last = dataset.info.buckets[-1]
    shortened = dataset.info.model_copy(update={"buckets": dataset.info.buckets[:-1]})
    file.write_text(shortened.model_dump_json())
    total = len(dataset.shards)
    with pytest.raises(UserError, match=f"buckets: cover {total - last.num_shards} of {total} shards"):
        open_dataset(dataset.url, name="x")


def test_the_digest_is_of_buckets_and_labels_too(dataset: Dataset) -> None:
    info = dataset.info
    plain = info.model_copy(update={"buckets": (), "labels": None, "labels_xxh64": None})
    assert plain.digest == info.index_digest
    renamed = info.model_copy(update={"buckets": (info.buckets[0].model_copy(update={"name": "x"}), *info.buckets[1:])})
    relabelled = info.model_copy(update={"labels_xxh64": "0" * 16})
    assert len({plain.digest, info.digest, renamed.digest, relabelled.digest}) == 4
