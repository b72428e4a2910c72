"""The latent network trains on two ranks, goes on after a stop, is exported, and serves a perceptual loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.distributed.test_training import losses
from tests.distributed.test_variants import class_folders
from tests.perceptual import make_context
from tests.tiny import tiny
from trainer import optim, train_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import LatentLPIPSConfig, LatentNetworkConfig, RunConfig
from trainer.config_text import with_overrides
from trainer.ema import EMA
from trainer.errors import ExitCode, UserError
from trainer.export.autoencoder import export_autoencoder
from trainer.export.latent_network import export_latent_network
from trainer.export.run import export_run
from trainer.losses.latent_lpips import LatentLPIPSLoss
from trainer.models.latent_network_files import LatentNetworkInfo, read_latent_network, write_latent_network
from trainer.models.latent_vgg import LatentVGG
from trainer.parallel.world import World
from trainer.recipes import load
from trainer.run_folder import RunFolder
from trainer.tasks.latent_network import LatentNetworkTask

pytestmark = pytest.mark.slow

STEPS = 20
EMOJI = "repo://data/assets/emoji_64"


def small(data: str, *overrides: str) -> RunConfig:
    """The demo's recipe on sixteen images of two classes, which a small network learns by heart."""
    return with_overrides(
        load("demo_latent_network"),
        [
            "task.model={widths: [16, 16, 32, 32, 32], convs_per_stage: [1, 1, 1, 1, 1], norm_num_groups: 4}",
            "task.num_classes=2",
            "task.label_smoothing=0",
            f"data.datasets.classes.url={data}",
            "data.random_crop=false",
            "data.flip_probability=0",
            "data.num_workers=0",
            f"phases.train.steps={STEPS}",
            "phases.train.batch_size=16",
            "phases.train.learning_rate=0.01",
            "phases.train.ema_decay=0.5",
            "optim.warmup_steps=2",
            "ema.start_step=0",
            "metrics.every_steps=1",
            "checkpoint.every_steps=8",
            *overrides,
        ],
    )


def everything(world: World, data: str, folder: Path) -> dict[str, Any]:
    """All runs of this file in one process group."""
    whole = small(data)
    results: dict[str, Any] = {
        "whole": train(world, whole, str(folder / "whole")),
        "stopped": train(world, whole, str(folder / "resumed"), stop_after=10),
        "resumed": train(world, whole, str(folder / "resumed")),
        "micro": train(world, small(data, "parallel.micro_batch_size=4"), str(folder / "micro")),
    }
    results["diffusion"] = train(world, diffusion(folder / "random-network"), str(folder / "diffusion"))
    results["no labels"] = refused(world, small(EMOJI), folder / "no-labels")
    results["too many"] = refused(world, small(data, "task.num_classes=1"), folder / "too-many")
    return results


def diffusion(network: Path) -> RunConfig:
    return tiny(
        f"task.perceptual={{kind: latent_lpips, url: {network}, tau_reference_px: 64, augment: true}}",
        "phases.low_resolution.steps=1",
        "phases.full_resolution.steps=1",
        "phases.perceptual.steps=2",
        "data.num_workers=0",
    )


def refused(world: World, config: RunConfig, url: Path) -> str:
    from trainer.preemption import StopRequest
    from trainer.run import Run

    with pytest.raises(UserError) as e:
        Run(config, RunFolder(str(url)), world, StopRequest())
    return str(e.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("latent_network")
    random = small("data").task
    assert isinstance(random, LatentNetworkConfig)
    network = LatentVGG(random.model, 4)
    network.init_weights()
    (folder / "random-network").mkdir()
    info = LatentNetworkInfo(latent_channels=4, model=random.model)
    write_latent_network(folder / "random-network", info, network, torch.float16)
    first, second = run_ranks(2, everything, class_folders(folder), folder)
    for name, result in first.items():
        assert result == second[name] if isinstance(result, str) else result["code"] == second[name]["code"], name
    return folder, first


def test_it_learns_the_classes(trained) -> None:
    folder, results = trained
    assert results["whole"]["code"] == ExitCode.DONE
    records = losses(str(folder / "whole"))
    assert len(records) == STEPS
    assert all(set(record) == {"loss", "accuracy"} for record in records)
    assert records[0]["loss"] == pytest.approx(0.693, abs=0.05), "ln 2: it begins with no opinion"
    assert sum(r["loss"] for r in records[-4:]) / 4 < 0.35
    assert sum(r["accuracy"] for r in records[-4:]) / 4 > 0.85


def test_it_goes_on_where_it_stopped(trained) -> None:
    folder, results = trained
    assert (results["stopped"]["code"], results["stopped"]["step"]) == (ExitCode.REQUEUE, 10)
    assert (results["resumed"]["code"], results["resumed"]["step"]) == (ExitCode.DONE, STEPS)
    assert losses(str(folder / "resumed")) == losses(str(folder / "whole"))
    assert results["micro"]["code"] == ExitCode.DONE
    for one, other in zip(losses(str(folder / "micro"))[:8], losses(str(folder / "whole")), strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@torch.no_grad()
def test_the_export_has_the_averages_features(trained, tmp_path) -> None:
    folder, _ = trained
    out = tmp_path / "models" / "latent-lpips"
    for _ in range(2):  # the second replaces the first
        measured = export_run(str(folder / "whole"), str(out), dtype=torch.float32)
    assert measured["step"] == STEPS
    assert measured["accuracy"] >= 15 / 16
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["latent-lpips"]

    run = RunFolder(str(folder / "whole"))
    task = LatentNetworkTask(run.config(), torch.device("cpu"))
    ema = EMA(task.module)
    manager = CheckpointManager(f"{run.url}/checkpoints", keep_last=2, config_digest=None, code_version="")
    assert manager.restore(train_state.tensors(task, ema, optim.build_optimizer(task.module, run.config().optim)))
    info, network, heads = read_latent_network(str(out))
    z0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    of_weights = task.module.features(z0)
    with ema.in_place_of_weights():
        for exported, averaged in zip(network.features(z0), task.module.features(z0), strict=True):
            torch.testing.assert_close(exported, averaged, rtol=0, atol=0)
    assert not torch.equal(of_weights[-1], network.features(z0)[-1])
    assert (info.scaling_factor, info.shift_factor) == (task.codec.scaling_factor, task.codec.shift_factor)
    assert info.resolution == 64
    assert len(heads) == 5
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=str(out)), task.codec)
    assert loss.check(64) == []
    assert loss(z0.flip(0), z0, torch.zeros(2), make_context(z0))[0].gt(0).all()
    assert not any(name.startswith("classifier") for name in load_file(out / "model.safetensors"))


