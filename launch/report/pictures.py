"""Samples and reconstructions for a page: few, small, as WebP. No torch."""

import base64
import io
import re
from dataclasses import dataclass, field

from launch.runs.read import read_errors
from trainer.errors import one_line
from trainer.run_folder import RunFolder

MAX_FRAMES = 24
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 60_000_000
SIDES = (1200, 900, 640, 420)
"""Longest sides, the next where the pictures of a run do not fit."""
QUALITY = 82


@dataclass(frozen=True)
class Frame:
    label: str
    """`step 400`, `final`."""
    order: int
    """Step; the final one is after all."""
    url: str
    """data:image/webp;base64,..."""
    width: int
    height: int


@dataclass
class Frames:
    folder: str
    frames: list[Frame] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_frames(run: RunFolder, folder: str, *, max_bytes: int, final_step: int | None) -> Frames:
    """At most MAX_FRAMES pictures of `samples/` or `reconstructions/`, evenly spread over the steps, the last among them.

    Args:
        max_bytes: of all of them in the page.
        final_step: of `final.png`.
    """
    found = Frames(folder)
    try:
        names = sorted((order, name) for name in run.names(folder) if (order := _order(name, final_step)) is not None)
    except read_errors() as e:
        found.missing.append(f"{folder}: cannot be listed ({one_line(e)})")
        return found
    if len(names) > MAX_FRAMES:
        found.missing.append(f"{folder}: {MAX_FRAMES} of {len(names)} pictures are shown")
        names = [names[round(i * (len(names) - 1) / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]
    while names:
        for side in SIDES:
            frames, missing = _frames(run, folder, names, side, max_bytes)
            if frames is not None:
                found.frames, found.missing = frames, found.missing + missing
                return found
        names = names[1::2]  # the last stays
        found.missing.append(f"{folder}: only {len(names)} pictures are shown, to keep this file small")
    return found


def _order(name: str, final_step: int | None) -> int | None:
    if name == "final.png":
        return final_step if final_step is not None else 10**15
    match = re.fullmatch(r"step-(\d{1,15})\.png", name)
    return int(match[1]) if match else None


def _frames(
    run: RunFolder, folder: str, names: list[tuple[int, str]], side: int, max_bytes: int
) -> tuple[list[Frame] | None, list[str]]:
    """(the frames, what cannot be shown); None for frames that are too large together."""
    frames, missing, total = [], [], 0
    for order, name in names:
        try:
            data, width, height = small(_read(run, f"{folder}/{name}"), side)
        except read_errors() as e:
            missing.append(f"{folder}/{name}: {one_line(e)}")
            continue
        url = "data:image/webp;base64," + base64.b64encode(data).decode()
        total += len(url)
        if total > max_bytes:
            return None, []
        label = f"step {order}" + (", final" if name == "final.png" else "")
        frames.append(Frame("final" if order >= 10**15 else label, order, url, width, height))
    return frames, missing


def _read(run: RunFolder, name: str) -> bytes:
    data = run.fs.cat_file(run.path(name), start=0, end=MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return bytes(data)


def small(data: bytes, side: int) -> tuple[bytes, int, int]:
    """A PNG as (WebP, width, height), its longest side at most `side`.

    Raises:
        ValueError, OSError: it is none, is damaged, or has too many pixels.
    """
    from PIL import Image

    # of the PNG's first chunk, before the library looks at it
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError("no PNG") from None
    except (SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"no PNG ({one_line(e)})") from None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue(), picture.width, picture.height
