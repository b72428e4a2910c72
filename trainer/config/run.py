"""A run as a whole: its sections, what must hold between them, and the layouts it fits."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from pydantic import Field, model_validator

from trainer.config.autoencoder import AutoencoderConfig
from trainer.config.data import DataConfig
from trainer.config.evaluation import ImageEvaluationConfig
from trainer.config.sampling import MOST_DDPM_STEPS, samplers_of
from trainer.config.section import NonNegativeInt, Section
from trainer.config.task import LatentDiffusionConfig, LatentNetworkConfig, TaskConfig
from trainer.config.training import (
    CheckpointConfig,
    EMAConfig,
    InitFromConfig,
    MetricsConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    ProfileConfig,
    PromptAccuracyConfig,
    ReconstructionsConfig,
    SamplesConfig,
    ValidationConfig,
    WatchdogConfig,
)
from trainer.errors import UserError


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    seed: NonNegativeInt = 0
    """Of everything random, together with a sample's position in the stream."""
    task: TaskConfig
    data: DataConfig
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    init_from: InitFromConfig | None = None
    """Weights of another run, or of an export, to begin with; absent: fresh ones."""
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    watchdog: WatchdogConfig | None = WatchdogConfig()
    """null: a run that hangs stays, until the timeouts of torch's collectives end it, or nothing does."""
    samples: SamplesConfig | None = None
    """Sample grids at intervals and at the end; latent diffusion only."""
    prompt_accuracy: PromptAccuracyConfig | None = None
    reconstructions: ReconstructionsConfig | None = None
    """Evaluation of what the autoencoder task trains."""
    validation: ValidationConfig | None = None
    """Loss at fixed noise levels; latent diffusion only."""
    image_evaluation: ImageEvaluationConfig | None = None
    """FID and its like, of pictures that are drawn at intervals; latent diffusion only."""
    profile: ProfileConfig | None = None
    """Where the time of a step goes, operation by operation."""

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
            if phase.perceptual and self.task.kind != "latent_diffusion":
                raise ValueError(
                    f"phases.{i}.perceptual: belongs to the latent_diffusion task, this is {self.task.kind}"
                )
        for field, kind in (("samples", "latent_diffusion"), ("prompt_accuracy", "latent_diffusion"),
                            ("validation", "latent_diffusion"), ("image_evaluation", "latent_diffusion"),
                            ("reconstructions", "autoencoder")):  # fmt: skip
            if getattr(self, field) and self.task.kind != kind:
                raise ValueError(f"{field}: belongs to the {kind} task, this is {self.task.kind}")
        _check_sizes(self.task, self.phases)
        self._check_stored()
        if self.task.kind == "latent_diffusion":
            self._check_sampling(self.task)
            self._check_sides(self.task)
            perceptual = self.task.perceptual
            if self.data.buckets and perceptual.kind == "latent_lpips" and perceptual.augment:
                raise ValueError(
                    "task.perceptual.augment: turns square latents alone; set it to false with data.buckets"
                )
        elif self.task.kind == "autoencoder" and self.task.trained != "all" and not self.init_from:
            raise ValueError(
                f"task.trained: {self.task.trained} of an autoencoder that nothing has trained; set init_from.url to one"
            )
        return self

    def _check_stored(self) -> None:
        """Columns of what a run would compute, where there is such a run."""
        task, data = self.task, self.data
        if data.latents and task.kind == "autoencoder":
            raise ValueError("data.latents: the autoencoder task trains on images; leave it out")
        if data.latents and task.kind == "latent_diffusion" and task.perceptual.kind == "image_space":
            for i, phase in enumerate(self.phases):
                if phase.perceptual:
                    raise ValueError(
                        f"phases.{i}.perceptual: image_space compares with images, and data.latents stand in their place; take "
                        "another task.perceptual, or data.latents=[]"
                    )
        if data.text_states and not (task.kind == "latent_diffusion" and task.text.kind == "frozen"):
            raise ValueError("data.text_states: are of frozen text encoders, task.text.kind=frozen; leave it out")

    def _check_sides(self, task: LatentDiffusionConfig) -> None:
        """Of images that are not a phase's."""
        for field, section in (("validation", self.validation), ("image_evaluation", self.image_evaluation)):
            if section is None or section.resolution is None:
                continue
            try:
                _check_resolutions(task, (self.phases[-1].model_copy(update={"resolution": section.resolution}),))
            except ValueError as e:
                raise ValueError(f"{field}.resolution: {str(e).removeprefix('phases.0.resolution: ')}") from None

    def _check_sampling(self, task: LatentDiffusionConfig) -> None:
        paradigm, samples = task.paradigm, self.samples
        for field, section in (("samples", samples), ("image_evaluation", self.image_evaluation)):
            if section is None:
                continue
            if section.sampler and section.sampler not in samplers_of(paradigm.kind):
                raise ValueError(f"{field}.sampler: {section.sampler} does not go with {paradigm.kind}; take "
                                 f"{' or '.join(samplers_of(paradigm.kind))}")  # fmt: skip
            if section.num_steps and paradigm.kind != "flow" and section.num_steps > MOST_DDPM_STEPS:
                raise ValueError(
                    f"{field}.num_steps: {section.num_steps} is more than the schedule's {MOST_DDPM_STEPS}"
                )
        if self.prompt_accuracy and not samples:
            raise ValueError("prompt_accuracy: needs samples, whose sampler it uses; set samples, or "
                             "prompt_accuracy=null")  # fmt: skip
        if task.text.kind == "classes":
            if self.prompt_accuracy:
                raise ValueError("prompt_accuracy: compares captions, and task.text.kind is classes; set it to null")
            num_classes = task.text.num_classes
            for prompt in samples.prompts if samples else ():
                if not (prompt.isdecimal() and int(prompt) < num_classes):
                    raise ValueError(f"samples.prompts: {prompt!r} is no class of 0..{num_classes - 1}")


