"""A safetensors file written tensor by tensor, so that no more than one need be in memory."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import IO

import torch
from torch import Tensor

from trainer.checkpoint.storage import DTYPE_NAMES


class SafetensorsStream:
    """
    Args:
        tensors: shape and type of each, in the order in which they will come.
        about: words for the file's metadata.
    """

    def __init__(
        self, file: IO[bytes], tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], about: Mapping[str, str]
    ) -> None:
        self._file, self._left = file, dict(tensors)
        tree: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
        begin = 0
        for name, (shape, dtype) in tensors.items():
            end = begin + math.prod(shape) * dtype.itemsize
            tree[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        expected = next(iter(self._left))
        shape, dtype = self._left.pop(expected)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, tuple(shape), dtype), (name, expected)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        assert not self._left, list(self._left)[:3]
