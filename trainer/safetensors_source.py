"""Weights in safetensors at a path or any fsspec URL: one file, a folder as diffusers or `loupe export` writes it, or a whole
pipeline's. Nothing is unpickled."""

import json
import posixpath
from typing import Any

import safetensors.torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor

from trainer.errors import UserError, one_line

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""diffusers' name, and that of `loupe export --format safetensors`; with `.index.json` behind it the file that says of a model
in several files which tensor is in which."""
INDEXED = ".index.json"
DENOISERS = ("transformer", "unet")
"""Where a pipeline has its denoiser."""
CONFIG = "config.json"
PIPELINE = "model_index.json"
JSON_LIMIT = 64 << 20
"""Largest config or index that is read, in bytes."""


class SafetensorsSource:
    """
    Raises (all methods):
        UserError: missing, unreadable, damaged, or not what diffusers writes; the message names the file.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = _open(self.url)
        self._is_file = self.url.endswith(".safetensors")
        if not self._is_file and (part := _denoiser_of(self._fs, self._root)):
            self.url, self._root = f"{self.url}/{part}", f"{self._root}/{part}"
        config = None if self._is_file else self._json(CONFIG)
        self.class_name = str((config or {}).get("_class_name", ""))
        """The class that wrote the folder; empty where nothing says it."""

    @staticmethod
    def is_one(url: str) -> bool:
        """Whether safetensors are there, not a run or its checkpoint."""
        fs, root = _open(url)
        try:
            if url.endswith(".safetensors") or _has_weights(fs, root) or _denoiser_of(fs, root):
                return True
            if fs.exists(f"{root}/{PIPELINE}"):
                raise UserError(f"init_from.url: {url} is a pipeline without safetensors in {' or '.join(DENOISERS)}; give the "
                                "folder of one model, or a .safetensors file")  # fmt: skip
        except OSError as e:
            raise UserError(f"init_from.url: {url}: cannot be read ({one_line(e)})") from None
        return False

    def read(self) -> dict[str, Tensor]:
        """All tensors, by their names in the files. Local files are mapped, not read."""
        if self._is_file:
            return self._tensors(self._root)
        stem = next((name for name in WEIGHTS if _is_there(self._fs, self._root, name)), WEIGHTS[0])
        index = self._json(f"{stem}{INDEXED}")
        if index is None:
            return self._tensors(f"{self._root}/{stem}")
        placed = index.get("weight_map")
        if not isinstance(placed, dict) or not all(_is_plain(file) for file in placed.values()):
            raise UserError(f"{self.url}/{stem}{INDEXED}: weight_map does not name files of this folder; it is damaged")
        state: dict[str, Tensor] = {}
        for file in sorted(set(placed.values())):
            state |= self._tensors(f"{self._root}/{file}")
        lost = sorted(set(placed) - set(state))
        if lost:
            raise UserError(
                f"{self.url}/{stem}{INDEXED}: lists {lost[0]} ({len(lost)} such) that no file has; copy it again"
            )
        return state

    def words(self) -> dict[str, str]:
        """Of the metadata of a file: what its writer says of it. Nothing is taken for granted: none may be there."""
        if not self._is_file:
            return {}
        try:
            with self._fs.open(self._root, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                tree = json.loads(file.read(length)) if length <= JSON_LIMIT else {}
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{self.url}: cannot be read ({one_line(e)})") from None
        found = tree.get("__metadata__") if isinstance(tree, dict) else None
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}

    def _tensors(self, path: str) -> dict[str, Tensor]:
        try:
            if isinstance(self._fs, LocalFileSystem):
                return safetensors.torch.load_file(path)
            return safetensors.torch.load(bytes(self._fs.cat_file(path)))
        except SafetensorError as e:
            raise UserError(f"{path}: not a whole safetensors file ({one_line(e)}); copy it again") from None
        except OSError as e:
            raise UserError(f"init_from.url: {path}: cannot be read ({one_line(e)})") from None

    def _json(self, name: str) -> dict[str, Any] | None:
        path = f"{self._root}/{name}"
        try:
            if not self._fs.exists(path):
                return None
            size = self._fs.size(path)
            if size is None or size > JSON_LIMIT:
                raise UserError(f"{path}: {size} bytes, more than {JSON_LIMIT}; it is not what diffusers writes")
            tree = json.loads(self._fs.cat_file(path))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise UserError(f"{path}: not JSON ({one_line(e)})") from None
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({one_line(e)})") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path}: not a JSON object; it is not what diffusers writes")
        return tree


def _open(url: str) -> tuple[Any, str]:
    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as e:
        raise UserError(f"init_from.url: {url} cannot be opened ({one_line(e)})") from None
    return fs, root.rstrip("/")


def _is_there(fs: Any, root: str, name: str) -> bool:
    return any(fs.exists(f"{root}/{file}") for file in (name, f"{name}{INDEXED}"))


def _has_weights(fs: Any, root: str) -> bool:
    return any(_is_there(fs, root, name) for name in WEIGHTS)


def _denoiser_of(fs: Any, root: str) -> str | None:
    """Name of the denoiser's folder, where `root` is a pipeline's."""
    if not fs.exists(f"{root}/{PIPELINE}"):
        return None
    return next((part for part in DENOISERS if _has_weights(fs, f"{root}/{part}")), None)


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and file == posixpath.basename(file) and file.endswith(".safetensors")
