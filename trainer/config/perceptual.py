"""What perceptual loss a run has: the latent perceptual loss, or one of its rivals. A phase says when, with which weight and
tau. `task.perceptual={kind: ...}` swaps one for another; fields that are left out have defaults."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainer.config.section import NonNegativeFloat, NonNegativeInt, Section


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
    whole_maps: NonNegativeInt = 0
    """Decoder maps, from the first, that are computed of all gated samples: only the loss of deeper ones is estimated, and
    of that only what the first ones do not foretell. The first two of Stable Diffusion's cost an eighth of all five."""
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
    """Use the first so many decoder maps; absent: all. The decoder runs no deeper (Figure 7: the fifth adds little)."""
    maps: tuple[str, ...] | None = None
    """Use these decoder maps, by name: mid, up0, up1, ...; of a tiny autoencoder stage0, stage1, ... The decoder runs as
    deep as the last one. Absent: `num_maps` says."""
    depth_weights: Literal["inverse_scale", "printed", "uniform"] = "inverse_scale"
    """omega_l, where r_l is the map's side and r_1 the decoder's first map's, used or not: r_1/r_l; the paper's printed
    2^(-r_l/r_1); or 1."""
    statistics: Literal["shared", "separate", "target_norm"] = "shared"
    """What scales the features. shared: the estimate's deviation, both maps. separate: each map's own mean and deviation.
    target_norm, as the public SDXL code: at each pixel the target's norm over channels, both maps."""
    detach_deviation: bool = False
    """Carry no gradient through the deviations: with it, a model can lower the loss by making its own features vary more."""
    mask_outliers: Literal["deep", "all", "none"] = "deep"
    """Maps whose outliers are masked (Algorithm 1): those at least 4x the latent's side; all; none."""
    mask_source: Literal["estimate", "target"] = "estimate"
    """Whose outliers are masked in both maps: those of the paper's predicted map, or of the true one, as in the public SDXL
    code."""
    over_pixels: Literal["mean", "sum"] = "mean"
    """Reduction over inlier pixels, before the mean over channels. Eq. 3 as printed sums, and w = 3 only fits a mean: a sum
    is larger by the map's number of pixels."""
    over_batch: Literal["all", "gated"] = "all"
    """all: sum over maps, mean over the whole batch, zeros outside the gate included. gated, as the public SDXL code: mean
    over maps and over the samples inside the gate of each rank's micro-batch, so the loss depends on how the batch is laid
    out; its weight is another, with five maps at least five times that of all."""
    sampled: SampledConfig | None = None
    """Estimate from fewer samples; absent: all inside the gate."""
    crop: CropConfig | None = None
    """Estimate from a window; absent: whole maps."""
    decoder_url: str | None = None
    """Estimate by another decoder of the same latent space, a folder as `task.codec.url`: an `AutoencoderTiny` distilled from
    the codec, or the plain decoder of an asymmetric one. Its loss is another, with a weight of its own; channels that are
    nearly dead, as of one distilled for too short, need statistics=separate. Absent: the codec's own."""

    @property
    def by_micro_batch(self) -> bool:
        """Whether the loss, and not only rounding, depends on how the batch is split."""
        return self.over_batch == "gated" or self.sampled is not None

    @model_validator(mode="after")
    def _goes_together(self) -> "LPLConfig":
        if self.maps is not None and (self.num_maps is not None or not self.maps):
            raise ValueError("maps: name at least one decoder map, and leave num_maps out")
        if self.maps is not None and len(set(self.maps)) < len(self.maps):
            raise ValueError("maps: names a map twice; name each once")
        if self.detach_deviation and self.statistics == "target_norm":
            raise ValueError("detach_deviation: target_norm has no deviation of the estimate's; leave it out")
        if self.mask_source == "target" and self.mask_outliers == "none":
            raise ValueError("mask_source: no outliers are masked with mask_outliers=none; leave it out")
        return self


