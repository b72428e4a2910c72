"""The feature networks by name, with their weights; or one of a user's own.

B images, D features. A network takes 8-bit images of any one size and does its own, pinned, preprocessing.
"""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.errors import UserError, one_line
from trainer.evaluate.features import inception
from trainer.evaluate.features.preprocess import pillow_bicubic_float, tf1_bilinear
from trainer.evaluate.features.weights import OPTION, SHA256_OPTION, WeightsFiles, check_finite, weights_file
from trainer.models.efficientnet import INPUT_PX, NUM_FEATURES, EfficientNetLite0, load_efficientnet_lite0
from trainer.models.tensor_files import open_url, read_pth, read_safetensors
from trainer.tensors import pixels_to_images

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of pytorch-fid's file, below, which is torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
MAX_BYTES = 1 << 29


class FeatureNetwork(Protocol):
    name: str
    dimensions: int
    preprocessing: str
    """What is done to pixels, in words: it goes into results, and tells two networks of one name apart."""

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, D) float32, of uint8 (B, 3, H, W) on the network's device."""
        ...

    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and what it was loaded from."""

    network: FeatureNetwork
    weights: WeightsFiles | None = None
    code: dict[str, str] = field(default_factory=dict)
    """Of a user's own: file to sha256."""

    @property
    def name(self) -> str:
        return self.network.name

    def numbers(self) -> dict[str, Any]:
        """What decides its features; equal for equal features."""
        found: dict[str, Any] = {
            "name": self.name,
            "dimensions": self.network.dimensions,
            "preprocessing": self.network.preprocessing,
            "precision": "float32, no TF32",
        }
        if self.weights is not None:
            found |= {"sha256": self.weights.digest(), "files": self.weights.sha256}
        return found | ({"code": self.code} if self.code else {})

    def to(self, device: torch.device) -> "LoadedNetwork":
        self.network.to(device)
        return self

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, D) float32.

        Raises:
            UserError: a network of a user's own gave something else.
        """
        with exactly(pixels_BCHW.device):
            out = self.network.features(pixels_BCHW)
        wanted = (len(pixels_BCHW), self.network.dimensions)
        if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"{OPTION}: {self.name} gave features of {shape}, and it is to give {wanted}; mend it")
        return out.float()


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """float32 as it is written: with TF32, which convolutions on a GPU take by themselves, features move by 1e-3, and the same
    images have another FID than on a CPU."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


# -------------------------------------------------------------------------------------------------------------- networks


class InceptionFeatures(nn.Module):
    """FID's Inception. `clean`: with clean-fid's resize in place of TensorFlow 1's; another measure, so another name."""

    dimensions = inception.NUM_FEATURES

    def __init__(self, network: inception.Inception, *, clean: bool) -> None:
        super().__init__()
        self.network, self._clean = network, clean
        self.name = "inception_clean" if clean else "inception"
        self.preprocessing = (
            "clean-fid: Pillow bicubic with antialiasing to 299 px, float32, clipped; (x - 128) / 128"
            if clean
            else "torch-fidelity: TensorFlow 1 bilinear without antialiasing to 299 px, float32; (x - 128) / 128"
        )

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        resize = pillow_bicubic_float if self._clean else tf1_bilinear
        out: Tensor = self.network(resize(pixels_BCHW, inception.SIDE))
        return out


class EfficientNetFeatures(nn.Module):
    name, dimensions = "efficientnet_lite0", NUM_FEATURES
    preprocessing = f"torch bicubic with antialiasing to {INPUT_PX} px, float32, clipped; as trained"

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        return self.network.features(pixels_to_images(pixels_BCHW))


def _inception(url: str, sha256: str | None, *, clean: bool) -> LoadedNetwork:
    files = weights_file(url, MAX_BYTES)
    if sha256 is None and files.digest() != INCEPTION_SHA256:
        raise UserError(f"{OPTION}: {url} has sha256 {files.digest()}, and FID is of {INCEPTION_FILE}, which has "
                        f"{INCEPTION_SHA256}; give that file, or name its own sum by {SHA256_OPTION}")  # fmt: skip
    fs, path = open_url(str(files.paths[0]), "Inception's weights")
    read = read_safetensors if path.endswith(".safetensors") else read_pth
    state = read(fs, path, MAX_BYTES, "Inception's weights")
    with torch.device("meta"):
        network = inception.Inception()
    # counts of training batches, which evaluation does not look at; older files have none
    expected = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            has = f"of {tuple(state[name].shape)}" if name in state else "not there"
            raise UserError(f"{OPTION}: {url}: {name} is {has}; give {INCEPTION_FILE}")
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: state[name].float() for name in expected}, strict=False)
    check_finite(network, url)
    return LoadedNetwork(InceptionFeatures(network.requires_grad_(False).eval(), clean=clean), files)


