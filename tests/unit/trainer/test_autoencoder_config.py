"""Stage 1's config: what cannot go together, and what a run is warned of; each message names the field and the mend."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.stage1 import ASYMMETRIC, GRADIENT, RUNNING_MEANS, stage1, write_lpips
from trainer.config import AutoencoderConfig, InitFromConfig
from trainer.config_text import from_yaml, to_yaml
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.models.autoencoders import Codec
from trainer.models.reconstruction import Reconstruction, build_autoencoder
from trainer.parallel.world import World
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.warm_start import warm_start

TEACHER = "task.teacher={url: nowhere, latent_channels: 4, downsampling: 4}"
SECOND = ("task.discriminator=null", "task.reconstructs=latents", TEACHER)


def module_of(*overrides: str) -> Reconstruction:
    task = stage1(*overrides).task
    assert isinstance(task, AutoencoderConfig)
    return Reconstruction(task)


@pytest.mark.parametrize("settings", [(), (GRADIENT,), (ASYMMETRIC,), (*SECOND, "task.image_space={}")])
def test_it_survives_yaml(settings: tuple[str, ...]) -> None:
    config = stage1(*settings)
    assert from_yaml(to_yaml(config), source="x") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("phases.0.resolution=30",), r"phases\.0\.resolution: 30 px is no multiple of 4, .*; take 32"),
        (("phases.0.resolution=8", "task.discriminator.num_layers=2"),
         r"phases\.0\.resolution: 8 px leave nothing .* needs 12; set task\.discriminator\.num_layers below 2"),
        (("task.outliers={maps: [up7]}",), r"task: outliers\.maps: no decoder map 'up7'; there are mid, up0, up1, up2"),
        ((GRADIENT, "task.kl_weight=0.1"), r"task: kl_weight: .*model\.kind is vq, .*leave it out"),
        (("task.equivariance={scales: [1.0, 0.1]}",),
         r"task\.equivariance\.scales: 0\.1 of the 8 latent pixels a side of phase train .*; take 0\.125 or more"),
        (("task.model.norm_num_groups=3",), r"norm_num_groups: 3 does not divide the 8 of block_out_channels"),
        (("task.trained=decoder",), r"task\.trained: decoder of an autoencoder that nothing has trained; set init_from\.url"),
        (("task.consistency={}",), r"task: consistency: compares with a teacher; set task\.teacher"),
        ((TEACHER,), r"task: teacher: nothing compares with it; set image_space or consistency, or leave it out"),
        ((TEACHER.replace("channels: 4", "channels: 3"), "task.image_space={}"),
         r"task: teacher\.latent_channels: 3, and the model's is 4; latents must be of one kind"),
        ((*SECOND, "task.learned_log_variance=true"), r"task: learned_log_variance: .*set it to false"),
        ((*SECOND, GRADIENT), r"reconstructs: latents goes with model\.kind kl"),
        (("task.discriminator.num_layers=7",), r"task\.discriminator\.num_layers: "),
    ],
)  # fmt: skip
def test_what_cannot_be(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        stage1(*settings)
    assert "\n" not in str(e.value)


def warnings(*overrides: str) -> list[str]:
    return AutoencoderTask(stage1(*overrides), torch.device("cpu")).check()


def test_what_a_run_is_warned_of() -> None:
    assert warnings() == []
    [beyond] = warnings("task.discriminator.start_step=8")
    assert beyond.startswith(
        "task.discriminator.start_step: 8, and the run has 8 steps: there will be no discriminator"
    )
    [small] = warnings("task.discriminator.num_layers=2")
    assert small.startswith(
        "phases.0.resolution: 32 px are fewer than the discriminator's patch of 34 px; take a smaller"
    )


def test_weights_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"^task\.lpips\.url: no nowhere; give a file with LPIPS weights$"):
        warnings("task.lpips={network: alex, url: nowhere}")


def test_fields_of_image_space_are_named_as_the_config_has_them(tmp_path: Path) -> None:
    lpips = write_lpips(tmp_path).partition("=")[2]
    teacher = Codec(module_of().autoencoder)

    def warned(image_space: str) -> list[str]:
        config = stage1(TEACHER, f"task.image_space={image_space}")
        return AutoencoderTask(config, torch.device("cpu"), teacher=teacher).check()

    assert warned(f"{{lpips: {lpips}}}") == []
    with pytest.raises(UserError, match=r"^task\.image_space\.lpips\.url: no nowhere; give a file with LPIPS weights$"):
        warned("{lpips: {network: alex, url: nowhere}}")
    with pytest.raises(UserError, match=r"^task\.image_space\.resize_px: 8, .* set it to 31 or more$"):
        warned(f"{{resize_px: 8, lpips: {lpips}}}")


# ------------------------------------------------------------------------------------------------------- what is trained


def test_a_vq_model_counts_its_codes_and_trains_all_but_running_means() -> None:
    def trained(*overrides: str) -> set[str]:
        return {name for name, parameter in module_of(*overrides).named_parameters() if parameter.requires_grad}

    codes = "autoencoder.quantize.embedding.weight"
    assert trained(GRADIENT) - trained(RUNNING_MEANS) == {codes}
    assert module_of(RUNNING_MEANS).given_names() == []
    assert all("condition_encoder" not in name for name in trained(ASYMMETRIC))
    given = module_of(RUNNING_MEANS, "init_from={url: x}", "task.trained=decoder").given_names()
    assert codes in given
    assert {name.split(".")[1] for name in given} == {"encoder", "quant_conv", "quantize"}
    given = module_of(ASYMMETRIC, "init_from={url: x}", "task.trained=encoder").given_names()
    assert {name.split(".")[1] for name in given} == {"decoder", "post_quant_conv"}
    assert not any("condition_encoder" in name for name in given)


@pytest.mark.parametrize("overrides", [(), (GRADIENT,), (RUNNING_MEANS,), (ASYMMETRIC,)])
def test_every_trained_parameter_gets_a_gradient(overrides: tuple[str, ...]) -> None:
    module = module_of(*overrides, "task.learned_log_variance=true")
    out = module(torch.randn(2, 3, 32, 32), None if out_of_codes(overrides) else torch.randn(2, 4, 8, 8))
    loss = out.x.square().sum() + out.log_variance.sum()
    if out.quantized is not None:
        loss = loss + out.quantized.codebook_B.sum() + out.quantized.commitment_B.sum()
    loss.backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []


def test_running_means_go_on_from_codes_that_were_loaded(alone: World) -> None:
    """8 images of 8 x 8 latent pixels a step, over 32 codes."""
    for loaded, count in (
        (["autoencoder.quantize.embedding.weight"], 16.0),
        (["autoencoder.encoder.conv_in.weight"], 0.0),
    ):
        task = AutoencoderTask(stage1(RUNNING_MEANS), torch.device("cpu"))
        task.after_warm_start(loaded)
        assert task.codebook is not None
        assert torch.equal(task.codebook.counts_K, torch.full((32,), count))
        assert torch.equal(task.codebook.sums_KC, count * task.module.codes_KC)


def out_of_codes(overrides: tuple[str, ...]) -> bool:
    return any("kind: vq" in override for override in overrides)


# ----------------------------------------------------------------------------------------------------- weights from files


def diffusers_folder(folder: Path, *overrides: str) -> Path:
    task = stage1(*overrides).task
    assert isinstance(task, AutoencoderConfig)
    torch.manual_seed(7)
    build_autoencoder(task.model).save_pretrained(folder)
    return folder


def test_a_loaded_checkpoint_of_another_width_or_other_channels(tmp_path: Path, alone: World) -> None:
    folder = diffusers_folder(tmp_path / "kl")
    for setting, there, here in (
        ("task.model.latent_channels=8", [8, 16, 3, 3], [16, 16, 3, 3]),
        ("task.model.block_out_channels=[8, 8, 24]", [16, 8, 3, 3], [24, 8, 3, 3]),
    ):
        module = module_of(setting)
        with pytest.raises(UserError) as e:
            warm_start(module, EMA(module), InitFromConfig(url=str(folder)), alone)
        message = str(e.value)
        assert message.startswith(f"init_from.url: {folder} has autoencoder.")
        assert f"of shape {there}, this model's is {here}" in message
        assert "task.model" in message
        assert "\n" not in message


def test_weights_with_the_names_of_an_old_diffusers(tmp_path: Path, alone: World) -> None:
    """As Stable Diffusion's first autoencoders are published."""
    folder = diffusers_folder(tmp_path / "kl")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in weights.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        renamed[name] = tensor
    assert len(set(renamed) - set(weights)) == 16
    save_file(renamed, file)
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    module = module_of()
    report = warm_start(module, EMA(module), InitFromConfig(url=str(folder)), alone)
    assert report.missing == report.unused == ()
    assert all(torch.equal(module.state_dict()[f"autoencoder.{name}"], tensor) for name, tensor in weights.items())
