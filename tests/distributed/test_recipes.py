"""Every recipe: sharded over 64 ranks on the meta device at full width; and, its widths cut, trained for three steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed.harness import run_ranks
from trainer.config import LatentDiffusionConfig, check_layout
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World
from trainer.recipes import RECIPES, load
from trainer.tasks.latent_diffusion import TextToImage

RANKS = 64
FULL_WIDTH = [name for name in RECIPES if load(name).task.kind == "latent_diffusion"]
MILLIONS = {
    "imagenet_256": 796, "sd3_medium_512": 2243, "finetune": 2243, "imagenet_256_dit": 675, "cc12m_256_unet": 860,
    "cc12m_256_pixart": 611, "demo": 2.7,
}  # fmt: skip
"""Parameters as published, or as the recipe's docstring says."""


@pytest.fixture(scope="module")
def many_ranks():  # type: ignore[no-untyped-def]
    """This process as the first of 64 ranks, whose collectives do nothing: what sharding does to shapes can be seen."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    yield World(0, RANKS, torch.device("meta"), mesh, dist.group.WORLD)  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_sharded_on_the_meta_device(name, many_ranks) -> None:
    config = load(name)
    assert isinstance(config.task, LatentDiffusionConfig)
    if not name.startswith(("demo", "photos", "finetune")):
        check_layout(config, RANKS)
    with torch.device("meta"):
        module = TextToImage(config.task)
    total = sum(p.numel() for p in module.parameters())
    assert total / 1e6 == pytest.approx(MILLIONS.get(name, total / 1e6), rel=0.03)
    parallelize(module, module.units(), many_ranks, config.parallel)
    parameters = list(module.parameters())
    assert all(isinstance(p, DTensor) and p.is_meta for p in parameters)
    local = sum(p.to_local().numel() for p in parameters)  # type: ignore[attr-defined]
    assert total / RANKS <= local < total / RANKS * 1.5 + 1e5, "rank 0 has its share, rounded up in each tensor"


# -------------------------------------------------------------------------------------------------- three steps of each


def train_all(world: World, root: Path) -> dict[str, Any]:
    """Each recipe's exit code and loss terms, or what it was refused for."""
    from tests.small_recipes import cut
    from trainer.errors import UserError
    from trainer.preemption import StopRequest
    from trainer.run import Run
    from trainer.run_folder import RunFolder

    results: dict[str, Any] = {}
    for name in FULL_WIDTH:
        folder = RunFolder(str(root / "runs" / name))
        try:
            run = Run(cut(name, root), folder, world, StopRequest())
            code = int(run.train())
            run.exporter.close()
        except UserError as e:
            results[name] = str(e)
            continue
        results[name] = (code, [record["loss"] for record in folder.metrics()])
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    from tests.small_recipes import write_assets

    root = tmp_path_factory.mktemp("recipes")
    write_assets(root)
    return root, run_ranks(1, train_all, root)[0]


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_three_steps_with_widths_cut(name, trained) -> None:
    root, results = trained
    assert not isinstance(results[name], str), results[name]
    code, losses = results[name]
    assert code == 0
    assert len(losses) == 3
    values = torch.tensor([[step["loss"], step["denoising"]] for step in losses])
    assert values.isfinite().all()
    assert (values > 0).all()
    recipe = load(name)
    last = recipe.phases[-1]
    report = root / "runs" / name / "init_report.json"
    assert report.exists() == (recipe.init_from is not None)
    assert ("lpl" in losses[-1]) == (last.perceptual is not None)
    assert (root / "runs" / name / "samples" / "final.png").stat().st_size > 1000
