"""A `VQModel` as a codec (latent-diffusion's VQ-regularised first stages): against diffusers' own, at small widths."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from tests.perceptual import make_context
from trainer.config import LPLConfig
from trainer.errors import UserError
from trainer.losses.lpl import LatentPerceptualLoss, build_lpl
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder

PUBLISHED: dict[str, dict[str, Any]] = {
    "f4": dict(block_out_channels=(128, 256, 512), latent_channels=3, vq_embed_dim=3, num_vq_embeddings=8192),
    "f8": dict(block_out_channels=(128, 256, 256, 512), latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16384),
    "f16": dict(block_out_channels=(128, 128, 256, 256, 512), latent_channels=8, num_vq_embeddings=16384),
}
"""Rombach et al. 2022, table 8, as diffusers' converter writes them: attention at one resolution where f is 8 or 16."""
NUM_CODES = 32


def make_vq(**changes: Any) -> VQModel:
    """f4, whose codes lie where its latents are, and are all used."""
    torch.manual_seed(0)
    vae = VQModel(
        **{
            "block_out_channels": (8, 12, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "latent_channels": 3,
            "num_vq_embeddings": NUM_CODES,
            "norm_num_groups": 4,
            "scaling_factor": 0.7,
            **changes,
        }
    )
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae.eval()


def make_raw(side: int = 6) -> Tensor:
    return torch.randn(2, 3, side, side + 1, generator=torch.Generator().manual_seed(1))


def nearest_by_distance(raw_BCHW: Tensor, codes_KC: Tensor) -> Tensor:
    """(B, H, W), from every distance in float64."""
    difference = raw_BCHW.double().permute(0, 2, 3, 1)[..., None, :] - codes_KC.double()
    return difference.square().sum(-1).argmin(-1)


def test_raw_latents_are_those_before_quantisation() -> None:
    vae, codec = make_vq(), Codec(make_vq())
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latents
        assert torch.equal(codec.encode_raw(images), raw)
        torch.testing.assert_close(codec.encode(images), raw * 0.7)
    assert raw.shape == (2, 3, 4, 6)
    assert (codec.downsampling, codec.latent_channels, codec.num_codes) == (4, 3, NUM_CODES)


def test_every_pixel_has_its_nearest_code() -> None:
    codec, raw = Codec(make_vq()), make_raw()
    codes = codec.codes_KC
    assert codes is not None
    indices = codec.code_indices(raw)
    assert indices is not None
    assert torch.equal(indices, nearest_by_distance(raw, codes))
    assert len(indices.unique()) > NUM_CODES // 3
    assert codec.code_indices(codes[None, :, :, None].transpose(1, 2)).flatten().tolist() == list(range(NUM_CODES))  # type: ignore[union-attr]


@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False}, {"lookup_from_codebook": True}], ids=str)
@torch.no_grad()
def test_decoding_quantises_first_as_diffusers_does(changes: dict[str, Any]) -> None:
    vae, codec, raw = make_vq(**changes), Codec(make_vq(**changes)), make_raw()
    assert codec.codes_KC is not None
    scaled = codec.raw_to_scaled(raw)
    chosen = F.embedding(nearest_by_distance(raw, codec.codes_KC), codec.codes_KC).permute(0, 3, 1, 2)
    images = vae.decoder(vae.post_quant_conv(chosen))
    assert not torch.allclose(vae.decoder(vae.post_quant_conv(raw)), images, atol=1e-2), "quantising changes nothing"
    torch.testing.assert_close(codec.decode(scaled), images, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.decode(scaled), vae.decode(raw).sample, rtol=1e-5, atol=1e-5)
    maps = codec.decode_features(scaled)
    decoder: Any = codec.vae.decoder
    torch.testing.assert_close(decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(maps[-1]))), images)
    assert codec.map_names == ("mid", "up0", "up1", "up2")
    assert codec.map_scales() == (1, 2, 4, 4)
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 6 * scale, 7 * scale) for channels, scale in zip((16, 16, 12, 8), codec.map_scales(), strict=True)
    ]


