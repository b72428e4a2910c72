"""How much of an image comes back from an autoencoder, and what its latents and its decoder's maps are like.

Images are compared as people see them, in 8 bits: in [-1, 1], then rounded and clamped. Every measure is a row an image, so
ranks share the images and the sums are the same. Shapes: images BCHW; raw latents BCHW; maps BCHW; N: all images.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config.perceptual import LPIPSNetwork
from trainer.errors import UserError
from trainer.evaluate.latents import masked_share, psnr
from trainer.evaluate.metrics.frechet import frechet_distance
from trainer.evaluate.metrics.images import SSIM_WINDOW, Pixels, ssim
from trainer.losses.outliers import inlier_mask
from trainer.models.autoencoders import Codec, run_chain
from trainer.models.efficientnet import EfficientNetLite0
from trainer.models.lpips import LPIPS, SMALLEST_SIDE
from trainer.parallel.world import World
from trainer.tensors import images_to_pixels, pixels_to_images


@dataclass(frozen=True)
class Output:
    """What an autoencoder makes of a batch of images. A baseline that has no latents leaves the rest out."""

    images_BCHW: Tensor
    """In [-1, 1], unclamped."""
    raw_BCHW: Tensor | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    """The decoder's, by name."""
    codes_BHW: Tensor | None = None
    """Index of the code of each latent pixel, of `num_codes`."""
    num_codes: int | None = None


Reconstruct = Callable[[Tensor], Output | Tensor]
"""Images in [-1, 1] to an `Output`, or to images alone."""


@dataclass(frozen=True)
class Judges:
    """Frozen networks that compare images; what is left out is not measured."""

    lpips: LPIPS | None = None
    features: EfficientNetLite0 | None = None

    def to(self, device: torch.device) -> "Judges":
        for network in (self.lpips, self.features):
            if network is not None:
                network.to(device)
        return self

    def numbers(self) -> dict[str, Any]:
        return {
            "lpips": None if self.lpips is None else self.lpips.network,
            "features": None if self.features is None else "efficientnet_lite0",
        }


def check_side(side: int, field: str, network: LPIPSNetwork | None) -> None:
    """Raises:
    UserError: images of `side` pixels are too small to be compared; `field` gave the side.
    """
    if side < SSIM_WINDOW:
        raise UserError(f"{field}: {side} px, and SSIM's window has {SSIM_WINDOW}; take more")
    if network and side < SMALLEST_SIDE[network]:
        raise UserError(f"{field}: {side} px, and LPIPS of {network} needs {SMALLEST_SIDE[network]}; take more")


def of_codec(codec: Codec) -> Reconstruct:
    """What a frozen autoencoder gives back of the mean of its posterior."""

    def reconstruct(images_BCHW: Tensor) -> Output:
        raw_BCHW = codec.encode_raw(images_BCHW)
        maps = codec.decode_features(codec.raw_to_scaled(raw_BCHW))
        images = run_chain(codec.decoder_head(), maps[-1])
        named = dict(zip(codec.map_names, maps, strict=True))
        return Output(images, raw_BCHW, named, codec.code_indices(raw_BCHW), codec.num_codes)

    return reconstruct


