"""Faces in real photos: found, blurred beyond recognition, and nothing else touched."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from data.commands.faces import faces as command
from data.faces.blur import FEATHER, blur_faces
from data.faces.detect import DetectorSpec, detector_spec
from data.faces.stage import Faces
from data.images import encode_image, read_image
from data.stages.runner import Worker
from data.stages.samples import Shard, open_samples, read_index
from data.stages.store import StageStore
from tests.sample_stages import read_parquets, write_samples
from trainer.errors import UserError

PHOTOS = 48


@pytest.fixture(scope="module")
def spec(shared_dir: Path) -> DetectorSpec:
    return detector_spec("yunet", shared_dir / "data/yunet/yunet_n_dynamic.onnx")


@pytest.fixture(scope="module")
def photos(shared_dir: Path) -> list[Path]:
    return sorted((shared_dir / "data/coco_open/images").iterdir())[:PHOTOS]


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of two boxes x, y, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return float(common / (a[2] * a[3] + b[2] * b[3] - common))


def inside(shape: tuple[int, ...], boxes: Any, radius: float) -> Any:
    """Where pixels' centres lie within an ellipse of `radius` sides of a box around its centre."""
    ys, xs = np.mgrid[: shape[0], : shape[1]] + 0.5
    mask = np.zeros(shape[:2], bool)
    for x, y, width, height in np.asarray(boxes)[:, :4]:
        mask |= ((xs - x - width / 2) / (radius * width)) ** 2 + ((ys - y - height / 2) / (radius * height)) ** 2 <= 1
    return mask


@pytest.mark.shared
def test_faces_are_gone_and_the_rest_is_as_it_was(spec: DetectorSpec, photos: list[Path]) -> None:
    detect = spec.make()
    found = left = 0
    for path in photos:
        image_HWC = read_image(path.read_bytes())
        boxes_N5 = detect(image_HWC)
        if not len(boxes_N5):
            continue
        blurred_HWC = blur_faces(image_HWC, boxes_N5, cells=3, margin=0.3)
        away = ~inside(image_HWC.shape, boxes_N5, (0.5 + 0.3) * (1 + FEATHER))
        assert (blurred_HWC[away] == image_HWC[away]).all()
        again = detect(blurred_HWC)
        found += len(boxes_N5)
        left += sum(any(overlap(box, other) > 0.3 for other in again) for box in boxes_N5)
    assert found > 30
    assert left <= 0.1 * found


@pytest.mark.shared
def test_boxes_are_in_the_images_own_pixels(spec: DetectorSpec, photos: list[Path]) -> None:
    """Of an image larger than the detector's input, and wider than it is high."""
    detect = spec.make()
    compared = 0
    for path in photos[:10]:
        image_HWC = read_image(path.read_bytes())
        large_HWC = np.asarray(Image.fromarray(image_HWC).resize((image_HWC.shape[1] * 3, image_HWC.shape[0] * 2)))
        large = detect(large_HWC) / [3, 2, 3, 2, 1]
        for box in detect(image_HWC):
            if box[2] > 30 and box[4] > 0.8:
                assert max((overlap(box, other) for other in large), default=0) > 0.6
                compared += 1
    assert compared > 5


def test_fine_structure_does_not_survive() -> None:
    """Two images that differ by a pattern finer than the cells give the same blurred face, but for rounding."""
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(80, 170, (160, 160, 3)).astype(np.uint8)
    boards = ((np.indices((160, 160)).sum(0) % 2) * 2 - 1)[:, :, None]
    other_HWC = (image_HWC + 60 * boards).astype(np.uint8)
    boxes_N5 = np.array([[50, 40, 60, 72, 1.0]], np.float32)
    face = inside(image_HWC.shape, boxes_N5, 0.5 + 0.3)
    ours, theirs = (blur_faces(i, boxes_N5, cells=3, margin=0.3)[face].astype(int) for i in (image_HWC, other_HWC))
    assert np.abs(image_HWC[face].astype(int) - other_HWC[face]).min() >= 59
    assert np.abs(ours - theirs).max() <= 3
    assert ours.std() < image_HWC[face].std() / 3


