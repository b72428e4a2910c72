"""What estimating the latent perceptual loss costs, saves and does to the gradient: the demo's model and autoencoder, in one
process.

    python -m ops.bench.lpl_estimators                          trains the demo's model for a minute first
    python -m ops.bench.lpl_estimators --run runs/demo          begins with a run's weights
    python -m ops.bench.lpl_estimators --steps 16 --weight 1    more batches, another weight of the loss
    python -m ops.bench.lpl_estimators --estimator "sampled: {samples_per_rank: 2, whole_maps: 1}"

For the exact loss and each estimator, over batches of fresh images, times and noise, spread over ranks of 16 samples:

    variance    of the whole gradient, denoising + weight * loss, over that of the exact loss's, at each global batch
    bias        norm of the mean difference to the exact loss's gradient over the norm of that one's mean
    cost        processor seconds of the loss and its gradient for one rank's samples, and their ratio to the exact loss's

Each with its standard error over steps. Both gradients are taken of the same samples, and an unbiased estimator's variance
is the exact loss's plus the mean square of the difference. The light decoder is distilled from the autoencoder first.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from data.batches import Batch
from data.images import read_image
from data.reader import open_dataset
from data.transforms import training_image
from trainer import optim
from trainer.config import InitFromConfig, LPLConfig, RunConfig, replace, resolve_url
from trainer.ema import EMA
from trainer.losses.denoising import denoising_loss
from trainer.losses.gate import threshold
from trainer.losses.lpl import LatentPerceptualLoss, build_lpl
from trainer.losses.perceptual import PerceptualContext
from trainer.models.autoencoders import Codec
from trainer.parallel.world import World, init_world
from trainer.recipes import load
from trainer.rng import normal, spread_uniform, uniform
from trainer.step_plan import StepPlan
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import pixels_to_images
from trainer.warm_start import warm_start

PER_RANK = 16
BATCHES = (16, 64, 256)
"""Global batches of which variances are given; the last is a step's."""
RESOLUTION = 64
TRAIN_STEPS = {32: 100, 64: 100}
"""By resolution, at a batch of 32: about a minute on one core."""
WARM_UP = 24
"""Micro-batches from which estimators learn losses by noise level before anything is measured."""
LIGHT = "light decoder"
LIGHT_WIDTHS = (8, 16, 16, 32)
"""The demo's are 24, 32, 64, 64."""
ESTIMATORS = {
    "sampled 8": "{sampled: {samples_per_rank: 8}}",
    "sampled 4, 2 maps whole": "{sampled: {samples_per_rank: 4, whole_maps: 2}}",
    "sampled 2, 3 maps whole": "{sampled: {samples_per_rank: 2, whole_maps: 3}}",
    "crop 1/4": "{crop: {area: 0.25}}",
    LIGHT: "{decoder_url: LIGHT}",
}


@dataclass
class Images:
    images_NCHW: Tensor
    captions: list[str]

    def batch(self, positions: range, step: int, resolution: int) -> Batch:
        """Images by stream position, each pass in another order."""
        count = len(self.captions)
        rows = [(position * 37 + position // count) % count for position in positions]
        images = self.images_NCHW[rows]
        if resolution != RESOLUTION:
            images = F.interpolate(images.float(), size=(resolution, resolution), mode="area").round().byte()
        return Batch(
            step=step, resolution=resolution, positions_B=torch.tensor(positions), images_BCHW=images,
            captions=[self.captions[row] for row in rows], labels_B=torch.full((len(rows),), -1),
            keys=[str(row) for row in rows], substitutions=(),
        )  # fmt: skip


@dataclass
class Measured:
    """Of one loss: sums over the ranks of each step."""

    means: list[Tensor] = field(default_factory=list)
    """Each step's mean gradient, in float32."""
    squares: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in BATCHES})
    """By global batch, each step's mean square norm."""
    products: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in BATCHES})
    """Likewise the product with the exact loss's."""
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a run of the demo's model, to begin with its weights")
    parser.add_argument("--steps", type=int, default=6, help=f"batches of {BATCHES[-1]} (default 6, at least 2)")
    parser.add_argument("--weight", type=float, default=3.0, help="of the loss, against the denoising loss (default 3)")
    parser.add_argument("--distil-steps", type=int, default=200, help="of the light decoder's training (default 200)")
    parser.add_argument("--estimator", action="append", metavar="YAML", help="fields of task.perceptual, for this one "
                        "instead of the default list; may be repeated")  # fmt: skip
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2, for a variance")
    torch.manual_seed(0)

    world = init_world()
    config = load("demo")
    task = LatentDiffusionTask(config, world.device)
    images = load_images(config)
    started = time.perf_counter()
    if options.run:
        warm_start(task.module, EMA(task.module), InitFromConfig(url=options.run), world)
        print(f"weights of {options.run}")
    else:
        loss = train(task, images, config)
        print(f"trained for {sum(TRAIN_STEPS.values())} steps, denoising loss {loss:.3f}, {elapsed(started)}")
    estimators = {text: f"{{{text}}}" for text in options.estimator} if options.estimator else ESTIMATORS
    with tempfile.TemporaryDirectory() as folder:
        if any("LIGHT" in text for text in estimators.values()):
            psnr = write_light(task.codec, images, folder, steps=options.distil_steps)
            print(f"light decoder distilled in {options.distil_steps} steps, {psnr:.1f} dB to the codec's, "
                  f"{elapsed(started)}")  # fmt: skip
        losses = {
            name: build_lpl(perceptual(config, text.replace("LIGHT", folder)), task.codec).to(world.device)
            for name, text in {"exact": "{}", **estimators}.items()
        }
    measured, denoising_share = measure(task, losses, images, options.steps, options.weight, world)
    print(f"device {world.device}, {torch.get_num_threads()} thread(s), {options.steps} steps of {BATCHES[-1]}, weight "
          f"{options.weight:g}, denoising alone has {denoising_share:.0%} of the exact gradient's mean square, "
          f"{elapsed(started)}\n")  # fmt: skip
    print(table(measured, losses))


