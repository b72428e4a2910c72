"""Copies among many, against a comparison of every pair."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from PIL import Image

import data.ingest.duplicates as duplicates
from data.ingest.duplicates import EXACT, HASHES, NEAR, find_duplicates
from data.ingest.examine import perceptual_hash
from tests.unit.data.conftest import picture
from trainer.errors import UserError


def hashes(rng: np.random.Generator, count: int, max_bits: int) -> NDArray[Any]:
    """Rows of which some are copies of others, in bytes or within some bits of the hash, and some have no hash."""
    rows = np.zeros(count, HASHES)
    phash = rng.integers(1, 2**64, count, dtype=np.uint64)
    for i in range(1, count):
        kind = rng.random()
        if kind < 0.3:
            near = phash[rng.integers(i)]
            for bit in rng.choice(64, rng.integers(max_bits + 1), replace=False):
                near ^= np.uint64(1) << np.uint64(bit)
            phash[i] = near
    phash[rng.random(count) < 0.1] = 0
    rows["phash"] = phash
    rows["content"] = rng.integers(1, 2**64, (count, 2), dtype=np.uint64)
    for i in range(1, count):
        if rng.random() < 0.2:
            rows[i] = rows[rng.integers(i)]
    return rows


def by_every_pair(rows: NDArray[Any], distance: int | None) -> list[int]:
    reasons: list[int] = []
    seen: dict[bytes, int] = {}
    phash = rows["phash"].tolist()
    for i, content in enumerate(content.tobytes() for content in rows["content"]):
        if content in seen:
            reasons.append(EXACT)
            continue
        seen[content] = i
        kept = (j for j in range(i) if not reasons[j] and phash[j])
        near = distance is not None and phash[i] and any((phash[j] ^ phash[i]).bit_count() <= distance for j in kept)
        reasons.append(NEAR if near else 0)
    return reasons


@pytest.mark.parametrize("distance", [None, 0, 1, 3, 6])
def test_the_same_as_comparing_every_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distance: int | None
) -> None:
    monkeypatch.setattr(duplicates, "PARTITION_ROWS", 50)
    monkeypatch.setattr(duplicates, "_CHUNK_ROWS", 64)
    for seed in range(3):
        rows = hashes(np.random.default_rng(seed), 400, 4)
        chunks = [rows[i : i + 37] for i in range(0, len(rows), 37)]
        found = find_duplicates(chunks, len(rows), distance, tmp_path)
        assert found.tolist() == by_every_pair(rows, distance)
        assert not list(tmp_path.iterdir())
        if distance:
            assert NEAR in found


def test_none_at_all(tmp_path: Path) -> None:
    for distance in (None, 0, 2):
        assert find_duplicates([], 0, distance, tmp_path).tolist() == []


def test_too_many_near_pairs_are_refused_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 1000)
    rows = np.zeros(200, HASHES)
    rows["content"] = np.random.default_rng(0).integers(1, 2**64, (200, 2), dtype=np.uint64)
    rows["phash"] = (np.uint64(0xF0F0_F0F0_F0F0_F0F0) << np.uint64(8)) + np.arange(200, dtype=np.uint64)
    with pytest.raises(UserError, match="choose a smaller distance"):
        find_duplicates([rows], 200, 4, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name != "hashed"]


def test_the_hash_is_imagehashs_own() -> None:
    import imagehash

    image = picture(3, 200, 300)
    assert perceptual_hash(np.asarray(image)) == int(str(imagehash.phash(image)), 16)


@pytest.mark.parametrize("colour", [0, 7, 255])
def test_an_image_of_one_colour_has_no_hash(colour: int) -> None:
    assert perceptual_hash(np.full((64, 96, 3), colour, np.uint8)) is None


@pytest.mark.shared
def test_real_photos_and_their_copies(shared_dir: Path) -> None:
    """Copies at half the size and at a lower quality are near; no two different photos are."""
    from data.images import read_image
    from tests.unit.data.conftest import encoded

    photos = sorted((shared_dir / "data/coco_open_256/images").iterdir())[:60]
    assert len(photos) == 60
    originals, copies = [], []
    for photo in photos:
        image = Image.fromarray(read_image(photo.read_bytes()))
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        originals.append(perceptual_hash(np.asarray(image)))
        copies.append(perceptual_hash(read_image(encoded(half, quality=80))))
    assert len(set(originals)) == 60
    apart = [(a or 0) ^ (b or 0) for a, b in zip(originals, copies, strict=True)]
    equal = sum(x == 0 for x in apart)
    assert equal >= 30  # the default finds most such copies
    assert max(x.bit_count() for x in apart) <= 8
    closest = min((a ^ b).bit_count() for i, a in enumerate(originals) for b in originals[:i] if a and b)
    assert closest > 8
    assert len({xxhash.xxh3_128_digest(p.read_bytes()) for p in photos}) == 60