def test_a_diffusion_run_has_it_as_its_perceptual_loss(trained) -> None:
    folder, results = trained
    assert results["diffusion"]["code"] == ExitCode.DONE
    records = losses(str(folder / "diffusion"))
    assert ["latent_lpips" in record for record in records] == [False, False, True, True]
    parts = sum(records[-1][f"latent_lpips_{i}"] for i in range(1, 6))
    assert records[-1]["latent_lpips"] == pytest.approx(parts, rel=1e-5)
    assert 0 < records[-1]["latent_lpips"] < 1


# ------------------------------------------------------------------------------------------------------------ bad input


def test_an_export_of_what_is_not_one(trained, tmp_path) -> None:
    folder, _ = trained
    with pytest.raises(UserError, match=r"a run of latent_network; export takes a run of the autoencoder task"):
        export_autoencoder(str(folder / "whole"), str(tmp_path / "x"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine: exists and is not what an export writes"):
        export_latent_network(str(folder / "whole"), str(tmp_path / "mine"))
    RunFolder(str(tmp_path / "empty")).claim(small("x"))
    with pytest.raises(UserError, match=r"empty: no checkpoint to export"):
        export_run(str(tmp_path / "empty"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_labels_that_are_not_there_or_too_many(trained) -> None:
    _, results = trained
    assert "data.datasets.classes: its samples have no labels" in results["no labels"]
    assert "task.num_classes: 1, but dataset classes has 2 classes; set it to 2" in results["too many"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "phases.0.resolution=60",
            r"phases\.0\.resolution: 60 px is no multiple of the codec's downsampling, 8; take 64",
        ),
        (
            "phases.0.resolution=16",
            r"16 px are latents of 2 pixels a side, and task\.model\.pooled_stages \[4, 5\] need 4",
        ),
        ("samples={sampler: ddim}", r"samples: belongs to the latent_diffusion task, this is latent_network"),
        ("phases.0.perceptual={}", r"phases\.0\.perceptual: belongs to the latent_diffusion task"),
        ("task.model.widths=[8, 8]", r"task\.model\.widths: .*at least 5"),
        ("task.model.pooled_stages=[1]", r"task\.model\.pooled_stages\.0: .*greater than or equal to 2"),
        ("task.model.norm_num_groups=7", r"norm_num_groups: 7 does not divide the 32 channels"),
        ("task.num_classes=0", r"task\.num_classes: "),
    ],
)
def test_configs_that_cannot_be(setting, message) -> None:
    with pytest.raises(UserError, match=message) as e:
        with_overrides(load("demo_latent_network"), [setting])
    assert "\n" not in str(e.value)


def test_a_submission_wants_the_network_there(tmp_path) -> None:
    from launch.inputs import check_local, inputs

    given = tiny("task.perceptual={kind: latent_lpips, url: nowhere}")
    fields = {field: (url, files) for field, url, files in inputs(given)}
    assert fields["task.perceptual.url"] == ("nowhere", ("config.json", "model.safetensors"))
    with pytest.raises(UserError, match=r"task\.perceptual\.url: no folder"):
        check_local("task.perceptual.url", str(tmp_path / "nowhere"), fields["task.perceptual.url"][1])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no model\.safetensors; it is not what `loupe export` writes"):
        check_local("task.perceptual.url", str(tmp_path), fields["task.perceptual.url"][1])
    without = tiny("task.perceptual={kind: latent_lpips, url: nowhere}", "phases.perceptual.perceptual=null")
    assert "task.perceptual.url" not in {field for field, *_ in inputs(without)}
    own = {field: url for field, url, _ in inputs(small("data"))}
    assert own["task.codec.url"] == "repo://trainer/assets/demo_autoencoder"
