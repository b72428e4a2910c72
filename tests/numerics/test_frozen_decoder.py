"""The cheap copy of a codec's decoder against the codec itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import FrozenDecoder, cut_out
from trainer.models.frozen_layers import (
    NO_SAVINGS,
    FrozenConv,
    FrozenNorm,
    PhaseConv,
    Savings,
    frozen_chain,
    norm_silu,
    norm_silu_gradient,
    phase_weight,
)
from trainer.models.published_codecs import BLOCKS, asymmetric, kl

NARROW: dict[str, Any] = dict(block_out_channels=(8, 12, 16, 16), norm_num_groups=4, layers_per_block=1)
WITH_ATTENTION = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")
VAES: dict[str, Callable[[], Any]] = {
    "sdxl": lambda: kl(**NARROW, scaling_factor=0.13025),
    "sd3": lambda: kl(
        **NARROW, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "no_attention": lambda: kl(**NARROW, mid_block_add_attention=False),
    "attention_in_a_block": lambda: kl(**{**NARROW, "up_block_types": WITH_ATTENTION}),
    "another_activation": lambda: kl(**NARROW, act_fn="gelu"),
    "one_block": lambda: kl(
        **{**NARROW, "block_out_channels": (8,), **{k: v[:1] for k, v in BLOCKS.items()}},
    ),
    "asymmetric": lambda: asymmetric((8, 12, 16, 20), 2, down_block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    "vq": lambda: VQModel(**NARROW, **BLOCKS, latent_channels=4, num_vq_embeddings=16),
    "tiny": lambda: AutoencoderTiny(latent_channels=4, decoder_block_out_channels=(12,) * 4,
                                    encoder_block_out_channels=(12,) * 4),
    "tiny_bilinear": lambda: AutoencoderTiny(latent_channels=4, upsample_fn="bilinear",
                                             decoder_block_out_channels=(12,) * 4, encoder_block_out_channels=(12,) * 4),
}  # fmt: skip


def make_codec(name: str = "sdxl") -> Codec:
    torch.manual_seed(0)
    codec = Codec(VAES[name]())
    for module in codec.modules():
        if isinstance(module, nn.GroupNorm):  # as trained: neither one nor zero
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return codec


def make_latents(codec: Codec, height: int = 6, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, codec.latent_channels, height, width, generator=generator)
    return (z * codec.scaling_factor).to(codec.dtype)


def relative(found: Tensor, want: Tensor) -> float:
    assert found.shape == want.shape
    return ((found.double() - want.double()).norm() / want.double().norm()).item()


def maps_and_gradient(decode: Callable[[Tensor], list[Tensor]], latents: Tensor) -> tuple[list[Tensor], Tensor]:
    latents = latents.clone().requires_grad_()
    maps = decode(latents)
    generator = torch.Generator().manual_seed(2)
    total = sum((m * torch.randn(m.shape, generator=generator, dtype=torch.float64).to(m)).sum() for m in maps)
    assert isinstance(total, Tensor)
    (gradient,) = torch.autograd.grad(total, latents)
    return [m.detach() for m in maps], gradient


# --------------------------------------------------------------------------------------------------------- it is the same


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_maps_images_and_gradient_are_the_codec_s(name: str, dtype: torch.dtype, bound: float) -> None:
    codec = make_codec(name).to(dtype)
    decoder, latents = FrozenDecoder(codec), make_latents(codec)
    want, want_gradient = maps_and_gradient(codec.decode_features, latents)
    found, gradient = maps_and_gradient(decoder, latents)
    assert (decoder.map_names, decoder.map_scales) == (codec.map_names, codec.map_scales())
    assert [m.dtype for m in found] == [dtype] * len(codec.map_names)
    for a, b in zip(found, want, strict=True):
        assert relative(a, b) < bound
    assert relative(gradient, want_gradient) < bound
    with torch.no_grad():
        assert relative(decoder.images(latents), codec.decode(latents)) < bound


@pytest.mark.parametrize(
    "savings",
    [NO_SAVINGS, Savings(weight_only=False), Savings(phase_convolution=False), Savings(channels_last=False)],
    ids=str,
)
def test_each_saving_alone_changes_nothing(savings: Savings) -> None:
    codec = make_codec().double()
    latents = make_latents(codec)
    want, want_gradient = maps_and_gradient(codec.decode_features, latents)
    found, gradient = maps_and_gradient(FrozenDecoder(codec, savings=savings), latents)
    assert max(relative(a, b) for a, b in zip(found, want, strict=True)) < 1e-12
    assert relative(gradient, want_gradient) < 1e-12


def test_float64_under_autocast_stays_float64() -> None:
    codec = make_codec().double()
    latents = make_latents(codec)
    want, want_gradient = maps_and_gradient(codec.decode_features, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, gradient = maps_and_gradient(FrozenDecoder(codec), latents)
    assert max(relative(a, b) for a, b in zip(found, want, strict=True)) < 1e-12
    assert relative(gradient, want_gradient) < 1e-12


def test_bfloat16_is_within_its_rounding() -> None:
    codec = make_codec()
    latents = make_latents(codec)
    want, want_gradient = maps_and_gradient(codec.decode_features, latents)
    decoder = FrozenDecoder(codec, dtype=torch.bfloat16)
    norms = [module.weight.dtype for module in decoder.modules() if isinstance(module, FrozenNorm)]
    assert set(norms) == {torch.float32}
    found, gradient = maps_and_gradient(decoder, latents)
    assert {m.dtype for m in found} == {torch.bfloat16}
    assert gradient.dtype == torch.float32
    for a, b in zip(found, want, strict=True):
        assert relative(a, b) < 0.03
    assert relative(gradient, want_gradient) < 0.06
    assert codec.dtype == torch.float32, "the codec is another's"


# --------------------------------------------------------------------------------------------------------- its layers


@pytest.mark.parametrize("kind", ["diffusers", "torch"])
def test_phase_convolution_is_upsampling_and_a_convolution(kind: str) -> None:
    """1e-12 in float64, values and gradients, with and without a bias, for sides that are odd."""
    torch.manual_seed(0)
    for bias in (True, False):
        conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double().requires_grad_(False)
        x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
        want = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if kind == "diffusers":
            found = PhaseConv(conv)(x)
        else:
            (layer,) = frozen_chain([nn.Upsample(scale_factor=2), conv])
            assert isinstance(layer, PhaseConv)
            found = layer(x)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(want)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (found, want)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_phase_weight_holds_each_tap_s_share() -> None:
    """A kernel that is 1 at one tap: four input pixels' worth of it, where upsampling puts them."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 1] = 1.0  # the pixel above
    want = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.float32)
    assert torch.equal(phase_weight(weight)[0, 0], want)


