"""An autoencoder's evaluation during its training: by all ranks, on what the config names, and without a trace in the run."""

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import read_image
from data.reader import open_dataset
from data.transforms import training_image
from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.distributed.test_training import train as train_and_scrape
from tests.distributed.test_variants import class_folders, one_unreadable
from tests.numerics.lpips_reference import random_weights
from tests.stage1 import GRADIENT, checkpoint, losses, stage1, unequal
from trainer.checkpoint.errors import CheckpointError
from trainer.config import LPIPSConfig, RunConfig
from trainer.errors import ExitCode, UserError
from trainer.evaluate.metrics.frechet import frechet_distance
from trainer.evaluate.metrics.images import ssim
from trainer.evaluate.reconstruction_run import BATCH
from trainer.metric_names import DETAILS
from trainer.models.autoencoders import Codec
from trainer.models.efficientnet import EfficientNetLite0, load_efficientnet_lite0
from trainer.models.lpips_weights import build_lpips
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tensors import images_to_pixels, pixels_to_images

pytestmark = pytest.mark.slow
"""Of ranks that train or measure: half a minute and more."""

COUNT = 11
"""Images: neither ranks nor batches divide it."""
DEMO = "repo://trainer/assets/demo_autoencoder"
SECOND_STAGE = (
    "task={kind: autoencoder, reconstructs: latents, teacher: {url: '" + DEMO + "'}, lpips: null, discriminator: null, "
    "model: {kind: kl, block_out_channels: [8, 8], norm_num_groups: 4}}"
)


def evaluated(folder: Path, *overrides: str, every: int = 3) -> RunConfig:
    section = (
        f"{{every_steps: {every}, count: {COUNT}, grid: 4, dataset: {{url: {folder / 'classes'}}}, "
        f"lpips: {{network: alex, url: {folder / 'alex.pth'}}}}}"
    )
    return stage1(f"reconstructions={section}", *overrides)


def configs(folder: Path) -> dict[str, RunConfig]:
    return {
        # the features' network takes most of the time, so only one of them has it
        "kl": evaluated(folder, f"reconstructions.features_url={folder / 'features.pth'}"),
        "vq": evaluated(folder, GRADIENT),
        "second stage": evaluated(folder, SECOND_STAGE),
        "fewer than ranks": evaluated(folder, "reconstructions.count=2", "reconstructions.grid=8"),
        "unreadable": evaluated(
            folder, f"reconstructions.dataset.url={folder / 'unreadable'}", "reconstructions.count=8"
        ),
        "its own": evaluated(folder, "reconstructions.dataset=null", "reconstructions.lpips=null"),
    }


def fresh(world: World, folder: Path) -> dict[str, Any]:
    """Of the weights that a run begins with, which are the same on any number of ranks."""
    from trainer.run import Run

    found = {}
    for name, config in configs(folder).items():
        run = Run(config, RunFolder(str(folder / f"fresh-{world.size}" / name)), world, StopRequest())
        assert run.evaluation is not None
        with run.trainer.averaged():
            measured = run.evaluation.measure()
        found[name] = {"numbers": measured.numbers, "picture": measured.picture, "warnings": run.evaluation.warnings}
        run.exporter.close()
    return found


def failed(world: World, folder: Path) -> str:
    """What is said on this rank of an error that only the last one meets."""
    from trainer.run import Run

    run = Run(evaluated(folder), RunFolder(str(folder / "failed")), world, StopRequest())
    assert run.evaluation is not None

    def gone(index: int) -> Any:
        raise RuntimeError("gone")

    if world.rank == world.size - 1:
        run.evaluation._dataset.read = gone  # type: ignore[method-assign,assignment]
    try:
        run.evaluation.measure()
    except CheckpointError as e:
        return str(e)
    finally:
        run.exporter.close()
    return ""


def on_two(world: World, folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {"fresh": fresh(world, folder), "failed": failed(world, folder)}
    more = ("task.discriminator.norm=spectral", "task.learned_log_variance=true")
    assert train_and_scrape(world, evaluated(folder, *more), str(folder / "with")) == ExitCode.DONE
    for name, config in {"without": stage1(*more), "codes": evaluated(folder, GRADIENT, every=100)}.items():
        assert train(world, config, str(folder / name))["code"] == ExitCode.DONE
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluation")
    class_folders(folder)
    one_unreadable(folder)
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / "features.pth")
    torch.save(random_weights("alex"), folder / "alex.pth")
    [one] = run_ranks(1, fresh, folder)
    first, second = run_ranks(2, on_two, folder)
    assert first == second, "all ranks know the same"
    assert first["failed"] == "rank 1: RuntimeError: gone", "nobody waits for the other"
    return folder, one, first["fresh"]


