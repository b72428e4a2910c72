"""Whether an exported folder draws the pictures that the trained model draws: in a process of its own, which has diffusers and
nothing of this package."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.errors import UserError, one_line
from trainer.export.components import Component
from trainer.export.pipeline_folder import guided_alike
from trainer.sampling.draw import noise_of
from trainer.sampling.model import SamplingModel
from trainer.sampling.settings import SampleSettings

LARGEST_DIFFERENCE = 1
"""Of 8-bit pixels: where one lies between two values, another order of sums rounds it to the other."""
DEADLINE_S = 3600.0
_SHOWN_LINES = 3


@dataclass(frozen=True)
class Parity:
    pictures: int
    settings: SampleSettings
    largest: int
    """Difference of 8-bit pixels."""
    differing: float
    """Share of the values that are not the same."""


def check_pictures(
    model: SamplingModel, folder: Path, prompts: Sequence[str], settings: SampleSettings, *, sd3: bool,
    components: Mapping[str, tuple[Component, Path]],
) -> tuple[Parity, np.ndarray]:  # fmt: skip
    """The trained model's own pictures go along, uint8 (B, 3, H, W).

    Args:
        model: the trained one, with the weights that were written.
        components: frozen encoders that are no part of the folder, and where they lie.

    Raises:
        UserError: the folder cannot be read by diffusers, or draws something else.
    """
    text = model.task.text
    if sd3 and text.kind == "frozen" and not guided_alike(text):
        settings = replace(settings, guidance=1.0)
    if sd3:
        settings = replace(settings, guidance_interval=None, guidance_rescale=0.0)
    ours = model.images(list(prompts), range(len(prompts)), settings).cpu().numpy()
    with tempfile.TemporaryDirectory(prefix="loupe-export-") as work, _on_host(model):
        theirs = _drawn(model, folder, prompts, settings, sd3, components, Path(work))
    if theirs.shape != ours.shape:
        raise UserError(
            f"the exported pipeline draws pictures of {theirs.shape[2:]}, not {ours.shape[2:]}; nothing was written"
        )
    difference = np.abs(theirs.astype(np.int16) - ours.astype(np.int16))
    largest = int(difference.max())
    if largest > LARGEST_DIFFERENCE:
        raise UserError(
            f"the exported pipeline's pictures differ by up to {largest} of 255 from the trained model's "
            f"({LARGEST_DIFFERENCE} is allowed; {np.mean(difference > LARGEST_DIFFERENCE):.2%} of the values do more), so "
            "nothing was written; take the versions of torch and diffusers that are tested together"
        )
    return Parity(len(ours), settings, largest, float(np.mean(difference > 0))), ours


@contextmanager
def _on_host(model: SamplingModel) -> Iterator[None]:
    """The model leaves its device to the other process, which reads it once more: a large one is not there twice."""
    if model.device.type == "cpu":
        yield
        return
    parts: tuple[nn.Module, ...] = (model.module, model.text, model.codec)
    for part in parts:
        part.to("cpu")
    torch.cuda.empty_cache()
    yield
    for part in parts:
        part.to(model.device)


def _drawn(
    model: SamplingModel, folder: Path, prompts: Sequence[str], settings: SampleSettings, sd3: bool,
    components: Mapping[str, tuple[Component, Path]], work: Path,
) -> np.ndarray:  # fmt: skip
    noise = noise_of(settings, range(len(prompts)), model.codec.latent_channels, model.codec.downsampling)
    np.save(work / "noise.npy", noise.numpy())
    text = model.task.text
    request = {
        "folder": str(folder), "sd3": sd3, "device": str(model.device), "prompts": list(prompts), "steps": settings.steps,
        "size": settings.size, "guidance": settings.guidance, "seed": settings.seed, "noise": str(work / "noise.npy"),
        "max_sequence_length": text.encoders[-1].max_tokens if text.kind == "frozen" else 0, "out": str(work / "out.npy"),
        "components": {name: [*part, str(path)] for name, (part, path) in components.items()},
    }  # fmt: skip
    (work / "request.json").write_text(json.dumps(request))
    script = Path(__file__).parent / "portable" / "draw.py"
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": str(torch.get_num_threads())}  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(work / "request.json")], env=environment, cwd=work,
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the exported pipeline has drawn {len(prompts)} pictures for {DEADLINE_S:.0f} s and is not done, so nothing was "
            "written; export on a machine with a GPU"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"diffusers cannot draw from the exported folder, so nothing was written: {one_line(ValueError(lines[-1]))}"
            if lines
            else f"drawing from the exported folder ended with {done.returncode}, so nothing was written"
        )
    return np.load(work / "out.npy", allow_pickle=False)
