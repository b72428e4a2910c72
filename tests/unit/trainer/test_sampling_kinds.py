"""What `loupe sample` draws is what a training's sample grid shows, of every kind of model, text and paradigm."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.sampling_runs import save
from tests.small_recipes import NUM_CLASSES, cut, write_assets
from trainer.config import LatentDiffusionConfig
from trainer.sampling.model import SamplingModel
from trainer.sampling.settings import SampleSettings
from trainer.tasks.latent_diffusion import LatentDiffusionTask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assets")
    write_assets(root)
    return root


@pytest.mark.parametrize(
    ("recipe", "sampler"),
    [
        ("sd3_medium_512", "rk4-38"),
        ("imagenet_256_dit", "ddim"),
        ("cc12m_256_unet", "dpm-solver"),
        ("cc12m_256_pixart", None),
    ],
)
def test_pictures_are_those_of_the_task(recipe: str, sampler: str | None, assets: Path, tmp_path: Path) -> None:
    config = cut(recipe, assets)
    assert isinstance(config.task, LatentDiffusionConfig)
    assert config.samples is not None
    save(tmp_path, config, step=3)
    model = SamplingModel.open(str(tmp_path), CPU)
    model.lot = 2
    settings = SampleSettings.of(config.samples, resolution=config.phases[-1].resolution)
    settings = replace(
        settings, steps=3, guidance=2.0, guidance_interval=(0.3, 1.0), sampler=sampler or settings.sampler
    )
    classes = config.task.text.kind == "classes"
    prompts = [str(i % NUM_CLASSES) if classes else text for i, text in enumerate(("a dog", "", "a dog"))]
    found = model.images([int(p) for p in prompts] if classes else prompts, range(3), settings)

    task = LatentDiffusionTask(config, CPU)
    with torch.no_grad():
        for name, parameter in task.module.named_parameters():
            parameter.copy_(model.module.state_dict()[name])
    expected: Tensor = task.decode(task.sample_latents(prompts, 0, settings))
    assert (found.int() - expected.int()).abs().max() <= 1
    assert found.shape == (3, 3, *settings.size)
    assert not torch.equal(found[0], found[2]), "other noise"
    assert torch.equal(found[1:2], model.images([int(prompts[1]) if classes else prompts[1]], [1], settings))
