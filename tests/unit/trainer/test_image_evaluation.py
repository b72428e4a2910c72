"""Sets of images against each other: the same images have the same figures whatever they lie in and however they are read,
rows are kept and found again, and what is wrong with images is refused or said."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.build import build
from data.images import read_image
from data.schema import Resize
from data.source import open_source
from data.transforms import training_image
from tests.feature_networks import Blocks
from tests.image_sets import SIDE, Counting, Pixels, drawn, evaluated, network, seen, values, written
from trainer.errors import UserError
from trainer.evaluate import metrics
from trainer.evaluate.features.preprocess import evaluation_image
from trainer.evaluate.image_measures import figure_name
from trainer.evaluate.image_sets import ImageSet, Selection, uniform_size
from trainer.evaluate.images_run import Settings
from trainer.evaluate.judged_sets import PART, Stopped
from trainer.evaluate.judges import PixelJudge


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("real"), drawn(150, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("made"), drawn(130, 2))


# --------------------------------------------------------------------------------------------------- the same, in every way


def test_the_same_images_have_the_same_figures(made: Path, real: Path, tmp_path: Path) -> None:
    """From arrays in memory by plain numpy, through PNG files by any batch size, from a subset's seed, and as a dataset."""
    found = evaluated(made, real, tmp_path / "a")
    a, b = (drawn(n, seed).reshape(n, 4, 5, 4, 5, 3) for n, seed in ((130, 2), (150, 1)))
    # means of 4 x 4 blocks, colour first, as the network has them
    fake_ND, real_MD = (x.mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(x), 48) / 255.0 for x in (a, b))
    expected = {
        "fd_blocks": metrics.frechet_distance(fake_ND, real_MD),
        "kd_blocks": metrics.kernel_distance_of_subsets(fake_ND, real_MD, subsets=100, size=65)[0],
        "precision_blocks": metrics.precision_recall(real_MD, fake_ND, k=3).precision,
        "recall_blocks": metrics.precision_recall(real_MD, fake_ND, k=3).recall,
        "density_blocks": metrics.density_coverage(real_MD, fake_ND, k=5).density,
        "coverage_blocks": metrics.density_coverage(real_MD, fake_ND, k=5).coverage,
        **metrics.spectrum_errors(
            metrics.radial_power_spectrum(drawn(130, 2)), metrics.radial_power_spectrum(drawn(150, 1))
        ),
    }
    assert values(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for figure in found.figures.values():
        assert figure["interval"]["low"] <= figure["interval"]["high"]
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in found.pictures.items()}
    assert sizes == {"spectrum.png": (1100, 440), "nearest.png": (690, 1098)}

    for batch_size in (3, 64):
        again = evaluated(made, real, tmp_path / f"batch {batch_size}", judging=Counting(batch_size))
        assert values(again) == pytest.approx(values(found), rel=1e-9)

    source = written(tmp_path / "source", drawn(130, 2))
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text("a picture")
    build(open_source(source), str(tmp_path / "set"), name="set", resize=Resize())
    from_dataset = evaluated(tmp_path / "set", real, tmp_path / "b")
    assert from_dataset.numbers["generated"]["kind"] == "dataset"
    assert values(from_dataset) == pytest.approx(values(found), rel=1e-6)
    assert from_dataset.numbers["definition"] == found.numbers["definition"]


def test_other_resizes_are_other_figures(made: Path, tmp_path: Path) -> None:
    """What users of others meet: two ways to shrink give the same photos two distances. Here the definition tells."""
    large = written(tmp_path / "large", np.random.default_rng(0).integers(0, 256, (60, 50, 50, 3)).astype(np.uint8))
    by_area = evaluated(made, large, tmp_path / "a")
    bicubic = evaluated(made, large, tmp_path / "b", resize="bicubic")
    assert abs(values(by_area)["fd_blocks"] / values(bicubic)["fd_blocks"] - 1) > 1e-4
    assert by_area.numbers["definition"] != bicubic.numbers["definition"]
    assert by_area.numbers["real"]["sizes"] == {"50x50": 60}
    expected = np.stack([evaluation_image(np.array(Image.open(p)), SIDE, "bicubic") for p in sorted(large.iterdir())])
    spectrum = metrics.spectrum_errors(
        metrics.radial_power_spectrum(drawn(130, 2)), metrics.radial_power_spectrum(expected)
    )
    assert values(bicubic)["spectrum_high"] == pytest.approx(spectrum["spectrum_high"], rel=1e-9)