def _efficientnet(url: str, sha256: str | None) -> LoadedNetwork:
    files = weights_file(url, MAX_BYTES)
    return LoadedNetwork(EfficientNetFeatures(load_efficientnet_lite0(str(files.paths[0]), OPTION)), files)


def _clip(url: str, sha256: str | None) -> LoadedNetwork:
    from trainer.evaluate.features.transformers_networks import load_clip

    return load_clip(url)


def _dinov2(url: str, sha256: str | None) -> LoadedNetwork:
    from trainer.evaluate.features.transformers_networks import load_dinov2

    return load_dinov2(url)


NETWORKS: dict[str, Callable[[str, str | None], LoadedNetwork]] = {
    "inception": lambda url, sha256: _inception(url, sha256, clean=False),
    "inception_clean": lambda url, sha256: _inception(url, sha256, clean=True),
    "dinov2": _dinov2,
    "clip": _clip,
    "efficientnet_lite0": _efficientnet,
}
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_name(name: str) -> None:
    """Raises:
    UserError: no such network.
    """
    if name not in NETWORKS and not _OWN.fullmatch(name):
        raise UserError(f"{OPTION}: {name}: no such network; take {', '.join(NETWORKS)}, or module:function of yours")


def build_network(name: str, weights: str | None, sha256: str | None = None) -> LoadedNetwork:
    """On the CPU.

    Args:
        name: one of `NETWORKS`; or `module:function`, which is imported and called with `weights`, and returns a
            `FeatureNetwork`. Only a command line names such code, never a file.
        weights: path or URL.
        sha256: what the weights must have.

    Raises:
        UserError: no such network, or weights that are missing, damaged or of another.
    """
    check_name(name)
    if name not in NETWORKS:
        return _own(name, weights, sha256)
    if weights is None:
        raise UserError(f"{OPTION}: {name} needs its weights; give {name}=FILE, a folder or a URL")
    loaded = NETWORKS[name](weights, sha256)
    assert loaded.weights is not None
    loaded.weights.check(sha256)
    return loaded


def _own(name: str, weights: str | None, sha256: str | None) -> LoadedNetwork:
    module_name, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # jobs run without the current folder; code that is named is looked for there
    try:
        module = importlib.import_module(module_name)
        build = getattr(module, function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"{OPTION}: {name}: cannot be imported ({one_line(e)}); name module:function") from None
    files = weights_file(weights, 1 << 36) if weights is not None and _is_file(weights) else None
    if files is not None:
        files.check(sha256)
    elif sha256 is not None:
        raise UserError(f"{SHA256_OPTION}: {weights} is no file; leave it out")
    network = build(weights)
    for attribute in ("name", "dimensions", "preprocessing", "features", "to"):
        if not hasattr(network, attribute):
            raise UserError(f"{OPTION}: {name}: what it returns has no `{attribute}`; see docs/evaluation.md")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", str(network.name)) or network.name in NETWORKS:
        raise UserError(f"{OPTION}: {name}: its name {network.name!r}; take a-z, 0-9 and _, and none of ours")
    source = inspect.getsourcefile(module)
    code = {name: hashlib.sha256(Path(source).read_bytes()).hexdigest()} if source else {name: "built in"}
    return LoadedNetwork(network, files, code)


def _is_file(url: str) -> bool:
    fs, path = open_url(url, "the network's weights")
    return bool(fs.isfile(path))


def parse_networks(words: Sequence[str], sums: Sequence[str]) -> list[tuple[str, str | None, str | None]]:
    """NAME=WEIGHTS, or NAME alone, and NAME=SHA256: (name, weights, sha256) of each network.

    Raises:
        UserError: no such network, one that comes twice, or a sum of none.
    """
    pairs = [word.partition("=") for word in words]
    for name, _, _ in pairs:
        check_name(name)
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError(f"{OPTION}: one is given twice; leave one out")
    given: dict[str, str] = {}
    for word in sums:
        name, _, sha256 = word.partition("=")
        if name not in names or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise UserError(f"{SHA256_OPTION}: {word}; give NAME=64 hexadecimal digits, of a network that is named")
        given[name] = sha256
    return [(name, weights or None, given.get(name)) for name, _, weights in pairs]
