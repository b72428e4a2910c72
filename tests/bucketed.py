"""Small datasets with aspect buckets, kinds of captions and a file of labels, written shard by shard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray

from data.buckets import ASPECTS
from data.mds import mds
from data.schema import COLUMNS, DATASET, INDEX, LABELS, Bucket, DatasetInfo, index_digest


def picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colours, different for each number."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin((x * (c + 1) + y * (number + 1)) / 37 + number) * 100 + 128 for c in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def row(key: str, image_HWC: NDArray[np.uint8], *, label: int = -1, **captions: Sequence[str]) -> dict[str, Any]:
    """Captions by kind."""
    image = bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image_HWC), quality=95, colorsubsampling="444"))
    texts = {kind: list(of_kind) for kind, of_kind in captions.items()} or {"original": [key]}
    return {"key": key, "image": image, "captions": texts, "label": label}


def of_aspect(image_HWC: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """The image stretched to a bucket's proportions at its own area."""
    side = (image_HWC.shape[0] * image_HWC.shape[1]) ** 0.5
    width, height = round(side * ASPECTS[name] ** 0.5), round(side / ASPECTS[name] ** 0.5)
    return np.asarray(cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def write_dataset(out: Path, rows: Mapping[str, Sequence[dict[str, Any]]], *, shard_kib: int = 8) -> str:
    """`rows`: of each bucket, by its name in `ASPECTS`. Returns the folder."""
    out.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    buckets, labels, kinds = [], [], set()
    for number, (name, of_bucket) in enumerate(rows.items()):
        part = out / f"part{number}"
        writer = mds().Writer(columns=COLUMNS, out=str(part), hashes=["xxh64"], size_limit=shard_kib << 10)
        for sample in of_bucket:
            writer.write(sample)
            labels.append(sample["label"])
            kinds |= set(sample["captions"])
        writer.finish()
        shards = json.loads((part / INDEX).read_text())["shards"]
        for shard in shards:
            old = shard["raw_data"]["basename"]
            shard["raw_data"]["basename"] = f"b{number}.{old}"
            (part / old).rename(out / f"b{number}.{old}")
        (part / INDEX).unlink()
        part.rmdir()
        buckets.append(Bucket(name=name, aspect=ASPECTS[name], first_shard=len(entries), num_shards=len(shards)))
        entries += shards
    index = json.dumps({"version": 2, "shards": entries}).encode()
    (out / INDEX).write_bytes(index)
    data = np.array(labels, dtype="<i4").tobytes()
    (out / LABELS).write_bytes(data)
    info = DatasetInfo(
        name=out.name, num_samples=len(labels), index_digest=index_digest(index), buckets=tuple(buckets),
        caption_kinds=tuple(sorted(kinds)), labels=LABELS, labels_xxh64=xxhash.xxh64(data).hexdigest(),
    )  # fmt: skip
    (out / DATASET).write_text(info.model_dump_json())
    return str(out)
