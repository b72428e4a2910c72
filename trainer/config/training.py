"""How a run trains: phases, optimizer, average, layout over ranks, and what happens between steps."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainer.config.data import DatasetConfig
from trainer.config.perceptual import LPIPSConfig
from trainer.config.section import NonNegativeFloat, NonNegativeInt, Probability, Section

# ------------------------------------------------------------------------------------------------------------- schedule


class PhasePerceptualConfig(Section):
    """The task's perceptual loss, in this phase."""

    weight: NonNegativeFloat = 3.0
    """w_LPL (paper, Figure 9)."""
    variance_share: PositiveFloat | None = None
    """In place of `weight`, which then says nothing: the weighted loss's variance is this share of the denoising term's,
    weighted as it is, by running variances (the paper compares its rivals at 0.1, section A.4). A phase begins with weight
    0; estimates lose half of their say every 100 steps."""
    measure_steps: PositiveInt = 8
    """Of `variance_share`: steps that are measured before the weight is more than 0."""
    tau: PositiveFloat | None = 3.0
    """Largest noise level sigma_t/alpha_t at which the loss counts (paper, Eq. 3, Figure 6); null: all count."""
    max_time: Annotated[float, Field(gt=0, le=1000)] | None = None
    """In place of `tau`, as the public SDXL code: the loss counts at times below this, of 1000."""

    @model_validator(mode="after")
    def _one_bound(self) -> "PhasePerceptualConfig":
        if self.max_time is not None and self.tau is not None:
            raise ValueError("max_time: stands in place of tau; set tau=null with it")
        return self


class RateScheduleConfig(Section):
    """The learning rate within a phase, as a factor of the phase's own."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    """cosine: half a period over the phase. wsd: warm-up, stable, then a linear decay over the last `decay_steps`."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up at the start of the phase, beside the run's own."""
    decay_steps: NonNegativeInt = 0
    """Of wsd."""
    final_factor: Probability = 0.0
    """Of cosine and wsd: the factor at the phase's end."""

    @model_validator(mode="after")
    def _goes_together(self) -> "RateScheduleConfig":
        if (self.kind == "wsd") != bool(self.decay_steps):
            raise ValueError(
                f"decay_steps: {self.decay_steps} does not go with {self.kind}; wsd needs some, others have none"
            )
        if self.kind == "constant" and self.final_factor:
            raise ValueError(f"final_factor: {self.final_factor:g} does not go with constant; take cosine or wsd")
        return self


class PhaseConfig(Section):
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    steps: PositiveInt
    resolution: PositiveInt
    """Side of the square training images, in pixels; with `data.buckets`, of the square of about their area."""
    batch_size: PositiveInt
    """Global batch, in images: over all ranks and accumulation."""
    learning_rate: PositiveFloat
    rate_schedule: RateScheduleConfig = RateScheduleConfig()
    denoising_weight: NonNegativeFloat = 1.0
    perceptual: PhasePerceptualConfig | None = None
    """Absent: off."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    data_mix: dict[str, PositiveFloat] | None = None
    """Weight of each dataset; absent: all, equally."""

    @model_validator(mode="after")
    def _share_of_something(self) -> "PhaseConfig":
        if self.perceptual is None or self.perceptual.variance_share is None:
            return self
        if not self.denoising_weight:
            raise ValueError(
                "perceptual.variance_share: is a share of the denoising loss's variance, and denoising_weight is 0; set it, "
                "or perceptual.weight and perceptual.variance_share=null"
            )
        if self.batch_size < 2:
            raise ValueError("perceptual.variance_share: one image has no variance; take a larger batch_size")
        return self

    @model_validator(mode="after")
    def _rate_fits(self) -> "PhaseConfig":
        rate = self.rate_schedule
        if rate.warmup_steps + rate.decay_steps > self.steps:
            raise ValueError(
                f"rate_schedule: {rate.warmup_steps} steps of warm-up and {rate.decay_steps} of decay do not fit into "
                f"the phase's {self.steps}"
            )
        return self


ParameterGroup = Literal["matrices", "modulation", "embeddings", "vectors"]
"""matrices: linear maps and convolutions; modulation: what makes shifts, scales and gates of a condition; embeddings:
tables of tokens, classes and positions; vectors: biases and the norms' scales."""


class SpikeConfig(Section):
    """What to do about a step whose loss or gradient norm leaves the range of the steps before it. Where a roll back goes
    depends on `checkpoint.every_steps`, and by a step on `metrics.every_steps`: of a run that rolls back, these two change
    the numbers."""

    sigma: PositiveFloat = 6.0
    """A step beyond the mean by more standard deviations than this is skipped, and counted."""
    window_steps: Annotated[int, Field(ge=8)] = 128
    """Steps that mean and deviation are taken over; until a phase has so many, nothing is a spike."""
    roll_back_after: PositiveInt = 16
    """Skipped steps within a window after which the run goes back to its last checkpoint and passes over the data since."""
    max_roll_backs: NonNegativeInt = 3
    """Of the whole run; one more stops it."""


Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    kind: Literal["adamw", "muon"] = "adamw"
    """muon: matrices by Muon (Jordan et al. 2024; torch.optim.Muon with AdamW's update size), all else by AdamW. Its
    orthogonalisation computes in bf16, so layouts over ranks agree to about 1e-3 only, and the host waits once a step."""
    implementation: Literal["fused", "foreach"] = "fused"
    """Of AdamW. foreach makes the host wait for the device once a step."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.03
    decay_groups: tuple[ParameterGroup, ...] = ("matrices", "modulation", "embeddings")
    """Groups of parameters that weight decay shrinks."""
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 5000
    """Linear warm-up at the start of the run."""
    max_skipped_in_a_row: PositiveInt = 10
    """Consecutive steps with a non-finite loss or gradient, each skipped and counted, before the run stops."""
    spikes: SpikeConfig | None = None
    """Absent: no step is refused for its size."""


class EMAConfig(Section):
    start_step: NonNegativeInt = 0
    """Until then the average is the model itself."""
    offload: bool = False
    """Keep the average in host memory: saves the device one copy of this rank's shard, costs a transfer a step."""