def test_the_face_box_lies_within_the_blur() -> None:
    boxes_N5 = np.array([[50, 40, 60, 72, 1.0]], np.float32)
    image_HWC = np.zeros((160, 160, 3), np.uint8)
    image_HWC[::2] = 255
    blurred_HWC = blur_faces(image_HWC, boxes_N5, cells=3, margin=0.3)
    assert np.abs(blurred_HWC[40:112, 50:110].astype(int) - 127).max() < 20


@pytest.mark.parametrize("box", [(-30, -20, 50, 60), (140, 150, 60, 60), (-500, 10, 40, 40), (10, 10, 0.5, 0.5)])
def test_boxes_at_the_edge(box: tuple[float, ...]) -> None:
    image_HWC = np.random.default_rng(0).integers(0, 255, (170, 180, 3)).astype(np.uint8)
    blurred_HWC = blur_faces(image_HWC, np.array([[*box, 1.0]], np.float32), cells=3, margin=0.3)
    assert blurred_HWC.shape == image_HWC.shape
    assert (blurred_HWC != image_HWC).any() == (box[0] > -500)


# ---------------------------------------------------------------------------------------------------------------- stage


def shard_images(url: str) -> dict[str, tuple[Any, bytes]]:
    store, found = StageStore(url), {}
    for shard in open_samples(url).shards():
        for row in read_index(Path(store.path(shard.index["name"]))):
            tar = Path(store.path(shard.tar["name"])).read_bytes()
            found[row.key] = row, tar[row.offset : row.offset + row.size]
    return found


@pytest.mark.shared
def test_stage(spec: DetectorSpec, photos: list[Path], tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    (photo,) = [path for path in photos if path.stem == "000000000785"]  # a woman on skis
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).rotate(90, expand=True).save(turned, quality=95, exif=exif)
    source = write_samples(str(tmp_path / "in"), [*photos[:24], turned], shard_samples=10)
    out = str(tmp_path / "out")
    assert Worker(Faces(source, spec), StageStore(out)).run() == []
    before, after = shard_images(source), shard_images(out)
    boxes = {row["key"]: row for row in read_parquets(out, "faces", "faces")}
    assert list(after) == list(before)
    assert 5 < len(boxes) < 25
    assert "turned.jpg" in boxes
    for key, (row, data) in after.items():
        old_row, old_data = before[key]
        assert (row.captions, row.source) == (old_row.captions, old_row.source)
        if key not in boxes:
            assert (data, row.content) == (old_data, old_row.content)
            continue
        assert row.content != old_row.content
        assert row.format == old_row.format
        pixels, old = read_image(data).astype(float), read_image(old_data).astype(float)
        assert pixels.shape == old.shape == (row.height, row.width, 3)
        away = ~inside(old.shape, boxes[key]["boxes"], 1.1)
        assert 10 * np.log10(255**2 / np.mean((pixels[away] - old[away]) ** 2)) > 35
    assert not Image.open(io.BytesIO(after["turned.jpg"][1])).getexif()
    summary = StageStore(out).read_json("summary.json")
    counts = summary["counts"]["faces"]
    assert counts["read"] == counts["kept"] == 25
    assert counts["blurred"] == len(boxes)
    assert counts["faces"] == sum(len(row["scores"]) for row in boxes.values())
    assert summary["faces"]["blurred_share"] == len(boxes) / 25
    grid_HWC = read_image((tmp_path / "out/audit.png").read_bytes())
    assert grid_HWC.shape[0] % 128 == grid_HWC.shape[1] % 128 == 0
    settings = json.loads((tmp_path / "out/stage.json").read_text())["settings"]
    assert settings["detector"]["weights_sha256"] == spec.weights_sha256


