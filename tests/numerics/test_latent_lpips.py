"""E-LatentLPIPS against a plain computation in float64; its augmentation against numpy's flips; and files that cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from tests.perceptual import make_context
from trainer.config import LatentLPIPSConfig, LatentVGGConfig
from trainer.errors import UserError
from trainer.losses.latent_lpips import LatentLPIPSLoss, augmented, draw_augmentations
from trainer.models.autoencoders import Codec
from trainer.models.latent_network_files import LatentNetworkInfo, read_latent_network, write_latent_network
from trainer.models.latent_vgg import LatentVGG

SMALL = LatentVGGConfig(widths=(8, 12, 16, 16, 24), convs_per_stage=(1, 2, 1, 1, 2), norm_num_groups=4)
PLAIN = LatentVGGConfig(widths=(8, 12, 16, 16, 24), convs_per_stage=(1, 2, 1, 1, 2), norm_num_groups=None)
DEEP = LatentVGGConfig(widths=(8, 8, 8, 8, 8), convs_per_stage=(1,) * 5, norm_num_groups=2, pooled_stages=(2, 3, 4, 5))
SIDE = 12


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return Codec(AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, **blocks))


def write(folder: Path, config: LatentVGGConfig = SMALL, *, heads: bool = False, **info) -> str:
    """A network with random weights, biases and norms among them, as an export writes it."""
    torch.manual_seed(3)
    network = LatentVGG(config, 4)
    network.init_weights()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    folder.mkdir(parents=True, exist_ok=True)
    write_latent_network(folder, LatentNetworkInfo(latent_channels=4, model=config, **info), network, torch.float32)
    if heads:
        drawn = {f"heads.{i}": torch.rand(width) for i, width in enumerate(config.widths)}
        safetensors.torch.save_file(
            {**safetensors.torch.load_file(folder / "model.safetensors"), **drawn}, folder / "model.safetensors"
        )
    return str(folder)


def make_latents(batch: int = 3, side: int = SIDE, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(batch, 4, side, side, generator=generator)
    return z0 + 0.4 * torch.randn(z0.shape, generator=generator), z0


# ----------------------------------------------------------------------------------------------- a plain computation


def plain_distance(folder: str, z0_hat: Tensor, z0: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss (B,) in float64 and its parts, from the files alone."""
    config = json.loads(Path(folder, "config.json").read_text())["model"]
    weights = {k: v.double() for k, v in safetensors.torch.load_file(Path(folder, "model.safetensors")).items()}
    parts = []
    a, b = z0_hat.double(), z0.double()
    for stage, (width, count) in enumerate(zip(config["widths"], config["convs_per_stage"], strict=True)):
        a, b = (plain_stage(x, weights, config, stage, count) for x in (a, b))
        head = weights.get(f"heads.{stage}", torch.full((width,), 1 / width, dtype=torch.float64))
        unit_a, unit_b = (x / x.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-10) for x in (a, b))
        parts.append(F.conv2d((unit_a - unit_b) ** 2, head.view(1, -1, 1, 1)).mean((1, 2, 3)))
    return sum(parts, torch.zeros(len(z0))), parts


def plain_stage(x: Tensor, weights: dict[str, Tensor], config: dict, stage: int, count: int) -> Tensor:
    if stage + 1 in config["pooled_stages"]:
        x = F.max_pool2d(x, 2)
    for i in range(count):
        x = F.conv2d(
            x, weights[f"stages.{stage}.convs.{i}.weight"], weights[f"stages.{stage}.convs.{i}.bias"], padding=1
        )
        if config["norm_num_groups"]:
            groups = x.unflatten(1, (config["norm_num_groups"], -1)).flatten(2)
            groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
            scale, shift = (weights[f"stages.{stage}.norms.{i}.{name}"] for name in ("weight", "bias"))
            x = groups.view_as(x) * scale[:, None, None] + shift[:, None, None]
        x = x.relu()
    return x


