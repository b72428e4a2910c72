"""Whose weights a run begins with: matching by name and shape, the sources, and what is refused. Ranks: test_elastic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save_file
from torch import nn

from tests.tiny import tiny
from tests.unit.trainer.test_checkpoint_manager import flip
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import AutoencoderConfig, InitFromConfig, KLModelConfig, LatentDiffusionConfig
from trainer.ema import EMA
from trainer.errors import UserError
from trainer.models.diffusers_denoisers import DiT, PixArt, UNet
from trainer.models.mmdit import MMDiT
from trainer.models.reconstruction import Reconstruction
from trainer.models.sd3_weights import mmdit_to_diffusers
from trainer.parallel.world import World
from trainer.safetensors_source import SafetensorsSource
from trainer.tasks.latent_diffusion import TextToImage
from trainer.warm_start import Mismatch, Report, warm_start

MMDIT = (
    "task.model={kind: mmdit, num_blocks: 1, num_heads: 2, head_dim: 8, patch_size: 1, position_grid: 8, base_grid: 4}"
)
UNET = (
    "task.model={kind: unet, block_out_channels: [32, 32], attention_levels: [true, false], layers_per_block: 1, "
    "head_dim: 8}"
)
PIXART = "task.model={kind: pixart, num_blocks: 1, num_heads: 2, head_dim: 8, patch_size: 1, base_grid: 4}"
DIT_MODEL = "task.model={kind: dit, num_blocks: 2, num_heads: 2, head_dim: 8, patch_size: 1, base_grid: 4}"
CLASSES = "task.text={kind: classes, num_classes: 3, width: 8}"


def build(*overrides: str, seed: int = 0) -> TextToImage:
    torch.manual_seed(seed)
    config = tiny(*overrides).task
    assert isinstance(config, LatentDiffusionConfig)
    module = TextToImage(config)
    for parameter in module.parameters():  # no two alike, and none zero
        nn.init.normal_(parameter)
    return module


def start(module: nn.Module, world: World, url: Path | str, **changes: Any) -> tuple[Report, EMA]:
    ema = EMA(module)
    report = warm_start(module, ema, InitFromConfig(url=str(url), **changes), world)
    for name, parameter in module.named_parameters():
        assert torch.equal(ema.average[name], parameter.detach()), "the average begins as the weights"
    return report, ema


def refused(module: nn.Module, world: World, url: Path | str, **changes: Any) -> str:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError) as e:
        start(module, world, url, **changes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def source() -> TextToImage:
    return build(MMDIT, seed=1)


@pytest.fixture
def run(source: TextToImage, tmp_path: Path) -> Path:
    """The folder of a run with two checkpoints: weights, an average that is 1 more, and moments."""
    m = CheckpointManager(str(tmp_path / "run" / "checkpoints"), keep_last=2, config_digest="d", code_version="v")
    for step in (1, 2):
        tensors = {f"model.{name}": tensor * step for name, tensor in source.state_dict().items()}
        tensors |= {f"ema.{name}": p.detach() * step + 1 for name, p in source.named_parameters()}
        tensors |= {f"optim.{name}.exp_avg": torch.zeros_like(p) for name, p in source.named_parameters()}
        m.save(tensors, step=step, images_seen=step, state={})
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def assert_weights(module: nn.Module, expected: nn.Module, factor: float = 1.0, more: float = 0.0) -> None:
    wanted = expected.state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, wanted[name] * factor + more), name


# ----------------------------------------------------------------------------------------------------- from another run


@pytest.mark.parametrize(("weights", "more"), [("average", 1.0), ("model", 0.0)])
def test_a_runs_newest_checkpoint(weights: str, more: float, run: Path, source: TextToImage, alone: World) -> None:
    module = build(MMDIT)
    report, _ = start(module, alone, run, weights=weights)
    assert_weights(module, source, 2.0, more)
    assert report.source == str(newest(run))
    assert set(report.loaded) == set(module.state_dict())
    assert (report.missing, report.mismatched, report.unused) == ((), (), ())
    assert not list(run.glob("checkpoints/*/HOLD-*"))


def test_one_checkpoint(run: Path, source: TextToImage, alone: World) -> None:
    module = build(MMDIT)
    first = min((run / "checkpoints").iterdir())
    report, _ = start(module, alone, f"{first}/", weights="model")
    assert_weights(module, source)
    assert report.source == str(first)
    assert "no committed checkpoint" in refused(module, alone, run / "checkpoints" / "step-00000009-00000000")


def test_only_what_is_taken_is_read(
    run: Path, source: TextToImage, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, read, bytes_read = build(MMDIT), CheckpointFolder.read, []

    def counted(self: CheckpointFolder, name: str, begin: int, end: int) -> Any:
        if name.endswith(".safetensors"):
            bytes_read.append(end - begin)
        return read(self, name, begin, end)

    monkeypatch.setattr(CheckpointFolder, "read", counted)
    fresh = module.text.state_dict() if module.text else {}
    fresh = {name: tensor.clone() for name, tensor in fresh.items()}
    report, _ = start(module, alone, run, include=("denoiser.*",), exclude=("denoiser.blocks.*",))
    taken = [name for name in module.state_dict() if name.startswith("denoiser.") and "blocks." not in name]
    assert set(report.loaded) == set(taken)
    assert report.missing == ()  # what was not asked for is not missed, though strict
    for name in taken:
        assert torch.equal(module.state_dict()[name], source.state_dict()[name] * 2 + 1)
    assert module.text is not None
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in module.text.state_dict().items())
    all_of_it = sum(path.stat().st_size for path in newest(run).glob("shard-*"))
    assert sum(bytes_read) < all_of_it / 3 / 2  # of three sets of tensors one, and of that a part


def test_damage_takes_the_one_before_unless_it_was_asked_for(run: Path, source: TextToImage, alone: World) -> None:
    bad, module = newest(run), build(MMDIT)
    flip("shard-00000.safetensors", 0.9)(bad)
    flip("shard-00000.safetensors", 0.1)(bad)
    report, _ = start(module, alone, run, weights="model")
    assert report.source != str(bad)
    assert_weights(module, source)
    assert not list(run.glob("checkpoints/*/SET-ASIDE.json"))  # it is not ours
    with pytest.raises(UserError, match=r"^init_from\.url: the checkpoint is damaged .*; give another$"):
        start(module, alone, bad, weights="model")


def test_a_run_that_may_only_be_read(
    run: Path, source: TextToImage, alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local_open = LocalFileSystem.open

    def read_only(self: LocalFileSystem, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode:
            raise PermissionError(13, "Permission denied", path)
        return local_open(self, path, mode, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "open", read_only)
    module = build(MMDIT)
    start(module, alone, run, weights="model")
    assert_weights(module, source, 2.0)
    assert "is read without being held" in caplog.text


def test_nothing_there_is_named(tmp_path: Path, alone: World) -> None:
    message = refused(build(MMDIT), alone, tmp_path / "absent")
    assert message.startswith(f"init_from.url: {tmp_path}/absent holds neither")


# ------------------------------------------------------------------------------------------------------------- matching


def test_another_depth_is_refused_and_with_strict_off_reported(run: Path, source: TextToImage, alone: World) -> None:
    deeper = build(MMDIT.replace("num_blocks: 1", "num_blocks: 2"))
    message = refused(deeper, alone, run)
    assert f"{newest(run)} has " in message
    assert "denoiser.blocks." in message
    assert "set init_from.strict=false" in message
    kept = deeper.state_dict()["denoiser.blocks.1.image.mlp.fc1.weight"].clone()
    report, _ = start(deeper, alone, run, strict=False)
    assert "denoiser.blocks.1.image.mlp.fc1.weight" in report.missing
    assert torch.equal(deeper.state_dict()["denoiser.blocks.1.image.mlp.fc1.weight"], kept)
    first = "denoiser.blocks.0.image.mlp.fc1.weight"
    assert torch.equal(deeper.state_dict()[first], source.state_dict()[first] * 2 + 1)
    assert "keep fresh values" in report.lines()[0]
    assert any(line.startswith("  not in the source: ") for line in report.lines())
    assert json.loads(json.dumps(report.to_json()))["missing"] == list(report.missing)


def test_another_width_names_both_shapes(run: Path, alone: World) -> None:
    wider = build(MMDIT.replace("head_dim: 8", "head_dim: 16"))
    message = refused(wider, alone, run, include=("denoiser.*",))
    assert "of shape [" in message
    assert "this model's is [" in message
    name = "denoiser.blocks.0.image.mlp.fc2.bias"
    report, _ = start(wider, alone, run, strict=False)
    assert Mismatch(name, (16,), (32,)) in report.mismatched
    assert "denoiser.patch.bias [16] there, [32] here" in " ".join(report.lines())


def test_another_architecture_names_a_tensor_of_each(run: Path, alone: World) -> None:
    unet = build(UNET, CLASSES)
    for strict in (True, False):
        message = refused(unet, alone, run, strict=strict, include=("denoiser.*",))
        assert "tensors of another layout (first: " in message
        assert "this model wants denoiser.net." in message
    assert "init_from.include, exclude: " in refused(unet, alone, run, include=("nothing*",))


# ---------------------------------------------------------------------------------------------------------- safetensors


def test_a_file_of_our_own_names(source: TextToImage, tmp_path: Path, alone: World) -> None:
    half = {name: tensor.bfloat16().contiguous() for name, tensor in source.state_dict().items()}
    save_file(half, tmp_path / "x.safetensors")
    module = build(MMDIT)
    report, _ = start(module, alone, tmp_path / "x.safetensors")
    assert len(report.loaded) == len(half)
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in module.state_dict().items())


@pytest.fixture
def sd3(source: TextToImage, tmp_path: Path) -> Path:
    assert isinstance(source.denoiser, MMDiT)
    arguments, state = mmdit_to_diffusers(source.denoiser)
    model = SD3Transformer2DModel(**arguments)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="4KB")  # several files and an index
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    return tmp_path / "transformer"


def test_a_folder_of_stable_diffusion_3(sd3: Path, source: TextToImage, alone: World) -> None:
    module = build(MMDIT)
    assert "text." in refused(module, alone, sd3)  # its text encoder is another's
    start(module, alone, sd3, include=("denoiser.*",))
    assert_weights(module.denoiser, source.denoiser)


def test_stable_diffusion_3_into_another_layout(sd3: Path, alone: World) -> None:
    shared = build(MMDIT.replace("kind: mmdit", "kind: mmdit, layout: shared"))
    message = refused(shared, alone, sd3, include=("denoiser.*",))
    assert "shared" in message
    assert "sd3" in message.lower()


@pytest.mark.parametrize("overrides", [(UNET,), (PIXART,)], ids=["unet", "pixart"])
def test_folders_of_diffusers_networks(overrides: tuple[str, ...], tmp_path: Path, alone: World) -> None:
    source, module = build(*overrides, seed=1), build(*overrides)
    assert isinstance(source.denoiser, UNet | PixArt)
    source.denoiser.net.save_pretrained(tmp_path)
    report, _ = start(module, alone, tmp_path, include=("denoiser.*",))
    assert len(report.loaded) == len(source.denoiser.state_dict())
    assert_weights(module.denoiser, source.denoiser)


def test_a_folder_of_diffusers_dit(tmp_path: Path, alone: World) -> None:
    """Its blocks have a copy each of what ours has once."""
    source, module = build(DIT_MODEL, CLASSES, seed=1), build(DIT_MODEL, CLASSES)
    assert isinstance(source.denoiser, DiT)
    arguments = {name: value for name, value in source.denoiser.net.config.items() if not name.startswith("_")}
    theirs = DiTTransformer2DModel(**arguments)
    theirs.load_state_dict(source.denoiser.diffusers_state())
    theirs.save_pretrained(tmp_path)
    start(module, alone, tmp_path, include=("denoiser.*",))
    assert_weights(module.denoiser, source.denoiser)


def test_a_folder_of_an_autoencoder(tmp_path: Path, alone: World) -> None:
    config = tiny_autoencoder()
    task = AutoencoderConfig(model=config)
    source, module = Reconstruction(task), Reconstruction(task)
    source.autoencoder.save_pretrained(tmp_path)
    start(module, alone, tmp_path)
    assert_weights(module, source)


def tiny_autoencoder() -> Any:
    return KLModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def test_a_whole_pipeline_gives_its_denoiser(sd3: Path, tmp_path: Path, source: TextToImage, alone: World) -> None:
    """In files with an index, as diffusers writes what is large."""
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    assert "a pipeline without safetensors in transformer or unet" in refused(build(MMDIT), alone, pipeline)
    sd3.rename(pipeline / "transformer")
    module = build(MMDIT)
    report, _ = start(module, alone, pipeline, include=("denoiser.*",))
    assert_weights(module.denoiser, source.denoiser)
    assert report.missing == report.unused == ()


def test_sd3_weights_of_another_depth_are_reported_with_strict_off(
    sd3: Path, source: TextToImage, alone: World
) -> None:
    deeper = build(MMDIT.replace("num_blocks: 1", "num_blocks: 2"))
    assert "num_blocks 1, this model has num_blocks 2" in refused(deeper, alone, sd3)
    fresh = {name: tensor.clone() for name, tensor in deeper.state_dict().items()}
    report, _ = start(deeper, alone, sd3, strict=False, include=("denoiser.*",))
    assert {name for name in report.missing if not name.startswith("denoiser.blocks.")} == set()
    assert any(name.startswith("denoiser.blocks.1.image.") for name in report.missing)
    # the only block there ends the text, and so has less of it
    assert "denoiser.blocks.0.text.modulation.weight" in {m.name for m in report.mismatched}
    wanted, now = source.state_dict(), deeper.state_dict()
    assert "denoiser.blocks.0.image.qkv.proj.weight" in report.loaded
    for name, tensor in now.items():
        assert torch.equal(tensor, wanted[name] if name in report.loaded else fresh[name]), name


def test_a_folder_of_model_safetensors(tmp_path: Path, source: TextToImage, alone: World) -> None:
    """As `loupe export --format safetensors` writes it, whole or in parts."""
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    module = build(MMDIT)
    start(module, alone, tmp_path)
    assert_weights(module, source)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    half: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, tmp_path / f"model-{i}.safetensors")
        half |= dict.fromkeys(part, f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": half}))
    module = build(MMDIT)
    start(module, alone, tmp_path)
    assert_weights(module, source)


def test_damaged_folders_name_the_file(sd3: Path, alone: World) -> None:
    module = build(MMDIT)
    shard = sorted(sd3.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    assert f"{shard}: not a whole safetensors file" in refused(module, alone, sd3)
    shard.unlink()
    assert f"{shard}: cannot be read" in refused(module, alone, sd3)
    shard.write_bytes(whole)
    index = sd3 / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    assert "weight_map does not name files of this folder" in refused(module, alone, sd3)
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    with pytest.raises(UserError, match=r"lists a \(1 such\) that no file has"):
        SafetensorsSource(str(sd3)).read()
    (sd3 / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(module, alone, sd3)
