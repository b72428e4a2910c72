"""How well an image fits its prompt, by CLIP's embeddings of both. Shapes: (N, D), row i an image and its prompt."""

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array, check_pair

WEIGHT = 2.5
"""w of Hessel et al. 2021, which stretches the cosines that occur to about [0, 1]."""


def unit_rows(name: str, embeddings_ND: NDArray[np.floating]) -> Array:
    """Rows of length 1.

    Raises:
        UserError: a row is zero.
    """
    rows = np.asarray(embeddings_ND, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    if not lengths.all():
        raise UserError(f"{name}: the embedding of row {int(lengths.argmin())} is zero; look at that image or prompt")
    out: Array = rows / lengths[:, None]
    return out


def cosines(image_ND: NDArray[np.floating], text_ND: NDArray[np.floating]) -> Array:
    """Of each image and its prompt: (N,). Embeddings of any length.

    Raises:
        UserError: NaN, zero rows, other shapes, or not as many images as prompts.
    """
    check_pair("images", image_ND, "prompts", text_ND)
    if len(image_ND) != len(text_ND):
        raise UserError(f"images, prompts: {len(image_ND)} and {len(text_ND)}; give one prompt an image")
    out: Array = np.einsum("nd,nd->n", unit_rows("images", image_ND), unit_rows("prompts", text_ND))
    return out


def clip_scores(image_ND: NDArray[np.floating], text_ND: NDArray[np.floating]) -> Array:
    """CLIP-S = 2.5 max(cos, 0) of each pair (Hessel et al. 2021, eq. 1): (N,), what an interval is drawn from."""
    out: Array = WEIGHT * np.maximum(cosines(image_ND, text_ND), 0.0)
    return out


def clip_score(image_ND: NDArray[np.floating], text_ND: NDArray[np.floating]) -> float:
    """Mean of CLIP-S over pairs (Hessel et al. 2021, section 3): in [0, 2.5], about 0.6 to 0.8 for good pairs."""
    return float(clip_scores(image_ND, text_ND).mean())


def clip_score_100(image_ND: NDArray[np.floating], text_ND: NDArray[np.floating]) -> float:
    """max(mean of 100 cos, 0), as torchmetrics' CLIPScore and by it EvalGIM: in [0, 100], about 25 to 32 for good pairs.

    Not 40 times `clip_score`: pairs of a negative cosine count as negative here, and as 0 there. Figures of papers on
    text-to-image models are on this scale.
    """
    return max(float(100.0 * cosines(image_ND, text_ND).mean()), 0.0)
