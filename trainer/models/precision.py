"""Where numbers must not be rounded: sums, norms and distances of what autocast has lowered."""

import torch
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """In float32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
