"""How a run trains: phases, optimizer, average, layout over ranks, and what happens between steps."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from trainer.config.data import DatasetConfig
from trainer.config.perceptual import LPIPSConfig
from trainer.config.sampling import SamplerName
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
    """Keep the averages in host memory: saves the device one copy of this rank's shard for each, costs a transfer a step."""
    profiles: Annotated[tuple[Annotated[float, Field(gt=0, le=0.25)], ...], Field(max_length=4)] = ()
    """Power-function averages kept beside the plain one, by their width sigma_rel, a share of the run (Karras et al. 2024,
    section 3.1). With two, such as [0.05, 0.10], averages of other widths can be made afterwards (docs/ema.md). Each takes
    what the plain one takes: 4 bytes a parameter over the ranks."""
    snapshot_steps: PositiveInt | None = None
    """Steps from one snapshot of the profiles to the next, into the run folder's ema/, and one at the run's end. A hundred
    over a run are plenty, twenty do. Absent: the profiles are in the checkpoints alone."""
    snapshot_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """float16 suffices (section 3.2); values that it cannot hold are written as float32, with a warning."""
    keep_snapshots: Annotated[int, Field(ge=2)] | None = None
    """The newest so many stay; absent: all."""

    @model_validator(mode="after")
    def _snapshots_of_something(self) -> "EMAConfig":
        if len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"profiles: each width once, got {', '.join(f'{width:g}' for width in self.profiles)}")
        if self.snapshot_steps and len(self.profiles) < 2:
            raise ValueError(
                "snapshot_steps: are of two or more profiles, from which other widths are made; set profiles=[0.05, 0.1], "
                "or leave it out"
            )
        return self


class ParallelConfig(Section):
    """Parameters, gradients, optimizer and EMA are sharded over ranks (FSDP2); of one rank they are whole."""

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
    shard_one_rank: bool = False
    """FSDP2 on one rank too, which gathers from itself: to measure or test on one what each of many does."""
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


class TLSConfig(Section):
    """Files on every machine of the job, in PEM."""

    certificate: str
    key: str
    client_ca: str | None = None
    """Who asks must show a certificate of this authority."""


class BasicAuthConfig(Section):
    """A name and a password that whoever asks for /metrics must give. The password itself stands in no config."""

    username: Annotated[str, Field(min_length=1, pattern=r"^[^:\s]+$")]
    password_file: str | None = None
    """Whose first line it is, on every machine of the job;"""
    password_variable: str | None = None
    """or the environment variable that holds it, on every machine."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "BasicAuthConfig":
        if (self.password_file is None) == (self.password_variable is None):
            raise ValueError("name one of password_file and password_variable")
        return self


class MetricsConfig(Section):
    every_steps: PositiveInt = 10
    """Steps between two reads of the device's accumulated values."""
    straggler_ratio: Annotated[float, Field(gt=1)] | None = 1.25
    """A rank is reported whose own time a step, without its waits for others, is beyond the ranks' median by this factor, in
    two windows in a row; null: none is."""
    straggler_steps: PositiveInt = 50
    """Steps of such a window, at least."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Other places that get every interval's figures, from rank 0; each needs its package, an extra of Loupe."""
    count_flops: bool = True
    """What a step computes is counted once for each phase and shape of its batch, for the MFU: up to seconds each time."""
    peak_flops: PositiveFloat | None = None
    """Operations a second that one device can do, for the MFU; absent: from a table by the device's name, else measured."""
    bind_address: str | None = None
    """Where /metrics listens; absent: on all addresses in a job of SLURM or Kubernetes, else for this machine alone."""
    port: NonNegativeInt = 0
    """Port of /metrics of a machine's first rank, the next ones of its others; one that is taken makes way for the next free
    one. 0: any free one. Where each rank answers is written into the run folder."""
    tls: TLSConfig | None = None
    """Absent: /metrics is plain HTTP."""
    auth: BasicAuthConfig | None = None
    """Absent: whoever reaches /metrics may read it."""
    discovery_dir: str | None = None
    """Folder on a disk that Prometheus sees too, for its file_sd: a file a run; absent: $LOUPE_DISCOVERY_DIR, or none."""

    @field_validator("discovery_dir")
    @classmethod
    def _check_discovery_dir(cls, path: str | None) -> str | None:
        if path is not None and ("://" in path or not path.startswith("/")):
            raise ValueError(f"{path}: a whole path on a disk; for object storage there is `loupe discovery serve`")
        return path


class SamplesConfig(Section):
    every_steps: PositiveInt = 1000
    prompts: tuple[str, ...] = ()
    """Absent: captions of the training data."""
    count: PositiveInt = 16
    sampler: SamplerName
    num_steps: PositiveInt = 50
    guidance_scale: PositiveFloat = 2.0
    guidance_interval: tuple[Probability, Probability] | None = None
    """Guidance is applied at times from the first to the second, as shares of the diffusion's time: 0 is data, 1 noise
    (Kynkaanniemi et al. 2024). Absent: always."""
    guidance_rescale: Probability = 0.0
    """phi of Lin et al. 2024, section 3.4: how far the guided prediction's deviation goes back to the conditional one's."""
    seed: int = 0

    @model_validator(mode="after")
    def _interval_is_one(self) -> "SamplesConfig":
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            first, last = self.guidance_interval
            raise ValueError(f"guidance_interval: {first:g} to {last:g} is empty; give the smaller time first")
        return self


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


class ValidationConfig(Section):
    """Loss of the averaged weights at fixed noise levels, of the same images with the same noise each time, at intervals and
    at the end. Latent diffusion only."""

    every_steps: PositiveInt = 1000
    dataset: DatasetConfig | None = None
    """Held-out images, taken evenly over it; absent: the first of the run's own, which it trains on."""
    count: Annotated[int, Field(ge=2, le=1 << 20)] = 256
    """Images."""
    levels: Annotated[int, Field(ge=1, le=64)] = 8
    """Noise levels: the centres of so many equal parts of the diffusion's time."""
    resolution: PositiveInt | None = None
    """Side of the images, in pixels; absent: that of the phase that is being trained."""
    seed: NonNegativeInt = 0
    """Of the noise."""
    batch_size: PositiveInt = 16
    """Images of one forward pass. Values depend on it by rounding, and not on the number of ranks."""


class ProfileConfig(Section):
    """A trace of a few steps of each start, and a page that sums it up, in the run's folder `profile`."""

    after_steps: PositiveInt = 10
    """Of this start, so that compiling and filling caches are over."""
    num_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """A trace has some MB a step."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Which write one."""


class PromptAccuracyConfig(Section):
    """Final check that prompts are obeyed: is the prompted image among the nearest training images, by latents?"""

    num_prompts: PositiveInt = 64
    num_neighbours: PositiveInt = 5