@pytest.mark.parametrize("kernel", [1, 3])
def test_frozen_convolution(kernel: int) -> None:
    conv = nn.Conv2d(3, 4, kernel, padding=kernel // 2).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FrozenConv(conv), (x,))
    torch.testing.assert_close(FrozenConv(conv)(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 8, 7)], ids=str)
def test_frozen_norm(silu: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).requires_grad_()
    layer = FrozenNorm(norm, silu=silu)
    want = F.silu(norm(x)) if silu else norm(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 8, 4, 1), (32, 1, 8, 1)), ((2, 8, 1, 1), (8, 1, 1, 1)), ((1, 8, 2, 2), (5, 1, 16, 8))],
    ids=str,
)
def test_frozen_norm_of_sides_of_1(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Where strides do not tell in which order a map lies."""
    norm = nn.GroupNorm(4, 8).requires_grad_(False)
    x = torch.empty_strided(shape, strides).copy_(torch.randn(shape)).requires_grad_()
    found, want = FrozenNorm(norm, silu=False)(x), norm(x)
    torch.testing.assert_close(found, want)
    upstream = torch.randn(shape)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (found, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_norm_of_a_gpu_computes_what_the_cpu_s_does(
    silu: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, upstream = (torch.randn(2, 8, 6, 5).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.rand(8), torch.randn(8)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()

    def passes() -> tuple[Tensor, ...]:
        y, mean, rstd = norm_silu(x, weight, bias, 4, 1e-5, silu)
        return y, mean, rstd, norm_silu_gradient(upstream, x, mean, rstd, weight, bias, silu)

    want = passes()
    monkeypatch.setattr("trainer.models.frozen_layers.ON_CPU", ())
    for a, b in zip(passes(), want, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < (1e-12 if dtype == torch.float64 else 4e-3)
    assert passes()[0].is_contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------- what it costs and holds


@contextmanager
def kept_bytes(holder: nn.Module) -> Iterator[list[int]]:
    """Bytes that the graph keeps for the backward pass, each storage once; `holder`'s weights, kept anyway, are left out."""
    own = {t.untyped_storage().data_ptr() for t in (*holder.parameters(), *holder.buffers())}
    kept: dict[int, int] = {}
    total = [0]
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | kept.keys():
            held.append(tensor)  # alive, so that no other tensor takes its place in memory
            kept[storage.data_ptr()] = storage.nbytes()
        total[0] = sum(kept.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def kept_by(decode: Callable[[Tensor], list[Tensor]], holder: nn.Module, latents: Tensor) -> int:
    with kept_bytes(holder) as total:
        decode(latents.clone().requires_grad_())
    return total[0]


def test_a_third_of_the_memory_is_kept() -> None:
    codec = make_codec("no_attention")
    latents = make_latents(codec, 8, 8)
    plain, lean = FrozenDecoder(codec, savings=NO_SAVINGS), FrozenDecoder(codec)
    before, after = kept_by(plain, plain, latents), kept_by(lean, lean, latents)
    assert kept_by(codec.decode_features, codec, latents) == before
    # inputs of norms are all: those of convolutions, of activations and upsampled maps are gone
    inputs: list[int] = []
    for module in lean.modules():
        if isinstance(module, FrozenNorm):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].untyped_storage().nbytes()))
    with torch.no_grad():
        lean(latents)
    assert sum(inputs) <= after < sum(inputs) + 20_000  # means and deviations of groups
    assert after < 0.36 * before


