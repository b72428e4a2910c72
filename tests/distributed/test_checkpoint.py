"""Checkpoints of a sharded model over several ranks: other world sizes, damage and failures that one rank meets."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.harness import run_ranks
from tests.unit.trainer.test_checkpoint_storage import CountingFileSystem
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import CheckpointManager
from trainer.errors import UserError
from trainer.parallel.world import World
from trainer.tensors import local

Tensors = dict[str, torch.Tensor]


def manager(path: Path, world: World | None = None) -> CheckpointManager:
    return CheckpointManager(
        str(path),
        keep_last=3,
        config_digest="d",
        code_version="v",
        process_group=world.host_group if world else None,
        background_group=dist.new_group(backend="gloo") if world else None,
    )


def build(world: World | None, seed: int) -> Tensors:
    """What a training run saves, after one step: parameters, AdamW's state, and a few odd ones."""
    torch.manual_seed(seed)
    # 7 and 5 rows divide over neither 2 nor 3 ranks, and of 1 row only the first rank has any
    model = nn.Sequential(nn.Linear(6000, 7), nn.Linear(7, 5), nn.Linear(5, 1)).to(torch.float32)
    odd = torch.randn(6, 10)
    if world:
        for layer in model:
            fully_shard(layer, mesh=world.mesh)  # type: ignore[arg-type]
        fully_shard(model, mesh=world.mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6000)).square().mean().backward()
    optimizer.step()
    tensors: Tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"optim.state.{name}.{key}": value for key, value in optimizer.state[p].items()}
    tensors["odd.columns"] = distribute_tensor(odd, world.mesh, [Shard(1)]) if world else odd
    tensors["odd.bf16"] = odd.bfloat16()
    tensors["odd.count"] = torch.tensor(seed, dtype=torch.int64)
    tensors["odd.step"] = (
        distribute_tensor(torch.tensor(2.5), world.mesh, [Replicate()]) if world else torch.tensor(2.5)
    )
    return tensors


def whole(tensors: Tensors) -> Tensors:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in sorted(tensors.items())
    }


def local_bytes(tensors: Tensors) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def error_of(work: Any) -> tuple[str, str]:
    try:
        work()
    except Exception as e:
        return type(e).__name__, str(e)
    return "none", ""


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------- what the ranks do


