"""What it takes to know the samples of one step in the middle of a huge dataset: at a start, or at a resume.

    python -m ops.bench.data_plan [--samples 300 500] [--peer 30 100] [--repeats 3]

ours   the plan is built from the shards' sizes (the index is read already) and asked for one global batch at half of the
       samples: of one dataset, of four datasets mixed, of one in nine aspect buckets, and of one of 1,000 classes drawn
       equally. --samples and --classes in millions.
peer   mosaicml-streaming's `generate_work` of StreamingDataset's defaults ("random" batching, py1e, relaxed partitions),
       resumed at half of the epoch, one node of 8 ranks of 8 workers. Its own code; only the fields that its constructor
       would fill from index files are filled by hand. --peer in millions; 0: leave it out.

Shards are of 650 to 850 samples, as 64 MB of 85 KB JPEGs are. Each figure is of a fresh process: the median of its CPU
seconds (one thread; neither waits for anything), and the largest growth of its peak memory beyond what it had after its
imports. Figures of the peer beyond what was run are extrapolated in proportion to the samples, and say so. The peer knows
no balanced classes, so those have no ratio.

Examples:

    python -m ops.bench.data_plan
    python -m ops.bench.data_plan --samples 10 --classes 1 --peer 1 --repeats 1    seconds, to see that it works
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import time
import types
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MILLION = 1_000_000
BATCH = 2048
CASES = {
    "one": "one dataset",
    "mixed": "four datasets mixed",
    "buckets": "nine aspect buckets",
    "classes": "1,000 classes equally",
}
TARGET_S, TARGET_MB = 0.2, 150.0
_ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, nargs="+", default=[300.0, 500.0], help="ours, in millions")
    parser.add_argument("--classes", type=float, default=30.0, help="ours drawn by class, in millions; 0: leave it out")
    parser.add_argument("--peer", type=float, nargs="+", default=[30.0, 100.0], help="in millions; 0: leave it out")
    parser.add_argument("--repeats", type=int, default=3, help="processes of ours a figure; the peer has one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case, _, samples = options.child.partition(":")
        print(json.dumps(peer(int(samples)) if case == "peer" else ours(case, int(samples))))
        return
    print(f"numpy {np.__version__}, Python {sys.version.split()[0]}; a batch of {BATCH} at half of the samples\n")
    found: dict[tuple[str, float], dict[str, float]] = {}
    for millions in options.samples:
        for case in ("one", "mixed", "buckets"):
            found[case, millions] = show(case, millions, options.repeats)
    if options.classes:
        found["classes", options.classes] = show("classes", options.classes, options.repeats)
    peers = {m: show("peer", m, 1) for m in options.peer if m}
    if peers:
        ratios(found, peers)


def show(case: str, millions: float, repeats: int) -> dict[str, float]:
    runs = [child(case, round(millions * MILLION)) for _ in range(repeats)]
    result = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    result["peak_mb"] = max(run["peak_mb"] for run in runs)
    name = CASES.get(case, "StreamingDataset's plan")
    more = ""
    if case != "peer":
        more = f", the next batch {1e6 * result['next_s'] / BATCH:.1f} us a sample, {result['pickled_mb']:.1f} MB to a worker"
        if case != "classes":
            met = result["seconds"] <= TARGET_S and result["peak_mb"] <= TARGET_MB
            more += f"; under {TARGET_S:g} s and {TARGET_MB:g} MB: {'yes' if met else 'NO'}"
    print(f"{millions:5g}M  {name:24s} {result['seconds']:8.3f} s {result['peak_mb']:8.1f} MB{more}", flush=True)
    return result


def child(case: str, samples: int) -> dict[str, float]:
    command = [sys.executable, "-m", "ops.bench.data_plan", "--child", f"{case}:{samples}"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case} of {samples} samples failed (out of memory?): {done.stderr.strip()[-2000:]}")
    out: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return out


def ratios(found: dict[tuple[str, float], dict[str, float]], peers: dict[float, dict[str, float]]) -> None:
    largest = max(peers)
    print()
    for (case, millions), own in found.items():
        if case == "classes":
            continue
        known = peers.get(millions)
        scale = 1.0 if known else millions / largest
        other = known or peers[largest]
        note = "" if known else f"  (peer extrapolated from {largest:g}M)"
        print(
            f"{millions:5g}M  {CASES[case]:24s} peer / ours: {scale * other['seconds'] / own['seconds']:8.0f}x seconds, "
            f"{scale * other['peak_mb'] / own['peak_mb']:6.0f}x memory{note}"
        )


# ------------------------------------------------------------------------------------------------------------ one process


def shard_sizes(samples: int, seed: int = 0) -> NDArray[np.int64]:
    """Sizes of 650 to 850 that sum to `samples`."""
    sizes = np.random.default_rng(seed).integers(650, 851, size=samples // 650 + 1)
    ends = np.cumsum(sizes)
    count = int(np.searchsorted(ends, samples)) + 1
    sizes = sizes[:count].astype(np.int64)
    sizes[-1] -= ends[count - 1] - samples
    return sizes


class Memory:
    """Growth of this process's peak memory, from here on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what there is now
        self._before = _status("VmRSS")

    def peak_mb(self) -> float:
        return (_status("VmHWM") - self._before) / 1e6


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def ours(case: str, samples: int) -> dict[str, float]:
    from data.buckets import ASPECTS
    from data.epochs import ClassRows
    from data.plan import BucketedMixture, MixSegment, Mixture, Plan
    from data.schema import Bucket

    names = ["a", "b", "c", "d"] if case == "mixed" else ["a"]
    parts = np.split(
        shard_sizes(samples), [round(share * (samples // 750)) for share in (0.5, 0.75, 0.9)[: len(names) - 1]]
    )
    sizes = {name: tuple(part.tolist()) for name, part in zip(names, parts, strict=True)}  # as a dataset holds them
    segments = [MixSegment(0, {name: 1.0 + i for i, name in enumerate(names)}, BATCH)]
    num_shards = len(sizes["a"])
    edges = [round(share * num_shards) for share in (0, 0.03, 0.07, 0.17, 0.35, 0.65, 0.83, 0.93, 0.97, 1)]
    buckets = [
        Bucket(name=name, aspect=aspect, first_shard=first, num_shards=end - first)
        for (name, aspect), first, end in zip(ASPECTS.items(), edges[:-1], edges[1:], strict=True)
    ]
    labels = np.random.default_rng(1).integers(0, 1000, size=samples if case == "classes" else 0, dtype=np.int32)
    np.random.Philox(key=0).random_raw(10)  # what is loaded at the first use
    memory, began = Memory(), time.process_time()
    plan: Plan
    if case == "buckets":
        plan = BucketedMixture(sizes, {"a": buckets}, seed=0, window_shards=64, segments=segments)
    else:
        classes = {"a": ClassRows(labels)} if case == "classes" else None
        plan = Mixture(sizes, seed=0, window_shards=64, segments=segments, classes=classes)
    half = samples // 2 // BATCH * BATCH
    refs = plan.refs(half, BATCH)
    seconds, peak_mb = time.process_time() - began, memory.peak_mb()
    assert len(set(refs)) == BATCH
    began = time.process_time()
    plan.refs(half + BATCH, BATCH)
    next_s = time.process_time() - began
    return {"seconds": seconds, "peak_mb": peak_mb, "next_s": next_s, "pickled_mb": len(pickle.dumps(plan)) / 1e6}


def peer(samples: int) -> dict[str, float]:
    spec = PathFinder.find_spec("streaming")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("mosaicml-streaming is not installed; run `make setup`, or take --peer 0")
    bare = types.ModuleType("streaming")  # its own __init__ imports torchvision
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["streaming"] = bare
    from streaming.base.batching import generate_work
    from streaming.base.dataset import StreamingDataset
    from streaming.base.world import World

    sizes = shard_sizes(samples)
    dataset: Any = object.__new__(StreamingDataset)
    defaults: dict[str, Any] = {
        "partition_algo": "relaxed", "num_canonical_nodes": 1, "initial_physical_nodes": 1, "batch_size": 32, "shuffle": True,
        "shuffle_algo": "py1e", "shuffle_seed": 9176, "shuffle_block_size": 4_000_000, "sampling_method": "balanced",
        "sampling_granularity": 1, "epoch_seed_change": True, "batching_method": "random",
    }  # fmt: skip
    of_index: dict[str, Any] = {
        "num_streams": 1, "shard_offset_per_stream": np.zeros(1, np.int64), "samples_per_shard": sizes,
        "shards_per_stream": np.array([len(sizes)]), "sample_offset_per_shard": np.cumsum(sizes) - sizes,
        "streams": [types.SimpleNamespace(choose=samples)], "epoch_size": samples,
    }  # fmt: skip
    dataset.__dict__.update(defaults | of_index)
    world = World(num_nodes=1, ranks_per_node=8, workers_per_rank=8, worker=0)
    memory, began = Memory(), time.process_time()
    work = generate_work("random", dataset, world, 0, samples // 2)
    seconds = time.process_time() - began
    assert work.shape[:3] == (1, 8, 8)
    return {"seconds": seconds, "peak_mb": memory.peak_mb()}


if __name__ == "__main__":
    main()
