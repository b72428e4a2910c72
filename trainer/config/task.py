"""What a run trains: denoiser, text encoders, codec and paradigm of latent diffusion; or an autoencoder; or a classifier of
latents, whose features a perceptual loss compares."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainer.config.autoencoder import AutoencoderConfig
from trainer.config.codec import CodecConfig
from trainer.config.perceptual import LPLConfig, PerceptualConfig
from trainer.config.section import NonNegativeInt, Probability, Section

# ------------------------------------------------------------------------------------------------------ text, or classes


class ByteTextConfig(Section):
    """A small transformer over bytes, trained with the denoiser."""

    kind: Literal["bytes"] = "bytes"
    max_bytes: PositiveInt = 64
    """Caption length in UTF-8 bytes; longer captions are cut, and counted."""
    width: PositiveInt = 128
    num_blocks: PositiveInt = 2
    num_heads: PositiveInt = 4


class ClassLabelConfig(Section):
    """One vector a class, trained with the denoiser."""

    kind: Literal["classes"] = "classes"
    num_classes: PositiveInt
    width: PositiveInt = 128


class EncoderConfig(Section):
    """One frozen text encoder of transformers. Widths are declared, so that a run can be checked without its weights."""

    family: Literal["clip", "t5", "gemma", "siglip"]
    url: str
    """Folder with the encoder's `config.json`, safetensors weights and tokenizer, a path or any fsspec URL."""
    weights_folder: str = ""
    """Subfolder of the weights and their config, as in a diffusers pipeline; empty: the folder itself."""
    tokenizer_folder: str = ""
    """Subfolder of the tokenizer; empty: the folder itself."""
    width: PositiveInt
    """Channels of the token states."""
    pooled_width: PositiveInt | None = None
    """Channels of the pooled output; absent: it is not used. T5 and Gemma pool by the mean over real tokens."""
    max_tokens: PositiveInt = 77
    """Caption length in tokens; longer captions are cut, and counted."""
    hidden_state: Annotated[int, Field(le=-1)] = -1
    """Which layer's states: -1 the last, after the final norm; -2 the one before it, as Stable Diffusion takes of CLIP."""
    join: Literal["tokens", "channels"] = "tokens"
    """Its token states follow those of the encoder before it, or stand beside them in the channels, as SD3's two CLIPs."""
    dropout: Probability = 0.0
    """Share of samples for which this encoder alone is given the null caption, beside `caption_dropout`."""
    padding: Literal["masked", "seen"] = "masked"
    """Whether tokens behind a caption's end are hidden, from the encoder and the denoiser; or seen by both, as Stable
    Diffusion 3 was trained."""
    null_text: Literal["empty", "zeros"] = "empty"
    """What a dropped caption is to this encoder: the empty caption, or zeros."""


