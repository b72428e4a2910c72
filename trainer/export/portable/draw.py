"""Draw pictures from an exported folder in a process that knows nothing of this package: `python -I draw.py REQUEST.json`.

What it drew, uint8 (B, 3, H, W), it leaves in the file that the request names.
"""

import importlib
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

OURS = ("trainer", "data", "launch", "ops")


class Unknown(importlib.abc.MetaPathFinder):
    """This package, even where it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".", maxsplit=1)[0] in OURS:
            raise ImportError(f"{name}: an export must do without it")


def main(request_file: str) -> None:
    """
    Args:
        request_file: `folder`, `sd3`, `components` that are not in it (name: [library, class, path]), `device`, `prompts`,
            `steps`, `size` (height, width), `guidance`, `out`; and of the noise `seed`, or `noise`: an npy file.
    """
    sys.meta_path.insert(0, Unknown())
    request = json.loads(Path(request_file).read_text())
    components = {
        name: getattr(importlib.import_module(library), kind).from_pretrained(path)
        for name, (library, kind, path) in request["components"].items()
    }
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(
        request["folder"],
        dtype=torch.float32,
        trust_remote_code=not request["sd3"],
        local_files_only=True,
        **components,
    ).to(request["device"])
    pipe.set_progress_bar_config(disable=True)
    height, width = request["size"]
    given = {"height": height, "width": width, "num_inference_steps": request["steps"]}
    if request["sd3"]:
        noise = torch.from_numpy(np.load(request["noise"], allow_pickle=False)).to(request["device"])
        sigmas = np.linspace(1.0, 1.0 / request["steps"], request["steps"]).tolist()
        images = pipe(
            request["prompts"], **given, sigmas=sigmas, latents=noise, guidance_scale=request["guidance"],
            max_sequence_length=request["max_sequence_length"], output_type="np",
        ).images  # fmt: skip
        pixels = np.round(images * 255).astype(np.uint8).transpose(0, 3, 1, 2)
    else:
        images = pipe(request["prompts"], **given, seed=request["seed"], guidance_scale=request["guidance"]).images
        pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
    np.save(request["out"], pixels)


if __name__ == "__main__":
    main(sys.argv[1])
