"""Stage 1: what an autoencoder is, and by which losses it is trained. After latent-diffusion (Rombach et al. 2022,
appendix G) and taming-transformers (Esser et al. 2021), whose values are the defaults."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainer.config.codec import CodecConfig
from trainer.config.perceptual import ImageSpaceTermsConfig, LPIPSConfig
from trainer.config.section import NonNegativeFloat, NonNegativeInt, Section

MAX_LEVELS = 8
KL_WEIGHT = 1e-6
Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=8192)], ...], Field(min_length=1, max_length=MAX_LEVELS)]

# ----------------------------------------------------------------------------------------------------------- the network


class LevelsConfig(Section):
    """Common to all autoencoders: diffusers' encoder and decoder, a level for each resolution."""

    block_out_channels: Widths
    """Channels of each resolution, the finest first: n + 1 of them make latents of a 2^n-th of the image's side."""
    layers_per_block: PositiveInt = 1
    """Residual blocks of a level on the way down; on the way up it is one more (Stable Diffusion: 2)."""
    latent_channels: Annotated[int, Field(ge=1, le=1024)] = 4
    norm_num_groups: PositiveInt = 32

    @property
    def downsampling(self) -> int:
        """Side of an image over side of its latents."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def decoder_maps(self) -> tuple[str, ...]:
        """Names of the decoder's feature maps, in order."""
        return ("mid", *(f"up{i}" for i in range(len(self.block_out_channels))))

    @model_validator(mode="after")
    def _groups_divide(self) -> "LevelsConfig":
        for field in ("block_out_channels", "decoder_block_out_channels"):
            for channels in getattr(self, field, ()):
                if channels % self.norm_num_groups:
                    raise ValueError(
                        f"norm_num_groups: {self.norm_num_groups} does not divide the {channels} of {field}"
                    )
        return self


class KLModelConfig(LevelsConfig):
    """diffusers' `AutoencoderKL`: continuous latents under a weak penalty."""

    kind: Literal["kl"] = "kl"
    mid_block_attention: bool = True


class AsymmetricKLModelConfig(LevelsConfig):
    """diffusers' `AsymmetricAutoencoderKL` (Zhu et al. 2023): an encoder, and a decoder of another size."""

    kind: Literal["asymmetric_kl"] = "asymmetric_kl"
    decoder_block_out_channels: Widths
    decoder_layers_per_block: PositiveInt = 2

    @model_validator(mode="after")
    def _as_many_levels(self) -> "AsymmetricKLModelConfig":
        here, there = len(self.decoder_block_out_channels), len(self.block_out_channels)
        if here != there:
            raise ValueError(
                f"decoder_block_out_channels: {here} levels, block_out_channels has {there}; give both as many"
            )
        return self


class CodebookConfig(Section):
    """Of vector quantisation (van den Oord et al. 2017)."""

    size: Annotated[int, Field(ge=2, le=1 << 20)] = 16384
    """Number of codes."""
    update: Literal["gradient", "ema"] = "gradient"
    """How codes follow the latents that choose them: by the codebook loss; or as their running mean (ibid., appendix A)."""
    commitment_weight: NonNegativeFloat = 0.25
    """Of |z - sg(e)|^2, which keeps latents near their codes; the codebook loss |sg(z) - e|^2 has a weight of 1."""
    weight: NonNegativeFloat = 1.0
    """Of the two together, beside the reconstruction."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Of the running counts; with `update: ema` of the codes too."""
    restart_below: NonNegativeFloat = 0.0
    """Codes that are chosen less often than this, by running count a step, are dead: they begin again at a latent of the
    current batch. 0: none do. Counts begin at 0: at step n they are 1 - ema_decay^n of what they will be."""
    restart_every_steps: PositiveInt = 100