def _check_sizes(task: TaskConfig, phases: tuple[PhaseConfig, ...]) -> None:
    if task.kind == "latent_diffusion":
        _check_resolutions(task, phases)
    elif task.kind == "latent_network":
        _check_latents(task, phases)
    else:
        _check_autoencoder(task, phases)


def size_multiple(task: TaskConfig) -> int:
    """What both sides of training images must divide by, in pixels."""
    if task.kind == "latent_diffusion":
        return task.codec.downsampling * task.model.latent_multiple
    if task.kind == "latent_network":
        return task.codec.downsampling
    factor = task.model.downsampling
    return factor * task.teacher.downsampling if task.reconstructs == "latents" and task.teacher else factor


def check_shape(config: RunConfig, phase_index: int, bucket: str, shape: tuple[int, int]) -> None:
    """Whether the task takes the images of an aspect bucket in a phase. `shape`: (height, width) in pixels.

    Raises:
        UserError: naming the bucket, and the field that its longer or shorter side does not fit.
    """
    phases = config.phases
    for side in shape:
        changed = phases[phase_index].model_copy(update={"resolution": side})
        try:
            _check_sizes(config.task, (*phases[:phase_index], changed, *phases[phase_index + 1 :]))
        except ValueError as e:
            height, width = shape
            raise UserError(f"data.buckets: images of bucket {bucket} are {width} x {height} px. {e}") from None


def _check_resolutions(task: LatentDiffusionConfig, phases: tuple[PhaseConfig, ...]) -> None:
    model = task.model
    multiple = size_multiple(task)
    for i, phase in enumerate(phases):
        patches, rest = divmod(phase.resolution, multiple)
        if rest:
            field = f"patch_size {model.latent_multiple}"
            if model.kind == "unet":
                field = f"block_out_channels' {model.latent_multiple}, of {len(model.block_out_channels)} levels"
            raise ValueError(
                f"phases.{i}.resolution: {phase.resolution} px is no multiple of {multiple}: the codec's downsampling of "
                f"{task.codec.downsampling} times task.model.{field}; take {(patches + 1) * multiple}"
            )
        if model.kind == "mmdit" and patches > model.position_grid:
            raise ValueError(
                f"task.model.position_grid: {model.position_grid} is less than the {patches} patches a side of phase "
                f"{phase.name}"
            )


def _check_latents(task: LatentNetworkConfig, phases: tuple[PhaseConfig, ...]) -> None:
    for i, phase in enumerate(phases):
        side, rest = divmod(phase.resolution, task.codec.downsampling)
        if rest:
            raise ValueError(f"phases.{i}.resolution: {phase.resolution} px is no multiple of the codec's downsampling, "
                             f"{task.codec.downsampling}; take {(side + 1) * task.codec.downsampling}")  # fmt: skip
        smallest = task.model.smallest_side
        if side < smallest:
            raise ValueError(
                f"phases.{i}.resolution: {phase.resolution} px are latents of {side} pixels a side, and "
                f"task.model.pooled_stages {list(task.model.pooled_stages)} need {smallest}; take "
                f"{smallest * task.codec.downsampling} px, or name fewer stages"
            )


def _check_autoencoder(task: AutoencoderConfig, phases: tuple[PhaseConfig, ...]) -> None:
    factor = size_multiple(task)
    for i, phase in enumerate(phases):
        side, rest = divmod(phase.resolution, factor)
        if rest:
            raise ValueError(
                f"phases.{i}.resolution: {phase.resolution} px is no multiple of {factor}, the autoencoder's downsampling; "
                f"take {(side + 1) * factor}"
            )
        if task.discriminator and phase.resolution < task.discriminator.smallest_px:
            raise ValueError(
                f"phases.{i}.resolution: {phase.resolution} px leave nothing of an image behind the discriminator, which needs "
                f"{task.discriminator.smallest_px}; set task.discriminator.num_layers below {task.discriminator.num_layers}"
            )
        smallest = min(task.equivariance.scales) if task.equivariance else 1.0
        if side * smallest < 1:
            raise ValueError(
                f"task.equivariance.scales: {smallest:g} of the {side} latent pixels a side of phase {phase.name} is less than "
                f"one; take {1 / side:g} or more"
            )


# -------------------------------------------------------------------------------------------------- a config as a whole

