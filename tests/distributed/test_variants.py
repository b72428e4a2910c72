"""Short whole runs of what the demo leaves out: DDPM-eps and DDPM-v, class labels, pictures at intervals, unreadable images."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from data.build import build
from data.images import read_image
from data.mds import mds
from data.reader import open_dataset
from data.schema import COLUMNS, DatasetInfo, Resize, index_digest
from data.source import open_source
from tests.check_demo import png_side
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses, several
from tests.tiny import tiny
from trainer.config import CODE_ROOT, RunConfig
from trainer.config_text import with_overrides
from trainer.errors import ExitCode, UserError
from trainer.export.autoencoder import export_autoencoder
from trainer.models.autoencoders import Codec
from trainer.recipes import load
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.slow
"""Of ranks that train: a minute and more."""

EMOJI = str(CODE_ROOT / "data" / "assets" / "emoji_64")
SHORT = ("phases.low_resolution.steps=2", "phases.full_resolution.steps=2", "phases.perceptual.steps=2")
SAMPLER = "samples={{every_steps: 4, count: 2, sampler: {}, num_steps: 2}}"
MIN_SNR = "task.paradigm.weighting=min_snr"
PICTURES = (
    "samples={every_steps: 3, count: 4, sampler: ddim, num_steps: 4}",
    "prompt_accuracy={num_prompts: 8}",
    "data.datasets.emoji.max_samples=12",
)


def class_folders(folder: Path) -> str:
    """A class-conditional dataset of two classes, built by our own command's function from real images."""
    emoji = open_dataset(EMOJI, name="emoji")
    for index in range(16):
        path = folder / "source" / ("even" if index % 2 == 0 else "odd") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), read_image(emoji.read(index).image)[..., ::-1])
    build(open_source(folder / "source"), str(folder / "classes"), name="classes", resize=Resize())
    return str(folder / "classes")


