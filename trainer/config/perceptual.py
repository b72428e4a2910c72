"""What perceptual loss a run has: the latent perceptual loss, or one of its rivals. A phase says when, with which weight and
tau. `task.perceptual={kind: ...}` swaps one for another; fields that are left out have defaults."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainer.config.section import NonNegativeFloat, Section


class GatedConfig(Section):
    """Common to all perceptual losses."""

    tau_reference_px: PositiveInt | None = 512
    """Resolution at which a phase's tau is meant; it scales with resolution / reference. Absent: tau is fixed."""


class DecodingConfig(GatedConfig):
    """Common to losses that run the frozen decoder."""

    chunk_size: PositiveInt = 4
    """Latents decoded at a time: the decoder's memory is one chunk's, whatever the batch."""


class SampledConfig(Section):
    """Decode so many of each rank's gated samples, chosen in proportion to a running RMS of their noise level's losses, and
    weighted by one over their probability: unbiased, with shapes that stay."""

    samples_per_rank: PositiveInt
    """Of each micro-batch."""
    num_bins: PositiveInt = 16
    """Noise levels that have an RMS of their own, evenly filled."""


class CropConfig(Section):
    """Decode deep maps of a random window alone: biased, by group norms that see the window and by its border."""

    area: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the feature map that goes on after the first upsampling."""


class LPLConfig(DecodingConfig):
    """The latent perceptual loss (Berrada et al. 2025, Eq. 3)."""

    kind: Literal["lpl"] = "lpl"
    num_maps: PositiveInt | None = None
    """Use the first so many decoder maps; absent: all."""
    maps: tuple[str, ...] | None = None
    """Use these decoder maps, by name (mid, up0, ...); absent: `num_maps` says."""
    depth_weights: Literal["inverse_scale", "printed", "uniform"] = "inverse_scale"
    """omega_l: r_1/r_l; the paper's printed 2^(-r_l/r_1); or 1."""
    statistics: Literal["shared", "separate", "target_norm"] = "shared"
    """What scales the features: the estimate's deviation for both maps; each map's own; or none, but each pixel divided by
    the target's norm over channels, as the public SDXL code does."""
    detach_deviation: bool = False
    """Carry no gradient through the statistics that scale the features."""
    mask_outliers: Literal["deep", "all", "none"] = "deep"
    """Maps whose outliers are masked: those at least 4x the latent's side; all; none."""
    mask_source: Literal["estimate", "target"] = "estimate"
    """Whose outliers: the paper's predicted map, or the true one, as the public SDXL code has it."""
    over_pixels: Literal["mean", "sum"] = "mean"
    """Over inlier pixels; Eq. 3 as printed sums, and w = 3 only fits a mean."""
    over_batch: Literal["all", "gated"] = "all"
    """all: mean over the whole batch, zeros outside the gate included, sum over maps. gated, as the public SDXL code: mean
    over the micro-batch's gated samples and over maps; its weight is another, at least five times."""
    sampled: SampledConfig | None = None
    """Estimate from fewer samples; absent: all inside the gate."""
    crop: CropConfig | None = None
    """Estimate from a window; absent: whole maps."""
    decoder_url: str | None = None
    """Estimate by another decoder of the same latent space, a folder as `task.codec.url`: an `AutoencoderTiny` distilled from
    the codec, or the plain decoder of an asymmetric one. Absent: the codec's own."""

    @model_validator(mode="after")
    def _goes_together(self) -> "LPLConfig":
        if self.maps is not None and (self.num_maps is not None or not self.maps):
            raise ValueError("maps: name at least one decoder map, and leave num_maps out")
        return self


class DecodedRGBConfig(DecodingConfig):
    """Squared error of the decoded images, the control that the paper finds worse than no perceptual loss (Figure 7)."""

    kind: Literal["decoded_rgb"] = "decoded_rgb"


class LPIPSConfig(Section):
    """A frozen LPIPS network (Zhang et al. 2018)."""

    network: Literal["vgg16", "alex", "vgg16_shift_tolerant", "alex_shift_tolerant"] = "vgg16"
    url: str | None = None
    """File or folder with its weights (docs/perceptual-losses.md says which forms are known). Absent: the trunk of an
    installed torchvision, and `heads_url`."""
    heads_url: str | None = None
    """File with the 1x1 heads alone, where `url` has the trunk only."""


class ImageSpaceConfig(DecodingConfig):
    """Image-space latent perceptual loss (CogVideo): a weighted sum of the latents' squared error, LPIPS between the decoded
    estimate and the decoded truth, and LPIPS between the decoded estimate and the input image."""

    kind: Literal["image_space"] = "image_space"
    lpips: LPIPSConfig = LPIPSConfig()
    latent_weight: NonNegativeFloat = 1.0
    decoded_weight: NonNegativeFloat = 1.0
    input_weight: NonNegativeFloat = 0.0
    resize_px: PositiveInt | None = None
    """Side to which images are resized, antialiased, before LPIPS; absent: as they are."""


class LatentLPIPSConfig(GatedConfig):
    """E-LatentLPIPS (Kang et al. 2024): LPIPS of a VGG-style network over latents."""

    kind: Literal["latent_lpips"] = "latent_lpips"
    url: str = "models/latent-lpips"
    """Folder of a latent network, as `loupe export` writes it of the `latent_network` task, or a user's in that layout."""
    augment: bool = False
    """One random augmentation, the same for both latents, before the network (their "E"); the paper's comparison has none."""


class SelfPerceptualConfig(GatedConfig):
    """Self-Perceptual (Lin & Yang 2024): features of a frozen copy of the denoiser, at the estimate and the truth noised
    alike to a new time."""

    kind: Literal["self_perceptual"] = "self_perceptual"
    block: PositiveInt | None = None
    """Features are the output of this block, counted from 1; absent: the middle one. The paper: 8, 16, 28 of 28."""


class ReweightingConfig(GatedConfig):
    """No perceptual loss but the denoising loss itself inside the gate, with the weight that a perceptual loss would have
    (Berrada et al. 2025, Eq. 15)."""

    kind: Literal["reweighting"] = "reweighting"
    variance_ratio: PositiveFloat | None = None
    """sigma_LPL^2 / sigma_l2^2. Absent: measured on `of` in each phase's first `measure_steps` steps."""
    measure_steps: PositiveInt = 16
    of: LPLConfig = LPLConfig()
    """The loss whose variance is measured; it gives no gradient."""


PerceptualConfig = Annotated[
    LPLConfig | DecodedRGBConfig | ImageSpaceConfig | LatentLPIPSConfig | SelfPerceptualConfig | ReweightingConfig,
    Field(discriminator="kind"),
]
