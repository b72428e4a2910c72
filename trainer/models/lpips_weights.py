"""Published weights of LPIPS, in the forms in which they lie about, told apart by the names of their tensors.

- The `lpips` package's whole state dict: `net.slice1.0.weight`, ..., `lin0.model.1.weight`, ..., `scaling_layer.shift`.
  Checkpoints of the shift-tolerant networks have the same names, and their filters.
- torchvision's VGG16 or AlexNet: `features.0.weight`, ..., beside its classifier, which is not used. The heads are then in
  a file of their own, as the `lpips` package's `weights/v0.1/vgg.pth`: `lin0.model.1.weight`, ...
"""

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.config import LPIPSConfig
from trainer.config.perceptual import LPIPSNetwork
from trainer.errors import UserError, one_line
from trainer.models.lpips import LPIPS, SCALE, SHIFT
from trainer.models.tensor_files import open_url, read_pth, read_safetensors

WHAT = "LPIPS weights"
MAX_BYTES = 1 << 30
"""Twice torchvision's VGG16 with its classifier."""
SAFETENSORS, SUFFIXES = ".safetensors", (".safetensors", ".pth", ".pt")
HEAD_NAMES = tuple(f"lin{k}.model.1.weight" for k in range(5))
COPIES = "lins."
"""The package lists its heads twice."""
CLASSIFIER = "classifier."


def build_lpips(
    config: LPIPSConfig, field: str = "task.perceptual.lpips", *, options: tuple[str, str] | None = None
) -> LPIPS:
    """The network with its weights, float32, on the CPU, frozen.

    Args:
        field: of the config's section, for messages.
        options: in its place, what a command calls `url` and `heads_url`.

    Raises:
        UserError: weights are not there, damaged, or of another network; the message names field, file and tensor.
    """
    with torch.device("meta"):
        lpips = LPIPS(config.network)
    url_field, heads_field = options or (f"{field}.url", f"{field}.heads_url")
    url = config.url
    if url is None:
        url = _file_of_torchvision(config.network, url_field)
    path, weights = _read(url, url_field)
    if any(name.startswith("features.") for name in weights):
        state = _from_torchvision(weights, lpips, f"{url_field}: {path}")
        if config.heads_url is None:
            raise UserError(f"{heads_field}: absent, and {path} has a trunk alone; give the file with its heads, as "
                            "weights/v0.1/vgg.pth of the lpips package")  # fmt: skip
        path, heads = _read(config.heads_url, heads_field)
        state |= _heads(heads, lpips, f"{heads_field}: {path}")
    else:
        if config.heads_url is not None and HEAD_NAMES[0] in weights:
            raise UserError(f"{heads_field}: {path} has heads of its own; leave one of the two out")
        state = _from_package(weights, lpips, f"{url_field}: {path}")
    lpips.load_state_dict(state, assign=True)
    return lpips


# ------------------------------------------------------------------------------------------------------- the known forms


def _from_package(weights: Mapping[str, Tensor], lpips: LPIPS, where: str) -> dict[str, Tensor]:
    names = {"scaling_layer.shift": "shift", "scaling_layer.scale": "scale"} | _head_names()
    for name in _trunk_names(lpips):
        layer = int(name.split(".")[1])
        stage = 1 + sum(layer >= end for end in lpips.ends)
        names[f"net.slice{stage}.{name.removeprefix('trunk.')}"] = name
    return _renamed(weights, names, lpips, where, ignored=COPIES)


def _from_torchvision(weights: Mapping[str, Tensor], lpips: LPIPS, where: str) -> dict[str, Tensor]:
    names = {name.replace("trunk", "features"): name for name in _trunk_names(lpips)}
    state = _renamed(weights, names, lpips, where, ignored=CLASSIFIER)
    return state | {"shift": torch.tensor(SHIFT).view(1, 3, 1, 1), "scale": torch.tensor(SCALE).view(1, 3, 1, 1)}


def _heads(weights: Mapping[str, Tensor], lpips: LPIPS, where: str) -> dict[str, Tensor]:
    return _renamed(weights, _head_names(), lpips, where, ignored=COPIES)


