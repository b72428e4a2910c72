"""What the sequences of ops/bench/data_sequences.py stream: small datasets, and shards of them that go bad."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

DATASETS = {"a": {"1:1": 40, "4:3": 32, "1:2": 24}, "b": {"2:1": 28, "1:1": 36}}
"""Images in each bucket."""
SHARD_KIB = 8
_SPOILT_AT_ONCE = 3
"""Of some forty. Those that a node has in its cache stay good there for a while."""


def config_of(root: str, seed: int, num_workers: int = 0) -> Any:
    from trainer.config_text import with_overrides
    from trainer.recipes import load

    return with_overrides(
        load("demo"),
        [
            f"seed={seed}",
            f"data.datasets={{a: {{url: '{root}/a'}}, b: {{url: '{root}/b'}}}}",
            "data.buckets=true",
            "data.caption_weights={original: 1, short: 3}",
            "data.random_crop=true",
            "data.flip_probability=0.5",
            "data.shuffle_window_shards=3",
            "data.prefetch_shards=4",
            "data.prefetch_steps=3",
            "data.max_bad_shards=40",
            f"data.num_workers={num_workers}",
            "phases.low_resolution.steps=20",
            "phases.low_resolution.batch_size=8",
            "phases.full_resolution.steps=16",
            "phases.full_resolution.batch_size=12",
            "phases.full_resolution.data_mix={a: 1, b: 2}",
            "phases.perceptual.steps=12",
            "phases.perceptual.batch_size=8",
        ],
    )


def write_datasets(root: Path) -> Path:
    """Small pictures, each of its own, in shards of a few."""
    import numpy as np
    import simplejpeg

    from data.buckets import ASPECTS
    from data.mds import mds
    from data.schema import COLUMNS, DATASET, INDEX, Bucket, DatasetInfo, index_digest

    rng = np.random.default_rng(0)
    for name, buckets in DATASETS.items():
        entries: list[dict[str, Any]] = []
        described: list[Bucket] = []
        for bucket, count in buckets.items():
            part = root / name / f"part{len(described)}"
            writer = mds().Writer(columns=COLUMNS, out=str(part), hashes=["xxh64"], size_limit=SHARD_KIB << 10)
            height, width = round(64 / ASPECTS[bucket] ** 0.5), round(64 * ASPECTS[bucket] ** 0.5)
            for i in range(count):
                coarse_HWC = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
                image_HWC = np.ascontiguousarray(coarse_HWC.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])
                key = f"{bucket}/{i:03d}"
                captions = {"original": [f"{key} one", f"{key} two"]} | ({"short": [key]} if i % 3 else {})
                image = bytes(simplejpeg.encode_jpeg(image_HWC, quality=90))
                writer.write({"key": key, "image": image, "captions": captions, "label": -1})
            writer.finish()
            shards = json.loads((part / INDEX).read_text())["shards"]
            for shard in shards:
                old = shard["raw_data"]["basename"]
                shard["raw_data"]["basename"] = new = f"b{len(described)}.{old}"
                (part / old).rename(root / name / new)
            shutil.rmtree(part)
            described.append(
                Bucket(name=bucket, aspect=ASPECTS[bucket], first_shard=len(entries), num_shards=len(shards))
            )
            entries += shards
        index = json.dumps({"version": 2, "shards": entries}).encode()
        (root / name / INDEX).write_bytes(index)
        info = DatasetInfo(
            name=name, num_samples=sum(buckets.values()), index_digest=index_digest(index), buckets=tuple(described),
            caption_kinds=("original", "short"),
        )  # fmt: skip
        (root / name / DATASET).write_text(info.model_dump_json())
    return root


def damage_or_mend(whole: Path, far: Path, rng: random.Random) -> bool:
    """Spoil some shards of the storage, or mend all; True where some were spoilt."""
    shards = sorted(path.relative_to(whole) for path in whole.glob("*/*.mds"))
    bad = [s for s in shards if not (far / s).exists() or (far / s).read_bytes() != (whole / s).read_bytes()]
    if bad and rng.random() < 0.4:
        mend(whole, far)
        return False
    for path in (far / shard for shard in rng.sample(shards, _SPOILT_AT_ONCE)):
        if rng.random() < 0.5:
            path.unlink(missing_ok=True)
        elif path.exists():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            _replace(path, bytes(data))
    return True


def mend(whole: Path, far: Path) -> None:
    for path in whole.glob("*/*.mds"):
        there = far / path.relative_to(whole)
        if not there.exists() or there.read_bytes() != path.read_bytes():
            _replace(there, path.read_bytes())


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(path)
