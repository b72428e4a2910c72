"""What a run asks of its datasets is refused before there is a job, by what their dataset.json says."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.schema import DATASET, INDEX, Bucket, DatasetInfo
from launch import datasets
from launch.datasets import check_datasets
from launch.job import load_config
from trainer.errors import UserError

EMOJI = Path(__file__).parents[3] / "data" / "assets" / "emoji_64"
LATENTS = {
    "kind": "latents", "dtype": "float16", "resolution": 32, "buckets": {}, "channels": 4,
}  # fmt: skip


def write(folder: Path, **what: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = DatasetInfo(name="n", num_samples=8, index_digest="0" * 32, **what)
    (folder / DATASET).write_text(info.model_dump_json())
    if info.buckets:
        write_index(folder, 5000, 5000)
    return folder


def write_index(folder: Path, *samples: int) -> None:
    """Of shards with so many, otherwise like a real one."""
    (entry, *_) = json.loads((EMOJI / INDEX).read_text())["shards"]
    shards = [
        {**entry, "samples": number, "raw_data": {**entry["raw_data"], "basename": f"shard.{i:05d}.mds"}}
        for i, number in enumerate(samples)
    ]
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}))


def check(folder: Path | str, *overrides: str) -> list[str]:
    return check_datasets(load_config("demo", [f"data.datasets.emoji.url={folder}", *overrides]))


def two_buckets(aspect: float) -> tuple[Bucket, ...]:
    return (
        Bucket(name="1:1", aspect=1.0, first_shard=0, num_shards=1),
        Bucket(name="w", aspect=aspect, first_shard=1, num_shards=1),
    )


def test_what_is_there_is_taken(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "set", buckets=two_buckets(2.0), caption_kinds=("original", "long"), labels="labels.i32",
        labels_xxh64="0" * 16, class_names=("a", "b"), columns={"latents": LATENTS, "text_0": {"kind": "text"}},
    )  # fmt: skip
    overrides = [
        "data.buckets=true",
        "data.caption_weights={original: 1, long: 2}",
        "data.datasets.emoji.class_balanced=true",
    ]
    assert check(folder, *overrides) == []
    assert check("repo://data/assets/emoji_64") == []


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["data.buckets=true"], "data.buckets: dataset emoji at .* has no aspect buckets; build it again with"),
        (
            ["data.caption_weights={short: 1, long: 1}"],
            "data.caption_weights: dataset emoji has captions of none of the kinds short, long; it has original",
        ),
        (["data.datasets.emoji.class_balanced=true"], "data.datasets.emoji.class_balanced: .* has no file of labels"),
        (
            ["task.text={kind: classes, num_classes: 2}", "samples=null", "prompt_accuracy=null"],
            "task.text.num_classes: 2, but dataset emoji has 3 classes; set it to 3",
        ),
        (
            ["data.latents=fine", "data.random_crop=false", "data.flip_probability=0"],
            r"data.latents: dataset emoji has no column 'fine' \(it has latents\)",
        ),
        (
            ["data.latents=latents", "data.random_crop=false", "data.flip_probability=0"],
            "data.latents: phase full_resolution is of 64 px, the columns of dataset emoji of 32 px; encode at 64 px too",
        ),
    ],
)
def test_what_is_not_there_is_named(overrides: list[str], error: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", class_names=("a", "b", "c"), columns={"latents": LATENTS})
    with pytest.raises(UserError, match=error):
        check(folder, *overrides)


def test_latents_of_other_crops(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", buckets=two_buckets(2.0), columns={"latents": LATENTS})
    more = ["data.buckets=true", "data.latents=latents", "data.random_crop=false", "data.flip_probability=0"]
    with pytest.raises(
        UserError, match=r"column 'latents' of dataset emoji is of square crops; set data\.buckets=false"
    ):
        check(folder, *more)


def test_two_datasets_that_mean_other_shapes_by_a_name(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", buckets=two_buckets(2.0)), write(tmp_path / "b", buckets=two_buckets(2.1))
    with pytest.raises(UserError, match=r"data.buckets: w has the aspect 2.1 in dataset more and 2 in emoji"):
        check(one, f"data.datasets.more={{url: {other}}}", "data.buckets=true")


def test_a_kind_that_nobody_has_is_warned_of(tmp_path: Path) -> None:
    (warning,) = check(write(tmp_path / "set"), "data.caption_weights={original: 1, detaled: 3}")
    assert warning == "data.caption_weights: no dataset has captions of the kind detaled; there are original"


def test_buckets_that_hold_no_batch_are_warned_of(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", buckets=two_buckets(2.0))
    write_index(folder, 5000, 3)
    (warning,) = check(folder, "data.buckets=true")
    assert warning.startswith("data.buckets: bucket w has fewer images (3) than a batch (")
    assert check(folder) == []
    more = write(tmp_path / "more", buckets=two_buckets(2.0))
    assert check(folder, f"data.datasets.more={{url: {more}}}", "data.buckets=true") == [], "of all datasets together"
    (folder / INDEX).unlink()
    (warning,) = check(folder, "data.buckets=true")
    assert "its index.json cannot be read" in warning


def test_indexed_tars_and_what_is_no_dataset(tmp_path: Path) -> None:
    write(tmp_path / "00000.tar.index")
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has no aspect buckets"):
        check(tmp_path / "00000.tar", "data.buckets=true")
    with pytest.raises(UserError, match=f"data.datasets.emoji.url: no {DATASET} in {tmp_path}"):
        check(tmp_path)
    (tmp_path / DATASET).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        check(tmp_path)


def test_storage_that_is_not_seen_from_here_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_DEADLINE_S", 0.5)
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    (warning,) = check("s3://bucket/set", "data.buckets=true")
    assert warning.startswith("data.datasets.emoji.url: cannot be read from here")
