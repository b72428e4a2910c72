"""Stage 1 from a trained autoencoder: its decoder or its encoder alone, a light decoder beside it, a second stage behind it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.stage1 import ASYMMETRIC, RUNNING_MEANS, checkpoint, losses, stage1, write_lpips
from trainer.config import AutoencoderConfig, RunConfig
from trainer.errors import ExitCode
from trainer.models.reconstruction import build_autoencoder
from trainer.parallel.world import World
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.slow

ALONE = ("task.discriminator=null", "optim.weight_decay=0.1")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_sources(folder: Path) -> None:
    """Autoencoders as diffusers saves them."""
    for name, overrides in (("kl", ()), ("vq", (RUNNING_MEANS,))):
        task = stage1(*overrides).task
        assert isinstance(task, AutoencoderConfig)
        torch.manual_seed(5)
        vae = build_autoencoder(task.model)
        vae.register_to_config(scaling_factor=1.5)
        vae.save_pretrained(folder / name)


def configs(folder: Path, lpips: str) -> dict[str, RunConfig]:
    teacher = f"task.teacher={{url: {folder / 'kl'}, latent_channels: 4, downsampling: 4}}"

    def of(*overrides: str) -> RunConfig:
        return stage1(*ALONE, *overrides)

    from_kl, from_vq = (f"init_from={{url: {folder / name}}}" for name in ("kl", "vq"))
    image_space = "task.image_space={lpips: " + lpips.partition("=")[2] + "}"
    pattern = "autoencoder.{}.*"

    def taking(*names: str) -> str:
        return f"init_from={{url: {folder / 'kl'}, include: [{', '.join(pattern.format(name) for name in names)}]}}"

    encoder_of_kl = taking("encoder", "quant_conv")
    return {
        "decoder": of(from_kl, "task.trained=decoder"),
        "decoder of codes": of(RUNNING_MEANS, from_vq, "task.trained=decoder"),
        # another encoder, that comes to give the teacher's latents
        "encoder": of(taking("decoder", "post_quant_conv"), "task.trained=encoder", teacher, image_space),
        "encoder of codes": of(RUNNING_MEANS, from_vq, "task.trained=encoder"),
        "light": of(
            ASYMMETRIC, encoder_of_kl, "task.trained=decoder", teacher, "task.consistency={}", "task.pixel_weight=0"
        ),
        "second": of("task.reconstructs=latents", teacher, image_space, "task.model.block_out_channels=[8, 8]"),
        "second plain": of("task.reconstructs=latents", teacher, "task.model.block_out_channels=[8, 8]"),
        "fresh": of(encoder_of_kl, "task.trained=encoder"),
    }


def everything(world: World, folder: Path, lpips: str) -> dict[str, Any]:
    seen = {}
    for name, config in configs(folder, lpips).items():
        gathered: set[str] = set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fsdp_param_group, "foreach_all_gather", watching(gathered))
            seen[name] = train(world, config, str(folder / "runs" / name)) | {"gathered": gathered}
    return seen


def watching(gathered: set[str]) -> Any:
    """Names of the parameters that a backward pass has gathered."""
    original = _fsdp_param_group.foreach_all_gather

    def watched(params: Any, *rest: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            gathered.update(str(param._param_fqn) for param in params)
        return original(params, *rest)

    return watched


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("modes")
    write_sources(folder)
    first, second = run_ranks(2, everything, folder, write_lpips(folder))
    for name, seen in first.items():
        assert seen.get("error") == second[name].get("error")
        if name != "fresh":
            assert seen.get("error", seen.get("code")) == ExitCode.DONE, name
    return folder, first


def parts(folder: Path, name: str, source: str) -> tuple[set[str], set[str], set[str]]:
    """First parts of the names of what a run has left as in `source`, bit for bit, in the weights; in the average; and of
    what its optimizer has a state for."""
    given = load_file(folder / source / WEIGHTS)
    tensors = checkpoint(folder / "runs" / name)
    same: list[set[str]] = []
    for prefix in ("model.autoencoder.", "ema.autoencoder."):
        by_part: dict[str, bool] = {}
        for tensor in (n.removeprefix(prefix) for n in tensors if n.startswith(prefix)):
            equal = tensor in given and torch.equal(tensors[prefix + tensor], given[tensor])
            part = tensor.split(".")[0]
            by_part[part] = by_part.get(part, True) and equal
        same.append({part for part, equal in by_part.items() if equal})
    stepped = {n.split(".")[2] for n in tensors if n.startswith("optim.autoencoder.")}
    return same[0], same[1], stepped


ENCODER, DECODER = {"encoder", "quant_conv"}, {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(
    ("name", "source", "frozen", "trained"),
    [
        ("decoder", "kl", ENCODER, DECODER),
        ("decoder of codes", "vq", ENCODER | {"quantize"}, DECODER),
        ("encoder", "kl", DECODER, ENCODER),
        ("encoder of codes", "vq", DECODER | {"quantize"}, ENCODER),
        ("light", "kl", ENCODER, DECODER),
    ],
)
def test_what_is_not_trained_stays_bit_equal(
    name: str, source: str, frozen: set[str], trained: set[str], runs: tuple[Path, dict[str, Any]]
) -> None:
    """Through weight decay, codes that would be running means, the average and a checkpoint."""
    folder, _ = runs
    weights, average, stepped = parts(folder, name, source)
    assert weights == average == frozen
    assert stepped == trained


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("decoder", "l1"), ("decoder of codes", "l1"), ("encoder", "image_space_latent"),
        ("encoder of codes", "loss"),
        ("light", "consistency"), ("second", "loss"), ("second plain", "l2"),
    ],
)  # fmt: skip
def test_it_learns(name: str, term: str, runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    records = losses(folder / "runs" / name)
    assert len(records) == 8
    assert records[-1][term] < 0.97 * records[0][term]


def test_terms_of_the_modes(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    names = {name: set(losses(folder / "runs" / name)[0]) for name in runs[1] if name != "fresh"}
    assert {"image_space_latent", "image_space_decoded"} <= names["encoder"] & names["second"]
    assert names["second plain"] == {"loss", "kl", "l2"}
    assert names["light"] == {"loss", "l1", "reconstruction", "kl", "consistency"}


def test_a_frozen_encoder_is_not_gathered_for_the_backward_pass(runs: tuple[Path, dict[str, Any]]) -> None:
    gathered = {name: seen["gathered"] for name, seen in runs[1].items()}
    assert any(".encoder." in name for name in gathered["encoder"])
    assert any(".decoder." in name for name in gathered["encoder"]), "gradients pass through it"
    assert any(".decoder." in name for name in gathered["decoder"])
    assert [name for name in gathered["decoder"] if ".encoder." in name] == []


def test_weights_that_leave_the_frozen_part_fresh_are_refused(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = runs
    error = seen["fresh"]["error"]
    assert "UserError: task.trained: encoder, and init_from gave nothing for autoencoder.decoder." in error
    assert "init_from.include" in error
    assert RunFolder(str(folder / "runs" / "fresh")).metrics() == []