class ParallelConfig(Section):
    """Parameters, gradients, optimizer and EMA are sharded over ranks (FSDP2)."""

    replicas: PositiveInt = 1
    """Whole copies of the model: each is sharded over world size / replicas neighbouring ranks (HSDP). 1: over all."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters until its backward pass; otherwise they stay: more memory, one gather less."""
    micro_batch_size: PositiveInt | None = None
    """Images per rank and forward pass; gradients accumulate up to the phase's batch. Absent: all at once."""
    keep_gathered: bool = False
    """Gather parameters once for all micro-batches of a step: fewer all-gathers, and memory for the whole model."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute in the backward pass: each block as a whole; or all but its matrix products and attentions."""
    compile: bool = False
    """torch.compile of each block; kernels are kept in the run folder's cache for restarts."""
    num_threads: NonNegativeInt = 0
    """CPU threads per rank; 0: OMP_NUM_THREADS, or the cores this process may use over the machine's ranks."""


# --------------------------------------------------------------------------------------------------- periodic actions


class InitFromConfig(Section):
    """Weights to begin with. They matter at the run's very first start; a resume has its own."""

    url: str
    """A run folder, one of its checkpoints, or weights in safetensors: a file, or a folder that diffusers wrote."""
    weights: Literal["average", "model"] = "average"
    """Which weights of a run: the moving average, or the last step's."""
    include: tuple[str, ...] = ("*",)
    """Names of the tensors to take, with * for any part."""
    exclude: tuple[str, ...] = ()
    strict: bool = True
    """Refuse to start where a tensor of the model has no match; otherwise it keeps its fresh values, and is reported."""


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Checkpoints that retention leaves; at least two, so one corrupt checkpoint never ends a run."""
    asynchronous: bool = True
    """Training stands still only while tensors are copied to host memory; the rest is written meanwhile."""


class WatchdogConfig(Section):
    """When a rank that makes no step any more ends, with stacks of all ranks in the run folder, so that the job starts again.
    A wait for data that has a deadline of its own, data.timeout_s, is left to that."""

    factor: Annotated[float, Field(gt=1)] = 10.0
    """A step may take so many times the median of the last ones,"""
    min_s: PositiveFloat = 120.0
    """but at least so long."""
    first_step_s: PositiveFloat = 1800.0
    """What may compile or load: start-up, and the first step of each phase and of each shape of a batch."""
    between_steps_s: PositiveFloat = 1800.0
    """Anything between two steps: a save that waits, a restore, samples, an evaluation, the end."""


class MetricsConfig(Section):
    every_steps: PositiveInt = 10
    """Steps between two reads of the device's accumulated values."""
    straggler_ratio: Annotated[float, Field(gt=1)] | None = 1.25
    """A rank is reported whose own time a step, without its waits for others, is beyond the ranks' median by this factor, in
    two windows in a row; null: none is."""
    straggler_steps: PositiveInt = 50
    """Steps of such a window, at least."""
    bind_address: str = "127.0.0.1"
    port: NonNegativeInt = 0
    """Port of /metrics of a machine's first rank, the next ones of its others; 0: any free one, written into the run
    folder."""


class SamplesConfig(Section):
    every_steps: PositiveInt = 1000
    prompts: tuple[str, ...] = ()
    """Absent: captions of the training data."""
    count: PositiveInt = 16
    sampler: Literal["ddim", "euler", "heun", "rk4"]
    """ddim for DDPM; euler, heun (two network evaluations a step) and rk4 (four) for flow."""
    num_steps: PositiveInt = 50
    guidance_scale: PositiveFloat = 2.0
    seed: int = 0


class ReconstructionsConfig(Section):
    """An autoencoder's evaluation, of the averaged weights, at intervals and at the end: PSNR, SSIM, LPIPS, Frechet distance,
    latent statistics, codebook usage, outliers of the decoder's maps, and a grid of originals and reconstructions."""

    every_steps: PositiveInt = 1000
    count: Annotated[int, Field(ge=2)] = 256
    """Images, spread evenly over the dataset."""
    dataset: DatasetConfig | None = None
    """Held-out images; absent: the first of the run's own, which it has seen."""
    grid: PositiveInt = 8
    """Images shown."""
    features_url: str | None = None
    """File with EfficientNet-Lite0's weights, for the Frechet distance (which on its features is not FID); absent: none."""
    lpips: LPIPSConfig | None = None
    """Absent: that of `task.lpips`, if there is one."""


class PromptAccuracyConfig(Section):
    """Final check that prompts are obeyed: is the prompted image among the nearest training images, by latents?"""

    num_prompts: PositiveInt = 64
    num_neighbours: PositiveInt = 5
