"""The same step on two devices in two precisions: same weights, images and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.loader import Loader
from data.reader import Dataset, open_dataset
from tests.gpu import CPU, Precision, noise_of_the_host, precision
from tests.tiny import tiny
from trainer import optim
from trainer.config import RunConfig, resolve_url
from trainer.requests import RankRequests
from trainer.step_plan import StepPlanner
from trainer.tasks.autoencoder import AutoencoderTask
from trainer.tasks.latent_diffusion import LatentDiffusionTask


@dataclass(frozen=True)
class Step:
    phase: str
    reference: dict[str, float]
    """Mean of each loss term."""
    terms: dict[str, float]
    cosine: float
    """Of the two gradients, over all parameters."""
    error: float
    """Norm of their difference over the reference's norm."""


def steps(device: torch.device, name: Precision, config: RunConfig | None = None, *, nudge: float = 0.0) -> list[Step]:
    """A run's steps, by default the tiny demo's 20, in float32 on the CPU; at each, the same from the same weights on
    `device`. `nudge`: deviation of what is added to fresh weights, where a few steps would leave most of them without a
    gradient, because outputs begin as zero."""
    config = config or tiny()
    datasets = {n: open_dataset(resolve_url(d.url), name=n) for n, d in config.data.datasets.items()}
    planner = StepPlanner(config, {n: d.shard_sizes for n, d in datasets.items()})
    reference, measured = (LatentDiffusionTask(config, d) for d in (CPU, device))
    measured.module.to(device)
    with torch.no_grad():
        for parameter in reference.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=nudge)
    optimizer = optim.build_optimizer(reference.module, config.optim)
    loader = make_loader(config, datasets, planner)
    out = []
    for batch in loader.steps(0, planner.schedule.total_steps):
        plan, scale = planner.plan(batch.step), 1.0 / len(batch.captions)
        measured.module.load_state_dict(reference.module.state_dict())
        with noise_of_the_host():
            with precision("fp32"):
                expected = reference.forward_backward(batch, plan, scale)
            with precision(name):
                got = measured.forward_backward(batch, plan, scale)
        a, b = gradient(reference.module), gradient(measured.module)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
        out.append(
            Step(plan.phase.name, means(expected), means(got), cosine.item(), ((a - b).norm() / a.norm()).item())
        )
        measured.module.zero_grad(set_to_none=True)
        divisor = optim.clip_divisor(optim.gradient_norm(reference.module), config.optim.max_grad_norm)
        optim.step(optimizer, plan.learning_rate, torch.zeros(()), divisor)
    loader.close()
    return out


def autoencoder_step(device: torch.device, name: Precision, config: RunConfig) -> tuple[Step, Step]:
    """The first step of stage 1 as above: of the autoencoder, and of its discriminator."""
    datasets = {n: open_dataset(resolve_url(d.url), name=n) for n, d in config.data.datasets.items()}
    planner = StepPlanner(config, {n: d.shard_sizes for n, d in datasets.items()})
    loader = make_loader(config, datasets, planner)
    batch, plan = next(iter(loader.steps(0, 1))), planner.plan(0)
    found = []
    for on, precision_name in ((CPU, "fp32"), (device, name)):
        task = AutoencoderTask(config, on)
        task.module.to(on)
        task.begin_step(plan)
        with noise_of_the_host(), precision(precision_name):  # type: ignore[arg-type]
            terms = means(task.forward_backward(batch, plan, 1.0 / len(batch.captions)))
        assert task.discriminator
        found.append((terms, gradient(task.module), gradient(task.discriminator)))
    loader.close()
    (reference, *exact), (terms, *got) = found
    whole, game = (
        Step(
            plan.phase.name, reference, terms, torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
            ((a - b).norm() / a.norm()).item(),
        )
        for a, b in zip(exact, got, strict=True)
    )  # fmt: skip
    return whole, game


def make_loader(config: RunConfig, datasets: dict[str, Dataset], planner: StepPlanner) -> Loader:
    return Loader(
        datasets, RankRequests(planner, 0, 1), seed=config.seed, random_crop=False, flip_probability=0.0, num_workers=0,
        prefetch_steps=1, timeout_s=60.0,
    )  # fmt: skip


def means(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: values_B.double().mean().item() for name, values_B in terms.items()}


def gradient(module: nn.Module) -> Tensor:
    """All of it as one vector on the CPU."""
    return torch.cat([p.grad.detach().flatten().cpu().double() for p in module.parameters() if p.grad is not None])
