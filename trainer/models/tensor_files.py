"""Reading files of weights on any fsspec URL: sizes are bounded, and nothing that is read is ever run."""

import io
import zipfile

import safetensors.torch
import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor

from trainer.config import resolve_url
from trainer.errors import UserError, one_line


def open_url(url: str, what: str) -> tuple[AbstractFileSystem, str]:
    """File system and path of a URL. `what` is there, for messages: "the autoencoder".

    Raises:
        UserError: no such protocol, or its library is not installed.
    """
    try:
        fs, root = url_to_fs(resolve_url(url))
    except (ValueError, ImportError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{url}: {what} cannot be opened ({one_line(e)})") from None
    return fs, root.rstrip("/")


def read_bytes(fs: AbstractFileSystem, path: str, max_bytes: int, what: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: the caller knows what should have been there.
        UserError: larger than that, or unreadable.
    """
    try:
        size = fs.size(path)
        if size is None or size > max_bytes:
            raise UserError(f"{path}: {size} bytes, more than {max_bytes}; is it a file of {what}?")
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({one_line(e)})") from None


def read_safetensors(fs: AbstractFileSystem, path: str, max_bytes: int, what: str) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU; a local one is mapped, so that it is not in memory twice.

    Raises:
        FileNotFoundError, UserError: as `read_bytes`; or the file is damaged.
    """
    try:
        if isinstance(fs, LocalFileSystem) and fs.isfile(path) and fs.size(path) <= max_bytes:
            return safetensors.torch.load_file(path)
        return safetensors.torch.load(read_bytes(fs, path, max_bytes, what))
    except SafetensorError as e:
        raise UserError(f"{path}: not a whole safetensors file ({one_line(e)}); copy it again") from None


def read_pth(fs: AbstractFileSystem, path: str, max_bytes: int, what: str) -> dict[str, Tensor]:
    """All tensors of a state dict that `torch.save` wrote, on the CPU. Code that such a file may hold is not run.

    Raises:
        FileNotFoundError, UserError: as `read_bytes`; or the file is damaged or holds anything but named tensors.
    """
    data = io.BytesIO(read_bytes(fs, path, max_bytes, what))
    if zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > max_bytes:
            raise UserError(f"{path}: {unpacked} bytes unpacked, more than {max_bytes}; is it a file of {what}?")
    data.seek(0)
    try:
        state = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged or foreign pickle runs into; torch's message would have it run
        raise UserError(
            f"{path}: not a file of tensors alone ({type(e).__name__}); copy it again, or write its state dict as safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path}: holds something else than named tensors; give a state dict")
    return state