class Measurement:
    """Rows of measures, an image each, and what follows from them."""

    def __init__(self, judges: Judges | None = None, *, shown: Collection[int] = range(8)) -> None:
        """`shown`: numbers of the images that are kept for a picture."""
        self._judges, self._wanted = judges or Judges(), shown
        self._rows: dict[str, list[NDArray[np.float64]]] = {}
        self._chosen_K: NDArray[np.int64] | None = None
        """How often each code was."""
        self._latent_pixels = 0
        """Of one image."""
        self.shown: dict[int, tuple[Pixels, Pixels]] = {}
        """Original and reconstruction (H, W, 3), by the image's number."""

    def __len__(self) -> int:
        return sum(map(len, self._rows.get("mse", [])))

    @torch.no_grad()
    def add(self, images_BCHW: Tensor, output: Output | Tensor, numbers: Sequence[int] | None = None) -> None:
        """A batch, and what became of it. Waits for the device.

        Args:
            numbers: the images', for the picture; absent: they go on from those before.
        """
        first = len(self)
        out = Output(output) if isinstance(output, Tensor) else output
        assert out.images_BCHW.shape == images_BCHW.shape, (out.images_BCHW.shape, images_BCHW.shape)
        before, after = images_to_pixels(images_BCHW), images_to_pixels(out.images_BCHW)
        # 127.5^2: of images in [-1, 1]; the sum of whole numbers is exact
        squares_B = (before.int() - after.int()).square().sum((1, 2, 3), dtype=torch.int64)
        rows = {"mse": squares_B.double() / (before[0].numel() * 127.5**2)}
        originals, reconstructions = (p.permute(0, 2, 3, 1).cpu().numpy() for p in (before, after))
        pairs = list(zip(originals, reconstructions, strict=True))
        rows["ssim"] = torch.tensor([ssim(*pair) for pair in pairs], dtype=torch.float64)
        seen, made = pixels_to_images(before), pixels_to_images(after)
        if self._judges.lpips:
            rows["lpips"] = self._judges.lpips(made, seen)
        if self._judges.features:
            rows |= {
                "features": self._judges.features.features(seen),
                "features_made": self._judges.features.features(made),
            }
        finite_B = out.images_BCHW.isfinite().flatten(1).all(1)
        # 8 bits have no NaN: what is none of an image must not be taken for a black one
        rows = {name: _not_a_number_unless(finite_B, row) for name, row in rows.items()}
        if out.raw_BCHW is not None:
            raw = out.raw_BCHW.double().flatten(2)
            rows |= {"latent_sum": raw.sum(2), "latent_squares": raw.square().sum(2)}
            self._latent_pixels = raw.shape[2]
        for name, map_BCHW in out.maps.items():
            features = map_BCHW.float()
            share_B = masked_share(features, inlier_mask(features)).mean(1)
            rows[f"outliers.{name}"] = _not_a_number_unless(features.isfinite().flatten(1).all(1), share_B)
        if out.codes_BHW is not None:
            assert out.num_codes is not None
            chosen_K = torch.bincount(out.codes_BHW.flatten(), minlength=out.num_codes).cpu().numpy()
            self._chosen_K = chosen_K if self._chosen_K is None else self._chosen_K + chosen_K
        for name, row in rows.items():
            self._rows.setdefault(name, []).append(row.double().cpu().numpy())
        numbered = zip(numbers or range(first, first + len(pairs)), pairs, strict=True)
        self.shown |= {number: pair for number, pair in numbered if number in self._wanted}

    def joined(self, world: World) -> "Measurement":
        """Of all ranks' images, in the order of ranks, on every rank. A collective of the host."""
        whole = Measurement(self._judges)
        for rows, chosen_K, latent_pixels, shown in world.gather(
            (self._rows, self._chosen_K, self._latent_pixels, self.shown)
        ):
            for name, parts in rows.items():
                whole._rows.setdefault(name, []).extend(parts)
            if chosen_K is not None:
                whole._chosen_K = chosen_K if whole._chosen_K is None else whole._chosen_K + chosen_K
            whole._latent_pixels = max(whole._latent_pixels, latent_pixels)
            whole.shown |= shown
        return whole

    def numbers(self) -> dict[str, Any]:
        """`MEANING` says what they are; NaN where an image or its latents were not finite, None what was not measured."""
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        mse_N = torch.from_numpy(rows["mse"])
        return {
            "psnr_db": psnr(mse_N).mean().item(),
            "psnr_pooled_db": psnr(mse_N.mean()).item(),
            "ssim": rows["ssim"].mean().item(),
            "lpips": rows["lpips"].mean().item() if "lpips" in rows else None,
            "frechet": _frechet(rows["features"], rows["features_made"]) if "features" in rows else None,
            "codebook": None if self._chosen_K is None else codebook_numbers(self._chosen_K),
            "latents": self._latents(rows) if "latent_sum" in rows else None,
            "outliers": {
                name.removeprefix("outliers."): share_N.mean().item()
                for name, share_N in rows.items()
                if name.startswith("outliers.")
            }
            or None,
            "count": len(mse_N),
            "not_finite": int(np.isnan(rows["mse"]).sum()),
        }

    def _latents(self, rows: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
        values = len(rows["latent_sum"]) * self._latent_pixels
        mean_C = rows["latent_sum"].sum(0) / values
        square_C = rows["latent_squares"].sum(0) / values
        mean = mean_C.mean()
        std = np.sqrt(max(square_C.mean() - mean**2, 0.0)) if np.isfinite(mean) else mean
        return {
            "mean": mean_C.tolist(),
            "std": np.sqrt(np.maximum(square_C - mean_C**2, 0.0)).tolist(),
            "shift_factor": float(mean),
            "scaling_factor": 1.0 / float(std) if std else None,
        }


def _not_a_number_unless(finite_B: Tensor, row: Tensor) -> Tensor:
    row = row.double()
    return torch.where(finite_B.to(row.device).view(-1, *[1] * (row.ndim - 1)), row, torch.full_like(row, torch.nan))


def _frechet(features_ND: NDArray[np.float64], made_ND: NDArray[np.float64]) -> float:
    if not (np.isfinite(features_ND).all() and np.isfinite(made_ND).all()):
        return float("nan")
    return frechet_distance(features_ND, made_ND)


def codebook_numbers(chosen_K: NDArray[np.int64]) -> dict[str, Any]:
    """Of how often each code was chosen."""
    share_K = chosen_K / chosen_K.sum()
    used = share_K[share_K > 0]
    return {
        "usage": len(used) / len(chosen_K),
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),
        "num_codes": len(chosen_K),
    }


