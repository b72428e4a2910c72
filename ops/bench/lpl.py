"""What the latent perceptual loss costs: a training step with and without it, side by side in one process.

    python -m ops.bench.lpl [--batch-size 16] [--repeats 8] [--resolution 64]

Prints seconds a step (median) and their ratio, for the demo's model and autoencoder on this machine's first device.
"""

import argparse
import statistics
import time

import torch

from data.loader import Batch
from trainer.config import LPLConfig, replace
from trainer.parallel.apply import parallelize
from trainer.parallel.world import init_world
from trainer.recipes import load
from trainer.step_plan import StepPlan
from trainer.tasks.latent_diffusion import LatentDiffusionTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=64)
    options = parser.parse_args()

    config = load("demo")
    assert config.task.kind == "latent_diffusion"
    config = replace(config, task=replace(config.task, perceptual=LPLConfig(tau_reference_px=options.resolution)))
    world = init_world()
    task = LatentDiffusionTask(config, world.device)
    parallelize(task.module, task.sharding_units(), world)
    batch = Batch(
        step=0,
        resolution=options.resolution,
        positions_B=torch.arange(options.batch_size),
        images_BCHW=torch.randint(0, 256, (options.batch_size, 3, options.resolution, options.resolution)).byte(),
        captions=["a 3d emoji of a dog"] * options.batch_size,
        labels_B=torch.full((options.batch_size,), -1),
        keys=["random"] * options.batch_size,
        substitutions=(),
    )
    with_lpl = config.phases[-1]
    phases = {"without": replace(with_lpl, perceptual=None), "with": with_lpl}
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for i in range(options.repeats + 1):
        for name, phase in phases.items():  # in turns, so that noise of the machine falls on both alike
            plan = StepPlan(step=0, phase=phase, phase_index=0, phase_step=0, learning_rate=1e-3, position=0,
                            begins_phase=False, ends_phase=False)  # fmt: skip
            started = time.perf_counter()
            task.forward_backward(batch, plan, 1.0 / options.batch_size)
            task.module.zero_grad(set_to_none=True)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if i:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"device {world.device}, {torch.get_num_threads()} thread(s), batch {options.batch_size}, {options.resolution} px"
    )
    for name, value in medians.items():
        print(f"{name:8s} {value * 1000:8.1f} ms a step")
    print(f"ratio    {medians['with'] / medians['without']:8.2f}")


if __name__ == "__main__":
    main()
