"""Weights of feature networks: files on any fsspec URL, with the checksums that say which ones they were."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from trainer.errors import UserError, one_line
from trainer.models.frozen_encoder import NOT_ARCHITECTURE
from trainer.models.tensor_files import open_url
from trainer.models.text_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_WEIGHTS_BYTES,
    TOKENIZER_FILE,
    FileReader,
    fetch,
    tokenizer_files,
    weight_files,
)

OPTION, SHA256_OPTION = "--network", "--network-sha256"
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class WeightsFiles:
    """Files of one network, on this machine."""

    url: str
    paths: tuple[Path, ...]
    sha256: dict[str, str]
    """By name, of all files that decide what the network computes."""
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    """Folder."""
    has_fast_tokenizer: bool = False

    def digest(self) -> str:
        """The file's own sha256; of several, one over theirs."""
        if len(self.sha256) == 1:
            return next(iter(self.sha256.values()))
        return hashlib.sha256(json.dumps(sorted(self.sha256.items())).encode()).hexdigest()

    def check(self, wanted: str | None) -> None:
        """Raises:
        UserError: the digest is another than `wanted`.
        """
        if wanted is not None and self.digest() != wanted.lower():
            raise UserError(
                f"{SHA256_OPTION}: {self.url} has {self.digest()}, not {wanted}; it is another file, or damaged"
            )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def weights_file(url: str, max_bytes: int) -> WeightsFiles:
    """One file.

    Raises:
        UserError: it is not there, too large, or cannot be read.
    """
    fs, path = open_url(url, "the network's weights")
    reader = FileReader(fs, OPTION)
    size = reader.size(path)
    if size is None:
        raise UserError(f"{OPTION}: {url}: no such file; give the file of the network's weights")
    if size > max_bytes:
        raise UserError(f"{OPTION}: {url}: {size} bytes, more than {max_bytes}; is it the network's?")
    if isinstance(fs, LocalFileSystem):
        local = Path(path)
    else:
        folder, _, name = path.rpartition("/")
        local = fetch(reader, folder, [name], max_bytes)[0]
    return WeightsFiles(url, (local,), {local.name: _digest(local, url)})


def transformers_folder(url: str, *, tokenizer: bool) -> WeightsFiles:
    """A folder as transformers writes one: config.json, safetensors, and CLIP's tokenizer where it is wanted.

    Raises:
        UserError: a file is missing, too large, or cannot be read.
    """
    fs, root = open_url(url, "the network")
    reader = FileReader(fs, OPTION)
    if reader.size(f"{root}/{CONFIG_FILE}") is None:
        raise UserError(f"{OPTION}: {url}: no {CONFIG_FILE}; give a folder as transformers' save_pretrained writes it")
    config = reader.json(f"{root}/{CONFIG_FILE}", MAX_CONFIG_BYTES)
    names = weight_files(reader, root)
    words = tokenizer_files(reader, root, "clip", OPTION) if tokenizer else []
    if isinstance(fs, LocalFileSystem):
        paths, others = [Path(root, name) for name in names], [Path(root, name) for name in words]
        configured = Path(root, CONFIG_FILE)
    else:
        paths = fetch(reader, root, names, MAX_WEIGHTS_BYTES)
        others = fetch(reader, root, words, MAX_TOKENIZER_BYTES) if words else []
        configured = fetch(reader, root, [CONFIG_FILE], MAX_CONFIG_BYTES)[0]
    digests = {path.name: _digest(path, url) for path in (configured, *paths, *others)}
    return WeightsFiles(
        url, tuple(paths), digests, config, others[0].parent if others else None, TOKENIZER_FILE in words
    )


def _digest(path: Path, url: str) -> str:
    try:
        return sha256_of(path)
    except OSError as e:
        raise UserError(f"{OPTION}: {url}: cannot be read ({one_line(e)})") from None


def load_transformers(
    cls: type[PreTrainedModel], config_cls: type[PreTrainedConfig], files: WeightsFiles
) -> PreTrainedModel:
    """The model in float32 on the CPU, frozen; from the tensors, so that transformers reads no other file.

    Raises:
        UserError: of another kind, damaged, or incomplete.
    """
    raw = {key: value for key, value in files.config.items() if key not in NOT_ARCHITECTURE}
    found = raw.pop("model_type", None)
    if found != config_cls.model_type:
        raise UserError(f"{OPTION}: {files.url} has model_type {found!r}; give one of {config_cls.model_type!r}")
    weights: dict[str, Tensor] = {}
    for path in files.paths:
        try:
            weights |= safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{OPTION}: {path}: not a whole safetensors file ({one_line(e)}); copy it again") from None
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    disable_progress_bar()
    try:
        made: Any = cls.from_pretrained(
            None, config=config_cls.from_dict(raw), state_dict=weights, local_files_only=True, trust_remote_code=False,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as e:  # transformers raises whatever a foreign value runs into
        raise UserError(f"{OPTION}: {files.url}: the weights do not fit config.json ({one_line(e)})") from None
    model, info = made
    # of both, transformers would leave the parameters at random values
    for name, has, wants in info["mismatched_keys"]:
        raise UserError(f"{OPTION}: {files.url}: {name} has shape {tuple(has)}, config.json says {tuple(wants)}")
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{OPTION}: {files.url}: the weights lack {missing[0]} ({len(missing)} such); copy them again")
    check_finite(model, files.url)
    frozen: PreTrainedModel = model.float().requires_grad_(False).eval()
    return frozen


def check_finite(model: nn.Module, url: str) -> None:
    """Raises:
    UserError: a weight is not.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{OPTION}: {url}: {name} holds values that are not finite; copy it again")