@pytest.mark.parametrize(("config", "heads"), [(SMALL, False), (SMALL, True), (PLAIN, True), (DEEP, False)])
def test_values_and_gradients_match_the_plain_computation(config, heads, codec, tmp_path) -> None:
    folder = write(tmp_path, config, heads=heads)
    z0_hat, z0 = make_latents(side=16)
    ours, plain = z0_hat.clone().requires_grad_(), z0_hat.double().requires_grad_()
    loss_B, terms = LatentLPIPSLoss(LatentLPIPSConfig(url=folder), codec)(
        ours, z0, torch.tensor([0.5, 3.0, 3.1]), make_context(z0)
    )
    plain_B, parts = plain_distance(folder, plain, z0)
    inside = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(loss_B.double(), plain_B * inside, rtol=1e-5, atol=0)
    assert list(terms) == ["gate", *(f"latent_lpips_{i}" for i in range(1, 6))]
    for i, part in enumerate(parts, start=1):
        torch.testing.assert_close(terms[f"latent_lpips_{i}"].double(), part * inside, rtol=1e-5, atol=0)
        assert not terms[f"latent_lpips_{i}"].requires_grad
    assert terms["gate"].tolist() == [1.0, 1.0, 0.0]
    weights = torch.tensor([2.0, 0.5, 7.0])
    (loss_B * weights).sum().backward()
    (plain_B * inside * weights).sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    error = (ours.grad.double() - plain.grad).norm() / plain.grad.norm()
    assert error < 1e-4
    assert ours.grad[2].eq(0).all()
    assert plain_B.min() > 1e-3


def test_bf16_is_near(codec, tmp_path) -> None:
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path)), codec)
    z0_hat, z0 = make_latents()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_B, _ = loss(z0_hat, z0, torch.zeros(3), make_context(z0))
    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B.double(), plain_distance(str(tmp_path), z0_hat, z0)[0], rtol=2e-2, atol=0)


def test_chunks_make_no_difference(codec, tmp_path) -> None:
    z0_hat, z0 = make_latents(batch=5)
    whole, parts = (
        LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path), augment=True, chunk_size=size), codec)(
            z0_hat, z0, torch.zeros(5), make_context(z0)
        )[0]
        for size in (16, 2)
    )
    torch.testing.assert_close(whole, parts)


# ------------------------------------------------------------------------------------------------- gate and edge cases


def test_outside_the_gate_nothing_is_seen_and_inside_what_is_not_finite_shows(codec, tmp_path) -> None:
    z0_hat, z0 = make_latents(batch=4)
    z0_hat[0] = float("nan")  # outside
    z0_hat[1, 2, 5, 5] = float("inf")
    z0_hat[2, 0, 0, 0] = float("nan")
    for augment in (False, True):
        loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path), augment=augment), codec)
        loss_B, terms = loss(z0_hat, z0, torch.tensor([9.0, 1.0, 1.0, 1.0]), make_context(z0))
        assert loss_B[0] == 0
        assert not loss_B[1:3].isfinite().any()
        assert 0 < loss_B[3] < 1
        assert terms["gate"].tolist() == [0, 1, 1, 1]


def test_what_the_augmentation_hides_shows_all_the_same(codec, tmp_path) -> None:
    """A pixel at the centre of the square that is cut out, in every sample's own place."""
    z0_hat, z0 = make_latents(batch=8)
    context = make_context(z0)
    drawn = draw_augmentations(context.uniform("augmentation"), SIDE)
    marked = torch.zeros_like(z0_hat)
    for row, (turn, down, right, centre_row, centre_column) in enumerate(drawn.tolist()):
        source = torch.arange(SIDE * SIDE).view(1, SIDE, SIDE).float()
        seen = numpy_augmented(source[0].numpy(), turn, down, right, (0, 0), cut=False)
        marked[row].view(4, -1)[:, int(seen[centre_row, centre_column])] = float("nan")
    hidden = augmented(z0_hat + marked, drawn)
    shifted_in = drawn[:, 1].abs() + drawn[:, 2].abs() == 0
    assert hidden[shifted_in].isfinite().all()
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path), augment=True), codec)
    assert not loss(z0_hat + marked, z0, torch.zeros(8), context)[0].isfinite().any()