class FrozenTextConfig(Section):
    """Frozen encoders of transformers, one or several, in bf16 on a GPU and without gradient."""

    kind: Literal["frozen"] = "frozen"
    encoders: tuple[EncoderConfig, ...] = Field(min_length=1)
    cache_mib: NonNegativeInt = 0
    """Host memory, per rank, for the states of captions already encoded; 0: none are kept."""

    @property
    def groups(self) -> tuple[tuple[EncoderConfig, ...], ...]:
        """Encoders whose token states stand beside each other; groups follow one another along the tokens."""
        groups: list[list[EncoderConfig]] = []
        for encoder in self.encoders:
            if encoder.join == "channels":
                groups[-1].append(encoder)
            else:
                groups.append([encoder])
        return tuple(tuple(group) for group in groups)

    @property
    def width(self) -> int:
        """Channels of the joined token states: narrower groups are padded with zeros."""
        return max(sum(encoder.width for encoder in group) for group in self.groups)

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled outputs beside each other; 0: none."""
        return sum(encoder.pooled_width or 0 for encoder in self.encoders)

    @model_validator(mode="after")
    def _encoders_join(self) -> "FrozenTextConfig":
        if self.encoders[0].join == "channels":
            raise ValueError("encoders.0.join: the first encoder has none before it; take tokens")
        for group in self.groups:
            for encoder in group[1:]:
                if encoder.max_tokens != group[0].max_tokens:
                    raise ValueError(
                        f"encoders: {encoder.family} of {encoder.max_tokens} tokens cannot stand beside {group[0].family} "
                        f"of {group[0].max_tokens}; give both the same max_tokens, or join by tokens"
                    )
        return self


TextConfig = Annotated[ByteTextConfig | ClassLabelConfig | FrozenTextConfig, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------------------ denoisers


class MMDiTConfig(Section):
    """SD3's MMDiT (Esser et al. 2024). Channels and condition widths follow from the codec and the text encoder."""

    kind: Literal["mmdit"] = "mmdit"
    num_blocks: PositiveInt
    num_heads: PositiveInt
    head_dim: PositiveInt = 64
    patch_size: PositiveInt = 2
    """Side of a patch, in latent pixels."""
    layout: Literal["sd3", "shared"] = "sd3"
    """sd3: image and text have weights of their own, and every block its modulation. shared: one set of weights for both
    and one modulation for all blocks, of which each learns an offset (PixArt-alpha's adaLN-single)."""
    num_dual_attention_blocks: NonNegativeInt = 0
    """First so many blocks have a second attention among the image's tokens alone (Stable Diffusion 3.5 medium: 13)."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """Added to the patches once, or turned into every query and key of the image (2-D, half of each head a side)."""
    position_growth: Literal["extend", "stretch"] = "extend"
    """What a larger image has at its patches: new positions around the smaller one's, as SD3; or the same range of
    positions, more densely."""
    position_grid: PositiveInt = 192
    """Side of the grid of positions, in patches: the largest image. With `extend`, smaller ones take its centre."""
    base_grid: PositiveInt = 64
    """Positions run from 0 to this across the grid, or with `stretch` across every image's longer side (SD3: the patches
    of its training resolution)."""
    qk_norm: bool = True
    """RMS normalisation of queries and keys per head."""

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def latent_multiple(self) -> int:
        """Sides of latents must be multiples of this."""
        return self.patch_size

    @model_validator(mode="after")
    def _fits(self) -> "MMDiTConfig":
        if self.num_dual_attention_blocks > self.num_blocks:
            raise ValueError(
                f"num_dual_attention_blocks: {self.num_dual_attention_blocks} of {self.num_blocks} blocks; take fewer"
            )
        if self.num_dual_attention_blocks and self.layout != "sd3":
            raise ValueError("num_dual_attention_blocks: goes with layout sd3, this is shared")
        if self.positions == "rotary" and self.head_dim % 4:
            raise ValueError(f"head_dim: {self.head_dim} is no multiple of 4, which 2-D rotary positions need")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(
                f"head_dim: num_heads x head_dim is {self.width}, no multiple of 4; 2-D positions need one"
            )
        return self


class UNetConfig(Section):
    """Latent diffusion's U-Net with cross-attention (Rombach et al. 2022), diffusers' `UNet2DConditionModel`."""

    kind: Literal["unet"] = "unet"
    block_out_channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280)
    layers_per_block: PositiveInt = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which resolutions, the finest first, attend to themselves and to the text."""
    head_dim: PositiveInt = 64
    norm_num_groups: PositiveInt = 32

    @property
    def latent_multiple(self) -> int:
        return int(2 ** (len(self.block_out_channels) - 1))

    @model_validator(mode="after")
    def _fits(self) -> "UNetConfig":
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError(
                f"attention_levels: {len(self.attention_levels)} levels, block_out_channels has "
                f"{len(self.block_out_channels)}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups: {self.norm_num_groups} does not divide the {channels} channels")
            if channels % self.head_dim:
                raise ValueError(f"head_dim: {self.head_dim} does not divide the {channels} channels")
        return self


class PatchTransformerConfig(Section):
    """What diffusers' transformers over patches have in common."""

    num_blocks: PositiveInt = 28
    num_heads: PositiveInt = 16
    head_dim: PositiveInt = 72
    patch_size: PositiveInt = 2
    base_grid: PositiveInt = 16
    """Patches a side at which positions are counted one by one; other sizes stretch over the same range."""

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def latent_multiple(self) -> int:
        return self.patch_size


class DiTConfig(PatchTransformerConfig):
    """DiT (Peebles & Xie 2023), class-conditional, diffusers' `DiTTransformer2DModel`."""

    kind: Literal["dit"] = "dit"


class PixArtConfig(PatchTransformerConfig):
    """PixArt-alpha (Chen et al. 2024), text by cross-attention, diffusers' `PixArtTransformer2DModel`."""

    kind: Literal["pixart"] = "pixart"


DenoiserConfig = Annotated[MMDiTConfig | UNetConfig | DiTConfig | PixArtConfig, Field(discriminator="kind")]

# --------------------------------------------------------------------------------------------------- paradigm, losses


