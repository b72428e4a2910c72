"""The timestep reweighting that the latent perceptual loss is compared with (Berrada et al. 2025, section 4.3, eq. 15)."""

import torch
from torch import Tensor, nn

from trainer.config import ReweightingConfig
from trainer.losses.gate import inside
from trainer.losses.injection import to_device
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.losses.variances import LossVariances


class Reweighting(PerceptualLoss):
    """The denoising loss once more inside the gate, times sigma_LPL^2 / sigma_l2^2: with the phase's weight w_LPL and the
    denoising loss itself, eq. 15.

    The ratio is given, or measured in the phase's first steps with the perceptual loss that is not trained on; until then
    it is what the steps so far have given, and 0 in the first. Terms: `gate`, `reweighting_ratio`.
    """

    name = "reweighting"
    is_measured = False

    def __init__(self, config: ReweightingConfig, lpl: PerceptualLoss | None) -> None:
        """`lpl`: whose variance is measured; None where the ratio is given."""
        super().__init__()
        assert (lpl is None) == (config.variance_ratio is not None)
        self.config, self.lpl = config, lpl
        self.variances = LossVariances(2)

    @property
    def measures(self) -> bool:
        return self.lpl is not None

    def check(self, resolution: int) -> list[str]:
        return self.lpl.check(resolution) if self.lpl else []

    def begin_phase(self, trained: nn.Module) -> None:
        self.variances.begin()
        if self.lpl:
            self.lpl.begin_phase(trained)

    def end_step(self, keep: Tensor) -> None:
        self.variances.end_step(keep)
        if self.lpl:
            self.lpl.end_step(keep)

    def state_tensors(self) -> dict[str, Tensor]:
        if self.lpl is None:
            return {}
        of_lpl = {f"of.{name}": tensor for name, tensor in self.lpl.state_tensors().items()}
        return {"variances": self.variances.sums, **of_lpl}

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        denoising_B = context.denoising_B
        if self.lpl and context.phase_step < self.config.measure_steps:
            with torch.no_grad():
                lpl_B, _ = self.lpl(z0_hat_BCHW.detach(), z0_BCHW, noise_level_B, context)
            self.variances.add(lpl_B, denoising_B)
        ratio = self._ratio(denoising_B)
        gate_B = torch.zeros(noise_level_B.shape, dtype=torch.bool)
        gate_B[inside(noise_level_B, context.threshold)] = True
        gate_B = to_device(gate_B, denoising_B.device)
        loss_B = torch.where(gate_B, ratio * denoising_B, 0.0)  # eq. 15: what it adds to 1, over w_LPL
        return loss_B, {"gate": gate_B.float(), "reweighting_ratio": ratio.expand(loss_B.shape)}

    def _ratio(self, like: Tensor) -> Tensor:
        if self.config.variance_ratio is not None:
            return torch.full((), self.config.variance_ratio, dtype=torch.float32, device=like.device)
        return self.variances.ratio(0, 1)
