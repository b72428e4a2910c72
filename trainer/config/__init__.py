"""The run's configuration: typed, frozen, one owner a field, units in the names. No torch.

A recipe is a function that returns a `RunConfig`; a variant calls another recipe and replaces fields with `replace`.
`section` holds what all sections share, `data`, `task` and `training` the sections, `run` the whole and its checks.
`trainer/config_text.py` reads and writes it as text.
"""

from trainer.config.autoencoder import (
    AsymmetricKLModelConfig,
    AutoencoderConfig,
    AutoencoderModelConfig,
    CodebookConfig,
    ConsistencyConfig,
    DiscriminatorConfig,
    EquivarianceConfig,
    KLModelConfig,
    OutlierPenaltyConfig,
    VQModelConfig,
)
from trainer.config.codec import CodecConfig
from trainer.config.data import DataConfig, DatasetConfig
from trainer.config.evaluation import FeatureNetworkConfig, ImageEvaluationConfig
from trainer.config.perceptual import (
    CropConfig,
    DecodedRGBConfig,
    ImageSpaceConfig,
    ImageSpaceTermsConfig,
    LatentLPIPSConfig,
    LPIPSConfig,
    LPLConfig,
    PerceptualConfig,
    ReweightingConfig,
    SampledConfig,
    SelfPerceptualConfig,
)
from trainer.config.run import (
    RunConfig,
    check_layout,
    check_shape,
    check_sinks,
    config_digest,
    differences,
    differences_in_words,
    explain_digests,
    run_digest,
    size_multiple,
)
from trainer.config.section import CODE_ROOT, Section, replace, resolve_url
from trainer.config.task import (
    ByteTextConfig,
    ClassLabelConfig,
    DenoiserConfig,
    DiTConfig,
    EncoderConfig,
    FrozenTextConfig,
    LatentDiffusionConfig,
    LatentNetworkConfig,
    LatentVGGConfig,
    MMDiTConfig,
    ParadigmConfig,
    PixArtConfig,
    TextConfig,
    UNetConfig,
)
from trainer.config.training import (
    BasicAuthConfig,
    CheckpointConfig,
    EMAConfig,
    InitFromConfig,
    MetricsConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    ProfileConfig,
    PromptAccuracyConfig,
    RateScheduleConfig,
    ReconstructionsConfig,
    SamplesConfig,
    SpikeConfig,
    TLSConfig,
    ValidationConfig,
    WatchdogConfig,
)

__all__ = [
    "CODE_ROOT", "AsymmetricKLModelConfig", "AutoencoderConfig", "AutoencoderModelConfig", "BasicAuthConfig", "ByteTextConfig",
    "CheckpointConfig", "ClassLabelConfig", "CodebookConfig", "CodecConfig", "ConsistencyConfig", "CropConfig",
    "DataConfig", "DatasetConfig", "DecodedRGBConfig", "DenoiserConfig", "DiTConfig", "DiscriminatorConfig",
    "EMAConfig", "EncoderConfig", "EquivarianceConfig", "FeatureNetworkConfig", "FrozenTextConfig",
    "ImageEvaluationConfig", "ImageSpaceConfig",
    "ImageSpaceTermsConfig", "InitFromConfig", "KLModelConfig", "LPIPSConfig", "LPLConfig",
    "LatentDiffusionConfig", "LatentLPIPSConfig", "LatentNetworkConfig", "LatentVGGConfig", "MMDiTConfig",
    "MetricsConfig", "OptimConfig", "OutlierPenaltyConfig", "ParadigmConfig", "ParallelConfig",
    "PerceptualConfig", "PhaseConfig", "PhasePerceptualConfig", "PixArtConfig", "ProfileConfig", "PromptAccuracyConfig",
    "RateScheduleConfig", "ReconstructionsConfig", "ReweightingConfig", "RunConfig", "SampledConfig",
    "SamplesConfig", "Section", "SelfPerceptualConfig", "SpikeConfig", "TLSConfig", "TextConfig", "UNetConfig",
    "VQModelConfig", "ValidationConfig", "WatchdogConfig", "check_layout", "check_shape", "check_sinks", "config_digest",
    "differences", "differences_in_words", "explain_digests", "replace", "resolve_url", "run_digest", "size_multiple",
]  # fmt: skip
