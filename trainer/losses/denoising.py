"""The diffusion loss: squared error of the network's prediction."""

import torch
from torch import Tensor


def denoising_loss(pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Mean squared error of each sample (B,), in float32 at least."""
    assert pred_BCHW.shape == target_BCHW.shape, f"prediction {pred_BCHW.shape}, target {target_BCHW.shape}"
    dtype = torch.promote_types(pred_BCHW.dtype, torch.float32)
    return (pred_BCHW.to(dtype) - target_BCHW.to(dtype)).square().flatten(1).mean(1)