NAMES = ("kl", "vq", "second stage", "fewer than ranks", "unreadable", "its own")


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_measure_what_one_does(runs, name: str) -> None:
    _, one, two = runs
    a, b = deepcopy(one[name]["numbers"]), deepcopy(two[name]["numbers"])
    assert a.pop("ranks") == 1
    assert b.pop("ranks") == 2
    # passes of other sizes round elsewhere, and a pixel in a million may so fall on the other side of a half
    for figure in ("psnr_db", "psnr_pooled_db", "ssim", "lpips", "frechet"):
        assert a.pop(figure) == (pytest.approx(b[figure], rel=1e-4) if b[figure] else None), figure
        b.pop(figure)
    for nested in ("latents", "outliers", "codebook"):
        for key, value in (a.pop(nested) or {}).items():
            assert value == pytest.approx(b[nested][key], rel=1e-3, abs=1e-6), (nested, key)
        b.pop(nested)
    assert a == b
    pictures = [np.asarray(Image.open(io.BytesIO(found[name]["picture"]))).astype(int) for found in (one, two)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 4, "a level's difference, four times as large"
    assert COUNT > BATCH


@torch.no_grad()
@pytest.mark.parametrize("name", ["kl", "vq", "second stage"])
def test_figures_are_of_the_held_out_images(runs, name: str) -> None:
    folder, one, _ = runs
    config, found = configs(folder)[name], one[name]["numbers"]
    dataset = open_dataset(str(folder / "classes"), name="classes")
    rows = [i * 16 // COUNT for i in range(COUNT)]
    before = np.stack([training_image(read_image(dataset.read(row).image), 32) for row in rows])
    images = pixels_to_images(torch.from_numpy(before).permute(0, 3, 1, 2))
    task = AutoencoderTask(config, torch.device("cpu"))
    vae = task.module.autoencoder.eval()
    x, teacher = images, Codec.load(DEMO)
    if name == "second stage":
        x = teacher.encode(images)
    if name == "vq":
        raw = vae.encode(x).latents
        decoded = vae.decode(raw).sample
    else:
        raw = vae.encode(x).latent_dist.mean
        decoded = vae.decode(raw).sample
    if name == "second stage":
        decoded = teacher.decode(decoded)
    after = images_to_pixels(decoded).permute(0, 2, 3, 1).numpy()
    mse = np.square(before.astype(np.float64) - after).mean((1, 2, 3))
    assert found["psnr_db"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), abs=1e-3)
    assert found["psnr_pooled_db"] == pytest.approx(10 * np.log10(255**2 / mse.mean()), abs=1e-3)
    assert found["ssim"] == pytest.approx(np.mean([ssim(a, b) for a, b in zip(before, after, strict=True)]), abs=1e-4)
    made = pixels_to_images(torch.from_numpy(after).permute(0, 3, 1, 2))
    lpips = build_lpips(LPIPSConfig(network="alex", url=str(folder / "alex.pth")))
    assert found["lpips"] == pytest.approx(lpips(images, made).mean().item(), rel=1e-3)
    if name == "kl":
        network = load_efficientnet_lite0(str(folder / "features.pth"))
        features = [network.features(batch).numpy() for batch in (images, made)]
        assert found["frechet"] == pytest.approx(frechet_distance(*features), rel=2e-3)
    assert found["latents"]["shift_factor"] == pytest.approx(raw.mean().item(), rel=1e-3, abs=1e-6)
    assert found["latents"]["scaling_factor"] == pytest.approx(1 / raw.std().item(), rel=1e-2)
    if name == "vq":
        codes = vae.quantize.embedding.weight
        chosen = torch.cdist(raw.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(1)
        assert found["codebook"]["usage"] == pytest.approx(len(chosen.unique()) / 32)
        assert found["codebook"]["num_codes"] == 32
    assert (found["count"], found["size"], found["dataset"]["held_out"]) == (COUNT, 32, True)
    assert list(found["outliers"]) == list(config.task.model.decoder_maps)  # type: ignore[union-attr]


def test_unreadable_images_are_left_out_and_named(runs) -> None:
    _, one, _ = runs
    found = one["unreadable"]["numbers"]
    assert found["count"] == 7
    [skipped] = found["skipped"]
    assert (skipped["sample"], skipped["reason"]) == (3, "undecodable")
    assert one["fewer than ranks"]["numbers"]["count"] == 2


def test_without_a_held_out_dataset_it_is_the_runs_own(runs) -> None:
    _, one, _ = runs
    found = one["its own"]["numbers"]
    assert found["dataset"]["url"] == "repo://data/assets/emoji_64"
    assert found["dataset"]["held_out"] is False
    assert (found["lpips"], found["frechet"], found["judges"]["lpips"]) == (None, None, None)


def test_training_goes_on_as_if_nothing_had_been_measured(runs) -> None:
    folder, _, _ = runs
    assert losses(folder / "with") == losses(folder / "without")
    assert unequal(checkpoint(folder / "with"), checkpoint(folder / "without")) == []


def test_what_a_run_writes(runs) -> None:
    folder, _, _ = runs
    run = RunFolder(str(folder / "with"))
    assert run.names("evaluation") == ["final.json", "step-00000003.json", "step-00000006.json"]
    assert run.names("reconstructions") == ["final.png", "step-00000003.png", "step-00000006.png"]
    picture = Image.open(folder / "with" / "reconstructions" / "final.png")
    assert picture.size == (4 * 100 + 4, 3 * 118), "four images of 32 px, three times as large, in three rows"
    assert [found["step"] for found in run.evaluations()] == [3, 6, 8]
    final, summary = run.read_json("evaluation/final.json"), run.read_json("summary.json")
    assert (final["step"], final["weights"]) == (8, "average")
    assert summary["evaluation"] == {key: value for key, value in final.items() if key in summary["evaluation"]} | {
        "dataset": final["dataset"]["url"]
    }
    assert f"{run.evaluations()[-1]['psnr_db']:.6g}" == f"{final['psnr_db']:.6g}"
    told = run.read_text(f"metrics/{run.names('metrics')[0]}")
    assert ("of images that it trains on" in told) == (not final["dataset"]["held_out"])
    scraped = run.read_text("scraped.txt")
    assert 'loupe_evaluation{metric="psnr_db"}' in scraped
    assert 'loupe_evaluation{metric="outliers_mid"}' in scraped
    assert run.read_json("evaluation/step-00000003.json")["psnr_db"] != final["psnr_db"], "the average has moved"


def test_the_terms_that_lines_leave_out_are_there_to_be_left_out(runs) -> None:
    folder, _, _ = runs
    seen = {name for run in ("with", "codes") for record in losses(folder / run) for name in record}
    assert DETAILS - seen == {"consistency_lpips"}


def test_shares_of_codes_are_gauges(runs) -> None:
    folder, _, _ = runs
    [found] = RunFolder(str(folder / "codes")).evaluations()
    assert 0 < found["codebook_usage"] <= 1
    assert found["codebook_num_codes"] == 32


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reconstructions.dataset.url=/nowhere/data", r"reconstructions\.dataset: .*/nowhere/data"),
        ("reconstructions.dataset.max_samples=1", r"reconstructions\.dataset: .* has 1 image; give two or more"),
        (
            "reconstructions.features_url=/nowhere/f.pth",
            r"reconstructions\.features_url: /nowhere/f\.pth: no such file",
        ),
        ("reconstructions.features_url=ALEX", r"reconstructions\.features_url: .*alex\.pth: not EfficientNet-Lite0's"),
        ("reconstructions.lpips.url=/nowhere/l.pth", r"reconstructions\.lpips\.url: no /nowhere/l\.pth"),
        (
            "reconstructions.lpips.network=alex_shift_tolerant",
            r"reconstructions\.lpips\.url: .*alex\.pth: .*not the weights",
        ),
        ("phases.0.resolution=28", r"phases\.0\.resolution: 28 px, and LPIPS of alex needs 31; take more"),
    ],
)
def test_bad_fields_are_told_before_the_first_step(
    runs, alone: World, tmp_path: Path, override: str, message: str
) -> None:
    from trainer.run import Run

    folder, _, _ = runs
    config = evaluated(folder, override.replace("ALEX", str(folder / "alex.pth")))
    with pytest.raises(UserError, match=message) as e:
        Run(config, RunFolder(str(tmp_path)), alone, StopRequest())
    assert "\n" not in str(e.value)


def test_what_is_no_error_is_said(runs, alone: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.run import Run

    folder, _, _ = runs
    emoji = "{url: repo://data/assets/emoji_64, max_samples: 9}"
    run = Run(evaluated(folder, f"reconstructions.dataset={emoji}"), RunFolder(str(tmp_path)), alone, StopRequest())
    run.exporter.close()
    said = capsys.readouterr().out
    assert "WARNING: reconstructions.count: 11, and repo://data/assets/emoji_64 has 9 images: all are used" in said
    assert "WARNING: reconstructions.dataset: the run trains on repo://data/assets/emoji_64 too" in said