def test_jpegs_are_decoded_at_full_size(tmp_path: Path) -> None:
    """A decoder that shrinks as it decodes, as training's does, gives other pixels."""
    folder = written(tmp_path / "jpegs", drawn(1, 4, side=160), "jpg")
    data = (folder / "0000.jpg").read_bytes()
    found = ImageSet(str(folder)).picture(0, SIDE, "training")
    assert np.array_equal(found.pixels_HWC, training_image(read_image(data), SIDE))
    assert not np.array_equal(found.pixels_HWC, training_image(read_image(data, min_side=SIDE), SIDE))
    assert (found.width, found.height, found.format) == (160, 160, "jpeg")


def test_a_selection_is_drawn_by_its_seed(real: Path) -> None:
    images = ImageSet(str(real))
    some = Selection(images, SIDE, "training", count=40, seed=3)
    chosen = some.order[: some.target].tolist()
    assert len(set(chosen)) == 40
    assert chosen == Selection(images, SIDE, "training", count=40, seed=3).order[:40].tolist()
    assert chosen != Selection(images, SIDE, "training", count=40, seed=4).order[:40].tolist()
    assert some.identity != Selection(images, SIDE, "training", count=40, seed=4).identity
    whole = [
        Selection(images, SIDE, "training", count=count, seed=seed) for count, seed in ((None, 0), (150, 5), (900, 7))
    ]
    assert all(w.order.tolist() == list(range(150)) for w in whole)
    assert len({json.dumps(w.identity) for w in whole}) == 1


# ------------------------------------------------------------------------------------------------------------ kept rows


def folders(cache: Path) -> dict[str, Path]:
    return {path.name.rpartition("-")[0]: path for path in cache.iterdir()}


def test_rows_are_kept_and_found_again(made: Path, real: Path, tmp_path: Path) -> None:
    loaded = network()
    first = evaluated(made, real, tmp_path, loaded=loaded)
    assert seen(loaded) >= 280
    told = json.loads((folders(tmp_path / "cache")["blocks"] / "provenance.json").read_text())
    assert (told["count"], told["skipped"]["count"], told["set"]["found"]) == (150, 0, 150)
    assert told["judge"]["preprocessing"] == Blocks.preprocessing
    assert not first.numbers["reference"]["blocks"]["was_there"]

    again, loaded = evaluated(made, real, tmp_path, loaded=(fresh := network())), fresh
    assert seen(loaded) == 0
    assert again.numbers["reference"]["blocks"]["was_there"]
    assert values(again) == values(first)

    # elsewhere, but the same files: found; with another in their place: not
    moved = written(tmp_path / "moved", drawn(150, 1))
    evaluated(made, moved, tmp_path, loaded=(loaded := network()))
    assert seen(loaded) == 0
    Image.fromarray(drawn(1, 9)[0]).save(moved / "0003.png")
    evaluated(made, moved, tmp_path, loaded=(loaded := network()))
    assert seen(loaded) >= 150


