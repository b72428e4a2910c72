"""What an export writes, of every kind of autoencoder: read and measured by diffusers itself."""

import json
from pathlib import Path
from typing import Any

import click.testing
import pytest
import safetensors.torch
import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from data.images import read_image
from data.reader import open_dataset
from data.transforms import training_image
from launch.commands.export import export
from tests.distributed.test_elastic import train
from tests.perceptual import make_context
from tests.stage1 import ASYMMETRIC, GRADIENT, stage1
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import CODE_ROOT, LPLConfig, RunConfig
from trainer.config_text import to_yaml, with_overrides
from trainer.errors import ExitCode, UserError
from trainer.export.autoencoder import export_autoencoder
from trainer.export.autoencoder_check import difference_to_diffusers
from trainer.export.run import usage
from trainer.losses.estimators import LightDecoder
from trainer.losses.lpl import build_lpl
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.reconstruction import Reconstruction
from trainer.parallel.world import World
from trainer.recipes import load

COUNT, SIDE = 12, 32
FEW = f"data.datasets.emoji.max_samples={COUNT}"
KL = "task.model={kind: kl, block_out_channels: [8, 8, 16], norm_num_groups: 4, mid_block_attention: false}"
ABSENT_LPIPS = "task.lpips={network: vgg16, url: /no/such/folder}"
TEACHER = "task.teacher={{url: {}, latent_channels: 4, downsampling: {}}}"
DEMO = "repo://trainer/assets/demo_autoencoder"
CLASSES = {"kl": AutoencoderKL, "asymmetric_kl": AsymmetricAutoencoderKL, "vq": VQModel}


def weights_of(config: RunConfig, seed: int) -> dict[str, Tensor]:
    """A module's, as if trained: latents away from zero, and codes where they are."""
    torch.manual_seed(seed)
    module = Reconstruction(config.task)  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        if name.endswith("quant_conv.bias"):
            torch.nn.init.normal_(parameter.data, 0.3, 0.1)
        if "quantize" in name:
            torch.nn.init.normal_(parameter.data, 0.3, 0.2)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def run_of(folder: Path, config: RunConfig, **changes: Tensor) -> Path:
    """A run folder with a checkpoint, whose average is not its weights, and with what belongs to the task alone."""
    weights, average = weights_of(config, 1), weights_of(config, 2) | changes
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in average.items()}
    tensors |= {"task.discriminator.main.0.weight": torch.zeros(3), "optim.step": torch.zeros(())}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    manager = CheckpointManager(f"{folder}/checkpoints", keep_last=2, config_digest="x", code_version="")
    manager.save(tensors, step=7, images_seen=56, state={})
    return folder


def photos() -> Tensor:
    dataset = open_dataset(str(CODE_ROOT / "data" / "assets" / "emoji_64"), name="emoji", max_samples=COUNT)
    pixels = [training_image(read_image(dataset.read(i).image, min_side=SIDE), SIDE) for i in range(COUNT)]
    return torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels]) / 127.5 - 1