def one_unreadable(folder: Path) -> str:
    """A whole, verified dataset, one of whose images is no image: what an upstream pipeline may have written."""
    emoji, out = open_dataset(EMOJI, name="emoji"), folder / "unreadable"
    writer = mds().Writer(out=str(out), columns=COLUMNS, hashes=["xxh64"])
    for index in range(8):
        sample = emoji.read(index)
        image = b"\xff\xd8\xff not a JPEG" if index == 3 else sample.image
        writer.write({"key": sample.key, "image": image, "captions": list(sample.texts), "label": -1})
    writer.finish()
    digest = index_digest((out / "index.json").read_bytes())
    (out / "dataset.json").write_text(DatasetInfo(name="x", num_samples=8, index_digest=digest).model_dump_json())
    return str(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("variants")
    unreadable = f"data.datasets.emoji.url={one_unreadable(folder)}"
    overrides: dict[str, tuple[str, ...]] = {
        "eps": ("task.paradigm.kind=ddpm_eps", *SHORT, *PICTURES),
        "v": ("task.paradigm.kind=ddpm_v", *SHORT, *PICTURES),
        "heun": (*SHORT, SAMPLER.format("heun"), "task.paradigm.timestep_density=cosmap", MIN_SNR),
        "rk4": (*SHORT, SAMPLER.format("rk4"), "task.paradigm.timestep_density=logit_normal"),
        "classes": (
            "task.text={kind: classes, num_classes: 2, width: 32}",
            f"data.datasets.emoji.url={class_folders(folder)}",
            "samples={every_steps: 4, count: 4, sampler: euler, num_steps: 2}",
            *SHORT,
        ),
        "no_pictures": SHORT,
        "many_pictures": (*SHORT, "samples={every_steps: 1, count: 2, sampler: euler, num_steps: 2}"),
        "unreadable": (unreadable, *SHORT),
        "unreadable_again": (unreadable, *SHORT),
        "too_many": (unreadable, *SHORT, "data.max_bad_samples=0"),
    }

    def configs() -> list[tuple[RunConfig, str, str]]:
        autoencoder = with_overrides(
            load("demo_autoencoder"),
            [
                "phases.train.steps=3",
                "phases.settle.steps=1",
                "phases.train.batch_size=4",
                "phases.settle.batch_size=4",
                "task.lpips=null",
                "task.discriminator=null",
                "init_from=null",
                "reconstructions=null",
            ],
        )
        tinies = [(tiny(*values), str(folder / name), "") for name, values in overrides.items()]
        return [*tinies, (autoencoder, str(folder / "autoencoder"), "")]

    ranks = run_ranks(2, several, configs())
    assert ranks[0] == ranks[1]
    return folder, dict(zip([*overrides, "autoencoder"], ranks[0], strict=True))


@pytest.mark.parametrize("name", ["eps", "v", "classes"])
def test_paradigms_and_conditions_train_with_lpl_in_the_last_phase(runs, name) -> None:
    folder, codes = runs
    assert codes[name] == ExitCode.DONE
    records = losses(str(folder / name))
    assert len(records) == 6
    assert ["lpl" in record for record in records] == [False] * 4 + [True] * 2
    assert all(0 < record["loss"] < 1e3 for record in records)


def test_classes_are_prompts(runs) -> None:
    folder, _ = runs
    assert sorted(path.name for path in (folder / "classes" / "samples").iterdir()) == [
        "final.png",
        "step-00000004.png",
    ]


@pytest.mark.parametrize("name", ["eps", "v"])
def test_pictures_at_intervals_and_at_the_end(runs, name) -> None:
    folder, _ = runs
    assert sorted(path.name for path in (folder / name / "samples").iterdir()) == ["final.png", "step-00000003.png"]
    assert png_side(folder / name / "samples" / "final.png") > 200
    assert png_side(folder / name / "curves.png") > 200
    summary = RunFolder(str(folder / name)).read_json("summary.json")
    assert 0 <= summary["prompt_accuracy"] <= 1
    assert summary["prompt_accuracy_chance"] == pytest.approx(5 / 12)


def test_pictures_do_not_disturb_training(runs) -> None:
    """They are drawn with the averaged weights, which the next step must not compute with."""
    folder, _ = runs
    assert losses(str(folder / "no_pictures")) == losses(str(folder / "many_pictures"))
    assert len(list((folder / "many_pictures" / "samples").iterdir())) == 6


def test_an_autoencoder_is_trained_and_exported_for_diffusers(runs, tmp_path) -> None:
    folder, codes = runs
    assert codes["autoencoder"] == ExitCode.DONE
    out = tmp_path / "exported"
    for _ in range(2):  # the second replaces the first
        measured = export_autoencoder(str(folder / "autoencoder"), str(out))
    assert measured["step"] == 4
    vae = AutoencoderKL.from_pretrained(out)
    codec = Codec.load(str(out))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(codec.decode(codec.encode(images)), vae.decode(raw).sample, atol=1e-4, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    with pytest.raises(UserError, match="export takes a run of the autoencoder task"):
        export_autoencoder(str(folder / "eps"), str(tmp_path / "x"))


def state_of(run: Path) -> dict[str, Any]:
    newest = max(run.glob("checkpoints/*/manifest.json"))
    state: dict[str, Any] = json.loads(newest.read_text())["state"]
    return state


def test_an_unreadable_image_is_replaced_counted_and_saved(runs) -> None:
    folder, codes = runs
    assert codes["unreadable"] == codes["unreadable_again"] == ExitCode.DONE
    assert losses(str(folder / "unreadable")) == losses(str(folder / "unreadable_again"))
    (pair,) = state_of(folder / "unreadable")["substitutions"]
    assert pair[:3] == ["emoji", 3, "emoji"]
    assert pair[3] != 3
    scraped = (folder / "unreadable" / "scraped.txt").read_text()
    assert "loupe_data_bad_samples_total{reason=" in scraped


def test_too_many_unreadable_images_stop_the_run(runs) -> None:
    folder, codes = runs
    assert "data.max_bad_samples: 1 samples were unreadable, the limit is 0" in codes["too_many"]
    assert not (folder / "too_many" / "summary.json").exists()
    shutil.rmtree(folder / "too_many")


@pytest.mark.parametrize("sampler", ["heun", "rk4"])
def test_pictures_by_samplers_of_higher_order_and_other_densities(sampler, runs) -> None:
    folder, codes = runs
    assert codes[sampler] == ExitCode.DONE
    pictures = sorted(path.name for path in (folder / sampler / "samples").iterdir())
    assert pictures == ["final.png", "step-00000004.png"]
    assert all("denoising_weighted" in step for step in losses(str(folder / "heun")))
    assert not any("denoising_weighted" in step for step in losses(str(folder / "rk4")))