def test_damaged_rows_are_made_anew_and_it_is_said(made: Path, real: Path, tmp_path: Path) -> None:
    first = values(evaluated(made, real, tmp_path))
    folder = folders(tmp_path / "cache")["blocks"]

    def changed(name: str, change: Any) -> None:
        data = bytearray((folder / name).read_bytes())
        (folder / name).write_bytes(bytes(change(data)))
        judging, loaded = Counting(), network()
        assert values(evaluated(made, real, tmp_path, judging=judging, loaded=loaded)) == first
        if name.startswith("statistics"):
            assert not judging.said
        else:
            assert len(judging.said) == 1
            assert "damaged" in judging.said[0]
            assert "made anew" in judging.said[0]
            assert seen(loaded) >= 150

    changed("rows.npz", lambda data: data[:-7])
    changed("rows.npz", lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    # whole, but of something else
    with np.load(folder / "rows.npz") as file:
        rows = {name: file[name] for name in file.files}
    np.savez(folder / "other.npz", **{**rows, "features": rows["features"] + 1})
    other = (folder / "other.npz").read_bytes()
    changed("rows.npz", lambda data: other)
    changed("provenance.json", lambda data: data[: len(data) // 2])
    # statistics follow from the rows
    changed("statistics.npz", lambda data: data[:200])
    changed("statistics.npz", lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    (folder / "provenance.json").unlink()
    assert values(evaluated(made, real, tmp_path)) == first


def test_a_stopped_evaluation_goes_on(made: Path, real: Path, tmp_path: Path) -> None:
    whole = evaluated(made, real, tmp_path / "whole")
    loaded = network()
    with pytest.raises(Stopped):
        evaluated(made, real, tmp_path, judging=Counting(stop=lambda: seen(loaded) >= PART), loaded=loaded)
    assert seen(loaded) == PART
    parts = sorted((folders(tmp_path / "cache")["blocks"] / "parts").iterdir())
    assert [part.name for part in parts] == ["000000000-000000064.npz"]

    # a part that was cut short is made again; the other, whole, is not
    with pytest.raises(Stopped):
        evaluated(made, real, tmp_path, judging=Counting(stop=lambda: seen(loaded) >= 2 * PART), loaded=loaded)
    assert seen(loaded) == 2 * PART
    parts[0].write_bytes(parts[0].read_bytes()[:500])
    again = evaluated(made, real, tmp_path, loaded=(loaded := network()))
    # the damaged part, the rest of 150, and all of the generated ones; filled up to whole batches
    assert seen(loaded) == PART + 24 + 136
    assert values(again) == values(whole)
    assert not (folders(tmp_path / "cache")["blocks"] / "parts").exists()


# ------------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_read_is_replaced_and_counted(made: Path, real: Path, tmp_path: Path) -> None:
    broken = written(tmp_path / "broken", drawn(150, 1))
    order = Selection(ImageSet(str(broken)), SIDE, "training", count=100, seed=0).order
    for place in (0, 50, 99, 101):
        (broken / f"{order[place]:04d}.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    found = evaluated(made, broken, tmp_path, reference_count=100)
    assert found.numbers["real"]["used"] == 100
    assert found.numbers["real"]["skipped"]["count"] == 4
    assert found.numbers["real"]["skipped"]["reasons"] == {"undecodable": 4}
    judging = Counting()
    selection = Selection(ImageSet(str(broken)), SIDE, "training", count=100, seed=0)
    rows = judging.judged(selection, [PixelJudge()], tmp_path / "cache", "real")["pixels"].rows
    kept = [place for place in range(104) if place not in (0, 50, 99, 101)]
    assert rows["place"].tolist() == kept
    assert rows["index"].tolist() == order[kept].tolist()
    assert (found.numbers["real"]["replaced"], found.numbers["real"]["found"]) == (3, 150), (
        "one of the four was to stand in"
    )
    assert "4 real images cannot be read (undecodable 4); others took their place" in found.numbers["warnings"]
    told = evaluated(made, broken, tmp_path, reference_count=148).numbers
    assert (told["real"]["used"], told["real"]["replaced"]) == (146, 2)
    assert any("; others took the place of 2, and 146 of 148 are left" in w for w in told["warnings"])
    all_of_them = evaluated(made, broken, tmp_path).numbers
    assert (all_of_them["real"]["used"], all_of_them["real"]["replaced"]) == (146, 0)
    assert "4 real images cannot be read (undecodable 4); 146 of 150 are left" in all_of_them["warnings"]

    for path in broken.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 150 images can be read"):
        evaluated(made, broken, tmp_path)


def test_too_few_images_are_refused_with_their_bias(made: Path, real: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"40 generated and 150 real images for 48 features of blocks: .* too large, by some "
                       r"0\.\d+ here; take 49 or more, give --allow-few, or --metrics kid,precision,recall,density,coverage,"
                       "spectrum"):  # fmt: skip
        evaluated(made, real, tmp_path, count=40)
    few = evaluated(made, real, tmp_path, count=40, allow_few=True)
    assert few.figures["fd_blocks"]["bias"] > 0
    assert any("fd_blocks: about" in w and "bias of so few images" in w for w in few.numbers["warnings"])
    assert "fd_blocks" not in evaluated(made, real, tmp_path, count=40, metrics=("precision",)).figures
    density = r"--metrics density: 5 generated and 150 real images, and it looks at 5 neighbours of each"
    with pytest.raises(UserError, match=density):
        evaluated(made, real, tmp_path, count=5, allow_few=True)
    precise = evaluated(made, real, tmp_path, count=5, metrics=("precision",)).figures
    assert set(precise) == {"precision_blocks"}
    with pytest.raises(UserError, match="3 generated and 150 real images are too few to compare"):
        evaluated(made, real, tmp_path, count=3, metrics=("spectrum",))


def test_the_metrics_that_can_be_had_of_few_are_named(made: Path, real: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--allow-few, or --metrics kid,precision,recall$"):
        evaluated(made, real, tmp_path, count=5, metrics=("fid", "fid_infinity"))
    with pytest.raises(UserError, match=r"--allow-few, or --metrics spectrum,coverage$"):
        evaluated(made, real, tmp_path, count=40, metrics=("fid", "spectrum", "coverage"))


def test_a_spectrums_figures_lie_in_their_intervals(made: Path, real: Path, tmp_path: Path) -> None:
    """Resampling adds noise, which adds to an absolute difference: percentiles would lie above it."""
    found = evaluated(made, made, tmp_path, metrics=("spectrum",), resamples=50)
    for name, figure in found.figures.items():
        assert figure["interval"]["low"] <= figure["value"] <= figure["interval"]["high"], name
        assert name in found.numbers["meaning"]
    assert found.figures["spectrum_high"]["value"] == 0.0 < found.figures["spectrum_high"]["interval"]["high"]
    low, signed = (found.figures[name]["interval"]["low"] for name in ("spectrum_high", "spectrum_high_signed"))
    assert low == 0.0 > signed


def test_features_that_are_not_finite_are_refused(
    made: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Blocks.features

    def wrong(self: Blocks, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        features = right(self, pixels_BCHW)
        features[0, 0] = torch.nan
        return features

    monkeypatch.setattr(Blocks, "features", wrong)
    with pytest.raises(UserError, match="NaN or infinite features in row 0"):
        evaluated(made, real, tmp_path)


def test_what_is_odd_about_images_is_said(real: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    images: list[Pixels] = list(drawn(60, 2))
    images[:5] = [np.repeat(image[..., :1], 3, axis=2) for image in images[:5]]
    images[5] = np.full((SIDE, SIDE, 3), 7, np.uint8)
    written(odd, images[:40])
    for i, image in enumerate(drawn(20, 3, side=16)):
        Image.fromarray(image).save(odd / f"small-{i}.jpg")
    found = evaluated(odd, real, tmp_path)
    generated = found.numbers["generated"]
    assert generated["formats"] == {"jpeg": 20, "png": 40, "webp": 0}
    assert (generated["grey"], generated["flat"], generated["enlarged"], generated["num_sizes"]) == (6, 1, 20, 2)
    said = "\n".join(found.numbers["warnings"])
    assert "20 of 60 generated images are JPEG" in said
    assert "generated images have 2 sizes (20x20 (40), 16x16 (20)); all are compared at 20 px" in said
    assert "20 of 60 generated images were enlarged to 20 px" in said
    assert "1 of 60 generated images are of one colour" in said
    assert "6 of 60 generated images are grey, and 0 of 150 real ones" in said
    with pytest.raises(UserError, match=r"--size: .* has images of 20 x 20 \(40\), 16 x 16 \(20\); say the side"):
        uniform_size(ImageSet(str(odd)), "--size")
    assert uniform_size(ImageSet(str(real)), "--size") == SIDE
    same = evaluated(real, real, tmp_path)
    assert values(same)["fd_blocks"] == pytest.approx(0.0, abs=1e-9)
    assert "both sets are the same images" in same.numbers["warnings"]
    assert not [w for w in evaluated(real, real, tmp_path).numbers["warnings"] if "JPEG" in w]


def test_metrics_that_cannot_be_had(made: Path, real: Path, tmp_path: Path) -> None:
    for wanted, message in ((("fit",), "fit is none; take fid"), (("cmmd",), "cmmd needs --network clip=FOLDER")):
        with pytest.raises(UserError, match=message):
            evaluated(made, real, tmp_path, metrics=wanted)
    with pytest.raises(UserError, match="clip_score needs prompts"):
        Settings(SIDE, metrics=("clip_score",)).chosen(["clip"], has_prompts=False)
    assert Settings(SIDE).chosen([], has_prompts=True) == ("spectrum",)
    assert figure_name("fid", "inception") == "fid"
    assert figure_name("kid", "inception_clean") == "kid_clean"
    assert figure_name("fid_infinity", "dinov2") == "fd_infinity_dinov2"