class VQModelConfig(LevelsConfig):
    """diffusers' `VQModel`: each latent pixel is the nearest of a codebook's vectors."""

    kind: Literal["vq"] = "vq"
    codebook: CodebookConfig = CodebookConfig()
    mid_block_attention: bool = True


AutoencoderModelConfig = Annotated[KLModelConfig | AsymmetricKLModelConfig | VQModelConfig, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------------------ its losses


class DiscriminatorConfig(Section):
    """PatchGAN (Isola et al. 2017): tells patches of reconstructions from those of images."""

    start_step: NonNegativeInt = 50_001
    """Of the run; before it there is no discriminator, and no cost of one."""
    weight: NonNegativeFloat = 0.5
    """Of the generator's term, beside the adaptive weight (Esser et al. 2021, eq. 7)."""
    adaptive_weight: bool = True
    """lambda = |grad reconstruction| / (|grad generator| + 1e-4) at the decoder's last layer, at most 1e4, no gradient."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """vanilla: the logistic loss of Goodfellow et al. 2014, as softplus."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of the first layer; doubled by each next, to at most eight times as many."""
    num_layers: Annotated[int, Field(ge=1, le=6)] = 3
    """Layers that halve the side. A logit sees a patch of 16, 34, 70, 142, ... pixels a side."""
    norm: Literal["batch", "spectral", "none"] = "batch"
    """batch: over the samples of all ranks. spectral (Miyato et al. 2018): of the weights, no norm of activations."""
    learning_rate_factor: PositiveFloat = 1.0
    """Its learning rate is the step's times this."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.9)
    """Of its Adam."""

    @property
    def patch_px(self) -> int:
        """Side of the patch that one logit sees."""
        side = 7  # two convolutions of 4 and stride 1
        for _ in range(self.num_layers):
            side = 2 * side + 2
        return side

    @property
    def smallest_px(self) -> int:
        """Side of an image that leaves one logit."""
        return int(3 * 2**self.num_layers)

    @property
    def by_micro_batch(self) -> bool:
        """Whether the loss, and not only rounding, depends on how the batch is split."""
        return self.adaptive_weight or self.norm == "batch"


class OutlierPenaltyConfig(Section):
    """Keeps the decoder's feature maps free of the few values, orders of magnitude above the rest, that LPL has to mask
    (Berrada et al. 2025, section A.3): mean of max(0, |f - mean| / deviation - threshold)^2 by channel and sample."""

    weight: PositiveFloat = 1.0
    threshold: PositiveFloat = 5.0
    """In standard deviations of the channel, which carry no gradient."""
    maps: tuple[str, ...] | None = None
    """Names of decoder maps: mid, up0, ...; absent: all."""


class EquivarianceConfig(Section):
    """Latents that turn and shrink as their image does (EQ-VAE, Kouzelis et al. 2025): the decoder's image of transformed
    latents against the transformed image, mean absolute difference. One transform a step, the same for all samples."""

    weight: PositiveFloat = 0.25
    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.25, 0.5, 0.75, 1.0), min_length=1)
    """Of the side; a step takes one of them."""
    rotations: bool = True
    """By a multiple of 90 degrees too."""


class ConsistencyConfig(Section):
    """The trained decoder against the teacher's, on the same latents: for a light decoder beside a full one."""

    pixel_weight: NonNegativeFloat = 1.0
    """Of the mean absolute difference of their images."""
    lpips_weight: NonNegativeFloat = 0.0
    """Of their LPIPS, by the network of `task.lpips`."""


class AutoencoderConfig(Section):
    """An autoencoder trained by reconstruction, LPIPS, a discriminator, and a weak penalty or a codebook."""

    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderModelConfig
    trained: Literal["all", "encoder", "decoder"] = "all"
    """What is trained of it; the rest stays as `init_from` gave it. decoder: latents of existing data stay valid."""
    reconstructs: Literal["images", "latents"] = "images"
    """latents: a second stage, whose input and output are the teacher's scaled latents."""
    teacher: CodecConfig | None = None
    """A frozen, trained autoencoder, for `image_space`, `consistency` and `reconstructs: latents`."""
    pixel_loss: Literal["l1", "l2"] = "l1"
    pixel_weight: NonNegativeFloat = 1.0
    lpips: LPIPSConfig | None = LPIPSConfig()
    """Absent: no perceptual term."""
    lpips_weight: NonNegativeFloat = 1.0
    kl_weight: NonNegativeFloat = KL_WEIGHT
    """Of the posterior's KL divergence, summed over latents; the reconstruction is a mean over pixels and channels, so the
    divergence is divided by their number: as latent-diffusion weighs the two sums."""
    learned_log_variance: bool = False
    """nll = reconstruction / exp(s) + s, with one trained s that begins at 0 (Rombach's code: `logvar`)."""
    discriminator: DiscriminatorConfig | None = DiscriminatorConfig()
    """Absent: none."""
    outliers: OutlierPenaltyConfig | None = None
    equivariance: EquivarianceConfig | None = None
    image_space: ImageSpaceTermsConfig | None = None
    """Trained encoder: its latents against the teacher's, and what the teacher's decoder makes of both (CogVideo)."""
    consistency: ConsistencyConfig | None = None

    @property
    def by_micro_batch(self) -> bool:
        return self.discriminator is not None and self.discriminator.by_micro_batch

    @model_validator(mode="after")
    def _goes_together(self) -> "AutoencoderConfig":
        for field in ("image_space", "consistency"):
            if getattr(self, field) and not self.teacher:
                raise ValueError(f"{field}: compares with a teacher; set task.teacher")
        if self.image_space and self.trained == "decoder" and self.reconstructs == "images":
            raise ValueError(
                "image_space: is about trained latents, and trained is decoder; take consistency for a decoder"
            )
        if self.consistency and self.trained == "encoder":
            raise ValueError("consistency: is about a trained decoder, and trained is encoder; take image_space for it")
        for name in (self.outliers and self.outliers.maps) or ():
            if name not in self.model.decoder_maps:
                raise ValueError(
                    f"outliers.maps: no decoder map {name!r}; there are {', '.join(self.model.decoder_maps)}"
                )
        if self.model.kind == "vq" and self.kl_weight not in (0.0, KL_WEIGHT):
            raise ValueError("kl_weight: is of a posterior, and model.kind is vq, which has none; leave it out, "
                             "model.codebook.commitment_weight is what keeps its latents near")  # fmt: skip
        if self.consistency and self.consistency.lpips_weight and not self.lpips:
            raise ValueError("consistency.lpips_weight: needs the network of task.lpips; set it, or the weight to 0")
        if self.reconstructs == "latents":
            self._check_second_stage()
        elif self.teacher and not (self.image_space or self.consistency):
            raise ValueError("teacher: nothing compares with it; set image_space or consistency, or leave it out")
        if self.teacher and self.reconstructs == "images":
            for field in ("latent_channels", "downsampling"):
                ours, theirs = getattr(self.model, field), getattr(self.teacher, field)
                if ours != theirs:
                    raise ValueError(
                        f"teacher.{field}: {theirs}, and the model's is {ours}; latents must be of one kind"
                    )
        return self

    def _check_second_stage(self) -> None:
        if not self.teacher:
            raise ValueError("teacher: a second stage reconstructs the latents of a first; set task.teacher")
        if self.model.kind != "kl" or self.trained != "all":
            raise ValueError("reconstructs: latents goes with model.kind kl and trained all")
        for field in ("lpips", "discriminator", "outliers", "equivariance", "consistency", "learned_log_variance"):
            if getattr(self, field):
                off = "false" if field == "learned_log_variance" else "null"
                raise ValueError(f"{field}: is about images, and reconstructs is latents; set it to {off}, and image_space "
                                 "for what the teacher's decoder makes of the latents")  # fmt: skip
