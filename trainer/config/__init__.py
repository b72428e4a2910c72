"""The run's configuration: typed, frozen, one owner a field, units in the names. No torch.

A recipe is a function that returns a `RunConfig`; a variant calls another recipe and replaces fields with `replace`.
`section` holds what all sections share, `data`, `task` and `training` the sections, `run` the whole and its checks.
`trainer/config_text.py` reads and writes it as text.
"""

from trainer.config.data import DataConfig, DatasetConfig
from trainer.config.perceptual import (
    CropConfig,
    DecodedRGBConfig,
    ImageSpaceConfig,
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
    config_digest,
    differences,
    differences_in_words,
    explain_digests,
    run_digest,
)
from trainer.config.section import CODE_ROOT, Section, replace, resolve_url
from trainer.config.task import (
    AutoencoderConfig,
    AutoencoderModelConfig,
    ByteTextConfig,
    ClassLabelConfig,
    CodecConfig,
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
    CheckpointConfig,
    EMAConfig,
    InitFromConfig,
    MetricsConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    PromptAccuracyConfig,
    RateScheduleConfig,
    SamplesConfig,
    SpikeConfig,
)

__all__ = [
    "CODE_ROOT", "AutoencoderConfig", "AutoencoderModelConfig", "ByteTextConfig", "CheckpointConfig",
    "ClassLabelConfig", "CodecConfig", "CropConfig", "DataConfig", "DatasetConfig", "DecodedRGBConfig",
    "DenoiserConfig", "DiTConfig", "EMAConfig", "EncoderConfig", "FrozenTextConfig", "ImageSpaceConfig",
    "InitFromConfig", "LPIPSConfig", "LPLConfig", "LatentDiffusionConfig", "LatentLPIPSConfig", "LatentNetworkConfig",
    "LatentVGGConfig", "MMDiTConfig",
    "MetricsConfig", "OptimConfig", "ParadigmConfig", "ParallelConfig", "PerceptualConfig", "PhaseConfig",
    "PhasePerceptualConfig", "PixArtConfig", "PromptAccuracyConfig", "RateScheduleConfig", "ReweightingConfig",
    "RunConfig", "SampledConfig", "SamplesConfig", "Section", "SelfPerceptualConfig", "SpikeConfig", "TextConfig",
    "UNetConfig", "check_layout", "config_digest", "differences", "differences_in_words", "explain_digests",
    "replace", "resolve_url", "run_digest",
]  # fmt: skip
