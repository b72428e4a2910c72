"""What features have to be before anything is measured of them."""

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Array = NDArray[np.float64]


def check_features(name: str, features_ND: NDArray[np.floating], *, at_least: int = 1) -> None:
    """
    Args:
        name: whose features they are, as the message shall name them: "generated", a folder.
        at_least: rows that the metric needs.

    Raises:
        UserError: another shape than (N, D), no numbers, NaN or infinity in a row, or fewer rows than `at_least`.
    """
    features = np.asarray(features_ND)
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(f"{name}: features of shape {features.shape}; give (N, D), one row an image")
    if features.dtype.kind not in "fiu":
        raise UserError(f"{name}: features of type {features.dtype}; give real numbers")
    if len(features) < at_least:
        raise UserError(
            f"{name}: features of {len(features)} images, and this metric needs {at_least}; take more images"
        )
    # A sum over a row is finite only where the row is; it is NaN or infinite too where float32 rows overflow, hence the
    # second look, which is taken of these rows alone.
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(features.sum(1)))
    rows = [int(row) for row in suspects if not np.isfinite(features[row]).all()]
    if rows:
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        raise UserError(
            f"{name}: NaN or infinite features in row {rows[0]}{more}; look at that image and at the network"
        )


def check_pair(
    a_name: str, a_ND: NDArray[np.floating], b_name: str, b_MD: NDArray[np.floating], *, at_least: int = 1
) -> None:
    """Both, and that one network made them.

    Raises:
        UserError: as `check_features`, or the numbers of features differ.
    """
    check_features(a_name, a_ND, at_least=at_least)
    check_features(b_name, b_MD, at_least=at_least)
    a, b = np.asarray(a_ND).shape[1], np.asarray(b_MD).shape[1]
    if a != b:
        raise UserError(f"{a_name}, {b_name}: {a} and {b} features an image; take both from one network and layer")
