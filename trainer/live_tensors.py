"""How much memory tensors hold, operation by operation: on a CPU, on the meta device, and of fake tensors."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations within have made and something still refers to, and the most there were. What
    compiled code makes within itself cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._follow(args, made_here=False)
        out = func(*args, **(kwargs or {}))
        self._follow(out, made_here=True)
        return out

    def _follow(self, tree: Any, *, made_here: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._sizes:  # else a view
                self._add(tensor.untyped_storage(), tensor.untyped_storage().nbytes() if made_here else 0)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._sizes[key] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
