"""What the commands that measure a codec share: checks of their options, the folder that they write, and what it takes to
repeat their numbers."""

import hashlib
import json
import math
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from trainer.errors import UserError, one_line
from trainer.models.autoencoders import Codec
from trainer.whole_files import write_whole

SKIPPED_SHOWN = 10

Progress = Callable[[str, int, int], None]
"""(what is being done, done, in all)"""

# ---------------------------------------------------------------------------------------------------------- its options


def choose_device(name: str) -> torch.device:
    """Raises:
    UserError: no such device, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: {name!r} is no device; take auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r}; take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} is not there; this machine shows {torch.cuda.device_count()} CUDA devices")
    return device


def check_size(size: int, downsampling: int, *, smallest_px: int) -> None:
    """Raises:
    UserError: images of `size` px do not go with the autoencoder.
    """
    if size % downsampling:
        below = size // downsampling * downsampling
        least = -(-smallest_px // downsampling) * downsampling
        raise UserError(f"--size: {size} is not a multiple of the autoencoder's downsampling, {downsampling}; take "
                        f"{max(below, least)} or {max(below + downsampling, least)}")  # fmt: skip


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """On a terminal alone: a bar for each thing that is being done."""
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    # disabled where nobody watches: rich would leave an empty line there
    with Bars(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
              console=console, transient=True, disable=not console.is_terminal) as bars:  # fmt: skip

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


# ------------------------------------------------------------------------------------------------------- to repeat numbers


def codec_numbers(codec: Codec, url: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, weight in sorted(codec.vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "url": url,
        "class": type(codec.vae).__name__,
        "weights_sha256": digest.hexdigest(),
        "parameters": sum(p.numel() for p in codec.vae.parameters()),
        "latent_channels": codec.latent_channels,
        "downsampling": codec.downsampling,
        "scaling_factor": codec.scaling_factor,
        "shift_factor": codec.shift_factor,
        "maps": dict(zip(codec.map_names, codec.map_scales(), strict=True)),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    return {
        "versions": {
            "loupe": version("loupe"),
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def images_line(images: Mapping[str, Any], wanted: int) -> list[str]:
    """What became of the images (`Chosen.numbers`), and the first of those that were left out."""
    used = len(images["used"])
    return [
        f"images:        {used}{f' (of {wanted} asked for)' if used < wanted else ''}, "
        f"{len(images['skipped'])} skipped, {len(images['enlarged'])} enlarged",
        *(f"  {s['name']}: {s['reason']}: {s['detail']}" for s in images["skipped"][:SKIPPED_SHOWN]),
    ]


def plain(value: Any) -> Any:
    """Fit for JSON: six digits, and null for what is not finite."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case bool() | int() | str() | None:
            return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


# ------------------------------------------------------------------------------------------------------------ the folder


def claim(out: str, names: Sequence[str], *, overwrite: bool, dry_run: bool = False) -> Path:
    """The folder to write files of these names to, made if need be (not by a dry run): known to be good before long work.

    Raises:
        UserError: it holds one of them and may not be overwritten, or it cannot be written to.
    """
    if "://" in out:
        raise UserError(f"--out: {out} is no local folder; write to one and copy it")
    folder = Path(out)
    try:
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".loupe-{secrets.token_hex(4)}.tmp"
            probe.touch()
            probe.unlink()
        present = [name for name in names if (folder / name).exists()]
    except OSError as e:
        raise UserError(f"--out: {out} cannot be written to ({one_line(e)}); give another folder") from None
    if present and not overwrite:
        raise UserError(f"--out: {out} has {present[0]} already; give another folder, or --overwrite")
    return folder


def write(
    folder: Path, numbers_name: str, numbers: Mapping[str, Any], pictures: Mapping[str, bytes], names: Sequence[str]
) -> None:
    """Each file appears whole, by rename; the numbers first go and come last. Of `names`, what is not written now goes.

    Raises:
        UserError: a file cannot be written.
    """
    text = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
    try:
        (folder / numbers_name).unlink(missing_ok=True)
        for name in names:
            if name != numbers_name and name not in pictures:
                (folder / name).unlink(missing_ok=True)
        for name, data in (*pictures.items(), (numbers_name, text.encode())):
            write_whole(folder / name, data)
    except OSError as e:
        raise UserError(f"--out: {folder} cannot be written to ({one_line(e)}); make room, or give another") from None
