"""LPIPS written out a second time, from published weights' names alone: float64, one operation at a time."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import read_image
from data.transforms import training_image
from trainer.tensors import pixels_to_images

VGG16: list[list[Any]] = [
    [("conv", 0, 64), ("conv", 2, 64)],
    [("pool", 2), ("conv", 5, 128), ("conv", 7, 128)],
    [("pool", 2), ("conv", 10, 256), ("conv", 12, 256), ("conv", 14, 256)],
    [("pool", 2), ("conv", 17, 512), ("conv", 19, 512), ("conv", 21, 512)],
    [("pool", 2), ("conv", 24, 512), ("conv", 26, 512), ("conv", 28, 512)],
]
ALEX: list[list[Any]] = [
    [("conv", 0, 64)],
    [("pool", 3), ("conv", 3, 192)],
    [("pool", 3), ("conv", 6, 384)],
    [("conv", 8, 256)],
    [("conv", 10, 256)],
]
VGG16_SHIFT_TOLERANT: list[list[Any]] = [
    [("conv", 0, 64), ("conv", 2, 64)],
    [("blur", 5, 64), ("conv", 6, 128), ("conv", 8, 128)],
    [("blur", 11, 128), ("conv", 12, 256), ("conv", 14, 256), ("conv", 16, 256)],
    [("blur", 19, 256), ("conv", 20, 512), ("conv", 22, 512), ("conv", 24, 512)],
    [("blur", 27, 512), ("conv", 28, 512), ("conv", 30, 512), ("conv", 32, 512)],
]
LAYERS = {"vgg16": VGG16, "alex": ALEX, "vgg16_shift_tolerant": VGG16_SHIFT_TOLERANT}
"""(kind, index in torchvision's `features`, channels); every convolution is followed by a ReLU."""


def random_weights(network: str, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as the `lpips` package writes it, whose features stay alive."""
    return {name: tensor.clone() for name, tensor in _random_weights(network, seed).items()}


@functools.cache
def _random_weights(network: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None],
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450])[None, :, None, None],
    }
    width = 3
    for k, layers in enumerate(LAYERS[network]):
        for kind, *rest in layers:
            if kind == "blur":
                filt = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
                state[f"net.slice{k + 1}.{rest[0]}.filt"] = filt.repeat(width, 1, 1, 1)
            if kind == "conv":
                index, channels = rest
                side = 3 if network != "alex" else {0: 11, 3: 5}.get(index, 3)
                shape = (channels, width, side, side)
                weight = torch.randn(shape, generator=generator) * (2 / (width * side**2)) ** 0.5
                state[f"net.slice{k + 1}.{index}.weight"] = weight
                state[f"net.slice{k + 1}.{index}.bias"] = 0.1 * torch.randn(channels, generator=generator)
                width = channels
    for k, layers in enumerate(LAYERS[network]):
        head = torch.rand(1, layers[-1][-1], 1, 1, generator=generator)
        state[f"lin{k}.model.1.weight"] = head
        state[f"lins.{k}.model.1.weight"] = head.clone()
    return state


def trunk_and_heads(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same as two files: torchvision's with a classifier, and the package's `weights/v0.1`."""
    trunk = {f"features.{n.split('.', 2)[2]}": t for n, t in state.items() if n.startswith("net.")}
    trunk |= {"classifier.6.weight": torch.zeros(1000, 4), "classifier.6.bias": torch.zeros(1000)}
    return trunk, {n: t for n, t in state.items() if n.startswith("lin") and not n.startswith("lins")}


def slow_lpips(network: str, state: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Of vgg16 and alex, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    total = torch.zeros(len(a), dtype=torch.float64)
    maps = [(x.double() - state["scaling_layer.shift"]) / state["scaling_layer.scale"] for x in (a, b)]
    for k, layers in enumerate(LAYERS[network]):
        for kind, *rest in layers:
            if kind == "pool":
                maps = [F.max_pool2d(h, rest[0], stride=2) for h in maps]
                continue
            name = f"net.slice{k + 1}.{rest[0]}"
            weight = state[f"{name}.weight"]
            stride = 4 if weight.shape[-1] == 11 else 1
            padding = 2 if weight.shape[-1] > 3 else 1
            maps = [F.conv2d(h, weight, state[f"{name}.bias"], stride=stride, padding=padding).relu() for h in maps]
        # a pixel without features has no direction: 1e-30 only keeps the gradient of the root finite there
        lengths = [(h.square().sum(1, keepdim=True) + 1e-30).sqrt() for h in maps]
        units = [h / (length + 1e-10) for h, length in zip(maps, lengths, strict=True)]
        error = F.conv2d((units[0] - units[1]) ** 2, state[f"lin{k}.model.1.weight"])
        total = total + error.mean((1, 2, 3))
    return total


# ------------------------------------------------------------------------------------------------------ what is shared


def loader(shared_dir: Path, name: str) -> ModuleType:
    """A module of shared/data/loaders."""
    spec = importlib.util.spec_from_file_location(name, shared_dir / "data" / "loaders" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photos(shared_dir: Path, count: int, side: int) -> Tensor:
    """Real photos in [-1, 1]."""
    folder = shared_dir / "data" / "coco_open_256"
    names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()[:count]]
    pixels = [
        training_image(read_image((folder / "images" / name).read_bytes(), min_side=side), side) for name in names
    ]
    return pixels_to_images(torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels]))
