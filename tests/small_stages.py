"""A few samples in three tars, through the real stages in seconds: parts of three samples, some of which have none to keep."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.faces.detect import detector_spec
from data.faces.stage import Faces
from data.ingest.stage import IngestStage
from data.mdsbuild.stage import BuildStage
from data.reader import Dataset, open_dataset
from data.stages.samples import dropped_keys, open_samples, read_index
from data.stages.store import StageStore
from tests.sample_stages import run

PART = 3
"""Samples of a part."""
EXPECTED = {
    "a/0": 0, "a/1": 1, "a/2": 2, "a/6": 3, "a/7": 4, "b/0": 5, "b/1": 6, "b/2": 7, "b/3": 8, "b/5": 9, "b/6": 10,
    "c/0": 11,
}  # fmt: skip
"""Key to the number of its image, of what `raw` writes: a's second part has nothing to keep, b/4 is a copy."""


def image(number: int) -> bytes:
    """Noise, as smooth pictures are near duplicates of one another."""
    pixels_HWC = np.random.default_rng(number).integers(0, 255, (24, 32, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, images: Sequence[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(images):
            for suffix, member in (("png", content), ("txt", f"{path.stem} {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    return path


def raw(folder: Path, *, shift: int = 0) -> list[str]:
    """Three tars. `shift`: other images under the same keys."""
    some = [image(shift + number) for number in range(12)]
    tars = {
        "a": [*some[:3], b"damaged", b"damaged", b"damaged", *some[3:5]],
        "b": [*some[5:9], some[0], *some[9:11]],
        "c": some[11:],
    }
    return [str(write_tar(folder / f"{name}.tar", images)) for name, images in tars.items()]


def ingest(out: Path, tars: Sequence[str]) -> str:
    return run(IngestStage(tars), str(out))


def everywhere(weights: Path | None) -> Any:
    """A detector that finds a face in the corner of each image."""
    return lambda image_HWC: np.array([[2, 2, 12, 12, 0.5]], np.float32)


def faces(source: str) -> Faces:
    return Faces(source, detector_spec(f"{__name__}:everywhere", None))


def blur(source: str, out: Path) -> str:
    return run(faces(source), str(out))


def stored(url: str, scratch: Path) -> dict[str, bytes]:
    """Key -> image, but for copies, in order."""
    store, samples, found = StageStore(url), open_samples(url), {}
    for shard in samples.shards():
        dropped = dropped_keys(samples, shard, scratch)
        tar = Path(store.path(shard.tar["name"])).read_bytes()
        for row in read_index(Path(store.path(shard.index["name"]))):
            assert row.key not in found
            if row.key not in dropped:
                found[row.key] = tar[row.offset : row.offset + row.size]
    return found


def built(source: str, folder: Path, **sidecars: Any) -> Dataset:
    build = BuildStage(source, str(folder / "set"), "x", {}, min_samples=1, **sidecars)
    run(build, str(folder / "work"))
    return open_dataset(str(folder / "set"), name="x")


def item_names(url: str, pass_name: str) -> list[str]:
    return [item["name"] for item in StageStore(url).read_json(f"work/{pass_name}/items.json")]