def _trunk_names(lpips: LPIPS) -> list[str]:
    return [name for name in lpips.state_dict() if name.startswith("trunk.")]


def _head_names() -> dict[str, str]:
    return {name: f"heads.{k}" for k, name in enumerate(HEAD_NAMES)}


def _renamed(
    weights: Mapping[str, Tensor], names: Mapping[str, str], lpips: LPIPS, where: str, *, ignored: str
) -> dict[str, Tensor]:
    """Tensors of a file, checked, under our names. `names`: those of the file to ours; `ignored`: how others may begin."""
    mend = f"not the weights of network {lpips.network}"
    expected = lpips.state_dict()
    _refuse(names.keys() - weights.keys(), f"{where}: lacks", mend)
    foreign = (name for name in weights if name not in names and not name.startswith(ignored))
    _refuse(foreign, f"{where}: has a foreign", mend)
    state = {}
    for name, ours in names.items():
        tensor, shape = weights[name], expected[ours].shape
        if ours.startswith("heads."):
            shape = torch.Size((1, *shape, 1, 1))
        if tensor.shape != shape:  # before any value is looked at: a small file can describe a huge tensor
            raise UserError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {tuple(shape)}; {mend}")
        state[ours] = tensor.float().contiguous().view(expected[ours].shape)
        _check_values(state[ours], name, ours, where)
    return state


def _refuse(names: Iterable[str], what: str, mend: str) -> None:
    found = sorted(names)
    if found:
        raise UserError(f"{what} {found[0]} ({len(found)} such); {mend}")


def _check_values(tensor: Tensor, name: str, ours: str, where: str) -> None:
    if not tensor.isfinite().all():
        raise UserError(f"{where}: {name} holds values that are not finite; copy or convert the weights again")
    if ours.startswith("heads.") and (tensor < 0).any():
        raise UserError(f"{where}: {name} holds negative values, so it is no distance; give heads that were trained "
                        "to stay at 0 or above, as all published ones")  # fmt: skip
    if ours == "scale" and (tensor <= 0).any():
        raise UserError(f"{where}: {name} holds values that are not positive; copy or convert the weights again")


# -------------------------------------------------------------------------------------------------------------- the files


def _read(url: str, field: str) -> tuple[str, dict[str, Tensor]]:
    """Path of the file, which may be the only one of its folder, and its tensors."""
    try:
        fs, path = open_url(url, WHAT)
        if fs.isdir(path):
            found = sorted(str(name) for name in fs.ls(path, detail=False) if str(name).endswith(SUFFIXES))
            if len(found) != 1:
                raise UserError(f"{path}: a folder with {len(found)} files of weights; give the file")
            path = found[0]
        read = read_safetensors if path.endswith(SAFETENSORS) else read_pth
        return path, read(fs, path, MAX_BYTES, WHAT)
    except FileNotFoundError:
        raise UserError(f"{field}: no {url}; give a file with LPIPS weights") from None
    except UserError as e:
        raise UserError(f"{field}: {e}") from None
    except OSError as e:
        raise UserError(f"{field}: {url}: cannot be read ({one_line(e)})") from None


def _file_of_torchvision(network: LPIPSNetwork, field: str) -> str:
    """Where torchvision keeps what it has downloaded; a job downloads nothing."""
    mend = f"give a file with the weights of {network}, the lpips package's or torchvision's"
    if network not in ("vgg16", "alex"):
        raise UserError(f"{field}: absent; give the checkpoint of {network}")
    try:
        from torchvision.models import AlexNet_Weights, VGG16_Weights
    except (ImportError, RuntimeError) as e:  # one built for another torch fails when it registers its operators
        raise UserError(f"{field}: absent, and torchvision cannot be used ({one_line(e)}); {mend}") from None
    source = (VGG16_Weights if network == "vgg16" else AlexNet_Weights).IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(source))
    if not os.path.isfile(path):
        raise UserError(
            f"{field}: absent, and torchvision has not yet downloaded {path}; fetch {source} there, or {mend}"
        )
    return path