def test_only_what_runs_is_copied() -> None:
    codec = make_codec()

    def count(module: nn.Module) -> int:
        return sum(t.numel() for t in (*module.parameters(), *module.buffers()))

    decoder: Any = codec.vae.decoder
    two = FrozenDecoder(codec, 2)
    held = [codec.vae.post_quant_conv, decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]]
    upsampler = decoder.up_blocks[0].upsamplers[0].conv.weight.numel()
    assert count(two) == sum(count(module) for module in held) + upsampler * 7 // 9  # 16 taps in place of 9
    assert two.head is None
    with pytest.raises(AssertionError, match="only mid, up0 are here"):
        two.images(make_latents(codec))
    for a, b in zip(two(make_latents(codec)), codec.decode_features(make_latents(codec), 2), strict=True):
        assert relative(a, b) < 1e-5
    shared = {p.data_ptr() for p in codec.parameters()} & {t.data_ptr() for t in (*two.parameters(), *two.buffers())}
    assert not shared


def test_it_is_frozen_and_follows_to() -> None:
    codec = make_codec()
    decoder = FrozenDecoder(codec)
    assert not any(t.requires_grad for t in (*decoder.parameters(), *decoder.buffers()))
    assert not any(module.training for module in nn.ModuleList([decoder]).train()[0].modules())
    latents = make_latents(codec)
    decoder.double()
    found = decoder(latents)
    assert {m.dtype for m in found} == {torch.float64}
    codec.double()
    assert max(relative(a, b) for a, b in zip(found, codec.decode_features(latents), strict=True)) < 1e-6
    with torch.no_grad():
        decoder(latents)[-1].sum()
    assert FrozenDecoder(make_codec().bfloat16()).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("name", ["sdxl", "no_attention", "tiny"])
def test_a_window_cuts_the_second_map_and_what_is_deeper(name: str) -> None:
    codec = make_codec(name).double()
    decoder, latents = FrozenDecoder(codec), make_latents(codec)
    tops, lefts, height, width = torch.tensor([0, 3, 6]), torch.tensor([4, 0, 1]), 6, 5
    found = decoder(latents, (tops, lefts, height, width))
    whole = codec.decode_features(latents)
    assert [relative(a, b) < 1e-12 for a, b in zip(found[:2], whole[:2], strict=True)] == [True, True]
    second = codec.map_scales()[1]
    sides = [(height * scale // second, width * scale // second) for scale in codec.map_scales()]
    assert [tuple(m.shape[2:]) for m in found[2:]] == sides[2:]
    for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        h = whole[1][i : i + 1, :, top : top + height, left : left + width]
        for stage, part in zip(codec.decoder_stages()[2:], found[2:], strict=True):
            for module in stage:
                h = module(h)
            assert relative(part[i : i + 1], h) < 1e-12


def test_the_whole_as_a_window_changes_nothing_and_gradients_go_through() -> None:
    codec = make_codec().double()
    decoder, latents = FrozenDecoder(codec), make_latents(codec)
    zeros = torch.zeros(3, dtype=torch.long)
    want, want_gradient = maps_and_gradient(decoder, latents)
    found, gradient = maps_and_gradient(lambda z: decoder(z, (zeros, zeros, 12, 10)), latents)
    assert max(relative(a, b) for a, b in zip(found, want, strict=True)) < 1e-12
    assert relative(gradient, want_gradient) < 1e-12


def test_a_window_must_lie_within_the_map() -> None:
    with pytest.raises(AssertionError, match="beyond the map"):
        cut_out(torch.zeros(1, 1, 4, 4), (torch.tensor([2]), torch.tensor([0]), 3, 3))
