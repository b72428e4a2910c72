"""Each way to lay a run out over ranks and memory computes what one plain process does, and leaves the same checkpoints."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from launch.environment import Place, variables_of
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses, train
from tests.distributed.test_variants import class_folders
from tests.tiny import tiny
from trainer import optim, train_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import ParallelConfig, RunConfig, check_layout
from trainer.ema import EMA, host_mesh
from trainer.errors import ExitCode, UserError
from trainer.parallel.apply import apply_activation_checkpointing, begin_micro_batch, parallelize
from trainer.parallel.world import World
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import full, local

pytestmark = pytest.mark.slow
"""Of ranks that train: a minute and more."""

STEPS = (  # the demo's three phases; few of the dear ones
    "phases.low_resolution.steps=14",
    "phases.full_resolution.steps=4",
    "phases.perceptual.steps=2",
    "checkpoint.every_steps=10",
    "data.num_workers=0",
)
ON_TWO = {
    "full": ("parallel.activation_checkpointing=full", "parallel.reshard_after_forward=false"),
    "selective": ("parallel.activation_checkpointing=selective", "ema.offload=true"),
    "accumulate": ("parallel.micro_batch_size=2", "parallel.keep_gathered=true"),
}
ON_FOUR = {"hsdp": ("parallel.replicas=2", "parallel.micro_batch_size=1", "ema.offload=true")}
"""Each option once; what goes wrong shows in its run's losses or checkpoint."""

Jobs = list[tuple[RunConfig, str]]


class Operations(TorchDispatchMode):
    """Counts operations by name. (torch's CommDebugMode follows modules too, and loses them in FSDP2's hooks.)"""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def several(world: World, jobs: Jobs) -> list[int]:
    return [train(world, config, url) for config, url in jobs]


def compiled(world: World, jobs: Jobs) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    codes = several(world, jobs)
    inductor, stats = counters["inductor"], counters["stats"]
    return {
        "codes": codes,
        "graphs": stats["unique_graphs"],
        "hits": inductor["fxgraph_cache_hit"],
        "misses": inductor["fxgraph_cache_miss"],
    }


def two(world: World, jobs: Jobs) -> dict[str, Any]:
    codes, all_gathers = [], {}
    for job in jobs:
        with Operations() as seen:
            codes += several(world, [job])
        all_gathers[Path(job[1]).name] = seen.count["_allgather_base_"]
    return {"codes": codes, "all_gathers": all_gathers, "gathers": gathers(world), "offload": offload(world)}


def four(world: World, jobs: Jobs) -> dict[str, Any]:
    return {"codes": several(world, jobs), "mesh": (world.mesh.mesh_dim_names, world.mesh.mesh.tolist())}


