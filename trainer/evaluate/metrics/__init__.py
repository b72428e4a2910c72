"""What is measured of sets of images: pure functions of arrays, float64 inside, each with its source.

Features (N, D) come from any network, one row an image; pixels are (N, H, W, 3), uint8. docs/evaluation.md has the table.
"""

from trainer.evaluate.metrics.bootstrap import Estimate, bootstrap, bootstrap_difference
from trainer.evaluate.metrics.checks import Array, check_features, check_pair
from trainer.evaluate.metrics.clip_score import clip_score, clip_score_100, clip_scores, cosines
from trainer.evaluate.metrics.feature_statistics import FeatureStatistics, Moments
from trainer.evaluate.metrics.frechet import (
    frechet_bias,
    frechet_distance,
    frechet_distance_of,
    frechet_estimate,
    frechet_infinity,
)
from trainer.evaluate.metrics.images import psnr, psnr_of_error, ssim
from trainer.evaluate.metrics.kernel import cmmd, kernel_distance, kernel_distance_of_subsets
from trainer.evaluate.metrics.neighbours import (
    DensityCoverage,
    Neighbourhoods,
    PrecisionRecall,
    density_coverage,
    neighbourhoods,
    precision_recall,
    squared_distances,
)
from trainer.evaluate.metrics.spectrum import (
    log_power,
    log_power_difference,
    radial_power_spectrum,
    radial_powers,
    spectrum_errors,
)

__all__ = [
    "Array",
    "DensityCoverage",
    "Estimate",
    "FeatureStatistics",
    "Moments",
    "Neighbourhoods",
    "PrecisionRecall",
    "bootstrap",
    "bootstrap_difference",
    "check_features",
    "check_pair",
    "clip_score",
    "clip_score_100",
    "clip_scores",
    "cmmd",
    "cosines",
    "density_coverage",
    "frechet_bias",
    "frechet_distance",
    "frechet_distance_of",
    "frechet_estimate",
    "frechet_infinity",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "log_power",
    "log_power_difference",
    "neighbourhoods",
    "precision_recall",
    "psnr",
    "psnr_of_error",
    "radial_power_spectrum",
    "radial_powers",
    "spectrum_errors",
    "squared_distances",
    "ssim",
]
