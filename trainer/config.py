"""The run's configuration: typed, frozen, one owner a field, units in the names. No torch.

A recipe is a function that returns a `RunConfig`; a variant calls another recipe and replaces fields with `replace`.
`trainer/config_text.py` reads and writes it as text.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from trainer.errors import UserError

CODE_ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or the snapshot of it that a job runs from."""

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------------- data


class DatasetConfig(Section):
    url: str
    """Folder of an MDS dataset in the training schema; `repo://PATH` lies within the code itself."""
    max_samples: PositiveInt | None = None
    """Use the first so many samples only."""


class DataConfig(Section):
    datasets: dict[str, DatasetConfig]
    """Named sources; a phase mixes them by weight."""
    random_crop: bool = False
    """Crop at a place drawn from the stream position; otherwise at the centre."""
    flip_probability: Probability = 0.0
    """Chance of a horizontal flip, drawn from the stream position."""
    shuffle_window_shards: PositiveInt = 64
    """Samples are shuffled within windows of so many (shuffled) shards."""
    num_workers: NonNegativeInt = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch_steps: PositiveInt = 4
    """Steps' batches that each worker prepares ahead."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for a batch before the job gives up."""
    max_bad_samples: NonNegativeInt = 100
    """Undecodable samples that are replaced and counted before the run stops."""
    cache_dir: str | None = None
    """Local folder for shards of remote datasets; the system's cache folder when absent."""


# --------------------------------------------------------------------------------------------- the latent diffusion task


class ByteTextConfig(Section):
    kind: Literal["bytes"] = "bytes"
    max_bytes: PositiveInt = 64
    """Caption length in UTF-8 bytes; longer captions are cut, and counted."""
    width: PositiveInt = 128
    num_blocks: PositiveInt = 2
    num_heads: PositiveInt = 4


class ClassLabelConfig(Section):
    kind: Literal["classes"] = "classes"
    num_classes: PositiveInt
    width: PositiveInt = 128


TextConfig = Annotated[ByteTextConfig | ClassLabelConfig, Field(discriminator="kind")]


class MMDiTConfig(Section):
    """SD3's MMDiT (Esser et al. 2024). Channels and condition widths follow from the codec and the text encoder."""

    num_blocks: PositiveInt
    num_heads: PositiveInt
    head_dim: PositiveInt = 64
    patch_size: PositiveInt = 2
    """Side of a patch, in latent pixels."""
    position_grid: PositiveInt = 192
    """Side of the table of 2-D positions, in patches: the largest image. Smaller images take its centre."""
    base_grid: PositiveInt = 64
    """Positions run from 0 to this across the whole table (SD3: the patches of its training resolution)."""
    qk_norm: bool = True
    """RMS normalisation of queries and keys per head."""

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


class CodecConfig(Section):
    """A frozen diffusers `AutoencoderKL`. Scale and shift are its own config's."""

    url: str
    """Folder with `config.json` and safetensors weights; `repo://PATH` lies within the code itself."""


class ParadigmConfig(Section):
    kind: Literal["ddpm_eps", "ddpm_v", "flow"]
    timestep_density: Literal["uniform", "mode", "logit_normal"] | None = None
    """Absent: the paradigm's own, uniform for DDPM and mode sampling for flow."""
    mode_scale: float = 1.29
    """s of mode sampling (Esser et al. 2024, eq. 20)."""
    shift_base_px: PositiveInt | None = None
    """Shift noise levels with resolution, relative to this one; absent: no shift."""


class LPLConfig(Section):
    """What the latent perceptual loss is, for the whole run; a phase says when, with which weight and tau."""

    num_maps: PositiveInt | None = None
    """Use the first so many decoder maps; absent: all."""
    depth_weights: Literal["inverse_scale", "printed", "uniform"] = "inverse_scale"
    """omega_l: r_1/r_l; the paper's printed 2^(-r_l/r_1); or 1."""
    tau_reference_px: PositiveInt | None = 512
    """Resolution at which tau is meant; it scales with resolution / reference. Absent: tau is fixed."""
    detach_deviation: bool = False
    """Carry no gradient through the standard deviation that normalises the features."""
    mask_outliers: Literal["deep", "all", "none"] = "deep"
    """Maps whose outliers are masked: those at least 4x the latent's side; all; none."""


