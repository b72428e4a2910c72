"""Bytes that a restore reads from S3 over the checkpoint's size: ours, and torch's own reader, in turns on one state.

    python -m ops.bench.checkpoint_reads [--width 256] [--blocks 3] [--layouts 2:2 2:1 1:2]

The weights of a transformer's blocks, their average and two moments, sharded over ranks (processes, gloo), are saved to
the tests' S3 server and restored through a proxy that counts the bytes of all answers: listings, records, tensors. Peer:
`dcp.save` and `dcp.load` with `FsspecWriter` and `FsspecReader`. Every restored tensor is compared with what was saved. A
layout of 2:1 is saved by two ranks and restored by one.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

OURS, TORCH = "ours", "FsspecReader"


@dataclass(frozen=True)
class Reads:
    reader: str
    saved_by: int
    restored_by: int
    """Ranks."""
    stored: int
    """Bytes of the checkpoint's objects."""
    read: int
    """Bytes of the answers that the restore was given, over all ranks."""
    requests: int

    @property
    def ratio(self) -> float:
        return self.read / self.stored


def state(world: Any, width: int, blocks: int, *, seed: int) -> dict[str, torch.Tensor]:
    """The same on any number of ranks: matrices and vectors sharded over rows, and a step count a parameter, replicated."""
    from torch.distributed.tensor import Shard, distribute_tensor

    shapes = {
        "qkv.weight": (3 * width, width), "qkv.bias": (3 * width,), "out.weight": (width, width), "out.bias": (width,),
        "up.weight": (4 * width, width), "up.bias": (4 * width,), "down.weight": (width, 4 * width), "down.bias": (width,),
        "modulation.weight": (6 * width, width), "modulation.bias": (6 * width,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for kind in ("model", "average", "optim.exp_avg", "optim.exp_avg_sq"):
        for block in range(blocks):
            for name, shape in shapes.items():
                whole = torch.randn(shape, generator=generator)
                tensors[f"{kind}.blocks.{block}.{name}"] = distribute_tensor(whole, world.mesh, [Shard(0)])
                if kind == "optim.exp_avg":
                    tensors[f"optim.step.blocks.{block}.{name}"] = torch.tensor(float(seed))
    return tensors


def save(world: Any, reader: str, url: str, width: int, blocks: int) -> None:
    """On each rank."""
    tensors = state(world, width, blocks, seed=1)
    if reader == OURS:
        _manager(world, url).save(tensors, step=1, images_seen=0, state={})
    else:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        dcp.save(tensors, storage_writer=FsspecWriter(url), process_group=world.host_group)


def restore(world: Any, reader: str, url: str, width: int, blocks: int) -> None:
    """On each rank; what was not restored as saved is an error."""
    tensors = state(world, width, blocks, seed=2)
    if reader == OURS:
        assert _manager(world, url).restore(tensors) is not None
    else:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        dcp.load(tensors, storage_reader=FsspecReader(url), process_group=world.host_group)
    expected = state(world, width, blocks, seed=1)
    for name, tensor in tensors.items():
        assert torch.equal(_local(tensor), _local(expected[name])), name


def _local(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _manager(world: Any, url: str) -> Any:
    from trainer.checkpoint.manager import CheckpointManager

    return CheckpointManager(
        url, keep_last=2, config_digest="bench", code_version="bench", process_group=world.host_group
    )


@contextmanager
def counted_s3() -> Iterator[Any]:
    """The tests' S3 server behind their proxy, which spoils nothing here."""
    from tests.s3_server import faulty_s3

    with faulty_s3() as proxy:
        yield proxy


def measure(
    proxy: Any, reader: str, saved_by: int, restored_by: int, *, width: int, blocks: int, run_ranks: Callable[..., Any]
) -> Reads:
    """`run_ranks`: calls a function on so many ranks, as `tests.distributed.harness` does."""
    import s3fs

    # by their module's name, which the ranks can import where this module is __main__
    from ops.bench.checkpoint_reads import restore, save
    from tests.s3_server import BUCKET

    path = f"{BUCKET}/{reader}-{saved_by}-{restored_by}"
    run_ranks(saved_by, save, reader, f"s3://{path}", width, blocks)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    stored = sum(int(size) for size in fs.du(path, total=False).values())
    bytes_before, requests_before = proxy.bytes_out, len(proxy.requests)
    run_ranks(restored_by, restore, reader, f"s3://{path}", width, blocks)
    read, requests = proxy.bytes_out - bytes_before, len(proxy.requests) - requests_before
    fs.rm(path, recursive=True)
    return Reads(reader, saved_by, restored_by, stored, read, requests)


def table(found: Mapping[tuple[int, int], tuple[Reads, ...]]) -> str:
    names = [reads.reader for reads in next(iter(found.values()))]
    lines = [f"{'saved by, restored by':<24}" + "".join(f"{name:>26}" for name in names)]
    for (saved_by, restored_by), row in found.items():
        cells = [f"{reads.ratio:.3f}x, {reads.requests} requests" for reads in row]
        lines.append(f"{f'{saved_by} rank(s), {restored_by}':<24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def layouts(texts: list[str]) -> list[tuple[int, int]]:
    found = []
    for text in texts:
        saved_by, _, restored_by = text.partition(":")
        found.append((int(saved_by), int(restored_by)))
    return found


def run(
    width: int, blocks: int, pairs: list[tuple[int, int]], *, readers: tuple[str, ...] = (OURS, TORCH)
) -> dict[tuple[int, int], tuple[Reads, ...]]:
    from tests.distributed.harness import run_ranks

    with counted_s3() as proxy:
        return {
            pair: tuple(
                measure(proxy, reader, *pair, width=width, blocks=blocks, run_ranks=run_ranks) for reader in readers
            )
            for pair in pairs
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of the blocks")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=["2:2", "2:1", "1:2"], metavar="SAVED:RESTORED", help="ranks")
    options = parser.parse_args()
    found = run(options.width, options.blocks, layouts(options.layouts))
    size = next(iter(found.values()))[0].stored
    print(f"bytes read on a restore from S3 over the checkpoint's size ({size / (1 << 20):.0f} MiB)")
    print(table(found))


if __name__ == "__main__":
    main()