def test_gradients_go_straight_through_to_the_latents() -> None:
    """That of the latents is that of the codes that stand for them."""
    codec, raw = Codec(make_vq()), make_raw()
    assert codec.codes_KC is not None
    chosen = F.embedding(nearest_by_distance(raw, codec.codes_KC), codec.codes_KC).permute(0, 3, 1, 2)
    chosen.requires_grad_()
    vae: Any = codec.vae
    weight = torch.randn(2, 3, 24, 28, generator=torch.Generator().manual_seed(2))
    (want,) = torch.autograd.grad((vae.decoder(vae.post_quant_conv(chosen)) * weight).sum(), chosen)
    for decode in (codec.decode, FrozenDecoder(codec).images):
        latents = codec.raw_to_scaled(raw).requires_grad_()
        (found,) = torch.autograd.grad((decode(latents) * weight).sum(), latents)
        torch.testing.assert_close(found * codec.scaling_factor, want, rtol=1e-4, atol=1e-5)
    assert codec.codes_KC.grad is None
    assert not any(p.requires_grad for p in codec.parameters())


def test_the_lean_decoder_chooses_codes_in_float32() -> None:
    """Rounded to bfloat16 first, latents between two codes would get the other one."""
    codec = Codec(make_vq())
    assert codec.codes_KC is not None
    first, second = codec.codes_KC[0], codec.codes_KC[1]
    with torch.no_grad():
        codec.codes_KC[2:] += 100.0  # out of the way
        way = F.normalize(second - first, dim=0)
        aside_NC = torch.randn(100, 3, generator=torch.Generator().manual_seed(4))
        aside_NC -= (aside_NC @ way)[:, None] * way
        between = (torch.lerp(first, second, 0.499) + aside_NC)[:, :, None, None]
        wrong = codec.code_indices(between.bfloat16())
        assert wrong is not None
        assert codec.code_indices(between).sum() == 0  # type: ignore[union-attr]
        nearly = between[wrong.flatten().argmax()].expand(1, 3, 4, 4)
        assert wrong.any(), "no latent that rounding would bring to the other code"
        latents = codec.raw_to_scaled(nearly)
        lean = FrozenDecoder(codec, dtype=torch.bfloat16)(latents)[0].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = FrozenDecoder(codec)(latents)[0]
        want = codec.decode_features(latents, 1)[0]
        other = codec.decode_features(codec.raw_to_scaled(second[None, :, None, None].expand(1, 3, 4, 4)), 1)[0]
    norm = want.norm()
    assert (lean - want).norm() < 0.02 * norm
    assert (cast - want).norm() < 1e-5 * norm
    assert (other - want).norm() > 0.05 * norm


