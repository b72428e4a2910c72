"""Images of all kinds, and what is no image, through a small run of stage 1; and what it refuses or warns of as it starts."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.mds import mds
from data.reader import open_dataset
from data.schema import COLUMNS, DatasetInfo, index_digest
from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.stage1 import losses, stage1
from trainer.config import AutoencoderConfig
from trainer.errors import ExitCode
from trainer.models.reconstruction import build_autoencoder
from trainer.parallel.world import World
from trainer.run_folder import RunFolder

SHORT = ("phases.train.steps=4", "phases.train.batch_size=4", "task.discriminator.start_step=1")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def odd_images(folder: Path) -> str:
    """A dataset with a grey, a 16-bit and a CMYK image, and two that cannot be read: of an upstream that did not look."""
    emoji = open_dataset("data/assets/emoji_64", name="emoji")
    photo = Image.open(io.BytesIO(emoji.read(0).image)).convert("RGB").resize((48, 40))
    whole = encoded(photo, "JPEG")
    images = {
        "grey": encoded(photo.convert("L"), "PNG"),
        "deep": encoded(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
        "print": encoded(photo.convert("CMYK"), "JPEG"),
        "cut": encoded(photo, "PNG")[:300],
        "text": b"this is no image",
        **{f"plain{i}": whole for i in range(3)},
    }
    out = folder / "odd"
    writer = mds().Writer(out=str(out), columns=COLUMNS, hashes=["xxh64"])
    for key, image in images.items():
        writer.write({"key": key, "image": image, "captions": [key], "label": -1})
    writer.finish()
    digest = index_digest((out / "index.json").read_bytes())
    info = DatasetInfo(name="odd", num_samples=len(images), index_digest=digest)
    (out / "dataset.json").write_text(info.model_dump_json())
    return f"data.datasets.emoji.url={out}"


def everything(world: World, folder: Path, settings: dict[str, tuple[str, ...]]) -> dict[str, str]:
    seen = {}
    for name, overrides in settings.items():
        try:
            result: Any = train(world, stage1(*SHORT, *overrides), str(folder / name))
        except Exception as e:  # of what is built before a run can train
            result = {"error": f"{type(e).__name__}: {e}"}
        seen[name] = result.get("error") or result["code"]
    return seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    task = stage1().task
    assert isinstance(task, AutoencoderConfig)
    build_autoencoder(task.model).save_pretrained(folder / "kl")
    codec = f"{{url: {folder / 'kl'}, latent_channels: %d, downsampling: 4}}"
    odd = odd_images(folder)
    settings = {
        "odd": (odd,),
        "too many": (odd, "data.max_bad_samples=1"),
        "width": (f"init_from={{url: {folder / 'kl'}}}", "task.model.block_out_channels=[8, 16, 16]"),
        "channels": (f"init_from={{url: {folder / 'kl'}}}", "task.model.latent_channels=8"),
        "teacher": (f"task.teacher={codec % 8}", "task.consistency={}", "task.model.latent_channels=8"),
        "lpips": ("task.lpips={network: vgg16_shift_tolerant}",),
        "never": ("task.discriminator.start_step=50001",),
        "patch": ("task.discriminator.num_layers=2",),
    }
    [seen] = run_ranks(1, everything, folder, settings)
    return folder, seen


def notes(folder: Path, name: str) -> str:
    return (folder / name / "metrics" / "0000.jsonl").read_text()


def test_odd_images_are_read_and_broken_ones_replaced_and_named(runs, capfd) -> None:
    folder, seen = runs
    assert seen["odd"] == ExitCode.DONE
    records = losses(folder / "odd")
    assert len(records) == 4
    assert all(np.isfinite(list(terms.values())).all() for terms in records)
    newest = max((folder / "odd" / "checkpoints").glob("*/manifest.json")).relative_to(folder / "odd")
    replaced = RunFolder(str(folder / "odd")).read_json(str(newest))["state"]["substitutions"]
    assert sorted(pair[:2] for pair in replaced) == [["emoji", 3], ["emoji", 4]]
    assert seen["too many"].startswith("UserError: data.max_bad_samples: 2 samples were unreadable, the limit is 1")


def test_what_does_not_match_the_config_is_named(runs) -> None:
    _, seen = runs
    for name in ("width", "channels"):
        assert seen[name].startswith("UserError: init_from.url: ")
        assert "of shape [" in seen[name]
        assert "this model's is [" in seen[name]
        assert "task.model" in seen[name]
    assert "task.teacher.latent_channels: 8, but the autoencoder at" in seen["teacher"]
    assert "task.lpips.url: absent; give the checkpoint of vgg16_shift_tolerant" in seen["lpips"]
    assert all("\n" not in str(line) for line in seen.values())


def test_warnings_are_noted_where_the_launcher_shows_them(runs) -> None:
    folder, seen = runs
    assert seen["never"] == seen["patch"] == ExitCode.DONE
    assert "WARNING: task.discriminator.start_step: 50001, and the run has 4 steps" in notes(folder, "never")
    assert "WARNING: phases.0.resolution: 32 px are fewer than the discriminator's patch of 34" in notes(
        folder, "patch"
    )
    assert "WARNING" not in notes(folder, "odd").replace("are enlarged", "").split('"step"')[0]
