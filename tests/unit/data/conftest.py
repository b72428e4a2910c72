"""Small datasets made of real image files, and a cache folder of each test's own."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.build import build
from data.schema import Resize
from data.source import open_source

MakeDataset = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number: int, height: int = 40, width: int = 56) -> Image.Image:
    """Smooth colours, different for each number, so that JPEG keeps them and no two are alike."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin((x * (c + 1) + y * (number + 1)) / 37 + number) * 100 + 128 for c in range(3)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make_dataset(count, name=...) writes images with texts and builds them; bad={row} are damaged afterwards."""

    def make(count: int, *, name: str = "set", bad: tuple[int, ...] = (), shard_kib: int | None = None) -> Path:
        import data.build as module

        source = tmp_path / f"{name}-source"
        source.mkdir()
        for i in range(count):
            (source / f"{i:04d}.jpg").write_bytes(encoded(picture(i)))
            (source / f"{i:04d}.txt").write_text(f"first caption of {i}\nsecond caption of {i}\n")
        out = tmp_path / name
        originals = module._sample, module._write_shards

        def sample(entry, resize):  # type: ignore[no-untyped-def]
            row = originals[0](entry, resize)
            if int(entry.key[:4]) in bad:
                row["image"] = row["image"][: len(row["image"]) // 2]
            return row

        def write(folder, samples, shard_bytes, max_samples):  # type: ignore[no-untyped-def]
            return originals[1](folder, samples, shard_kib << 10 if shard_kib else shard_bytes, max_samples)

        module._sample, module._write_shards = sample, write
        try:
            build(open_source(source), str(out), name=name, resize=Resize())
        finally:
            module._sample, module._write_shards = originals
        return out

    return make
