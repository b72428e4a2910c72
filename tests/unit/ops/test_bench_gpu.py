"""What `make bench-gpu` calls can be built, on a machine without a GPU too."""

import argparse
import re
import shlex
import subprocess

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from ops.bench.step import config_of, main, parser_of_options
from ops.bench.step_loops import batches
from trainer.config import CODE_ROOT, LatentDiffusionConfig, replace
from trainer.models.mmdit import MMDiT
from trainer.models.sd3_weights import mmdit_to_diffusers
from trainer.tasks.latent_diffusion import TextToImage


def lines() -> list[str]:
    """Options of its calls of `ops.bench.step`, as the shell has them."""
    told = subprocess.run(
        ["make", "-n", "-o", "setup", "bench-gpu"], cwd=CODE_ROOT, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    of_all = re.search(r"-m ops.bench.step (.*?) \$options", told)
    assert of_all
    of_each = re.search(r"for options in (.*?); do", told)
    assert of_each
    return [f"{of_all[1]} {options}" for options in shlex.split(of_each[1])]


def options_of(line: str) -> argparse.Namespace:
    return parser_of_options().parse_args(shlex.split(line))


@pytest.mark.parametrize("overrides", sorted({tuple(options_of(line).overrides) for line in lines()}))
def test_both_sides_have_the_same_model(overrides: tuple[str, ...]) -> None:
    config = config_of(argparse.Namespace(recipe="sd3_medium_512", overrides=overrides))
    assert isinstance(config.task, LatentDiffusionConfig)
    with torch.device("meta"):
        ours = TextToImage(config.task)
        assert isinstance(ours.denoiser, MMDiT)
        arguments, state = mmdit_to_diffusers(ours.denoiser)
        theirs = SD3Transformer2DModel(**arguments).state_dict()
    assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in state.items()}


@pytest.mark.parametrize("line", lines())
def test_each_call_has_its_batches(line: str) -> None:
    options = options_of(line)
    config = config_of(options)
    assert options.recipe == "sd3_medium_512"
    assert options.compile
    assert options.batch_size <= 64, "of one GPU, without micro-batches"
    assert config.parallel.activation_checkpointing == "none", "the peer recomputes nothing"
    phase = replace(config.phases[-1], resolution=options.resolution or config.phases[-1].resolution)
    made = batches(config, phase, 1, stored=options.stored_latents, buckets=options.buckets)
    assert len(made) > 1 if options.buckets else len(made) == 1


def test_another_layout_is_refused_at_once() -> None:
    with pytest.raises(SystemExit, match="imagenet_512_lpl: not an MMDiT in SD3's layout"):
        main(["--recipe", "imagenet_512_lpl"])
    with pytest.raises(SystemExit, match=r"task\.model\.num_blocs"):
        main(["task.model.num_blocs=3"])