def test_no_row_inside_costs_nothing_and_has_a_graph_and_the_same_terms(codec, tmp_path) -> None:
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path), augment=True), codec)
    z0_hat, z0 = make_latents()
    some = loss(z0_hat, z0, torch.zeros(3), make_context(z0))[1]
    loss.network = None  # type: ignore[assignment]  # whoever ran it would find out
    loss_B, terms = loss(z0_hat.requires_grad_(), z0, torch.full((3,), 9.0), make_context(z0))
    assert list(terms) == list(some)
    assert loss_B.eq(0).all()
    loss_B.sum().backward()
    assert z0_hat.grad is not None
    assert z0_hat.grad.eq(0).all()


def test_pixels_without_any_active_channel_have_a_finite_gradient(codec, tmp_path) -> None:
    folder = Path(write(tmp_path, PLAIN))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["stages.0.convs.0.bias"] -= 1e3
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    z0_hat, z0 = make_latents()
    loss_B, terms = LatentLPIPSLoss(LatentLPIPSConfig(url=str(folder)), codec)(
        z0_hat.requires_grad_(), z0, torch.zeros(3), make_context(z0)
    )
    loss_B.sum().backward()
    assert terms["latent_lpips_1"].eq(0).all()
    assert z0_hat.grad is not None
    assert z0_hat.grad.eq(0).all()


def test_frozen(codec, tmp_path) -> None:
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path)), codec).train()
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(module.training for module in loss.modules())
    assert loss.state_tensors() == {}


# -------------------------------------------------------------------------------------------------------- augmentation


def numpy_augmented(
    image: np.ndarray, turn: int, down: int, right: int, centre: tuple[int, int], *, cut: bool = True
) -> np.ndarray:
    """The augmentation of one channel, step by step."""
    side = len(image)
    out = image.T if turn & 4 else image
    out = np.flipud(out) if turn & 2 else out
    out = np.fliplr(out) if turn & 1 else out
    padded = np.pad(out, side)
    out = padded[side - down : 2 * side - down, side - right : 2 * side - right].copy()
    if cut:
        top, left = (c - side // 4 for c in centre)
        out[max(top, 0) : max(top + side // 2, 0), max(left, 0) : max(left + side // 2, 0)] = 0
    return out


def test_augmentation_is_what_numpy_makes_of_it() -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = draw_augmentations(torch.rand(64, generator=generator, dtype=torch.float64), SIDE)
    latents = torch.randn(64, 2, SIDE, SIDE, generator=generator)
    out = augmented(latents, drawn)
    for row, (turn, down, right, *centre) in enumerate(drawn.tolist()):
        for channel in range(2):
            expected = numpy_augmented(latents[row, channel].numpy(), turn, down, right, (centre[0], centre[1]))
            np.testing.assert_array_equal(out[row, channel].numpy(), expected)


def test_the_eight_turns_are_all_flips_and_rotations() -> None:
    image = np.arange(9.0).reshape(3, 3)
    turns = {numpy_augmented(image, turn, 0, 0, (0, 0), cut=False).tobytes() for turn in range(8)}
    assert turns == {np.rot90(flipped, k).tobytes() for flipped in (image, np.fliplr(image)) for k in range(4)}
    assert len(turns) == 8


def test_draws_are_even_and_independent_of_each_other() -> None:
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw_augmentations(draws, 16)
    assert drawn.dtype == torch.int64
    bases = ((8, 0), (5, -2), (5, -2), (16, 0), (16, 0))
    for column, (base, first) in zip(drawn.T, bases, strict=True):
        counts = torch.bincount(column - first, minlength=base)
        assert len(counts) == base
        expected = len(draws) / base
        assert ((counts - expected).abs() < 5 * expected**0.5).all()
    correlation = torch.corrcoef(drawn.T.double()) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 5 / len(draws) ** 0.5
    assert torch.equal(draw_augmentations(draws, 16), drawn)
    last = draw_augmentations(torch.tensor([np.nextafter(1.0, 0.0)]), 16)
    assert last.tolist() == [[7, 2, 2, 15, 15]]


def test_both_latents_are_augmented_alike(codec, tmp_path) -> None:
    folder = write(tmp_path)
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=folder, augment=True), codec)
    z0_hat, z0 = make_latents(batch=6)
    context, levels = make_context(z0), torch.zeros(6)
    assert loss(z0, z0, levels, context)[0].eq(0).all()
    loss_B, _ = loss(z0_hat, z0, levels, context)
    drawn = draw_augmentations(context.uniform("augmentation"), SIDE).tolist()
    a, b = (
        torch.from_numpy(np.stack([
            np.stack([numpy_augmented(channel.numpy(), row[0], row[1], row[2], (row[3], row[4])) for channel in z[i]])
            for i, row in enumerate(drawn)
        ]))
        for z in (z0_hat, z0)
    )  # fmt: skip
    torch.testing.assert_close(loss_B.double(), plain_distance(folder, a, b)[0], rtol=1e-5, atol=0)
    assert (loss_B - LatentLPIPSLoss(LatentLPIPSConfig(url=folder), codec)(z0_hat, z0, levels, context)[0]).ne(0).all()


def test_what_is_cut_out_or_shifted_away_has_no_gradient(codec, tmp_path) -> None:
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path), augment=True), codec)
    z0_hat, z0 = make_latents(batch=6)
    context = make_context(z0)
    loss(z0_hat.requires_grad_(), z0, torch.zeros(6), context)[0].sum().backward()
    ones = torch.ones(6, 1, SIDE, SIDE, requires_grad=True)
    augmented(ones, draw_augmentations(context.uniform("augmentation"), SIDE)).sum().backward()
    assert z0_hat.grad is not None
    assert ones.grad is not None
    seen = ones.grad.expand(-1, 4, -1, -1) > 0
    assert torch.equal(z0_hat.grad != 0, seen)
    assert 0.3 < seen.float().mean() < 0.9