def two_ranks(world: World, base: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    m = manager(base / "run", world)
    first = build(world, seed=1)
    seen["first"] = whole(first)
    seen["path"] = m.save(first, step=1, images_seen=8, state={"of": "two"})

    m.folder.fs = fs = CountingFileSystem()
    into = build(world, seed=9)
    seen["restored"] = m.restore(into)
    seen["same layout"] = same(whole(into), seen["first"])
    # rank 0 alone reads COMMIT, manifest and index
    records = sum((Path(seen["path"]) / name).stat().st_size for name in ("COMMIT", "manifest.json", "index.json"))
    seen["read"] = fs.bytes_read - (records if world.is_main else 0)
    seen["needed"] = local_bytes(into)

    # A bit of rank 1's shard: rank 1 alone reads it, after rank 0 has overwritten its tensors.
    second = Path(m.save(build(world, seed=2), step=2, images_seen=16, state={}))
    if world.is_main:
        flip_bit(second / "shard-00001.safetensors", -8)
    world.barrier()
    told: list[str] = []
    into = build(world, seed=9)
    seen["after damage"] = m.restore(into, on_set_aside=lambda path, reason: told.append(reason))
    seen["after damage same"] = same(whole(into), seen["first"])
    seen["told"] = told

    # Rank 1's file system refuses large files; rank 0's does not.
    failing = manager(base / "failing", world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    seen["failed write"] = error_of(lambda: failing.save(first, step=1, images_seen=1, state={}))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.barrier()
    seen["left by it"] = sorted(path.name for path in (base / "failing").iterdir())
    seen["next"] = failing.save(first, step=2, images_seen=1, state={})

    # Rank 1's input is wrong.
    wrong: dict[str, Any] = {**first, "word": "x"} if world.rank == 1 else dict(first)
    seen["wrong save"] = error_of(lambda: failing.save(wrong, step=3, images_seen=1, state={}))
    extra = {**first, "more": torch.zeros(1)} if world.rank == 1 else first
    seen["wrong restore"] = error_of(lambda: failing.restore(extra))

    # Only rank 0 looks, and what it meets is every rank's.
    other = CheckpointManager(
        str(base / "run"), keep_last=2, config_digest="other", code_version="v", process_group=world.host_group
    )
    seen["other config"] = error_of(lambda: other.restore(first))
    seen["background"] = in_background(world, base / "background", first)
    seen["all lists"] = [info.step for info in failing.list()]
    return seen


def in_background(world: World, path: Path, tensors: Tensors) -> dict[str, Any]:
    """Saves while other collectives run; then one that fails on rank 1 alone, after which ranks ask at other times."""
    seen: dict[str, Any] = {}
    m = manager(path, world)
    before = whole(tensors)
    m.begin_save(tensors, step=1, images_seen=1, state={})
    for tensor in tensors.values():  # at once, as the next step would
        local(tensor.detach()).add_(1)
    for i in range(20):
        assert world.gather(i) == [i, i]
        dist.all_reduce(torch.ones(1000))
    m.finish()
    saved = m.poll()
    assert saved is not None
    into = build(world, seed=9)
    seen["restored"] = m.restore(into)
    seen["as it was"] = same(whole(into), before)
    seen["metadata"] = all(
        isinstance(t, DTensor) == isinstance(tensors[name], DTensor) for name, t in m._host_copy.take(tensors).items()
    )

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    m.begin_save(tensors, step=2, images_seen=1, state={})
    if world.rank == 1:
        m.settle(timeout_s=60)
    seen["failed"] = error_of(m.finish)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.barrier()
    seen["left"] = sorted(p.name[:13] for p in path.iterdir())
    m.begin_save(tensors, step=3, images_seen=1, state={})
    m.finish()
    seen["steps"] = [info.step for info in m.list()]
    return seen


def three_ranks(world: World, base: Path) -> dict[str, Tensors]:
    seen = {}
    for source in ("run", "by-one"):
        into = build(world, seed=9)
        restored = manager(base / source, world).restore(into)
        assert restored is not None
        seen[source] = whole(into)
    manager(base / "by-three", world).save(into, step=7, images_seen=56, state={})
    return seen


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(base: Path) -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks, base)


def test_two_ranks_write_and_read(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["same layout"]
        assert seen["path"] == two[0]["path"]
        assert (seen["restored"].path, seen["restored"].step, seen["restored"].state) == (
            seen["path"], 1, {"of": "two"},
        )  # fmt: skip
    shards = sorted(Path(two[0]["path"]).glob("shard-*"))
    assert [path.name for path in shards] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    # each part is written once: the shards together are about the tensors
    held = sum(tensor.nbytes for tensor in two[0]["first"].values())
    assert held <= sum(path.stat().st_size for path in shards) <= held + 2 * 8192


def test_each_rank_reads_what_it_needs(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["needed"] <= seen["read"] <= 1.1 * seen["needed"]


def test_damage_that_one_rank_meets_takes_all_to_the_one_before(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["after damage"].step == 1
        assert seen["after damage same"]
    [reason] = two[0]["told"]
    assert "shard-00001.safetensors" in reason
    assert two[1]["told"] == []  # rank 0 tells


def test_failed_write_of_one_rank_is_every_ranks(two: list[dict[str, Any]]) -> None:
    for seen in two:
        kind, message = seen["failed write"]
        assert kind == CheckpointError.__name__
        assert "shard-00001.safetensors: cannot be written" in message
        assert "File too large" in message
        assert seen["left by it"] == []
        assert seen["next"] == two[0]["next"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong save", "word is a str"),
        ("wrong restore", "this run has more that the checkpoint lacks"),
        ("other config", "config d, this run's is other"),
    ],
)
def test_bad_input_on_one_rank_is_every_ranks(case: str, words: str, two: list[dict[str, Any]]) -> None:
    for seen in two:
        kind, message = seen[case]
        assert kind == UserError.__name__
        assert words in message
        assert seen["all lists"] == [2]


def test_saves_in_the_background(two: list[dict[str, Any]]) -> None:
    for seen in (rank["background"] for rank in two):
        assert seen["restored"].step == 1
        assert seen["as it was"]
        assert seen["metadata"]
        kind, message = seen["failed"]
        assert kind == CheckpointError.__name__
        assert "shard-00001.safetensors: cannot be written" in message
        assert seen["left"] == ["step-00000001"]
        assert seen["steps"] == [1, 3]


def test_two_ranks_to_one_to_three_to_one(base: Path, two: list[dict[str, Any]]) -> None:
    def by_one(source: str) -> Tensors:
        into = build(None, seed=9)
        assert manager(base / source).restore(into) is not None
        assert same(whole(into), two[0]["first"])
        return into

    alone = manager(base / "by-one")
    alone.verify(alone.save(by_one("run"), step=6, images_seen=48, state={}))
    for seen in run_ranks(3, three_ranks, base):
        assert same(seen["run"], two[0]["first"])
        assert same(seen["by-one"], two[0]["first"])
    by_one("by-three")


def test_missing_shard_is_seen_without_reading(base: Path, two: list[dict[str, Any]]) -> None:
    copy = base / "copy"
    shutil.copytree(base / "run", copy)
    [checkpoint] = [path for path in copy.iterdir() if path.name == os.path.basename(two[0]["path"])]
    (checkpoint / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="damaged and set aside"):
        manager(copy).restore(build(None, seed=9))
    assert "shard-00001.safetensors: missing" in (checkpoint / "SET-ASIDE.json").read_text()
