"""Does plain diffusers draw what `loupe sample` draws? `python tests/check_export.py runs/demo` exports a finished run, makes a
virtual environment with torch and diffusers alone, draws there from the exported folder, and compares the pictures."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "safetensors", "numpy", "pillow")
LARGEST_DIFFERENCE = 1
DEADLINE_S = 1800
SEED = 11
"""Another than the export's own check has."""

DRAW = """
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, prompts, out, seed = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True, dtype=torch.float32)
for i, image in enumerate(pipe(json.loads(prompts), seed=int(seed)).images):
    image.save(f"{out}/{i}.png")
ours = [name for name in sys.modules if name.split(".")[0] in ("trainer", "data", "launch")]
assert not ours, ours
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a finished run of latent diffusion")
    parser.add_argument(
        "--venv", type=Path, help="environment that is there already; else a new one, in a temporary folder"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loupe-check-") as folder:
        work = Path(folder)
        venv = arguments.venv or make_venv(work / "venv")
        run(sys.executable, "-m", "launch.cli", "export", arguments.run, str(work / "exported"), "--dtype", "float32")
        prompts = json.loads((work / "exported" / "export.json").read_text())["prompts"]
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        run(
            sys.executable,
            "-m",
            "launch.cli",
            "sample",
            arguments.run,
            *asked,
            "--out",
            str(work / "ours"),
            "--seed",
            str(SEED),
        )
        (work / "theirs").mkdir()
        draw = ["-I", "-c", DRAW, str(work / "exported"), json.dumps(prompts), str(work / "theirs"), str(SEED)]
        run(str(venv / "bin" / "python"), *draw, cwd=work, HF_MODULES_CACHE=str(work / "modules"), HF_HUB_OFFLINE="1")
        worst = 0
        for i, prompt in enumerate(prompts):
            pictures = (work / "ours" / "images" / f"{i:08d}.png", work / "theirs" / f"{i}.png")
            ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in pictures)
            difference = int(np.abs(ours - theirs).max())
            worst = max(worst, difference)
            print(
                f"{prompt}: largest difference {difference}/255, mean level {ours.mean():.0f}, deviation {ours.std():.0f}"
            )
    print("ok" if worst <= LARGEST_DIFFERENCE else "FAILED: the pictures are not the same")
    return int(worst > LARGEST_DIFFERENCE)


def make_venv(folder: Path) -> Path:
    run(sys.executable, "-m", "venv", str(folder))
    run(str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *PACKAGES)
    return folder


def run(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True, timeout=DEADLINE_S)


if __name__ == "__main__":
    sys.exit(main())
