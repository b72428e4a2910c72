"""Image metrics while a text-to-image model is trained: those of `loupe evaluate run`, at intervals."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from trainer.config.sampling import SamplerName
from trainer.config.section import NonNegativeFloat, NonNegativeInt, Probability, Section

NetworkName = Literal["inception", "inception_clean", "dinov2", "clip", "efficientnet_lite0"]
"""Code of one's own is named on a command line alone, never in a file."""
MetricName = Literal[
    "fid", "fid_infinity", "kid", "precision", "recall", "density", "coverage", "cmmd", "clip_score", "spectrum"
]


class FeatureNetworkConfig(Section):
    name: NetworkName
    weights: str
    """File, folder or URL, as `loupe evaluate --network` takes it. Never downloaded from elsewhere."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """What the weights must have."""


class ImageEvaluationConfig(Section):
    """Pictures of the averaged weights against real images, at intervals and at the end: the figures of `loupe evaluate run`
    for a checkpoint of the same step. Latent diffusion only."""

    every_steps: PositiveInt = 10_000
    reference: str | None = None
    """Real images, a dataset or a folder; absent: `validation.dataset`, or else what the run trains on (its first dataset, up
    to `max_samples`)."""
    reference_count: Annotated[int, Field(ge=4)] | None = None
    """So many of them, drawn by the seed; absent: all."""
    num_samples: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Pictures, of captions (or classes) of the reference that the seed draws; absent: one of each."""
    prompts: str | None = None
    """File of prompts, as `loupe sample --prompts` takes it: a picture of each, in place of `num_samples`."""
    networks: tuple[FeatureNetworkConfig, ...] = ()
    """Whose features are compared; absent: power spectra alone."""
    metrics: tuple[MetricName, ...] = ()
    """Absent: all that can be had but fid_infinity."""
    allow_few: bool = False
    """A Frechet distance even of no more images than features."""
    resolution: PositiveInt | None = None
    """Side of the pictures, in pixels, and of the real images beside them; absent: the last phase's, so that figures of all
    phases compare."""
    resize: Literal["training", "bicubic"] = "training"
    """Of real images of another size: as the trainer makes its own, by area; or Pillow's bicubic."""
    sampler: SamplerName | None = None
    """Absent, as of the next four: that of `samples`, or without `samples` that of `loupe sample`."""
    num_steps: PositiveInt | None = None
    guidance_scale: NonNegativeFloat | None = None
    guidance_interval: tuple[Probability, Probability] | None = None
    guidance_rescale: Probability | None = None
    noise_seed: NonNegativeInt = 0
    """Of the pictures' noise."""
    seed: NonNegativeInt = 0
    """Of images that are chosen, and of resamples."""
    resamples: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Of bootstrap intervals; 0: without."""
    lot: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pictures that a rank draws at once; absent: 8. Pictures depend on it by rounding."""
    batch_size: Annotated[int, Field(ge=1, le=64)] = 32
    """Images that the feature networks see at once."""
    cache: str | None = None
    """Folder that all ranks see, for what the networks give of real images; absent: that of `loupe evaluate`."""

    @model_validator(mode="after")
    def _fields_agree(self) -> "ImageEvaluationConfig":
        if self.prompts is not None and self.num_samples is not None:
            raise ValueError("num_samples: goes without prompts; the file says how many there are")
        names = [network.name for network in self.networks]
        if len(set(names)) < len(names):
            raise ValueError(f"networks: each once, got {', '.join(names)}")
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            first, last = self.guidance_interval
            raise ValueError(f"guidance_interval: {first:g} to {last:g} is empty; give the smaller time first")
        return self