def measure(
    images: Iterable[Tensor],
    *,
    reconstruct: Reconstruct,
    judges: Judges | None = None,
    device: torch.device | None = None,
    shown: Collection[int] = range(8),
    advance: Callable[[int], None] = lambda count: None,
) -> Measurement:
    """Reconstruct batches (B, 3, H, W) of images in [-1, 1], and compare.

    Args:
        reconstruct: of an autoencoder (`of_codec`), or anything that gives images back, as a baseline.
        judges: on `device` already.
        shown: numbers of the images that are kept for a picture.
        advance: called with the number of images of each batch.
    """
    measurement = Measurement(judges, shown=shown)
    for images_BCHW in images:
        batch = images_BCHW.to(device or images_BCHW.device)
        with torch.no_grad():
            output = reconstruct(batch)
        measurement.add(batch, output)
        advance(len(batch))
    return measurement


def flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Single numbers, under names such as `codebook_usage` and `outliers_mid`: what a gauge, or a line, can hold."""
    out: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            out |= {f"{name}_{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[name] = float(value)
    return out


def in_words(numbers: Mapping[str, Any]) -> str:
    """The figures of one line."""
    words = {
        "psnr_db": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}", "frechet": "Frechet distance {:.2f}",
    }  # fmt: skip
    parts = [text.format(numbers[name]) for name, text in words.items() if numbers[name] is not None]
    if numbers["codebook"]:
        book = numbers["codebook"]
        parts.append(f"codes {100 * book['usage']:.1f} % of {book['num_codes']}, perplexity {book['perplexity']:.1f}")
    if numbers["outliers"]:
        name, share = max(numbers["outliers"].items(), key=lambda item: -1.0 if item[1] is None else item[1])
        parts.append(f"outliers up to {100 * (share or 0.0):.2g} % ({name})")
    if numbers["not_finite"]:
        parts.append(f"{numbers['not_finite']} images NOT FINITE")
    return "  ".join(parts)


MEANING = {
    "images": "square centre crops of `size` px, compared as 8-bit: rounded and clamped",
    "psnr_db": "of each image (over pixels and colours), mean over images; 100 stands for equal",
    "psnr_pooled_db": "of the mean squared error over all images",
    "ssim": "structural similarity (Wang et al. 2004), Gaussian window of 1.5 px, mean over R, G and B and over images",
    "lpips": "mean over images, by the network that `judges` names",
    "frechet": "Frechet distance between the features of originals and of reconstructions, by the network that `judges` "
    "names; of EfficientNet-Lite0 it is not FID; it falls with the number of images: compare equal counts",
    "codebook": "usage: share of codes that some pixel of these images chose; perplexity: exp of the entropy of their shares",
    "latents": "raw latents (the posterior's mean, or before quantisation), over images and pixels: mean and std by channel; "
    "shift_factor and scaling_factor: mean and 1 / std of all values, so that (raw - shift) * scale has mean 0 and variance 1",
    "outliers": "share of pixels of each decoder map that Algorithm 1 of the latent perceptual loss masks, mean over channels "
    "and images",
    "not_finite": "images whose reconstruction was not finite; measures over them are null",
}
