"""Batches to the device, beside the step that it is at work on."""

from dataclasses import replace

import torch
from torch import Tensor

from data.batches import Batch


class DeviceCopy:
    """Copies what is large of a batch through pinned memory on a stream of its own.

    The host is a step ahead of the device, so the copy runs while the device computes the step before; on the device's
    own stream it would wait behind that step. On CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            images_BCHW = self._copied(batch.images_BCHW)
            latents_BCHW = None if batch.latents_BCHW is None else self._copied(batch.latents_BCHW)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)
        for tensor in (images_BCHW, latents_BCHW):
            if tensor is not None:
                # else its memory could be given to the next batch while this one is computed on
                tensor.record_stream(compute)
        return replace(batch, images_BCHW=images_BCHW, latents_BCHW=latents_BCHW)

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)
