"""How much loss terms vary from sample to sample, estimated in training and the same for any layout over ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

HALF_LIFE_STEPS = 100
"""Where an estimate follows the training: steps after which one counts half."""


class LossVariances(nn.Module):
    """Mean over steps of each term's variance over the global batch (the paper's "mean variance", section 4.3).

    Variances are taken within a step, about the step's own mean: a loss that falls in training does not vary for that.
    Zeros outside a gate are samples like others, because the loss in eq. 3 holds the indicator. Everything lives on the
    device; ranks agree once a step.
    """

    def __init__(self, num_terms: int, *, half_life_steps: float = math.inf) -> None:
        """`half_life_steps`: inf, every step counts alike."""
        super().__init__()
        self._decay = 0.5 ** (1.0 / half_life_steps)
        self.register_buffer("sums", torch.zeros(1 + num_terms, dtype=torch.float64))
        self.sums: Tensor
        """Steps so far, decayed, and as many steps' summed variances: a checkpoint's part, written and read in place."""
        self._of_step: Tensor | None = None

    def begin(self) -> None:
        """Forget everything."""
        self.sums.zero_()

    def add(self, *terms_B: Tensor) -> None:
        """A micro-batch's terms. It counts with the end of its step."""
        terms_KB = torch.stack([term_B.detach().double() for term_B in terms_B])
        count_K = torch.full_like(terms_KB[:, 0], terms_KB.shape[1])
        moments_3K = torch.stack([count_K, terms_KB.sum(1), terms_KB.square().sum(1)])
        self._of_step = moments_3K if self._of_step is None else self._of_step + moments_3K

    def end_step(self, keep: Tensor) -> None:
        """Take in what was added since the last call. A collective where anything was, which must be so on all ranks or
        none. A step that is refused, or has a variance that is none (not finite, or one sample alone), does not count."""
        if self._of_step is None:
            return
        moments_3K, self._of_step = self._of_step, None
        if dist.is_initialized():
            dist.all_reduce(moments_3K)
        n_K, sum_K, squares_K = moments_3K
        variance_K = ((squares_K - sum_K * sum_K / n_K) / (n_K - 1)).clamp(min=0.0)
        counts = (keep > 0) & variance_K.isfinite().all()
        later = self._decay * self.sums + torch.cat([torch.ones_like(variance_K[:1]), variance_K])
        self.sums.copy_(torch.where(counts, later, self.sums))

    def ratio(self, over: int, under: int, *, min_steps: int = 1) -> Tensor:
        """Variance of term `over` divided by that of term `under`, float32 (); 0 until so many steps have counted, of which
        one may happen to hold next to nothing inside a gate."""
        decayed = sum(self._decay**i for i in range(min_steps))
        known = (self.sums[1 + under] > 0) & (self.sums[0] > decayed - 0.5 * self._decay**min_steps)
        return torch.where(known, self.sums[1 + over] / self.sums[1 + under], 0.0).float()
