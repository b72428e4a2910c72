"""What a denoiser is told beside the timestep. B batch, L text tokens, T and P widths of tokens and pooled text."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    tokens_BLT: Tensor
    pooled_BP: Tensor | None = None
    """None: the encoders give none."""
    mask_BL: Tensor | None = None
    """True at tokens that are not padding; None: all are real."""
    labels_B: Tensor | None = None
    """Class numbers, int64, where the run is on classes; the number of classes itself stands for no class."""