def latents_and_images(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    raw = vae.encode(x).latents if isinstance(vae, VQModel) else vae.encode(x).latent_dist.mean
    return raw, vae.decode(raw).sample


def json_of(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model", [KL, ASYMMETRIC, GRADIENT], ids=["kl", "asymmetric", "vq"])
@torch.no_grad()
def test_diffusers_reads_the_average_with_its_scale(
    model: str, dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither LPIPS' files nor the discriminator's tensors are looked at."""
    config = stage1(model, FEW, ABSENT_LPIPS, "task.learned_log_variance=true")
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    measured = export_autoencoder(str(run), str(out), dtype=dtype)
    assert capfd.readouterr().err == ""
    vae = CLASSES[config.task.model.kind].from_pretrained(out, torch_dtype=torch.float32)  # type: ignore[union-attr]
    average = weights_of(config, 2)
    found = vae.state_dict()
    assert {f"autoencoder.{name}" for name in found} | {"log_variance"} == set(average)
    assert all(torch.equal(w, average[f"autoencoder.{name}"].to(dtype).float()) for name, w in found.items())
    stored = safetensors.torch.load_file(out / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}

    raw, images = latents_and_images(vae, photos())
    assert measured.keys() == {"step", "scaling_factor", "shift_factor", "psnr_db", "difference"}
    assert measured["step"] == 7
    assert measured["difference"] <= 1e-6
    assert measured["shift_factor"] == pytest.approx(raw.mean().item(), rel=1e-5)
    assert measured["scaling_factor"] == pytest.approx(1 / raw.std().item(), rel=1e-5)
    assert abs(measured["shift_factor"]) > 0.1
    psnr = 10 * torch.log10(4 / (images.clamp(-1, 1) - photos()).square().mean()).item()
    assert measured["psnr_db"] == pytest.approx(psnr, abs=1e-4)
    written, latents = json_of(out / "config.json"), json_of(out / "latents.json")
    for name in ("scaling_factor", "shift_factor"):
        assert written[name] == latents[name] == measured[name] == pytest.approx(vae.config[name])
    torch.testing.assert_close(torch.tensor(latents["mean"]), raw.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(latents["std"]), raw.std((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert (latents["step"], latents["images"], latents["resolution"], written["sample_size"]) == (7, COUNT, SIDE, SIDE)

    codec = Codec.load(str(out))
    assert (codec.scaling_factor, codec.shift_factor) == (measured["scaling_factor"], measured["shift_factor"])
    scaled = codec.encode(photos())
    assert abs(scaled.mean().item()) < 1e-4
    assert scaled.std().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(codec.decode(scaled), images, rtol=1e-4, atol=1e-4)


def test_a_second_export_replaces_the_first_and_says_how_it_is_used(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", stage1(KL, FEW))
    out = tmp_path / "a folder" / "out"
    for dtype in ("float32", "float16"):
        result = click.testing.CliRunner().invoke(
            export, [str(run), str(out), "--dtype", dtype], catch_exceptions=False
        )
        assert result.exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors", "latents.json"
    ]  # fmt: skip
    first, second = result.output.splitlines()
    assert "psnr_db" in first
    assert "difference" in first
    pasted = second.partition("--set '")[2].removesuffix("'")
    config = with_overrides(load("demo"), [pasted])
    assert config.task.kind == "latent_diffusion"
    codec = load_codec(config.task.codec)
    assert (codec.latent_channels, codec.downsampling) == (4, 4)
    assert config.task.codec.url == str(out)


# ---------------------------------------------------------------------------------------------------------- the check


def drawn_module(kind: str) -> tuple[Reconstruction, Tensor]:
    config = stage1({"kl": KL, "vq": GRADIENT}[kind], FEW)
    module = Reconstruction(config.task).eval()  # type: ignore[arg-type]
    module.load_state_dict(weights_of(config, 2))
    return module, photos()[:4]


@pytest.mark.parametrize(
    ("kind", "name", "what"),
    [
        ("kl", "encoder.conv_in.bias", "latents"),
        ("kl", "decoder.conv_out.bias", "reconstructions"),
        ("vq", "quantize.embedding.weight", "distances of codes"),
        ("vq", "post_quant_conv.bias", "reconstructions"),
    ],
)
def test_the_check_sees_what_is_not_the_trained_one(kind: str, name: str, what: str, tmp_path: Path) -> None:
    module, x = drawn_module(kind)
    module.autoencoder.save_pretrained(tmp_path)
    assert difference_to_diffusers(tmp_path, module, [x[:2], x[2:]]) <= 1e-6
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights[name] += 1e-2
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{what} of the exported .* differ by .* 1e-06 is allowed") as caught:
        difference_to_diffusers(tmp_path, module, [x[:2], x[2:]])
    assert "\n" not in str(caught.value)


def test_where_the_check_fails_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = run_of(tmp_path / "run", stage1(KL, FEW)), tmp_path / "exports" / "out"
    export_autoencoder(str(run), str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save = AutoencoderKL.save_pretrained

    def another(self: AutoencoderKL, folder: Path, **options: Any) -> None:
        bias: Any = self.decoder.conv_out.bias
        bias.data += 0.1
        save(self, folder, **options)
        bias.data -= 0.1

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", another)
    with pytest.raises(UserError, match="reconstructions of the exported AutoencoderKL"):
        export_autoencoder(str(run), str(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------- runs that began with, or look at, another


def test_a_trained_decoder_keeps_the_scale_of_its_latents(tmp_path: Path) -> None:
    """The teacher's folder is not read, and may be gone."""
    export_autoencoder(str(run_of(tmp_path / "first", stage1(KL, FEW))), str(tmp_path / "kl"))
    other = json_of(tmp_path / "kl" / "config.json") | {"scaling_factor": 0.25, "shift_factor": 0.5}
    (tmp_path / "kl" / "config.json").write_text(json.dumps(other))
    light = (ASYMMETRIC, FEW, "task.trained=decoder", "task.discriminator=null")
    taught = (TEACHER.format("/no/such/folder", 4), "task.consistency={pixel_weight: 1.0}")

    def scale(init_from: str, scale_of: str | None = None) -> tuple[float, float]:
        config = stage1(*light, *taught, f"init_from={{url: {init_from}, strict: false}}")
        run = run_of(tmp_path / f"run{len(list(tmp_path.iterdir()))}", config)
        measured = export_autoencoder(str(run), str(tmp_path / "light"), scale_of=scale_of)
        assert any("decoder_url" in line for line in usage(str(run), str(tmp_path / "light")))
        return measured["scaling_factor"], measured["shift_factor"]

    assert scale(str(tmp_path / "kl")) == (0.25, 0.5)
    assert scale("/no/such/folder", str(tmp_path / "kl")) == (0.25, 0.5)
    assert scale(str(tmp_path / "first")) not in {(0.25, 0.5), (1.0, 0.0)}  # a run's weights have none beside them
    [step] = (tmp_path / "first" / "checkpoints").glob("step-*")
    assert scale(f"{step}/") == scale(f"{tmp_path / 'first'}/") == scale(str(tmp_path / "first"))
    codec = Codec.load(str(tmp_path / "light"))
    assert isinstance(codec.vae, AsymmetricAutoencoderKL)
    with pytest.raises(UserError, match=r"init_from.url: /no/such/folder.*give --scale-of FOLDER"):
        scale("/no/such/folder")
    with pytest.raises(UserError, match=r"--scale-of: /no/such/folder/config.json: no such file"):
        scale(str(tmp_path / "kl"), "/no/such/folder")


@torch.no_grad()
def test_a_second_stage(tmp_path: Path) -> None:
    config = stage1(
        "task.model={kind: kl, block_out_channels: [8, 8], norm_num_groups: 4, latent_channels: 6}",
        "task.reconstructs=latents", TEACHER.format(DEMO, 8), "task.discriminator=null", FEW,
    )  # fmt: skip
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    measured = export_autoencoder(str(run), str(out), dtype=torch.float32)
    vae, teacher = AutoencoderKL.from_pretrained(out), Codec.load(DEMO)
    assert (vae.config["in_channels"], vae.config["out_channels"], vae.config["latent_channels"]) == (4, 4, 6)
    x = teacher.encode(photos())
    raw, again = latents_and_images(vae, x)
    assert raw.shape == (COUNT, 6, 2, 2)
    assert measured["difference"] <= 1e-6
    assert measured["scaling_factor"] == pytest.approx(1 / raw.std().item(), rel=1e-5)
    error = (teacher.decode(again).clamp(-1, 1) - photos()).square().mean()
    assert measured["psnr_db"] == pytest.approx(10 * torch.log10(4 / error).item(), abs=1e-4)
    assert "second stage" in usage(str(run), str(out))[0]
    with pytest.raises(UserError, match=r"in_channels is 4; it must be 3: .*a second stage"):
        Codec.load(str(out))


def test_a_light_decoder_trained_by_consistency_carries_lpl(alone: World, tmp_path: Path) -> None:
    """From a run, by the task itself: encoder from an export, decoder fresh, taught by the full one; then LPL through it."""
    wide = "task.model={kind: kl, block_out_channels: [8, 8, 16], norm_num_groups: 4}"
    export_autoencoder(
        str(run_of(tmp_path / "full-run", stage1(wide, FEW))), str(tmp_path / "full"), dtype=torch.float32
    )
    encoder = "[autoencoder.encoder.*, autoencoder.quant_conv.*]"
    config = stage1(
        ASYMMETRIC.replace("decoder_block_out_channels: [8, 8, 8]", "decoder_block_out_channels: [4, 4, 8]"), FEW,
        "task.trained=decoder", TEACHER.format(tmp_path / "full", 4), "task.consistency={pixel_weight: 1.0}",
        "task.discriminator=null", "phases.train.steps=6", f"init_from={{url: {tmp_path}/full, include: {encoder}}}",
    )  # fmt: skip
    result = train(alone, config, str(tmp_path / "run"))
    assert result.get("code") == ExitCode.DONE, result
    measured = export_autoencoder(str(tmp_path / "run"), str(tmp_path / "light"), dtype=torch.float32)
    full, light = Codec.load(str(tmp_path / "full")), Codec.load(str(tmp_path / "light"))
    assert (light.scaling_factor, light.shift_factor) == (full.scaling_factor, full.shift_factor)
    assert measured["step"] == 6
    with torch.no_grad():
        torch.testing.assert_close(light.encode(photos()), full.encode(photos()))
    decoders = [
        sum(p.numel() for stage in c.decoder_stages() for m in stage for p in m.parameters()) for c in (light, full)
    ]
    assert decoders[0] < 0.5 * decoders[1]

    loss = build_lpl(LPLConfig(decoder_url=str(tmp_path / "light"), mask_outliers="none"), full)
    assert isinstance(loss.decoder, LightDecoder)
    z0 = full.encode(photos()[:2]).detach()
    z0_hat = (z0 + 0.3 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(loss.decoder.images(z0_hat), light.decode(z0_hat), rtol=1e-4, atol=1e-5)
    loss_B, terms = loss(z0_hat, z0, torch.ones(2), make_context(z0, downsampling=4))
    assert {"lpl_mid", "lpl_up0", "lpl_up1", "lpl_up2"} <= terms.keys()
    assert (loss_B > 0).all()
    (gradient,) = torch.autograd.grad(loss_B.sum(), z0_hat)
    assert gradient.isfinite().all()
    assert (gradient.abs() > 0).float().mean() > 0.99


# ------------------------------------------------------------------------------------------------------ what is refused


def test_weights_that_float16_does_not_hold(tmp_path: Path) -> None:
    config = stage1(KL, FEW)
    name = "autoencoder.decoder.conv_out.weight"
    run = run_of(tmp_path / "run", config, **{name: weights_of(config, 2)[name] * 1e7})
    with pytest.raises(UserError, match=r"decoder.conv_out.weight: .* not finite in float16; take --dtype float32"):
        export_autoencoder(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert export_autoencoder(str(run), str(tmp_path / "out"), dtype=torch.float32)["difference"] <= 1e-6


def test_latents_that_are_all_the_same(tmp_path: Path) -> None:
    config = stage1(KL, FEW)
    dead = torch.zeros_like(weights_of(config, 2)["autoencoder.quant_conv.weight"])
    run = run_of(
        tmp_path / "run",
        config,
        **{"autoencoder.quant_conv.weight": dead, "autoencoder.quant_conv.bias": torch.ones(8)},
    )
    with pytest.raises(UserError, match="latents of the run's data have a deviation of 0"):
        export_autoencoder(str(run), str(tmp_path / "out"))


def test_folders_that_are_no_run_or_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        export_autoencoder(str(tmp_path / "none"), str(tmp_path / "out"))
    run = run_of(tmp_path / "run", stage1(KL, FEW))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists and is not what an export writes"):
        export_autoencoder(str(run), str(tmp_path / "mine"))
    for name in ("config.json", "notes.txt"):  # another model's folder, as others keep it
        (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds config\.json, which no export writes and replacing it would lose"):
        export_autoencoder(str(run), str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "notes.txt").exists()
    with pytest.raises(UserError, match="nowhere://bucket/x: cannot be written to"):
        export_autoencoder(str(run), "nowhere://bucket/x")
    (run / "config.yaml").write_text(to_yaml(stage1(GRADIENT, FEW)))
    with pytest.raises(
        UserError, match=r"(is not there|has shape .*), the run's config has it of .*; export with the code"
    ):
        export_autoencoder(str(run), str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text(to_yaml(stage1(KL, FEW)))
    with pytest.raises(UserError, match="no checkpoint to export; train first"):
        export_autoencoder(str(tmp_path / "empty"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