def small(folder: Path) -> tuple[str, ...]:
    """One block, and three image sizes."""
    return (
        "task.model.num_blocks=1",
        "task.text={kind: classes, num_classes: 2, width: 32}",
        f"data.datasets.emoji.url={class_folders(folder)}",
        "phases.perceptual.resolution=48",
        "task.perceptual.tau_reference_px=48",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("layouts")
    one_block = small(folder)
    on_one: dict[str, tuple[str, ...]] = {
        "one": (),
        "uncompiled": one_block,
        # behind FSDP2's hooks, as on many ranks
        "compiled": (*one_block, "parallel.compile=true", "parallel.shard_one_rank=true"),
    }

    def jobs(layouts: Mapping[str, tuple[str, ...]]) -> Jobs:
        return [(tiny(*STEPS, *overrides), str(folder / name)) for name, overrides in layouts.items()]

    with pytest.MonkeyPatch.context() as patch:
        # as for the ranks of a job, whose cache lies in the run's folder
        place = Place(0, 1, 0, 1, "", 0, code_dir="", work_dir=str(folder), use_gpus=False)
        cache = variables_of(place, {})["TORCHINDUCTOR_CACHE_DIR"]
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
        yield (
            folder,
            {
                "one": run_ranks(1, compiled, jobs(on_one)),
                "again": run_ranks(1, compiled, jobs({"compiled_again": on_one["compiled"]})),
                "two": run_ranks(2, two, jobs(ON_TWO)),
                "four": run_ranks(4, four, jobs(ON_FOUR), replicas=2),
            },
        )


def same_losses(folder: Path, first: str, second: str) -> None:
    want, got = losses(str(folder / first)), losses(str(folder / second))
    assert len(want) == len(got) == 20
    for step_want, step_got in zip(want, got, strict=True):
        assert step_got == pytest.approx(step_want, rel=1e-5, abs=1e-5)


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", [*ON_TWO, *ON_FOUR])
def test_losses_are_those_of_one_plain_process(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, seen = runs
    codes = [rank["codes"] for spawn in seen.values() for rank in spawn]
    assert {code for rank in codes for code in rank} == {ExitCode.DONE}
    same_losses(folder, "one", name)


@pytest.fixture(scope="module")
def plain(runs: tuple[Path, dict[str, Any]]) -> dict[str, Tensor]:
    return saved(runs[0] / "one")


def saved(run: Path) -> dict[str, Tensor]:
    """A run's newest checkpoint, read by one process into an unsharded model: it refuses any other set of names."""
    task = LatentDiffusionTask(tiny(), torch.device("cpu"))
    tensors = train_state.tensors(task, EMA(task.module), optim.build_optimizer(task.module, tiny().optim))
    manager = CheckpointManager(f"{run}/checkpoints", keep_last=2, config_digest=None, code_version="")
    restored = manager.restore(tensors)
    assert restored is not None
    assert restored.step == 20
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", [*ON_TWO, *ON_FOUR])
def test_checkpoints_are_interchangeable(
    runs: tuple[Path, dict[str, Any]], plain: dict[str, Tensor], name: str
) -> None:
    got = saved(runs[0] / name)
    assert got.keys() == plain.keys()
    for tensor, want in plain.items():
        if tensor.startswith(("model.", "ema.")):
            torch.testing.assert_close(got[tensor], want, atol=2e-4, rtol=0, msg=f"{tensor} differs")


def test_a_copy_is_sharded_over_neighbours(runs: tuple[Path, dict[str, Any]]) -> None:
    assert [rank["mesh"] for rank in runs[1]["four"]] == [(("replicate", "shard"), [[0, 1], [2, 3]])] * 4


def test_runs_gather_as_their_layout_says(runs: tuple[Path, dict[str, Any]]) -> None:
    for rank in runs[1]["two"]:
        of = rank["all_gathers"]
        # two blocks of the denoiser, one of the text and the root: 20 steps
        assert of["full"] == of["accumulate"] == 20 * 4
        assert of["selective"] == 20 * (4 + 3)


@pytest.mark.parametrize(("mode", "products", "activations"), [("none", 2, 1), ("selective", 2, 2), ("full", 3, 2)])
def test_what_is_recomputed(mode: Any, products: int, activations: int) -> None:
    """The last product's output is no input of the backward pass: recomputation stops before it."""
    x, unit, plain = torch.randn(4, 6), block(), block()
    apply_activation_checkpointing([unit], mode)
    with Operations() as seen:
        unit(x).square().mean().backward()
    plain(x).square().mean().backward()
    assert (seen.count["addmm"], seen.count["gelu"]) == (products, activations)
    assert unit.state_dict().keys() == plain.state_dict().keys()
    for ours, theirs in zip(unit.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))


def test_replicas_must_divide_the_ranks() -> None:
    with pytest.raises(UserError, match=r"parallel\.replicas: 2 copies of the model, but 1 ranks are no multiple"):
        check_layout(tiny("parallel.replicas=2"), 1)


# ------------------------------------------------------------------------------------------------- gathers, by counting


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def gathers(world: World) -> dict[str, tuple[int, int, float]]:
    """By layout: all-gathers and reduce-scatters of one step in three micro-batches; the gradient's largest difference
    from that of one large batch."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(world.rank))
    layouts = {
        "plain": ParallelConfig(),
        "reshard_after_forward": ParallelConfig(reshard_after_forward=False),
        "keep_gathered": ParallelConfig(keep_gathered=True),
    }
    out = {}
    for name, config in layouts.items():
        module = layers()
        parallelize(module, [module[0], module[2]], world, config)
        for _ in range(2):  # the second step meets what the first has left
            module.zero_grad()
            with Operations() as seen:
                for i, part in enumerate(x.split(4)):
                    begin_micro_batch(module, last=i == 2, keep_gathered=config.keep_gathered)
                    (module(part).square().mean(dim=1).sum() / 12).backward()
        gradients = [full(p.grad) for p in module.parameters() if p.grad is not None]
        once = layers()
        xs = torch.cat([torch.randn(12, 6, generator=torch.Generator().manual_seed(r)) for r in range(world.size)])
        once(xs).square().mean().backward()
        difference = max(
            (g - p.grad).abs().max().item()
            for g, p in zip(gradients, once.parameters(), strict=True)
            if p.grad is not None
        )
        out[name] = (seen.count["_allgather_base_"], seen.count["_reduce_scatter_base_"], difference)
    return out


def test_parameters_that_stay_are_gathered_less_often(runs: tuple[Path, dict[str, Any]]) -> None:
    for rank in runs[1]["two"]:
        seen = rank["gathers"]
        # two blocks and the root, three micro-batches; blocks are gathered twice in each, forward and backward
        assert seen["plain"][:2] == (3 * (2 * 2 + 1), 3)
        assert seen["reshard_after_forward"][:2] == (3 * 3, 3)
        assert seen["keep_gathered"][:2] == (3, 3)
        assert all(difference < 1e-7 for *_, difference in seen.values())


# ----------------------------------------------------------------------------------------------- the average, offloaded


def offload(world: World) -> dict[str, Any]:
    """A sharded model's average in host memory beside the plain one; and how a GPU's shard would be held there."""
    module = layers()
    parallelize(module, [module[0]], world)
    plain, offloaded = EMA(module), EMA(module, offload=True)
    both_move(module, plain, offloaded)
    pairs = list(zip(plain.average.values(), offloaded.average.values(), strict=True))
    assert dist.group.WORLD is not None
    mesh = host_mesh(DeviceMesh.from_group(dist.group.WORLD, "cuda"))  # a mesh alone needs no GPU
    shard = torch.full((2, 3), float(world.rank))
    held = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1))
    return {
        "equal": all(torch.equal(local(a), local(b)) for a, b in pairs),
        "sharded": all(
            isinstance(a, DTensor) and isinstance(b, DTensor) and a.placements == b.placements for a, b in pairs
        ),
        "whole": all(torch.equal(full(a), full(b)) for a, b in pairs),
        "device": (mesh.device_type, held.to_local().data_ptr() == shard.data_ptr(), full(held)[:, 0].tolist()),
    }


def both_move(module: nn.Module, plain: EMA, offloaded: EMA) -> None:
    """Steps of a training: weights change the moment that the update has been queued, one step is skipped, a checkpoint is
    read into the average in place."""
    generator = torch.Generator().manual_seed(1)
    for i in range(6):
        for ema in (plain, offloaded):
            ema.update(0.9 if i else 0.0, torch.tensor(float(i == 3)))
            ema.wait_for_copy()
        with torch.no_grad():
            for p in module.parameters():
                shard = local(p)
                shard.add_(torch.randn(shard.shape, generator=generator))
        if i == 4:
            for ema in (plain, offloaded):
                for average in ema.average.values():
                    local(average).mul_(0.5)


def test_sharded_average_in_host_memory(runs: tuple[Path, dict[str, Any]]) -> None:
    for rank in runs[1]["two"]:
        seen = rank["offload"]
        assert seen["equal"]
        assert seen["sharded"]
        assert seen["whole"]
        assert seen["device"] == ("cpu", True, [0.0, 0.0, 1.0, 1.0])


def test_average_in_host_memory_is_the_plain_one() -> None:
    torch.manual_seed(0)
    module = nn.Linear(700, 700)  # large enough that an update in the thread is still under way when it is asked for
    plain, offloaded = EMA(module), EMA(module, offload=True)
    start = [p.detach().clone() for p in module.parameters()]
    both_move(module, plain, offloaded)
    for name, average in plain.average.items():
        assert torch.equal(average, offloaded.average[name])
        assert not torch.equal(average, dict(module.named_parameters())[name])
    weights = [p.detach().clone() for p in module.parameters()]
    offloaded.update(0.5, torch.tensor(0.0))  # under way when the swap begins
    plain.update(0.5, torch.tensor(0.0))
    with offloaded.in_place_of_weights():
        assert all(torch.equal(p, a) for p, a in zip(module.parameters(), plain.average.values(), strict=True))
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    assert not any(torch.equal(w, s) for w, s in zip(weights, start, strict=True))


# --------------------------------------------------------------------------------------------------------- compilation


def test_compiled_blocks_and_their_cache(runs: tuple[Path, dict[str, Any]]) -> None:
    """Compiled for the first image size, then once more for all others; not at all by the next process."""
    folder, seen = runs
    (first,), (again,) = seen["one"], seen["again"]
    assert first["graphs"] == again["graphs"] == 2
    assert (first["hits"], first["misses"]) == (0, 4)  # forward and backward of each
    assert (again["hits"], again["misses"]) == (4, 0)
    same_losses(folder, "uncompiled", "compiled")
    same_losses(folder, "uncompiled", "compiled_again")
