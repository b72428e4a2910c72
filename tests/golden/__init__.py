"""Golden losses: what the demo recipe's loss terms were, step by step, when its arithmetic was last changed on purpose.

`make golden` writes them anew. The recipe as it is, but for 200 steps of 16 images at a fortieth of its learning rate, on one
rank, float32, one thread. At the whole rate a difference in the last bit, as between two processors, grows to one or two
per cent of the loss within 200 steps (measured with other kernels on one machine), and nothing could be compared to 1e-4.
"""

import json
import tempfile
from pathlib import Path

from tests.distributed.harness import run_ranks
from trainer.config import RunConfig
from trainer.config_text import with_overrides
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.recipes import load
from trainer.run_folder import RunFolder

FILE = Path(__file__).with_name("demo_losses.json")

OVERRIDES = (
    "phases.low_resolution.steps=70",
    "phases.full_resolution.steps=100",
    "phases.perceptual.steps=30",
    *(f"phases.{i}.batch_size=16" for i in range(3)),
    *(f"phases.{i}.learning_rate={rate}" for i, rate in enumerate((5e-5, 5e-5, 1.25e-5))),
    "metrics.every_steps=1",
    "checkpoint.every_steps=1000",
    "samples=null",
    "prompt_accuracy=null",
)


def config() -> RunConfig:
    return with_overrides(load("demo"), OVERRIDES)


def _train(world: World, folder: str) -> None:
    from trainer.run import Run

    run = Run(config(), RunFolder(folder), world, StopRequest())
    run.train()
    run.exporter.close()


def measure() -> list[dict[str, float]]:
    """The loss terms of each step, as the run's own metrics record them."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(1, _train, folder)
        return [record["loss"] for record in RunFolder(folder).metrics()]


def write() -> None:
    lines = [json.dumps({name: float(f"{x:.7g}") for name, x in step.items()}) for step in measure()]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def recorded() -> list[dict[str, float]]:
    steps: list[dict[str, float]] = json.loads(FILE.read_text())
    return steps