class ParadigmConfig(Section):
    kind: Literal["ddpm_eps", "ddpm_v", "flow"]
    timestep_density: Literal["uniform", "mode", "logit_normal", "cosmap"] | None = None
    """Absent: the paradigm's own, uniform for DDPM and mode sampling for flow. mode and cosmap are for flow."""
    mode_scale: Annotated[float, Field(ge=-1.0, le=1.7519)] = 1.29
    """s of mode sampling (Esser et al. 2024, eq. 20); up to 2/(pi - 2), where times stay in order."""
    logit_mean: float = 0.0
    """m of logit-normal sampling (Esser et al. 2024, eq. 19): negative favours low noise."""
    logit_std: PositiveFloat = 1.0
    timestep_draws: Literal["low_discrepancy", "independent"] = "low_discrepancy"
    """Times spread evenly over the global batch, or drawn one by one. Each sample's own distribution is the same."""
    weighting: Literal["uniform", "min_snr"] = "uniform"
    """Of the squared error by noise level. min_snr (Hang et al. 2023): as if the clean estimate's error weighed
    min(SNR, gamma), whatever the network predicts."""
    min_snr_gamma: PositiveFloat = 5.0
    shift_base_px: PositiveInt | None = None
    """Shift noise levels with resolution, relative to this one; absent: no shift."""

    @model_validator(mode="after")
    def _goes_together(self) -> "ParadigmConfig":
        if self.kind != "flow" and self.timestep_density in ("mode", "cosmap"):
            raise ValueError(
                f"timestep_density: {self.timestep_density} is for flow; {self.kind} takes uniform or logit_normal"
            )
        return self


class LatentDiffusionConfig(Section):
    kind: Literal["latent_diffusion"] = "latent_diffusion"
    model: DenoiserConfig
    text: TextConfig
    codec: CodecConfig
    paradigm: ParadigmConfig
    caption_dropout: Probability = 0.1
    """Share of samples trained without their caption, for classifier-free guidance."""
    perceptual: PerceptualConfig = LPLConfig()
    """What the phases with a perceptual loss have of it."""

    @model_validator(mode="after")
    def _fields_agree(self) -> "LatentDiffusionConfig":
        model, text = self.model, self.text
        if model.kind == "dit" and text.kind != "classes":
            raise ValueError(
                f"model.kind: dit knows classes alone, text.kind is {text.kind}; take classes, or another model"
            )
        if model.kind == "mmdit" and text.kind == "frozen" and not text.pooled_width:
            raise ValueError("text.encoders: mmdit needs a pooled text; give an encoder its pooled_width")
        return self


# ----------------------------------------------------------------------------------------------- the latent network task

NUM_STAGES = 5
"""Of VGG, and of LPIPS's features."""
StageCount = Annotated[int, Field(ge=1, le=16)]
StageWidth = Annotated[int, Field(ge=1, le=8192)]


class LatentVGGConfig(Section):
    """VGG16's convolutions (Simonyan & Zisserman 2015) over latents, in five stages."""

    widths: tuple[StageWidth, ...] = Field((64, 128, 256, 512, 512), min_length=NUM_STAGES, max_length=NUM_STAGES)
    """Channels of each stage."""
    convs_per_stage: tuple[StageCount, ...] = Field((2, 2, 3, 3, 3), min_length=NUM_STAGES, max_length=NUM_STAGES)
    pooled_stages: tuple[Annotated[int, Field(ge=2, le=NUM_STAGES)], ...] = (4, 5)
    """Stages, counted from 1, that halve the side first. VGG16 halves it before each of 2 to 5 and at the end; latents are
    small already, and Kang et al. (2024) leave out three of the five."""
    norm_num_groups: PositiveInt | None = 32
    """Of the group norm behind each convolution; null: no norm, as VGG16 was published."""

    @property
    def smallest_side(self) -> int:
        """Of latents, in latent pixels: one pixel is left behind the last pooling."""
        return int(2 ** len(self.pooled_stages))

    @model_validator(mode="after")
    def _fits(self) -> "LatentVGGConfig":
        if len(set(self.pooled_stages)) < len(self.pooled_stages):
            raise ValueError(
                f"pooled_stages: {list(self.pooled_stages)} names a stage twice; a stage halves the side once"
            )
        for width in self.widths:
            if self.norm_num_groups and width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups: {self.norm_num_groups} does not divide the {width} channels of a stage"
                )
        return self


class LatentNetworkConfig(Section):
    """A network over latents, trained to tell the classes of images, whose features E-LatentLPIPS compares (Kang et al.
    2024, section 3.2). Learns the latents of one autoencoder."""

    kind: Literal["latent_network"] = "latent_network"
    model: LatentVGGConfig = LatentVGGConfig()
    codec: CodecConfig
    num_classes: PositiveInt
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that is spread evenly over all classes (Szegedy et al. 2016)."""


TaskConfig = Annotated[LatentDiffusionConfig | AutoencoderConfig | LatentNetworkConfig, Field(discriminator="kind")]