# ------------------------------------------------------------------------------------------------- network and files


def test_default_network_is_vgg16_on_latents() -> None:
    with torch.device("meta"):
        network = LatentVGG(LatentVGGConfig(), 4, 1000)
        maps = network.features(torch.zeros(2, 4, 32, 32))
        assert network(torch.zeros(2, 4, 32, 32)).shape == (2, 1000)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 32, 32), (128, 32, 32), (256, 32, 32), (512, 16, 16), (512, 8, 8)
    ]  # fmt: skip
    convolutions = sum(p.numel() for name, p in network.named_parameters() if ".convs." in name)
    vgg16_published = 14_714_688
    assert convolutions == vgg16_published + 64 * 9  # one more input channel


def test_features_of_the_smallest_latents_and_of_odd_ones() -> None:
    network = LatentVGG(LatentVGGConfig(), 4)
    network.init_weights()
    assert network.features(torch.randn(1, 4, 4, 4))[-1].shape == (1, 512, 1, 1)
    assert network.features(torch.randn(1, 4, 7, 7))[-1].shape == (1, 512, 1, 1)


def test_initial_activations_keep_their_size_through_thirteen_layers() -> None:
    for groups in (32, None):
        torch.manual_seed(0)
        network = LatentVGG(LatentVGGConfig(norm_num_groups=groups), 4)
        network.init_weights()
        sizes = [m.square().mean().sqrt().item() for m in network.features(torch.randn(2, 4, 16, 16))]
        assert all(0.3 < size < 3 for size in sizes), sizes


def test_poolings_and_the_resolution(codec, tmp_path) -> None:
    loss = LatentLPIPSLoss(LatentLPIPSConfig(url=write(tmp_path, DEEP)), codec)
    assert loss.check(128) == []
    with pytest.raises(UserError, match=r"resolution 64: latents of 8 pixels a side, .* need 16; train at 128 px"):
        loss.check(64)