REPORTING = (
    "metrics", "samples", "checkpoint", "prompt_accuracy", "reconstructions", "validation", "image_evaluation", "name",
    "watchdog", "profile",
)  # fmt: skip
NO_NUMBERS = {
    "data": (
        "num_workers", "prefetch_steps", "prefetch_shards", "timeout_s", "cache_dir", "cache_gib", "max_bad_samples",
        "max_bad_shards",
    ),
    "optim": ("max_skipped_in_a_row",),
    "optim.spikes": ("max_roll_backs",),
    "task.text": ("cache_mib",),
    "task.perceptual": ("chunk_size",),
    "task.perceptual.of": ("chunk_size",),
    "ema": ("offload", "snapshot_steps", "snapshot_dtype", "keep_snapshots"),
    "parallel": (
        "replicas", "reshard_after_forward", "micro_batch_size", "keep_gathered", "activation_checkpointing", "compile",
        "shard_one_rank", "num_threads",
    ),
}  # fmt: skip
"""Fields that do not change what a run computes, beyond rounding: they may differ between a run and its resume."""


def config_digest(config: RunConfig) -> str:
    """Changes when the numbers that a run computes may change. Where and how often it reports is left out."""
    return hashlib.sha256(json.dumps(_numbers(config), sort_keys=True).encode()).hexdigest()[:16]


def _numbers(config: RunConfig) -> dict[str, Any]:
    """What the digest is of."""
    tree = config.model_dump(mode="json", exclude=set(REPORTING))
    for path, fields in NO_NUMBERS.items():
        section: Any = tree
        for name in path.split("."):
            section = (section or {}).get(name)
        for field in fields:
            (section or {}).pop(field, None)  # not every run has such a section, nor every kind of it the field
    for dataset in tree["data"]["datasets"].values():
        dataset.pop("fetch")
    if not config.ema.profiles:
        tree["ema"].pop("profiles")  # a run's digest stays what it was before there were any
    task = config.task
    if (task.kind == "latent_diffusion" and task.perceptual.kind == "lpl" and task.perceptual.by_micro_batch) or (
        task.kind == "autoencoder" and task.by_micro_batch
    ):
        tree["parallel"]["micro_batch_size"] = config.parallel.micro_batch_size
    return tree


def run_digest(config: RunConfig, datasets: Mapping[str, str]) -> str:
    """The config's digest and those of the datasets, by their names: what a checkpoint is bound to."""
    return config_digest(config) + "".join(f"-{name}:{digest}" for name, digest in datasets.items())


def explain_digests(there: str, here: str) -> str:
    """How two of `run_digest` differ, in words."""
    there_config, _, there_data = there.partition("-")
    here_config, _, here_data = here.partition("-")
    if there_config != here_config:
        return "written by a run of another config, whose numbers differ"
    return f"trained on other data: {there_data.replace(':', ' is ')} there, {here_data.replace(':', ' is ')} here"


SHOWN_DIFFERENCES = 4


def differences(there: RunConfig, here: RunConfig) -> list[str]:
    """Fields in which two configs differ so that their digests do, as `task.model.layout: sd3 there, shared here`."""
    return list(_differences(_numbers(there), _numbers(here), ""))


def differences_in_words(there: RunConfig, here: RunConfig) -> str:
    """The first few of them, in one line."""
    found = differences(there, here)
    more = f"; and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    return "; ".join(found[:SHOWN_DIFFERENCES]) + more


def _differences(there: Any, here: Any, field: str) -> Iterator[str]:
    there, here = _by_name(there), _by_name(here)
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        if there.get("kind") != here.get("kind"):
            keys = {"kind": None}  # what else they have is another section's
        for key in keys:
            yield from _differences(there.get(key), here.get(key), f"{field}.{key}" if field else key)
    elif there != here:
        yield f"{field}: {_word(there)} there, {_word(here)} here"


def _by_name(tree: Any) -> Any:
    """A list of sections as a mapping: a phase goes by its name, as in an override."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        return {str(item.get("name", i)): item for i, item in enumerate(tree)}
    return tree


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "set"
    return "absent" if value is None else json.dumps(value).strip('"')


def check_sinks(config: RunConfig) -> None:
    """Whether the packages of `metrics.sinks` are there.

    Raises:
        UserError: one is not.
    """
    for name in config.metrics.sinks:
        if find_spec(name) is None:
            raise UserError(
                f"metrics.sinks: the package {name} is not installed; pip install -e '.[{name}]' in the checkout, or leave "
                "it out"
            )


def check_layout(config: RunConfig, world_size: int) -> None:
    """Every phase's batch must divide over ranks and micro-batches, and the ranks over the replicas; ranks that are named must
    be there.

    Raises:
        UserError: naming the phase and the numbers.
    """
    replicas, micro = config.parallel.replicas, config.parallel.micro_batch_size
    if world_size % replicas:
        raise UserError(
            f"parallel.replicas: {replicas} copies of the model, but {world_size} ranks are no multiple of it"
        )
    if config.profile and (beyond := [rank for rank in config.profile.ranks if rank >= world_size]):
        raise UserError(f"profile.ranks: {beyond[0]}, and there are ranks 0 to {world_size - 1}")
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