def perceptual(config: RunConfig, text: str) -> LPLConfig:
    """The demo's loss with these fields of its own."""
    assert config.task.kind == "latent_diffusion"
    assert config.task.perceptual.kind == "lpl"
    return replace(config.task.perceptual, **yaml.safe_load(text))


def load_images(config: RunConfig) -> Images:
    ((name, dataset),) = config.data.datasets.items()
    samples = open_dataset(resolve_url(dataset.url), name=name, max_samples=dataset.max_samples)
    rows = [samples.read(i) for i in range(samples.num_samples)]
    pictures = [torch.from_numpy(training_image(read_image(row.image), RESOLUTION)) for row in rows]
    return Images(torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), [row.texts[0] for row in rows])


def train(task: LatentDiffusionTask, images: Images, config: RunConfig) -> float:
    """Without any perceptual loss; returns the last ten steps' denoising loss."""
    optimizer, step, last = optim.build_optimizer(task.module, config.optim), 0, []
    for resolution, steps in TRAIN_STEPS.items():
        phase = replace(config.phases[0], perceptual=None, resolution=resolution)
        for _ in range(steps):
            plan = StepPlan(step=step, phase=phase, phase_index=0, phase_step=step, learning_rate=2e-3, position=32 * step,
                            begins_phase=False, ends_phase=False)  # fmt: skip
            batch = images.batch(range(32 * step, 32 * step + 32), step, resolution)
            last.append(task.forward_backward(batch, plan, 1 / 32)["denoising"].mean())
            divisor = optim.clip_divisor(optim.gradient_norm(task.module), config.optim.max_grad_norm)
            optim.step(optimizer, min(1.0, (step + 1) / 20) * 2e-3, torch.zeros((), device=last[-1].device), divisor)
            step += 1
    return torch.stack(last[-10:]).mean().item()


def write_light(codec: Codec, images: Images, folder: str, *, steps: int) -> float:
    """A narrow decoder that learns to decode the codec's latents as the codec does; PSNR between the two in dB."""
    latents = encoded(codec, images)
    light = distilled(codec, latents, steps=steps)
    light.vae.save_pretrained(folder)
    with torch.no_grad():
        error = light.decode(latents[:32]).clamp(-1, 1) - codec.decode(latents[:32]).clamp(-1, 1)
    return (20 * torch.log10(2 / error.square().mean().sqrt())).item()


@torch.no_grad()
def encoded(codec: Codec, images: Images) -> Tensor:
    device = next(codec.parameters()).device
    return torch.cat([codec.encode(pixels_to_images(part.to(device))) for part in images.images_NCHW.split(16)])