def test_another_latent_space_is_refused_or_warned_of(codec, tmp_path) -> None:
    same = write(tmp_path / "same", scaling_factor=codec.scaling_factor, shift_factor=0.0)
    assert LatentLPIPSLoss(LatentLPIPSConfig(url=same), codec).check(256) == []
    other = write(tmp_path / "other", scaling_factor=0.13025, shift_factor=0.0)
    (warning,) = LatentLPIPSLoss(LatentLPIPSConfig(url=other), codec).check(256)
    assert "trained on latents of scaling_factor 0.13025, the codec's is 0.18215" in warning
    config = json.loads(Path(same, "config.json").read_text())
    weights = safetensors.torch.load_file(f"{same}/model.safetensors")
    weights["stages.0.convs.0.weight"] = torch.zeros(8, 16, 3, 3)
    safetensors.torch.save_file(weights, f"{same}/model.safetensors")
    Path(same, "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(UserError, match=r"task\.perceptual\.url: .* takes 16 channels, the codec's latents have 4"):
        LatentLPIPSLoss(LatentLPIPSConfig(url=same), codec)


def test_files_give_the_same_network_back(tmp_path) -> None:
    folder = write(tmp_path, resolution=256)
    info, network, heads = read_latent_network(folder)
    assert (info.latent_channels, info.model, info.resolution) == (4, SMALL, 256)
    assert [head.tolist() for head in heads] == [[pytest.approx(1 / width)] * width for width in SMALL.widths]
    assert not network.training
    z0 = make_latents()[1]
    again = tmp_path / "again"
    again.mkdir()
    write_latent_network(again, info, network, torch.float16)
    half = read_latent_network(str(again))[1]
    for a, b in zip(network.features(z0), half.features(z0), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_a_classifier_in_the_file_is_passed_over(tmp_path) -> None:
    weights = safetensors.torch.load_file(f"{write(tmp_path)}/model.safetensors")
    safetensors.torch.save_file({**weights, "classifier.weight": torch.zeros(10, 24)}, tmp_path / "model.safetensors")
    assert read_latent_network(str(tmp_path))[1].classifier is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": None}, "no latent network there .*`loupe export`"),
        ({"model.safetensors": None}, "no latent network there"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": "[1]"}, "names no latent_channels"),
        ({"config.json": " " * (1 << 17)}, "131072 bytes"),
        ({"config.json": {"latent_channels": 0}}, "latent_channels: .*greater than or equal to 1"),
        ({"config.json": {"format": "other"}}, "format: "),
        ({"config.json": {"model": {"widths": [8, 12]}}}, "widths: .*at least 5"),
        ({"config.json": {"model": {"widths": [10**9] * 5}}}, "widths.0: .*8192"),
        ({"config.json": {"model": {"norm_num_groups": 5}}}, "norm_num_groups: 5 does not divide the 64"),
        ({"config.json": {"model": {"pooled_stages": [4, 4]}}}, "names a stage twice"),
        ({"config.json": {"scaling_factor": -1}}, "scaling_factor: "),
        ({"model.safetensors": b"\x00" * 9}, "not a whole safetensors file"),
        ({"weights": {"stages.0.convs.0.weight": None}}, r"lacks stages\.0\.convs\.0\.weight \(1 such\)"),
        ({"weights": {"other": torch.zeros(1)}}, "has a foreign other"),
        ({"weights": {"stages.0.convs.0.bias": torch.zeros(9)}}, r"has shape \(9,\), .* says \(8,\)"),
        ({"weights": {"stages.0.convs.0.bias": torch.full((8,), float("nan"))}}, "not finite"),
        ({"weights": {"heads.0": torch.zeros(8)}}, r"lacks heads\.1 \(4 such\)"),
        ({"weights": {f"heads.{i}": torch.full((w,), -1.0) for i, w in enumerate(SMALL.widths)}}, "negative"),
    ],
)
def test_bad_files_are_refused_in_one_line(change, message, tmp_path) -> None:
    folder = Path(write(tmp_path))
    for name, content in change.items():
        if name == "weights":
            weights = {**safetensors.torch.load_file(folder / "model.safetensors"), **content}
            weights = {k: v for k, v in weights.items() if v is not None}
            safetensors.torch.save_file(weights, folder / "model.safetensors")
        elif content is None:
            (folder / name).unlink()
        elif isinstance(content, dict):
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**config, **content}))
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as e:
        read_latent_network(str(folder))
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)
