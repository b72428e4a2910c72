"""The codec against diffusers' own autoencoder, and the files that it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.autoencoders import Codec

SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": dict(latent_channels=4, scaling_factor=0.13025, force_upcast=True, layers_per_block=2),
    "sd3": dict(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    ),
    "no_attention": dict(latent_channels=4, mid_block_add_attention=False),
}


def make_vae(name: str = "sdxl", channels: tuple[int, ...] = (8, 16, 16, 24)) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **SHAPES[name],
    ).eval()


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


# ---------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_is_exactly_the_autoencoder_s(name: str) -> None:
    vae = make_vae(name)
    codec = Codec(make_vae(name))
    raw = torch.randn(2, codec.latent_channels, 5, 4)
    shift = vae.config["shift_factor"] or 0.0
    scaled = (raw - shift) * vae.config["scaling_factor"]
    with torch.no_grad():
        # the same rounding of the latents on both sides, so that what is compared is the decoder, bit by bit
        images = vae.decode(codec.scaled_to_raw(scaled)).sample
        assert torch.equal(codec.decode(scaled), images)
        maps = codec.decode_features(scaled)
        decoder = codec.vae.decoder
        assert torch.equal(decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(maps[-1]))), images)
    torch.testing.assert_close(codec.scaled_to_raw(scaled), raw, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.raw_to_scaled(raw), scaled)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 5, 4), (24, 10, 8), (16, 20, 16), (16, 40, 32), (8, 40, 32)]
    assert codec.map_scales() == tuple(m.shape[-1] // 4 for m in maps) == (1, 2, 4, 8, 8)
    assert codec.map_names == ("mid", "up0", "up1", "up2", "up3")


@pytest.mark.parametrize("name", SHAPES)
def test_encoding_is_the_mean_of_the_posterior(name: str) -> None:
    vae = make_vae(name)
    codec = Codec(make_vae(name))
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        assert torch.equal(codec.encode_raw(images), mean)
        assert torch.equal(codec.encode(images), codec.raw_to_scaled(mean))
    assert mean.shape == (2, codec.latent_channels, 4, 2)
    assert codec.downsampling == 8


def test_fewer_maps_run_less_of_the_decoder() -> None:
    class Forbidden(nn.Module):
        upsamplers = None

        def forward(self, *args) -> Tensor:
            raise AssertionError("ran")

    codec = Codec(make_vae())
    latents = torch.randn(1, 4, 4, 4)
    expected = codec.decode_features(latents)[:3]
    codec.vae.decoder.up_blocks[2] = Forbidden()
    for found, want in zip(codec.decode_features(latents, 3), expected, strict=True):
        assert torch.equal(found, want)
    with pytest.raises(AssertionError, match="ran"):
        codec.decode_features(latents, 4)


def test_the_codec_is_frozen_and_lets_gradients_through() -> None:
    codec = nn.ModuleList([Codec(make_vae().train())]).train()[0]
    assert isinstance(codec, Codec)
    assert not any(module.training for module in codec.modules())
    assert not any(p.requires_grad for p in codec.parameters())
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    maps = codec.decode_features(latents)
    maps[-1][1].square().sum().backward()
    assert latents.grad is not None
    assert latents.grad[0].abs().max() == 0.0
    assert latents.grad[1].abs().max() > 0.0


def test_a_codec_in_bfloat16_takes_float32_latents() -> None:
    codec = Codec(make_vae()).bfloat16()
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    maps = codec.decode_features(latents, 2)
    assert maps[-1].dtype == torch.bfloat16
    maps[-1].float().sum().backward()
    assert latents.grad is not None
    assert latents.grad.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- loading


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
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'; only AutoencoderKL is supported"),
        ({"block_out_channels": [8, -1, 16, 24]}, "block_out_channels is"),
        ({"block_out_channels": [10**9] * 4}, "not a valid AutoencoderKL config"),
        ({"block_out_channels": [2**15, 2**16, 2**16, 2**17]}, "has shape .* not the weights"),  # terabytes, if made,
        ({"norm_num_groups": 0}, "not a valid AutoencoderKL config"),
        ({"act_fn": "nonsense"}, "not a valid AutoencoderKL config"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000; it must be 1 to 64"),
        ({"layers_per_block": 3}, r"lacks .* \(\d+ such\)"),
        ({"layers_per_block": 1}, r"has a foreign .* \(\d+ such\)"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types is"),
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
    refuse(folder, "config.json: no such file; give the folder of a diffusers AutoencoderKL")


def test_unreadable_weights_are_refused(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(folder, "safetensors: not a whole safetensors file")
    path.write_bytes(b"")
    refuse(folder, "safetensors: not a whole safetensors file")
    path.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, which is never read")
    refuse(folder, "diffusion_pytorch_model.safetensors: no such file")


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda w: w["decoder.conv_in.weight"].view(-1)[3:4].fill_(math.nan))
    refuse(folder, "decoder.conv_in.weight holds values that are not finite")


@pytest.mark.parametrize("url", ["nowhere://x", "repo://../outside", "/no/such/folder"])
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Codec.load(url)
    assert url.rpartition("//")[2] in str(caught.value)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Codec.load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