def everywhere(weights: Path | None, *, size: float = 20) -> Any:
    """A detector that finds a face in the corner of each image."""
    assert weights is None
    return lambda image_HWC: np.array([[0, 0, size, size, 0.5]], np.float32)


def test_formats_and_own_detector(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3)).astype(np.uint8))
    files = [tmp_path / f"image.{suffix}" for suffix in ("jpg", "png", "webp")]
    for file in files:
        image.save(file)
    source, out = write_samples(str(tmp_path / "in"), files), str(tmp_path / "out")
    spec = detector_spec(f"{__name__}:everywhere", None, ["size=10"])
    assert Worker(Faces(source, spec), StageStore(out)).run() == []
    for row, data in shard_images(out).values():
        assert Image.open(io.BytesIO(data)).format == {"jpeg": "JPEG"}.get(row.format, row.format.upper())
    png = shard_images(out)["image.png"][1]
    away = ~inside((64, 48), [[0, 0, 10, 10]], 0.8 * (1 + FEATHER))
    assert (read_image(png)[away] == np.asarray(image)[away]).all()
    assert (read_image(png)[:8, :8] != np.asarray(image)[:8, :8]).mean() > 0.9


def test_same_faces_in_the_grid_at_every_try(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encode_image(np.random.default_rng(0).integers(0, 255, (64, 48, 3)).astype(np.uint8), "png", 1))
    source = write_samples(str(tmp_path / "in"), [file])
    spec = detector_spec(f"{__name__}:everywhere", None)
    for out in ("a", "b"):
        Worker(Faces(source, spec), StageStore(str(tmp_path / out))).run()
    assert (tmp_path / "a/audit.png").read_bytes() == (tmp_path / "b/audit.png").read_bytes()


def test_undecodable_images_do_not_stay(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(encode_image(np.random.default_rng(0).integers(0, 255, (64, 48, 3)).astype(np.uint8), "jpeg", 90))
    source, out = write_samples(str(tmp_path / "in"), [file]), str(tmp_path / "out")
    shard = open_samples(source).shards()[0]
    assert isinstance(shard, Shard)
    damage(StageStore(source), shard)
    spec = detector_spec(f"{__name__}:everywhere", None)
    assert Worker(Faces(source, spec), StageStore(out)).run() == []
    assert StageStore(out).read_json("summary.json")["counts"]["faces"] == {
        "read": 1, "kept": 0, "rejected/undecodable": 1, "blurred": 0, "faces": 0,
    }  # fmt: skip


def damage(store: StageStore, shard: Shard) -> None:
    """Cut an image short behind ingest's back, receipts mended to fit."""
    from data.stages.receipts import hash_file

    tar = Path(store.path(shard.tar["name"]))
    data = bytearray(tar.read_bytes())
    row = read_index(Path(store.path(shard.index["name"])))[0]
    data[row.offset + 200 : row.offset + row.size] = bytes(row.size - 200)
    tar.write_bytes(data)
    for receipt in Path(store.path("work")).rglob("*.json"):
        receipt.write_text(receipt.read_text().replace(shard.tar["xxh64"], hash_file(tar)))


@pytest.mark.parametrize(
    ("name", "weights", "options", "words"),
    [
        ("nose", None, [], "none of yunet"),
        ("yunet", None, [], "--weights"),
        ("yunet", "missing.onnx", [], "no such file"),
        ("yunet", "empty.onnx", [], "not YuNet's"),
        ("yunet", "empty.onnx", ["min_score=2"], "min_score"),
        ("yunet", "empty.onnx", ["colour=red"], "colour"),
        ("yunet", None, ["min_score"], "name=value"),
        ("os.nothing:make", None, [], "cannot be imported"),
        (f"{__name__}:everywhere", None, ["width=3"], "width"),
    ],
)
def test_bad_detectors(name: str, weights: str | None, options: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=words) as caught:
        detector_spec(name, tmp_path / weights if weights else None, options)
    assert "\n" not in str(caught.value)


def test_help_has_examples() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert "Examples:" in text
    assert "--weights" in text
