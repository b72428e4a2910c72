"""Self-Perceptual (Lin & Yang 2024, "Diffusion Model with Perceptual Loss", section 3): estimate and truth compared in the
features of the denoiser itself, as it was when the loss began.

Shapes: latents BCHW; N rows inside the gate, of a micro-batch's B.
"""

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import SelfPerceptualConfig
from trainer.errors import UserError
from trainer.losses.gate import inside
from trainer.losses.injection import to_device
from trainer.losses.perceptual import PerceptualContext, PerceptualLoss
from trainer.models.denoisers import Denoiser


class SelfPerceptualLoss(PerceptualLoss):
    """Mean squared difference of a frozen copy's features at block k, between the clean estimate and the truth, both noised
    to a new time t' with the same new noise. The copy is told the sample's own text.

    The copy is of the whole trained module but the blocks behind k, which nothing asks. It is sharded as the trained one,
    so its two forward passes and the backward pass are collectives: every rank takes them for every micro-batch, whatever
    its gate says. Term: `gate`.
    """

    name = "self_perceptual"

    def __init__(self, config: SelfPerceptualConfig, trained: nn.Module) -> None:
        """`trained`: has a `denoiser`, `units()`, and a forward pass that takes `num_blocks` as the denoiser's does.

        Raises:
            UserError: the denoiser has no such block.
        """
        super().__init__()
        denoiser = trained.denoiser
        assert isinstance(denoiser, Denoiser)
        total = denoiser.num_blocks
        self.block = (total + 1) // 2 if config.block is None else config.block
        if self.block > total:
            raise UserError(
                f"task.perceptual.block: {self.block}, but the denoiser has {total} blocks; take 1 to {total}"
            )
        self.copy: Any
        self.copy = copy.deepcopy(trained)
        self.copy.denoiser.cut(self.block)
        self.copy.requires_grad_(False)
        self.eval()

    def begin_phase(self, trained: nn.Module) -> None:
        """The copy becomes what `trained` is now: every rank copies its own shards."""
        theirs = trained.state_dict()
        with torch.no_grad():
            for name, mine in self.copy.state_dict().items():
                mine.copy_(theirs[name])

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"copy.{name}": tensor for name, tensor in self.copy.state_dict().items()}

    def sharded(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        return [(self.copy, self.copy.units())]

    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        paradigm, device = context.paradigm, z0_hat_BCHW.device
        host_rows = inside(noise_level_B, context.threshold)
        any_inside = len(host_rows) > 0
        if not any_inside:
            # Row 0 comes along, of which nothing is used: other ranks wait for this one's part in the copy's collectives.
            host_rows = torch.zeros(1, dtype=torch.long)
        rows = to_device(host_rows, device)
        counts_N = torch.full(rows.shape, any_inside, device=device)
        t_N = to_device(paradigm.sample_t(context.uniform("second_timestep"))[host_rows], device)
        noise_NCHW = context.normal("second_noise").index_select(0, rows)
        text = of_rows(context.text, rows)

        def features(z0_NCHW: Tensor) -> Tensor:
            zt_NCHW = paradigm.add_noise(z0_NCHW, noise_NCHW, t_N)
            out: Tensor = self.copy(zt_NCHW, paradigm.model_time(t_N), text, num_blocks=self.block)
            return out.float()

        def selected(latents_BCHW: Tensor) -> Tensor:
            # Zeros in place of the row along: its latents may be no numbers, and 0 times such is none either.
            return torch.where(counts_N[:, None, None, None], latents_BCHW.index_select(0, rows), 0.0)

        with torch.no_grad():
            target = features(selected(z0_BCHW))
        error_N = (features(selected(z0_hat_BCHW)) - target).square().flatten(1).mean(1)
        zeros_B = error_N.new_zeros(len(z0_hat_BCHW))
        loss_B = zeros_B.index_copy(0, rows, torch.where(counts_N, error_N, 0.0))
        return loss_B, {"gate": zeros_B.index_copy(0, rows, counts_N.float())}


def of_rows(text: Any, rows: Tensor) -> Any:
    """Some samples' text: each tensor that a text encoder or the trained module takes has a row a sample."""
    tensors = {field.name: getattr(text, field.name) for field in fields(text)}
    chosen = {name: value.index_select(0, rows) for name, value in tensors.items() if isinstance(value, Tensor)}
    return replace(text, **chosen)