def test_lpl_runs_on_its_decoder() -> None:
    codec = Codec(make_vq())
    z0 = codec.raw_to_scaled(make_raw(8)[..., :8])
    z0_hat = (z0 + torch.randn(z0.shape, generator=torch.Generator().manual_seed(3))).requires_grad_()
    loss = build_lpl(LPLConfig(mask_outliers="none"), codec)
    assert isinstance(loss, LatentPerceptualLoss)
    loss.check(32)
    loss_B, terms = loss(z0_hat, z0, torch.ones(2), make_context(z0, downsampling=4))
    assert terms.keys() == {"gate", "lpl_mid", "lpl_up0", "lpl_up1", "lpl_up2"}
    assert (loss_B > 0).all()
    (gradient,) = torch.autograd.grad(loss_B.sum(), z0_hat)
    assert gradient.isfinite().all()
    assert (gradient.abs() > 0).float().mean() > 0.99
    # an estimate within the truth's cells decodes to the same
    near_B, _ = loss(z0 + 1e-5, z0, torch.ones(2), make_context(z0, downsampling=4))
    assert near_B.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes(name: str) -> None:
    """Without memory: key names and shapes."""
    levels = len(PUBLISHED[name]["block_out_channels"])
    attends = int(name != "f4")
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * (levels - attends) + ("AttnDownEncoderBlock2D",) * attends,
        "up_block_types": ("AttnUpDecoderBlock2D",) * attends + ("UpDecoderBlock2D",) * (levels - attends),
    }
    f, channels = 2 ** (levels - 1), PUBLISHED[name]["latent_channels"]
    with torch.device("meta"):
        codec = Codec(VQModel(**PUBLISHED[name], **blocks, layers_per_block=2))
        assert codec.encode(torch.empty(1, 3, 64, 64)).shape == (1, channels, 64 // f, 64 // f)
        images = codec.decode(torch.empty(1, channels, 64 // f, 64 // f))
    assert images.shape == (1, 3, 64, 64)
    assert codec.scaling_factor == 0.18215
    assert f"f{codec.downsampling}" == name
    keys = set(codec.vae.state_dict())
    assert {"quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias"} <= keys
    assert any(f"encoder.down_blocks.{levels - 1}.attentions.0." in key for key in keys) == bool(attends)


# -------------------------------------------------------------------------------------------------------------- its files


def saved(folder: Path, **changes: Any) -> Path:
    make_vq().save_pretrained(folder, safe_serialization=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@torch.no_grad()
def test_loads_what_diffusers_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codec, vae, raw = Codec.load(str(saved(tmp_path))), make_vq(), make_raw()
    assert isinstance(codec.vae, VQModel)
    assert all(torch.equal(codec.vae.state_dict()[name], weight) for name, weight in vae.state_dict().items())
    assert (codec.scaling_factor, codec.shift_factor) == (0.7, 0.0)
    torch.testing.assert_close(codec.decode(codec.raw_to_scaled(raw)), vae.decode(raw).sample, rtol=1e-5, atol=1e-5)
    assert "not expected" not in capfd.readouterr().err


@torch.no_grad()
def test_a_shift_that_its_constructor_does_not_know(tmp_path: Path) -> None:
    """As an export writes it: the codec shifts, and diffusers keeps it in its config when it is saved again."""
    codec = Codec.load(str(saved(tmp_path / "a", shift_factor=0.3)))
    assert codec.shift_factor == 0.3
    raw = make_raw()
    torch.testing.assert_close(codec.raw_to_scaled(raw), (raw - 0.3) * 0.7)
    VQModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert Codec.load(str(tmp_path / "b")).shift_factor == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_vq_embeddings": 10**9}, "num_vq_embeddings is 1000000000; it must be 1 to 1048576"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings is 0"),
        ({"num_vq_embeddings": "8"}, "num_vq_embeddings is '8'"),
        ({"num_vq_embeddings": 16}, "quantize.embedding.weight has shape .* not the weights"),
        ({"vq_embed_dim": 8}, "vq_embed_dim is 8; it must be latent_channels, 3, or null"),
        ({"vq_embed_dim": 10**9}, "vq_embed_dim is 1000000000"),
        ({"norm_type": "spatial"}, "norm_type is 'spatial'; it must be group"),
        ({"latent_channels": 10**9}, "latent_channels is 1000000000"),
        ({"layers_per_block": 65}, "layers_per_block is 65; it must be 1 to 64"),
        ({"block_out_channels": [2**40] * 3}, "not a valid VQModel config"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types is"),
        ({"mid_block_add_attention": False}, "has a foreign decoder.mid_block.attentions"),
        ({"scaling_factor": -1}, "scaling_factor is -1; it must be a positive number"),
        ({"shift_factor": [0.1]}, r"shift_factor is \[0.1\]; it must be a number or null"),
        ({"in_channels": 4}, "in_channels is 4; it must be 3: images are RGB .a second stage"),
    ],
    ids=str,
)
def test_foreign_configs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Codec.load(str(saved(tmp_path, **changes)))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
