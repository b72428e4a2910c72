"""Mean and covariance of features, over batches and ranks, and as a file.

Shapes: features (N, D).
"""

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate.metrics.checks import Array, check_features
from trainer.whole_files import write_whole

MOST_FEATURES = 16384
"""D of a file that is believed: 2 GiB of covariance."""


@dataclass(frozen=True)
class FeatureStatistics:
    mean_D: Array
    covariance_DD: Array
    """Unbiased: over count - 1."""
    count: int

    def __post_init__(self) -> None:
        d = len(self.mean_D)
        assert self.mean_D.shape == (d,), self.mean_D.shape
        assert self.covariance_DD.shape == (d, d), (self.covariance_DD.shape, d)
        assert self.count > 1, self.count

    @property
    def dimensions(self) -> int:
        return len(self.mean_D)

    @classmethod
    def of_features(cls, features_ND: NDArray[np.floating], *, name: str = "features") -> "FeatureStatistics":
        """
        Raises:
            UserError: NaN, another shape, fewer than two rows.
        """
        check_features(name, features_ND, at_least=2)
        rows = np.asarray(features_ND)
        return cls.of_batches((rows[i : i + 4096] for i in range(0, len(rows), 4096)), name=name)

    @classmethod
    def of_batches(cls, batches: Iterable[NDArray[np.floating]], *, name: str = "features") -> "FeatureStatistics":
        """Batches (B, D), one at a time in memory; equal to `of_features` of all but for rounding.

        Raises:
            UserError: as `of_features`.
        """
        moments = Moments(name)
        for features_BD in batches:
            moments.add(features_BD)
        return moments.statistics()

    def save(self, path: Path) -> None:
        """As .npz with the names that pytorch-fid and torch-fidelity's readers know (mu, sigma), and `count`."""
        write_whole(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, mu=self.mean_D, sigma=self.covariance_DD, count=np.int64(self.count))
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path, *, count: int | None = None) -> "FeatureStatistics":
        """
        Raises:
            UserError: not such a file; or it does not say its count, as those of pytorch-fid do not, and `count` is not given.
        """
        try:
            data = path.read_bytes()
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}; give a file of feature statistics") from e
        return cls.from_bytes(data, source=str(path), count=count)

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str, count: int | None = None) -> "FeatureStatistics":
        """The content of such a file; `source` names it in errors, which are those of `load`."""
        mend = "make the statistics anew"
        try:
            shapes = _shapes(data)
            mean, covariance = shapes.get("mu"), shapes.get("sigma")
            if not mean or not covariance or covariance != mean * 2 or not 0 < mean[0] <= MOST_FEATURES:
                raise UserError(f"{source}: mu and sigma of shapes {mean} and {covariance}; {mend}")
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                mean_D, covariance_DD = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
                if shapes.get("count") == ():
                    count = int(file["count"])
        except UserError:
            raise
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as e:
            raise UserError(f"{source}: no file of feature statistics ({type(e).__name__}: {e}); {mend}") from e
        if count is None:
            raise UserError(f"{source}: it does not say of how many images it is; give their count")
        if count < 2:
            raise UserError(f"{source}: of {count} images; {mend}, of two at least")
        if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
            raise UserError(f"{source}: NaN or infinite values; {mend}")
        scale = float(np.abs(covariance_DD).max())
        if np.abs(covariance_DD - covariance_DD.T).max() > 1e-6 * scale or covariance_DD.diagonal().min() < 0:
            raise UserError(f"{source}: sigma is no covariance (not symmetric, or a negative variance); {mend}")
        return cls(mean_D, covariance_DD, count)


class Moments:
    """Count, mean and centred outer products of what was added so far; those of parts are merged into those of all.

    Parts are centred before they are multiplied (Chan, Golub and LeVeque 1983, eq. 2.1), so a mean that is large beside
    the spread costs no digits, as the difference of raw sums would.
    """

    def __init__(self, name: str = "features") -> None:
        """`name`: whose features they are, for errors."""
        self.name, self.count = name, 0
        self._mean_D: Array | None = None
        self._scatter_DD: Array | None = None

    def add(self, features_BD: NDArray[np.floating]) -> None:
        """
        Raises:
            UserError: NaN, or another number of features than before.
        """
        if len(features_BD) == 0:
            return
        check_features(self.name, features_BD)
        rows = np.asarray(features_BD, dtype=np.float64)
        mean_D = rows.mean(0)
        centred = rows - mean_D
        self._merge(len(rows), mean_D, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Add what `other` has seen, of other images.

        Raises:
            UserError: another number of features.
        """
        if other.count:
            assert other._mean_D is not None
            assert other._scatter_DD is not None
            self._merge(other.count, other._mean_D, other._scatter_DD)

    def _merge(self, count: int, mean_D: Array, scatter_DD: Array) -> None:
        if self._mean_D is None or self._scatter_DD is None:
            self.count, self._mean_D, self._scatter_DD = count, mean_D, scatter_DD.copy()
            return
        if mean_D.shape != self._mean_D.shape:
            raise UserError(
                f"{self.name}: {len(self._mean_D)} and {len(mean_D)} features an image; take all from one network and layer"
            )
        total = self.count + count
        shift_D = mean_D - self._mean_D
        self._scatter_DD += scatter_DD
        self._scatter_DD += np.outer(shift_D, shift_D * (self.count * count / total))
        self._mean_D = self._mean_D + shift_D * (count / total)
        self.count = total

    def statistics(self) -> FeatureStatistics:
        """
        Raises:
            UserError: fewer than two rows.
        """
        if self.count < 2 or self._mean_D is None or self._scatter_DD is None:
            raise UserError(f"{self.name}: features of {self.count} images; a covariance needs two at least")
        covariance_DD = self._scatter_DD / (self.count - 1)
        return FeatureStatistics(self._mean_D.copy(), (covariance_DD + covariance_DD.T) / 2, self.count)


def _shapes(data: bytes) -> dict[str, tuple[int, ...]]:
    """By name, from the headers: before anything of that size is made."""
    shapes = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                if dtype.kind not in "fiu":
                    raise ValueError(f"{name} of type {dtype}")
                shapes[name.removesuffix(".npy")] = shape
    return shapes