class LatentDiffusionConfig(Section):
    kind: Literal["latent_diffusion"] = "latent_diffusion"
    model: MMDiTConfig
    text: TextConfig
    codec: CodecConfig
    paradigm: ParadigmConfig
    caption_dropout: Probability = 0.1
    """Share of samples trained without their caption, for classifier-free guidance."""
    lpl: LPLConfig = LPLConfig()


# ------------------------------------------------------------------------------------------------- the autoencoder task


class AutoencoderModelConfig(Section):
    """Sizes of a diffusers `AutoencoderKL`."""

    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt = 1
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 32


class AutoencoderConfig(Section):
    """Stage 1 at its simplest: L1 + KL, one optimizer."""

    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderModelConfig
    kl_weight: NonNegativeFloat = 1e-6


TaskConfig = Annotated[LatentDiffusionConfig | AutoencoderConfig, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------------- schedule


class PhaseLPLConfig(Section):
    weight: NonNegativeFloat = 3.0
    """w_LPL (paper, Figure 9)."""
    tau: PositiveFloat = 3.0
    """Largest noise level sigma_t/alpha_t at which the loss counts (paper, Eq. 3, Figure 6)."""


class PhaseConfig(Section):
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    steps: PositiveInt
    resolution: PositiveInt
    """Side of the square training images, in pixels."""
    batch_size: PositiveInt
    """Global batch, in images: over all ranks and accumulation."""
    learning_rate: PositiveFloat
    denoising_weight: NonNegativeFloat = 1.0
    lpl: PhaseLPLConfig | None = None
    """Absent: off."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    data_mix: dict[str, PositiveFloat] | None = None
    """Weight of each dataset; absent: all, equally."""


class OptimConfig(Section):
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.03
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 5000
    """Linear warm-up at the start of the run."""
    max_skipped_in_a_row: PositiveInt = 10
    """Consecutive steps with a non-finite loss or gradient, each skipped and counted, before the run stops."""


class EMAConfig(Section):
    start_step: NonNegativeInt = 0
    """Until then the average is the model itself."""


class ParallelConfig(Section):
    """Parameters, gradients, optimizer and EMA are sharded over all ranks (FSDP2)."""

    micro_batch_size: PositiveInt | None = None
    """Images per rank and forward pass; gradients accumulate up to the phase's batch. Absent: all at once."""
    num_threads: NonNegativeInt = 0
    """CPU threads per rank; 0: OMP_NUM_THREADS, or the cores this process may use over the machine's ranks."""


# --------------------------------------------------------------------------------------------------- periodic actions


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Checkpoints that retention leaves; at least two, so one corrupt checkpoint never ends a run."""


class MetricsConfig(Section):
    every_steps: PositiveInt = 10
    """Steps between two reads of the device's accumulated values."""
    bind_address: str = "127.0.0.1"
    port: NonNegativeInt = 0
    """Port of /metrics on rank 0, the next ones on the others; 0: any free one, written into the run folder."""


class SamplesConfig(Section):
    every_steps: PositiveInt = 1000
    prompts: tuple[str, ...] = ()
    """Absent: captions of the training data."""
    count: PositiveInt = 16
    sampler: Literal["ddim", "euler"]
    num_steps: PositiveInt = 50
    guidance_scale: PositiveFloat = 2.0
    seed: int = 0


class PromptAccuracyConfig(Section):
    """Final check that prompts are obeyed: is the prompted image among the nearest training images, by latents?"""

    num_prompts: PositiveInt = 64
    num_neighbours: PositiveInt = 5


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    seed: NonNegativeInt = 0
    """Of everything random, together with a sample's position in the stream."""
    task: TaskConfig
    data: DataConfig
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    samples: SamplesConfig | None = None
    """Sample grids at intervals and at the end; latent diffusion only."""
    prompt_accuracy: PromptAccuracyConfig | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "RunConfig":
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases: names must differ, got {', '.join(names)}")
        if not self.data.datasets:
            raise ValueError("data.datasets: name at least one dataset")
        for i, phase in enumerate(self.phases):
            for name in phase.data_mix or {}:
                if name not in self.data.datasets:
                    raise ValueError(f"phases.{i}.data_mix: no dataset {name!r}; have {', '.join(self.data.datasets)}")
            if phase.lpl and self.task.kind != "latent_diffusion":
                raise ValueError(f"phases.{i}.lpl: belongs to the latent_diffusion task, this is {self.task.kind}")
        if self.task.kind == "latent_diffusion":
            paradigm, samples = self.task.paradigm, self.samples
            if paradigm.kind != "flow" and paradigm.timestep_density not in (None, "uniform"):
                raise ValueError(
                    f"task.paradigm.timestep_density: {paradigm.timestep_density} is for flow, DDPM uses uniform"
                )
            if samples and (samples.sampler == "euler") != (paradigm.kind == "flow"):
                raise ValueError(f"samples.sampler: {samples.sampler} does not go with {paradigm.kind}; euler goes "
                                 "with flow, ddim with ddpm_eps and ddpm_v")  # fmt: skip
            if samples and paradigm.kind != "flow" and samples.num_steps > 1000:
                raise ValueError(f"samples.num_steps: {samples.num_steps} is more than the schedule's 1000")
            if self.prompt_accuracy and not samples:
                raise ValueError("prompt_accuracy: needs samples, whose sampler it uses; set samples, or "
                                 "prompt_accuracy=null")  # fmt: skip
            if self.task.text.kind == "classes":
                if self.prompt_accuracy:
                    raise ValueError(
                        "prompt_accuracy: compares captions, and task.text.kind is classes; set it to null"
                    )
                num_classes = self.task.text.num_classes
                for prompt in samples.prompts if samples else ():
                    if not (prompt.isdecimal() and int(prompt) < num_classes):
                        raise ValueError(f"samples.prompts: {prompt!r} is no class of 0..{num_classes - 1}")
        else:
            for field in ("samples", "prompt_accuracy"):
                if getattr(self, field):
                    raise ValueError(f"{field}: belongs to the latent_diffusion task, this is {self.task.kind}")
        return self


# ------------------------------------------------------------------------------------ a config as a whole

S = TypeVar("S", bound=Section)


def replace(section: S, **changes: Any) -> S:
    """A copy with fields replaced, validated as a whole (`model_copy` would not)."""
    return type(section).model_validate({**_fields(section), **changes})


def _fields(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in type(section).model_fields}


def config_digest(config: RunConfig) -> str:
    """Changes when the numbers that a run computes may change. Where and how often it reports is left out."""
    tree = config.model_dump(mode="json", exclude={"metrics", "samples", "checkpoint", "prompt_accuracy", "name"})
    for field in ("num_workers", "prefetch_steps", "timeout_s", "cache_dir", "max_bad_samples"):
        tree["data"].pop(field)
    tree["optim"].pop("max_skipped_in_a_row")
    for field in ("micro_batch_size", "num_threads"):
        tree["parallel"].pop(field)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def check_layout(config: RunConfig, world_size: int) -> None:
    """Every phase's batch must divide over ranks and micro-batches.

    Raises:
        UserError: naming the phase and the numbers.
    """
    micro = config.parallel.micro_batch_size
    for phase in config.phases:
        per_rank, rest = divmod(phase.batch_size, world_size)
        if rest:
            below = f"{per_rank * world_size} or " if per_rank else ""
            raise UserError(
                f"phases.{phase.name}.batch_size: {phase.batch_size} images do not divide over {world_size} ranks; "
                f"take {below}{(per_rank + 1) * world_size}"
            )
        if micro and per_rank > micro and per_rank % micro:
            raise UserError(
                f"parallel.micro_batch_size: {micro} does not divide the {per_rank} images of a rank in phase {phase.name}"
            )


def resolve_url(url: str) -> str:
    """`repo://PATH` to a path within the code; any other URL as it is.

    Raises:
        UserError: the path leaves the code's folder.
    """
    if not url.startswith("repo://"):
        return url
    path = (CODE_ROOT / url.removeprefix("repo://")).resolve()
    if not path.is_relative_to(CODE_ROOT):
        raise UserError(f"{url}: leads out of the code's folder; give a plain path instead")
    return str(path)