class DecodedRGBConfig(DecodingConfig):
    """Squared error of the decoded images, the control that the paper finds worse than no perceptual loss (Figure 7)."""

    kind: Literal["decoded_rgb"] = "decoded_rgb"


LPIPSNetwork = Literal["vgg16", "alex", "vgg16_shift_tolerant", "alex_shift_tolerant"]
"""The shift-tolerant ones (Ghildyal and Liu 2022) blur wherever they subsample; their distances are on another scale."""


class LPIPSConfig(Section):
    """A frozen LPIPS network (Zhang et al. 2018)."""

    network: LPIPSNetwork = "vgg16"
    url: str | None = None
    """File or folder with its weights (docs/perceptual-losses.md says which forms are known). Absent: the trunk of an
    installed torchvision, and `heads_url`."""
    heads_url: str | None = None
    """File with the 1x1 heads alone, where `url` has the trunk only."""


class ImageSpaceTermsConfig(Section):
    """Image-space latent perceptual loss (CogVideo): a weighted sum of the latents' squared error, LPIPS between the decoded
    estimate and the decoded truth, and LPIPS between the decoded estimate and the input image."""

    lpips: LPIPSConfig = LPIPSConfig()
    latent_weight: NonNegativeFloat = 1.0
    decoded_weight: NonNegativeFloat = 1.0
    input_weight: NonNegativeFloat = 0.0
    resize_px: PositiveInt | None = None
    """Side to which images are resized, bicubic and antialiased, before LPIPS; absent: as they are."""

    @model_validator(mode="after")
    def _some_term(self) -> "ImageSpaceTermsConfig":
        if not (self.latent_weight or self.decoded_weight or self.input_weight):
            raise ValueError("latent_weight, decoded_weight, input_weight: all are 0; give one of them a weight")
        return self


class ImageSpaceConfig(ImageSpaceTermsConfig, DecodingConfig):
    """The same of a diffusion model's clean estimate, inside the gate."""

    kind: Literal["image_space"] = "image_space"


class LatentLPIPSConfig(GatedConfig):
    """E-LatentLPIPS (Kang et al. 2024): LPIPS of a VGG-style network over latents."""

    kind: Literal["latent_lpips"] = "latent_lpips"
    url: str = "models/latent-lpips"
    """Folder of a latent network, as `loupe export` writes it of the `latent_network` task, or a user's in that layout."""
    augment: bool = False
    """One random augmentation, the same for both latents, before the network (their "E"); the paper's comparison has none."""
    chunk_size: PositiveInt = 16
    """Latents that the network sees at a time: its memory is one chunk's, whatever the batch."""


class SelfPerceptualConfig(GatedConfig):
    """Self-Perceptual (Lin & Yang 2024): features of a frozen copy of the denoiser, at the estimate and the truth noised
    alike to a new time."""

    kind: Literal["self_perceptual"] = "self_perceptual"
    block: PositiveInt | None = None
    """Features are the output of this block, counted from 1; absent: the middle one. The paper: 8, 16, 28 of 28. Of a U-Net
    the levels on the way down, the middle, and the levels on the way up: 9 of four levels."""


class ReweightingConfig(GatedConfig):
    """No perceptual loss but the denoising loss itself inside the gate, with the weight that a perceptual loss would have
    (Berrada et al. 2025, Eq. 15)."""

    kind: Literal["reweighting"] = "reweighting"
    variance_ratio: PositiveFloat | None = None
    """sigma_LPL^2 / sigma_l2^2. Absent: measured on `of` in each phase's first `measure_steps` steps, over all samples, those
    outside the gate with an LPL of 0; until then the ratio is what the steps before have given, and 0 in the first."""
    measure_steps: PositiveInt = 16
    of: LPLConfig = LPLConfig()
    """The loss whose variance is measured; it gives no gradient. The gate is this section's, not `of`'s."""


PerceptualConfig = Annotated[
    LPLConfig | DecodedRGBConfig | ImageSpaceConfig | LatentLPIPSConfig | SelfPerceptualConfig | ReweightingConfig,
    Field(discriminator="kind"),
]
