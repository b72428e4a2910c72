"""How long training stands still for a save: waiting for it, and saving in the background, in turns in one process.

python -m ops.bench.checkpoint [--mib 800] [--tensors 200] [--repeats 5] [--url FOLDER]
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

from trainer.checkpoint.manager import CheckpointManager
from trainer.parallel.world import init_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=800, help="size of the state")
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--url", help="folder or fsspec URL; a temporary local folder when absent")
    options = parser.parse_args()
    world = init_world()
    elements = options.mib * (1 << 18) // options.tensors
    tensors = {f"t{i}": torch.randn(elements, device=world.device) for i in range(options.tensors)}
    stood_still: dict[str, list[float]] = {"waiting": [], "background": []}
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(
            options.url or folder, keep_last=2, config_digest="bench", code_version="bench",
            process_group=world.host_group, background_group=dist.new_group(backend="gloo"),
        )  # fmt: skip
        for i in range(options.repeats + 1):
            for j, (name, save) in enumerate((("waiting", manager.save), ("background", manager.begin_save))):
                started = time.perf_counter()
                save(tensors, step=2 * i + j, images_seen=0, state={})
                if i:  # the first makes the buffers
                    stood_still[name].append(time.perf_counter() - started)
                manager.finish()
    dist.destroy_process_group()
    medians = {name: statistics.median(values) for name, values in stood_still.items()}
    ratio = medians["waiting"] / medians["background"]
    print(f"{options.mib} MiB in {options.tensors} tensors on {world.device.type}, median of {options.repeats} saves")
    print(
        f"stands still: waiting {medians['waiting']:.3f} s, background {medians['background']:.3f} s, ratio {ratio:.1f}"
    )


if __name__ == "__main__":
    main()
