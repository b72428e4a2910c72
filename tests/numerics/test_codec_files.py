"""The files that a codec is loaded from, and those that it refuses."""

import json
import math
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from tests.numerics.test_codec import make_vae
from trainer.config import CodecConfig
from trainer.errors import UserError
from trainer.models.autoencoders import Codec, load_codec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_vae().save_pretrained(tmp_path / "vae", safe_serialization=True)
    return tmp_path / "vae"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path)


def test_loads_what_diffusers_saved(folder: Path) -> None:
    codec, vae = Codec.load(str(folder)), make_vae()
    for name, weight in vae.state_dict().items():
        assert torch.equal(codec.vae.state_dict()[name], weight)
    assert codec.scaling_factor == 0.13025
    assert codec.shift_factor == 0.0
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(codec.encode_raw(images), vae.encode(images).latent_dist.mean)


def test_loads_from_any_file_system(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/codec-test/{file.name}", file.read_bytes())
    assert Codec.load("memory://codec-test/").latent_channels == 4


def test_loads_half_precision_as_float32(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({k: v.half() for k, v in w.items()}))
    assert Codec.load(str(folder)).dtype == torch.float32


def test_loads_attention_under_its_old_names(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            for new_part, old_part in old.items():
                if f".{new_part}." in name:
                    weights[name.replace(new_part, old_part)] = weights.pop(name)
        assert "decoder.mid_block.attentions.0.proj_attn.bias" in weights

    edit_weights(folder, rename)
    found = Codec.load(str(folder)).vae.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in make_vae().state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "AutoencoderDC"},
            "_class_name is 'AutoencoderDC'; supported are AutoencoderKL, Asymm.*, Auto.*Tiny",
        ),
        ({"_class_name": ["AutoencoderKL"]}, r"_class_name is \['AutoencoderKL'\]; supported are"),
        ({"_class_name": "AutoencoderTiny"}, r"lacks decoder.layers.0.bias \(\d+ such\)"),
        ({"block_out_channels": [8, -1, 16, 24]}, "block_out_channels is"),
        ({"block_out_channels": [10**9] * 4}, "not a valid AutoencoderKL config"),
        ({"block_out_channels": [2**15, 2**16, 2**16, 2**17]}, "has shape .* not the weights"),  # terabytes, if made,
        ({"norm_num_groups": 0}, "not a valid AutoencoderKL config"),
        ({"act_fn": "nonsense"}, "not a valid AutoencoderKL config"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000; it must be 1 to 64"),
        ({"layers_per_block": 3}, r"lacks .* \(\d+ such\)"),
        ({"layers_per_block": 1}, r"has a foreign .* \(\d+ such\)"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types is"),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 4}, "down_block_types is"),
        ({"latent_channels": 10**9}, "latent_channels is 1000000000; it must be 1 to 1024"),
        ({"latent_channels": 8}, "has shape .* not the weights"),
        ({"scaling_factor": 0}, "scaling_factor is 0; it must be a positive number"),
        ({"scaling_factor": math.nan}, "scaling_factor is nan"),
        ({"shift_factor": "x"}, "shift_factor is 'x'; it must be a number or null"),
        ({"latents_mean": [0, 0, 0, 0]}, "latents scaled per channel are not supported"),
        ({"in_channels": 1}, "in_channels is 1; it must be 3"),
    ],
    ids=str,
)
def test_foreign_configs_are_refused(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    refuse(folder, message)


def test_unreadable_configs_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json: not JSON")
    (folder / "config.json").write_text("[]")
    refuse(folder, "config.json: _class_name is 'list'")
    (folder / "config.json").write_bytes(b" " * (1 << 21))
    refuse(folder, "config.json: 2097152 bytes")
    (folder / "config.json").unlink()
    refuse(folder, "config.json: no such file; give the folder of a diffusers autoencoder")


def test_unreadable_weights_are_refused(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(folder, "safetensors: not a whole safetensors file")
    path.write_bytes(b"")
    refuse(folder, "safetensors: not a whole safetensors file")
    path.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, which is never read")
    refuse(
        folder,
        r"no such file, and diffusion_pytorch_model.bin .* AutoencoderKL.from_pretrained\(FOLDER\).save_pretrained",
    )
    (folder / "diffusion_pytorch_model.bin").unlink()
    refuse(folder, "diffusion_pytorch_model.safetensors: no such file; give the folder of a diffusers autoencoder")


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda w: w["decoder.conv_in.weight"].view(-1)[3:4].fill_(math.nan))
    refuse(folder, "decoder.conv_in.weight holds values that are not finite")


@pytest.mark.parametrize("url", ["nowhere://x", "repo://../outside", "/no/such/folder"])
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Codec.load(url)
    assert url.rpartition("//")[2] in str(caught.value)


# -------------------------------------------------------------------------------------------------- the other two classes


def make_asymmetric() -> AsymmetricAutoencoderKL:
    torch.manual_seed(1)
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(4, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 12),
        layers_per_up_block=2,
        norm_num_groups=4,
    )


