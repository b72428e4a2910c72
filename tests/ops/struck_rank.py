"""A rank of a real run that is struck by faults when a test says so: `python -m tests.ops.struck_rank --config C --run-dir R
--faults FILE`. FILE is JSON, rank -> one of `FAULTS`, read at every step; a fault lasts for as long as it stands there."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

FAULTS = ("slow", "sleep", "nan", "wild")
"""slow: half a second more a step. sleep: no step any more. nan: in the first latent of a batch. wild: latents a hundred times
as large, as of images that are none."""
SLOW_S = 0.5


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--faults", required=True, type=Path)
    options = parser.parse_args()
    from trainer import train
    from trainer.tasks.latent_diffusion import LatentDiffusionTask
    from trainer.trainer import Trainer

    rank = os.environ["RANK"]
    train_step, latents_of = Trainer._train_step, LatentDiffusionTask._latents_of

    def fault() -> str | None:
        try:
            found: str | None = json.loads(options.faults.read_text()).get(rank)
        except FileNotFoundError:
            return None
        return found

    def struck(trainer, batch, plan):  # type: ignore[no-untyped-def]
        while fault() == "sleep":
            time.sleep(0.1)
        if fault() == "slow":
            time.sleep(SLOW_S)
        return train_step(trainer, batch, plan)

    def spoilt(task, batch):  # type: ignore[no-untyped-def]
        latents = latents_of(task, batch)
        if fault() == "nan":
            latents[0] = float("nan")
        return latents * 100 if fault() == "wild" else latents

    Trainer._train_step = struck  # type: ignore[method-assign]
    LatentDiffusionTask._latents_of = spoilt  # type: ignore[method-assign]
    return train.main(["--config", options.config, "--run-dir", options.run_dir])


if __name__ == "__main__":
    sys.exit(main())