def distilled(codec: Codec, latents_NCHW: Tensor, *, steps: int, batch_size: int = 4) -> Codec:
    """A decoder of fewer channels, trained on the squared error to the codec's images; its encoder stays random.

    Of the codec's architecture, not an `AutoencoderTiny`: after so few steps, one of those has channels that are nearly
    dead, and where an estimate's deviation is nearly 0 the loss's gradient is large and says nothing.
    """
    vae = AutoencoderKL(
        block_out_channels=LIGHT_WIDTHS, layers_per_block=1, norm_num_groups=4, latent_channels=codec.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * len(LIGHT_WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(LIGHT_WIDTHS), mid_block_add_attention=False,
        scaling_factor=codec.scaling_factor, shift_factor=codec.shift_factor,
    )  # fmt: skip
    light = Codec(vae).to(latents_NCHW.device)
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(latents_NCHW), (batch_size,), generator=generator)
        noise = torch.randn(latents_NCHW[rows].shape, generator=generator).to(latents_NCHW)
        z = latents_NCHW[rows] + 0.3 * torch.rand((), generator=generator).item() * noise
        with torch.no_grad():
            target = codec.decode(z)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.mse_loss(light.decode(z), target).backward()
        optimizer.step()
    vae.decoder.requires_grad_(False)
    return light


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(
    task: LatentDiffusionTask,
    losses: dict[str, LatentPerceptualLoss],
    images: Images,
    steps: int,
    weight: float,
    world: World,
) -> tuple[dict[str, Measured], float]:
    """The whole gradients' moments by loss, the exact one's as they are and the others' as differences to it; and the share
    that the denoising loss has of the exact one's mean square."""
    task.module.train()
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    keep = torch.ones((), device=world.device)
    for i in range(WARM_UP):
        with torch.no_grad():
            z0_hat, z0, level_B, context, _ = estimates(task, images, range(i * PER_RANK, (i + 1) * PER_RANK), -1 - i)
            for loss in losses.values():
                if loss.sampler:
                    loss(z0_hat, z0, level_B, context)
                    loss.end_step(keep)
    measured = {name: Measured() for name in losses}
    squares = torch.zeros(2, dtype=torch.float64)
    for step in range(steps):
        position = (WARM_UP + 1000) * PER_RANK + step * BATCHES[-1]
        ranks = [range(first, first + PER_RANK) for first in range(position, position + BATCHES[-1], PER_RANK)]
        sums = {name: {size: torch.zeros(0) for size in BATCHES} for name in losses}
        moments = {name: {size: torch.zeros(2, dtype=torch.float64) for size in BATCHES} for name in losses}
        for i, positions in enumerate(ranks):
            z0_hat, z0, level_B, context, denoising = estimates(task, images, positions, step)
            of_denoising = gradient_of(denoising, parameters)
            exact = torch.zeros(0)
            for name, loss in losses.items():
                leaf = z0_hat.detach().requires_grad_()
                started = processor_seconds(world)
                value = loss(leaf, z0, level_B, context)[0].mean()
                (of_leaf,) = torch.autograd.grad(value, leaf)
                measured[name].seconds.append(processor_seconds(world) - started)
                gradient = gradient_of(z0_hat, parameters, weight * of_leaf)
                if name == "exact":
                    exact = gradient
                    vector = of_denoising + gradient
                    squares += torch.stack([of_denoising.square().sum(), vector.square().sum()]).double().cpu()
                else:
                    vector = gradient - exact
                for size in BATCHES:
                    count = size // PER_RANK
                    sums[name][size] = total = sums[name][size] + vector if i % count else vector
                    if i % count == count - 1:
                        of_batch = torch.stack([total.square().sum(), torch.dot(total, sums["exact"][size])])
                        moments[name][size] += of_batch.double().cpu() / count**2 / (BATCHES[-1] // size)
        for name, loss in losses.items():
            loss.end_step(keep)
            of = measured[name]
            of.means.append(sums[name][BATCHES[-1]] / len(ranks))
            for size in BATCHES:
                square, product = moments[name][size].tolist()
                of.squares[size].append(square)
                of.products[size].append(product)
    return measured, (squares[0] / squares[1]).item()


def estimates(
    task: LatentDiffusionTask, images: Images, positions: range, step: int
) -> tuple[Tensor, Tensor, Tensor, PerceptualContext, Tensor]:
    """z0_hat with its graph, z0, noise levels, context, and the mean denoising loss, as `LatentDiffusionTask` has them."""
    config, places, device = task.config, list(positions), next(task.module.parameters()).device
    batch = images.batch(positions, step, RESOLUTION)
    paradigm = task.paradigm(RESOLUTION)
    host_t_B = paradigm.sample_t(spread_uniform(0, places, step))
    t_B = host_t_B.to(device)
    pictures = pixels_to_images(batch.images_BCHW.to(device))
    with torch.no_grad():
        z0 = task.codec.encode(pictures)
    noise = normal(0, places, "noise", z0.shape[1:], device=device)
    zt = paradigm.add_noise(z0, noise, t_B)
    text = task.text.prepare(batch.captions).to(device)
    prediction = task.module(zt, paradigm.model_time(t_B), text)
    denoising_B = denoising_loss(prediction, paradigm.target(z0, noise, t_B))
    phase = load("demo").phases[-1].perceptual
    assert phase
    context = PerceptualContext(
        threshold=threshold(phase, paradigm, RESOLUTION, config.perceptual.tau_reference_px),
        phase_step=max(step, 0), paradigm=paradigm, images_BCHW=pictures, denoising_B=denoising_B,
        text=text, uniform=lambda purpose: uniform(0, places, purpose),
        normal=lambda purpose: normal(0, places, purpose, z0.shape[1:], device=device),
    )  # fmt: skip
    z0_hat = paradigm.to_z0(prediction, zt, t_B)
    return z0_hat, z0, paradigm.noise_level(host_t_B), context, denoising_B.mean()


def gradient_of(output: Tensor, parameters: Sequence[Tensor], given: Tensor | None = None) -> Tensor:
    """All parameters' as one vector; the graph stays."""
    gradients = torch.autograd.grad(output, parameters, given, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def processor_seconds(world: World) -> float:
    """Of this process, so that others on the machine do not count; on a GPU the clock's, everything queued being done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# ------------------------------------------------------------------------------------------------------------- reporting


def table(measured: dict[str, Measured], losses: dict[str, LatentPerceptualLoss]) -> str:
    head = ["", *(f"variance at {size}" for size in BATCHES), "bias", "seconds", "ratio"]
    lines = [head]
    exact = measured["exact"]
    exact_seconds = median(exact.seconds)
    for name, of in measured.items():
        seconds = median(of.seconds)
        cells = [name]
        if name == "exact":
            cells += ["1"] * len(BATCHES) + ["0"]
        else:
            unbiased = losses[name].config.crop is None and losses[name].config.decoder_url is None
            cells += [jackknife(ratio_of(exact, of, size, unbiased), len(of.means)) for size in BATCHES]
            cells.append(jackknife(bias_of(exact, of), len(of.means)))
        lines.append([*cells, f"{seconds:.3f}", f"{seconds / exact_seconds:.2f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                               enumerate(zip(line, widths, strict=True))) for line in lines)  # fmt: skip


Statistic = Callable[[list[int]], float]
"""Of some of the steps, by number."""


def ratio_of(exact: Measured, of: Measured, size: int, unbiased: bool) -> Statistic:
    """Variance of the whole gradient over the exact loss's. With g the exact one and d the difference, what is added is
    E|d|^2 where d has no mean given the samples; else 2 E<g, d> + E|d|^2, less what the means have of it."""

    def statistic(steps: list[int]) -> float:
        def mean(values: list[float]) -> float:
            return sum(values[i] for i in steps) / len(steps)

        g = torch.stack([exact.means[i] for i in steps]).mean(0)
        d = torch.stack([of.means[i] for i in steps]).mean(0)
        # the mean of n batches is itself off by an n-th of the variance
        n = len(steps) * (BATCHES[-1] // size)
        correction = n / (n - 1)
        variance = (mean(exact.squares[size]) - g.square().sum().item()) * correction
        if unbiased:
            return 1.0 + mean(of.squares[size]) / variance
        added = 2 * mean(of.products[size]) + mean(of.squares[size]) - (2 * torch.dot(g, d) + d.square().sum()).item()
        return 1.0 + added * correction / variance

    return statistic


def bias_of(exact: Measured, of: Measured) -> Statistic:
    """|E d| / |E g|, each squared norm less what chance adds to it; 0 where nothing is left."""

    def squared_norm(measured: Measured, steps: list[int]) -> float:
        total = torch.stack([measured.means[i] for i in steps])
        n = len(steps)
        return (total.sum(0).square().sum() - total.square().sum()).item() / (n * (n - 1))

    def statistic(steps: list[int]) -> float:
        return (max(0.0, squared_norm(of, steps)) / max(1e-30, squared_norm(exact, steps))) ** 0.5

    return statistic


def jackknife(statistic: Statistic, num_steps: int) -> str:
    """Value and its standard error, from what it is without each of the steps."""
    every = list(range(num_steps))
    value = statistic(every)
    if num_steps < 3:
        return f"{value:.2f}"
    without = torch.tensor([statistic([i for i in every if i != left]) for left in every])
    error = ((num_steps - 1) / num_steps * (without - without.mean()).square().sum()).sqrt().item()
    return f"{value:.2f} ± {error:.2f}"


def median(values: Sequence[float]) -> float:
    return torch.tensor(values).median().item()


def elapsed(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


if __name__ == "__main__":
    main()