def make_tiny() -> AutoencoderTiny:
    torch.manual_seed(1)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(6, 6, 6),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=5,
        scaling_factor=0.7,
        shift_factor=0.3,
    )


MAKERS = {"asymmetric": make_asymmetric, "tiny": make_tiny}


def save(kind: str, folder: Path) -> Path:
    MAKERS[kind]().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize(("kind", "downsampling", "scale"), [("asymmetric", 2, 0.18215), ("tiny", 4, 0.7)])
def test_the_class_in_the_config_is_what_is_built(
    kind: str, downsampling: int, scale: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codec, vae = Codec.load(str(save(kind, tmp_path / "vae"))), MAKERS[kind]()
    assert type(codec.vae) is type(vae)
    found = codec.vae.state_dict()
    assert found.keys() == vae.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in vae.state_dict().items())
    assert not any(p.requires_grad or p.is_meta for p in codec.parameters())
    assert (codec.downsampling, codec.scaling_factor) == (downsampling, scale)
    assert "not expected" not in capfd.readouterr().err  # fields that diffusers writes and then warns of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_block_out_channels": [8, 12, 12]}, "up_block_out_channels is .* as long as down_block_out_channels, 2"),
        ({"up_block_out_channels": [8, "12"]}, "up_block_out_channels is .* a list of 1 to 16 positive integers"),
        ({"down_block_out_channels": [10**9] * 2}, "not a valid AsymmetricAutoencoderKL config"),
        ({"layers_per_down_block": 10**9}, "layers_per_down_block is 1000000000; it must be 1 to 64"),
        ({"layers_per_up_block": True}, "layers_per_up_block is True"),
        ({"layers_per_up_block": 3}, "lacks decoder.up_blocks.0.resnets.3"),
        ({"up_block_types": ["UpDecoderBlock2D", ["x"]]}, "up_block_types is .* 2 of UpDecoderBlock2D"),
        ({"down_block_types": []}, "down_block_types is"),
        ({"latents_std": [1.0] * 4}, "latents scaled per channel are not supported"),
        ({"scaling_factor": "1"}, "scaling_factor is '1'"),
    ],
    ids=str,
)
def test_foreign_asymmetric_configs_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    edit_config(save("asymmetric", tmp_path / "vae"), **changes)
    refuse(tmp_path / "vae", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_block_out_channels": [8, 8, 16]}, "encoder_block_out_channels is .* equal numbers"),
        ({"decoder_block_out_channels": [6, 6]}, "num_decoder_blocks is .* as many numbers, 1 to 64, as decoder_block"),
        ({"decoder_block_out_channels": [6] * 2, "num_decoder_blocks": [1] * 2}, "as long as encoder_block_out_channels, 3"),
        ({"decoder_block_out_channels": [2**40] * 3}, "not a valid AutoencoderTiny config"),
        ({"num_encoder_blocks": [1, 2, 10**9]}, "num_encoder_blocks is"),
        ({"num_encoder_blocks": 3}, "num_encoder_blocks is 3"),
        ({"num_encoder_blocks": [1, 2, 2]}, "lacks encoder.layers"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor is 3; it must be 2"),
        ({"upsample_fn": "trilinear"}, "upsample_fn is 'trilinear'; it must be one of nearest"),
        ({"act_fn": 3}, "not a valid AutoencoderTiny config"),
        ({"shift_factor": math.inf}, "shift_factor is inf"),
        ({"out_channels": 4}, "out_channels is 4; it must be 3"),
    ],
    ids=str,
)  # fmt: skip
def test_foreign_tiny_configs_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    edit_config(save("tiny", tmp_path / "vae"), **changes)
    refuse(tmp_path / "vae", message)


# ----------------------------------------------------------------------------------------------------- what a run declares


def test_a_run_declares_channels_and_downsampling(tmp_path: Path) -> None:
    url = str(save("tiny", tmp_path / "vae"))
    codec = load_codec(CodecConfig(url=url, latent_channels=5, downsampling=4))
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(codec.encode_raw(images), make_tiny().encode(images).latents)

    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # refused before weights are read
    with pytest.raises(UserError) as caught:
        load_codec(CodecConfig(url=url, latent_channels=4, downsampling=4))
    assert str(caught.value) == (
        f"task.codec.latent_channels: 4, but the autoencoder at {url} has 5; set it to 5, or give the URL of an "
        "autoencoder with 4"
    )
    with pytest.raises(UserError, match=r"task\.codec\.downsampling: 8, but the autoencoder at .* has 4; set it to 4"):
        load_codec(CodecConfig(url=url, latent_channels=5))


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Codec.load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
