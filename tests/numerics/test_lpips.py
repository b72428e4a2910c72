"""LPIPS: the distance against independent computations, its gradients, and every published form of its weights."""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.numerics.lpips_reference import loader, photos, random_weights, slow_lpips, trunk_and_heads
from trainer.config import LPIPSConfig
from trainer.config.perceptual import LPIPSNetwork
from trainer.errors import UserError
from trainer.models.lpips import LPIPS, SMALLEST_SIDE
from trainer.models.lpips_weights import build_lpips

REAL = ("data", "stlpips", "alex_shift_tolerant.pth")


def images(count: int = 2, side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    a = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)
    return a, a + 0.2 * torch.randn(a.shape, generator=generator)


def value_and_gradients(distance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> list[Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value_B = distance(a, b)
    factor_B = torch.arange(1, len(a) + 1, dtype=value_B.dtype)
    return [value_B.detach(), *torch.autograd.grad((value_B * factor_B).sum(), (a, b))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-5, atol=0.0)
    for gradient, slow in zip(found[1:], expected[1:], strict=True):
        assert (gradient.double() - slow.double()).norm() <= 1e-4 * slow.double().norm()


def save(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.shared
def test_real_weights_on_real_photos(shared_dir: Path) -> None:
    url = str(shared_dir.joinpath(*REAL))
    lpips = build_lpips(LPIPSConfig(network="alex_shift_tolerant", url=url))
    reference = loader(shared_dir, "stlpips_load").STLPIPS(url)
    photo = photos(shared_dir, 3, 64)
    noisy = photo + 0.15 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    for other in (noisy, photo.flip(0), photo.roll(3, -1)):
        assert_same(value_and_gradients(lpips, photo, other), value_and_gradients(reference, photo, other))


@pytest.mark.shared
def test_real_weights_behave_as_a_perceptual_distance_does(shared_dir: Path) -> None:
    lpips = build_lpips(LPIPSConfig(network="alex_shift_tolerant", url=str(shared_dir.joinpath(*REAL))))
    photo = photos(shared_dir, 4, 96)
    with torch.no_grad():
        assert torch.equal(lpips(photo, photo), torch.zeros(4))
        torch.testing.assert_close(lpips(photo, photo.flip(0)), lpips(photo.flip(0), photo))

        def blurred(side: int) -> Tensor:
            small = F.interpolate(photo, size=(side, side), mode="bicubic", antialias=True)
            return F.interpolate(small, size=photo.shape[-2:], mode="bicubic")

        noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
        for degraded in (
            [blurred(side) for side in (72, 48, 24, 12)],
            [photo + s * noise for s in (0.05, 0.1, 0.2, 0.4)],
        ):
            distances = torch.stack([lpips(photo, other) for other in degraded])
            assert (distances[0] > 1e-4).all()
            assert (distances.diff(dim=0) > 0).all(), distances
        # what the shift-tolerant network is for: a pixel to the side is near, another photo is far
        moved = lpips(photo[..., 1:], photo[..., :-1])
        assert (moved < 0.2 * lpips(photo, photo.roll(1, 0))).all()


@cache
def slow_values(network: str) -> list[Tensor]:
    state = random_weights(network)
    return value_and_gradients(lambda x, y: slow_lpips(network, state, x, y), *images(side=32))


@pytest.mark.parametrize("network", ["vgg16", "alex"])
@pytest.mark.parametrize("form", ["package.pth", "package.safetensors", "torchvision"])
def test_published_forms_against_a_slow_computation(network: str, form: str, tmp_path: Path) -> None:
    state = random_weights(network)
    if form == "torchvision":
        trunk, heads = trunk_and_heads(state)
        config = LPIPSConfig(
            network=network,
            url=save(tmp_path / "vgg16-397923af.pth", trunk),
            heads_url=save(tmp_path / "vgg.pth", heads),
        )
    else:
        config = LPIPSConfig(network=network, url=save(tmp_path / form, state))
    lpips = build_lpips(config)
    found = value_and_gradients(lpips, *images(side=32))
    assert_same(found, slow_values(network))
    assert found[0].shape == (2,)
    assert found[0].min() > 0.01


@pytest.mark.shared
def test_shift_tolerant_vgg16(shared_dir: Path, tmp_path: Path) -> None:
    state = random_weights("vgg16_shift_tolerant")
    url = save(tmp_path / "vgg_shift_tolerant.pth", {n: t for n, t in state.items() if not n.startswith("lins.")})
    reference = loader(shared_dir, "stlpips_load").STLPIPS(url, "vgg")
    lpips = build_lpips(LPIPSConfig(network="vgg16_shift_tolerant", url=url))
    a, b = images(side=32)
    assert_same(value_and_gradients(lpips, a, b), value_and_gradients(reference, a, b))


def test_features_are_the_five_maps_after_their_activations() -> None:
    maps = LPIPS("vgg16").features(images(side=32)[0])
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512]
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 2]
    assert all(m.min() == 0 for m in maps), "a later layer has written over an earlier map, or there is no ReLU"
    lpips = LPIPS("alex")
    a, b = images()
    torch.testing.assert_close(lpips.distance(lpips.features(a), lpips.features(b)), lpips(a, b))


@pytest.mark.parametrize("network", SMALLEST_SIDE)
def test_smallest_side(network: LPIPSNetwork) -> None:
    with torch.device("meta"):
        lpips = LPIPS(network)
        side = lpips.smallest_side
        assert min(lpips.features(torch.empty(1, 3, side, side))[-1].shape) >= 1
        lpips.smallest_side = 1
        with pytest.raises(RuntimeError):
            lpips.features(torch.empty(1, 3, side - 1, side - 1))


def test_a_picture_without_features_has_finite_gradients(tmp_path: Path) -> None:
    state = random_weights("alex")
    state["net.slice1.0.bias"] -= 100.0  # nothing survives the first ReLU
    lpips = build_lpips(LPIPSConfig(network="alex", url=save(tmp_path / "w.pth", state)))
    value, *gradients = value_and_gradients(lpips, *images())
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_a_sample_that_is_not_finite_is_alone(tmp_path: Path) -> None:
    lpips = build_lpips(LPIPSConfig(network="alex", url=save(tmp_path / "w.pth", random_weights("alex"))))
    a, b = images(3)
    expected = lpips(a, b)
    a[1, 0, 5, 5] = torch.nan
    found = lpips(a, b)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_statistics_are_float32_under_autocast(tmp_path: Path) -> None:
    lpips = build_lpips(LPIPSConfig(network="alex", url=save(tmp_path / "w.pth", random_weights("alex"))))
    a, b = images()
    exact = lpips(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips.features(a)[0].dtype == torch.bfloat16
        low = lpips(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=2e-2, atol=0.0)


def test_it_is_frozen() -> None:
    lpips = LPIPS("alex")
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.train().training
    assert not any(m.training for m in lpips.modules())


# --------------------------------------------------------------------------------------------------------- other places


def test_a_folder_and_any_file_system(tmp_path: Path) -> None:
    state = random_weights("alex")
    path = Path(save(tmp_path / "lpips.safetensors", state))
    (tmp_path / "README.md").write_text("...")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/lpips-test/lpips.safetensors", path.read_bytes())
    for url in (str(tmp_path), f"file://{tmp_path}/", "memory://lpips-test", "memory://lpips-test/lpips.safetensors"):
        found = build_lpips(LPIPSConfig(network="alex", url=url)).state_dict()
        assert torch.equal(found["trunk.0.weight"], state["net.slice1.0.weight"])
        assert torch.equal(found["heads.4"], state["lin4.model.1.weight"].flatten())


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in random_weights("alex").items()}
    lpips = build_lpips(LPIPSConfig(network="alex", url=save(tmp_path / "w.pth", state)))
    assert {tensor.dtype for tensor in lpips.state_dict().values()} == {torch.float32}


def test_torchvisions_cache_is_used_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision itself is not needed for tests: what is read of it is the address that names its file."""
    trunk, heads = trunk_and_heads(random_weights("alex"))
    config = LPIPSConfig(network="alex", heads_url=save(tmp_path / "alex.pth", heads))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    refuse(config, r"task\.perceptual\.lpips\.url: absent, and torchvision cannot be used \(.*\); give a file with")

    address = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=address))
    stand_in = SimpleNamespace(AlexNet_Weights=weights, VGG16_Weights=weights)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=stand_in))
    monkeypatch.setitem(sys.modules, "torchvision.models", stand_in)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    refuse(config, rf"url: absent, and torchvision has not yet downloaded .*alexnet-owt-7be5be79\.pth; fetch {address}")

    os.makedirs(tmp_path / "home" / "hub" / "checkpoints")
    save(tmp_path / "home" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth", trunk)
    assert torch.equal(build_lpips(config).state_dict()["trunk.3.bias"], trunk["features.3.bias"])
    refuse(
        LPIPSConfig(network="alex"), r"lpips\.heads_url: absent, and .*owt.* has a trunk alone; give the file with its"
    )
    refuse(LPIPSConfig(network="vgg16_shift_tolerant"), r"url: absent; give the checkpoint of vgg16_shift_tolerant")


# ------------------------------------------------------------------------------------------------------------ bad files


Edit = Callable[[dict[str, Tensor]], object]


def without(name: str) -> Edit:
    return lambda state: state.pop(name)


def replaced(name: str, tensor: Tensor) -> Edit:
    return lambda state: state.update({name: tensor})


def with_value(name: str, value: float) -> Edit:
    return lambda state: state[name].view(-1)[1:2].fill_(value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("net.slice3.6.bias"), r"lacks net\.slice3\.6\.bias \(1 such\); not the weights of network alex"),
        (without("lin2.model.1.weight"), r"lacks lin2\.model\.1\.weight \(1 such\)"),
        (without("scaling_layer.scale"), r"lacks scaling_layer\.scale \(1 such\)"),
        (dict.clear, r"lacks lin0\.model\.1\.weight \(17 such\)"),
        (replaced("net.slice6.12.weight", torch.zeros(1)), r"has a foreign net\.slice6\.12\.weight"),
        (replaced("lin0.model.1.weight", torch.zeros(1, 63, 1, 1)), r"lin0.* has shape \(1, 63, 1, 1\), not \(1, 64, 1, 1\)"),
        (replaced("net.slice1.0.weight", torch.zeros(1).expand(2**20, 2**20)), r"net.* has shape \(1048576, 1048576\)"),
        (with_value("net.slice4.8.weight", torch.nan), r"net\.slice4\.8\.weight holds values that are not finite"),
        (with_value("lin1.model.1.weight", torch.inf), r"lin1\.model\.1\.weight holds values that are not finite"),
        (with_value("lin3.model.1.weight", -1e-3), r"lin3\.model\.1\.weight holds negative values"),
        (with_value("scaling_layer.scale", 0.0), r"scaling_layer\.scale holds values that are not positive"),
    ],
)  # fmt: skip
def test_foreign_weights_are_refused(edit: Edit, message: str, tmp_path: Path) -> None:
    state = random_weights("alex")
    edit(state)
    url = save(tmp_path / "w.pth", state)
    refuse(LPIPSConfig(network="alex", url=url), rf"^task\.perceptual\.lpips\.url: {url}: {message}")


def test_weights_of_another_network_or_form_are_refused(tmp_path: Path) -> None:
    state = random_weights("alex")
    trunk, heads = trunk_and_heads(state)
    whole, half = save(tmp_path / "whole.pth", state), save(tmp_path / "half.pth", trunk)
    top = save(tmp_path / "heads.pth", heads)
    refuse(LPIPSConfig(network="vgg16", url=whole), r"lacks net\.slice1\.2\.bias .* network vgg16")
    refuse(
        LPIPSConfig(network="vgg16", url=half, heads_url=top), r"lacks features\.10\.weight|lacks features\.12\.bias"
    )
    refuse(LPIPSConfig(network="alex_shift_tolerant", url=whole), r"lacks net\.slice1\.1\.filt")
    refuse(
        LPIPSConfig(network="alex", url=whole, heads_url=top), r"lpips\.heads_url: .*whole\.pth has heads of its own"
    )
    refuse(
        LPIPSConfig(network="alex", url=half, heads_url=half),
        r"^task\.perceptual\.lpips\.heads_url: .*lacks lin0\.model",
    )
    refuse(LPIPSConfig(network="alex", url=top), r"lacks net\.slice1\.0\.bias")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_unreadable_files_are_refused_and_no_code_in_them_runs(tmp_path: Path) -> None:
    url = str(tmp_path / "w.pth")
    refuse(LPIPSConfig(network="alex", url=url), rf"^task\.perceptual\.lpips\.url: no {url}; give a file")
    torch.save({"net.slice1.0.weight": Trap(tmp_path / "ran")}, url)
    refuse(LPIPSConfig(network="alex", url=url), r"w\.pth: not a file of tensors alone \(UnpicklingError\)")
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"net.slice1.0.weight": torch.zeros(1)}}, url)
    refuse(LPIPSConfig(network="alex", url=url), r"w\.pth: holds something else than named tensors")
    Path(url).write_bytes(b"")
    refuse(LPIPSConfig(network="alex", url=url), r"w\.pth: not a file of tensors alone")
    with open(url, "wb") as file:
        file.truncate((1 << 30) + 1)
    refuse(LPIPSConfig(network="alex", url=url), r"w\.pth: 1073741825 bytes, more than 1073741824")
    (tmp_path / "half.safetensors").write_bytes(b"\x10")
    refuse(LPIPSConfig(network="alex", url=str(tmp_path / "half.safetensors")), "not a whole safetensors file")
    refuse(LPIPSConfig(network="alex", url=str(tmp_path)), r"a folder with 2 files of weights; give the file")
    refuse(LPIPSConfig(network="alex", url="nowhere://x"), r"lpips\.url: nowhere://x: LPIPS weights cannot be opened")
    refuse(LPIPSConfig(network="alex", url="repo://../outside"), r"lpips\.url: repo://\.\./outside: leads out of")


def refuse(config: LPIPSConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_lpips(config)
    assert "\n" not in str(caught.value)
