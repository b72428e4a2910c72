"""Finding faces.

boxes_N5: float32; x, y, width and height in pixels of the upright image, and a score from 0 to 1. Boxes may reach beyond the
image.
"""

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError, one_line

MAX_WEIGHTS_BYTES = 4 << 30
_MULTIPLE = 64
"""Of the network's input; YuNet asks for 32, and fewer shapes mean that it is rebuilt less often."""


class Detector(Protocol):
    """Finds faces. Made anew in each worker by a factory: `factory(weights, **options)`."""

    def __call__(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """boxes_N5 of an RGB image."""


@dataclass(frozen=True)
class DetectorSpec:
    """Which detector, before it is made: plain values."""

    name: str
    """One of `DETECTORS`, or `package.module:factory`."""
    weights: str | None = None
    """A local file."""
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None

    def settings(self) -> dict[str, Any]:
        """All that decides what it finds. By content rather than by place: weights may lie elsewhere on another machine."""
        return {"name": self.name, "weights_sha256": self.weights_sha256, **self.options}

    def make(self) -> Detector:
        """
        Raises:
            UserError: there is no such detector, or it does not take these weights or options.
        """
        factory = _factory(self.name)
        _check_options(self.name, factory, self.options)
        try:
            detector: Detector = factory(Path(self.weights) if self.weights else None, **self.options)
        except UserError:
            raise
        except Exception as e:  # of a user's own detector as well, in whatever way it fails
            raise UserError(f"--detector {self.name}: cannot be made ({one_line(e)}); see its options") from e
        if self.weights and sha256(Path(self.weights)) != self.weights_sha256:
            raise UserError(f"--weights {self.weights}: has changed since the command began; run it again")
        return detector


def detector_spec(name: str, weights: Path | None, options: Sequence[str] = ()) -> DetectorSpec:
    """A detector as a command line gives it, tried once.

    Args:
        options: `name=value`; values are JSON where they can be, else texts.

    Raises:
        UserError: it cannot be made.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--detector-option {option}: write name=value")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    if weights is not None and not weights.is_file():
        raise UserError(f"--weights {weights}: no such file; give the detector's weights")
    digest = sha256(weights) if weights else None
    spec = DetectorSpec(name, str(weights.resolve()) if weights else None, parsed, digest)
    spec.make()
    return spec


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class YuNet:
    """Wu et al. 2023, through OpenCV.

    It finds faces of about 10 to 300 pixels of its input, so an image is searched at several sizes: small enough for a face
    that fills it, and large enough for one far away.

    Args:
        weights: an ONNX file of any input size.
        min_score: lower finds more faces, and more of what is none.
        long_sides: of the inputs, in pixels.
        max_enlarge: images are enlarged so much at most. On photos of 640 pixels 1.6 finds half as many faces again at half the
            speed, but nine in ten of those are under 12 pixels and show nobody.
        overlap: boxes that share more (intersection over union) are one face.
    """

    def __init__(
        self,
        weights: Path | None,
        *,
        min_score: float = 0.6,
        long_sides: Sequence[int] = (320, 1024),
        max_enlarge: float = 1.0,
        overlap: float = 0.3,
    ) -> None:
        _check_between("min_score", min_score, 0, 1)
        _check_between("overlap", overlap, 0, 1)
        _check_between("max_enlarge", max_enlarge, 0, 16)
        if not isinstance(long_sides, list | tuple) or not long_sides:
            raise UserError(f"--detector-option long_sides={long_sides}: write a list of pixels, such as [320,1024]")
        for side in long_sides:
            if not isinstance(side, int) or not 32 <= side <= 4096:
                raise UserError(f"--detector-option long_sides: {side!r} is no whole number of pixels from 32 to 4096")
        if weights is None:
            raise UserError("--weights: YuNet needs its weights, an ONNX file of OpenCV's model zoo")
        if weights.stat().st_size > MAX_WEIGHTS_BYTES:
            raise UserError(f"--weights {weights}: larger than the {MAX_WEIGHTS_BYTES} bytes that weights may have")
        network = np.frombuffer(weights.read_bytes(), dtype=np.uint8)
        try:
            with _quiet_opencv():
                self._network = cv2.FaceDetectorYN.create(
                    "onnx", network, np.empty(0, np.uint8), (320, 320), min_score, overlap, 5000
                )
        except cv2.error as e:
            raise UserError(f"--weights {weights}: not YuNet's ({one_line(e)}); give its ONNX file") from None
        self._long_sides, self._max_enlarge, self._overlap = sorted(set(long_sides)), max_enlarge, overlap

    def __call__(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        longest = max(image_HWC.shape[:2])
        scales = {min(side / longest, self._max_enlarge) for side in self._long_sides}
        boxes_N5 = np.concatenate([self._at_scale(image_HWC, scale) for scale in sorted(scales)])
        if len(boxes_N5) < 2:
            return boxes_N5
        # The smaller input's box of a face may be the better placed one; the score says.
        kept = cv2.dnn.NMSBoxes(boxes_N5[:, :4].tolist(), boxes_N5[:, 4].tolist(), 0.0, self._overlap)
        return boxes_N5[np.asarray(kept).reshape(-1)]

    def _at_scale(self, image_HWC: NDArray[np.uint8], scale: float) -> NDArray[np.float32]:
        height, width = (max(1, round(side * scale)) for side in image_HWC.shape[:2])
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        small_HWC = cv2.resize(np.ascontiguousarray(image_HWC), (width, height), interpolation=how)
        input_HWC = np.zeros((_round_up(height), _round_up(width), 3), np.uint8)
        input_HWC[:height, :width] = small_HWC[:, :, ::-1]
        self._network.setInputSize((input_HWC.shape[1], input_HWC.shape[0]))
        found = self._network.detect(input_HWC)[1]
        if found is None:
            return np.empty((0, 5), np.float32)
        boxes_N5 = np.asarray(found, np.float32)[:, [0, 1, 2, 3, 14]]
        boxes_N5[:, [0, 2]] *= image_HWC.shape[1] / width
        boxes_N5[:, [1, 3]] *= image_HWC.shape[0] / height
        return boxes_N5


def _check_between(option: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise UserError(f"--detector-option {option}={value}: is no number between {low} and {high}")


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """It warns of targets that nobody asked for, and prints what it raises."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)


def _round_up(side: int) -> int:
    return -(-side // _MULTIPLE) * _MULTIPLE


DETECTORS: dict[str, Callable[..., Detector]] = {"yunet": YuNet}


def _written(value: object) -> str:
    """As a command line gives it."""
    return json.dumps(value, default=str, separators=(",", ":"))


def _check_options(name: str, factory: Callable[..., Detector], options: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: an option that the detector's factory does not have.
    """
    try:
        parameters = list(inspect.signature(factory).parameters.values())[1:]  # behind the weights
    except (TypeError, ValueError):  # one written in another language, which does not tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if unknown := [option for option in options if option not in {p.name for p in known}]:
        have = ", ".join(p.name if p.default is p.empty else f"{p.name}={_written(p.default)}" for p in known) or "none"
        raise UserError(f"--detector-option {unknown[0]}: {name} has no such option; it has {have}")


def _factory(name: str) -> Callable[..., Detector]:
    if name in DETECTORS:
        return DETECTORS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"--detector {name}: none of {', '.join(DETECTORS)}; for your own give package.module:factory")
    try:
        factory: Callable[..., Detector] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--detector {name}: cannot be imported ({one_line(e)}); is its package installed?") from None
    return factory
