"""What a save in the background writes: a copy in host memory."""

from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class HostCopy:
    """Copies of tensors in host memory, pinned where they come from a GPU. DTensors keep mesh and placements.

    One set of buffers serves all copies, one after the other: what was taken before is overwritten.
    """

    def __init__(self) -> None:
        self._stager: DefaultStager | None = None

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Complete when it returns: the tensors may change at once."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)
        copies = self._stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
        assert isinstance(copies, dict)
        return copies
