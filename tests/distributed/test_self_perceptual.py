"""Losses that hold a copy of the trained module, or estimate variances: the same on every layout, and after a stop."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train
from tests.distributed.test_layouts import Operations
from tests.distributed.test_training import losses
from tests.perceptual import make_context
from tests.tiny import tiny
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.storage import DTYPE_NAMES
from trainer.config import RunConfig, SelfPerceptualConfig
from trainer.errors import ExitCode, UserError
from trainer.losses.self_perceptual import SelfPerceptualLoss, of_rows
from trainer.parallel.apply import parallelize
from trainer.parallel.world import World
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.tensors import full

pytestmark = pytest.mark.slow

SHORT = (
    "phases.low_resolution.steps=1",
    "phases.full_resolution.steps=1",
    "phases.perceptual.steps=5",
    "phases.perceptual.learning_rate=0.01",
    "phases.perceptual.perceptual.tau=0.5",  # a quarter of the samples: most micro-batches of one have none inside
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "data.num_workers=0",
)
SELF = (
    *SHORT,
    "task.perceptual.kind=self_perceptual",
    "task.perceptual.block=1",
    "phases.perceptual.perceptual.variance_share=0.1",
    "phases.perceptual.perceptual.measure_steps=1",
)
EQ_15 = (
    *SHORT,
    "task.perceptual.kind=reweighting",
    "task.perceptual.measure_steps=3",
    "phases.perceptual.perceptual.tau=3",
)
MICRO, SELECTIVE = "parallel.micro_batch_size=1", "parallel.activation_checkpointing=selective"
MODES = {
    "plain": (),
    "selective": (SELECTIVE,),
    "full": ("parallel.activation_checkpointing=full",),
    "gathered": ("parallel.reshard_after_forward=false",),
}
ON_ONE = {"self": SELF, "eq_15": EQ_15}
ON_TWO = {"self_two": (*SELF, MICRO, SELECTIVE), "eq_15_two": (*EQ_15, MICRO)}
STOPPED = {"self_stopped": ON_TWO["self_two"], "eq_15_stopped": ON_TWO["eq_15_two"]}
"""After 4 steps: two into the phase, and two of three into a measurement."""


def config(overrides: tuple[str, ...]) -> RunConfig:
    return tiny(*overrides)


def two(world: World, folder: Path) -> dict[str, Any]:
    codes = [train(world, config(o), str(folder / name))["code"] for name, o in ON_TWO.items()]
    codes += [train(world, config(o), str(folder / name), stop_after=4)["code"] for name, o in STOPPED.items()]
    if world.is_main:
        shutil.copytree(folder / "self_stopped", folder / "self_elastic")
    world.barrier()
    codes += [train(world, config(o), str(folder / name))["code"] for name, o in STOPPED.items()]
    return {"codes": codes, "parts": {mode: parts(world, mode) for mode in MODES}}


def one(world: World, folder: Path) -> list[int]:
    codes = [train(world, config(o), str(folder / name))["code"] for name, o in ON_ONE.items()]
    return [*codes, train(world, config(STOPPED["self_stopped"]), str(folder / "self_elastic"))["code"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("self_perceptual")
    by_rank = run_ranks(2, two, folder)
    assert [rank["codes"] for rank in by_rank] == [
        [ExitCode.DONE] * 2 + [ExitCode.REQUEUE] * 2 + [ExitCode.DONE] * 2
    ] * 2
    assert run_ranks(1, one, folder) == [[ExitCode.DONE] * 3]
    return folder, by_rank


def stored(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by this process alone."""
    (path,) = run.glob(f"checkpoints/step-{step:08d}-*")
    tensors: dict[str, Tensor] = {}

    def choose(index: Any, where: str) -> dict[str, Tensor]:
        dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        tensors.update({name: torch.empty(tuple(t.size), dtype=dtypes[t.dtype]) for name, t in index.tensors.items()})
        return tensors

    manager = CheckpointManager(str(path.parent), keep_last=2, config_digest=None, code_version="")
    assert manager.read(choose, path=str(path)) is not None
    return tensors


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    ("name", "plain"),
    [("self_two", "self"), ("self_elastic", "self"), ("eq_15_two", "eq_15")],
)
def test_layouts_agree(runs: tuple[Path, Any], name: str, plain: str) -> None:
    got, want = (losses(str(runs[0] / run))[-7:] for run in (name, plain))
    assert len(got) == len(want) == 7
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["self", "eq_15"])
def test_a_stop_within_the_phase_changes_no_bit(runs: tuple[Path, Any], name: str) -> None:
    folder = runs[0]
    assert losses(str(folder / f"{name}_stopped")) == losses(str(folder / f"{name}_two"))
    got, want = (stored(folder / f"{name}_{run}", 7) for run in ("stopped", "two"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[tensor], want[tensor]) for tensor in want)


def test_the_copy_is_of_the_phases_begin_and_stays(runs: tuple[Path, Any]) -> None:
    run = runs[0] / "self_two"
    at_begin, later = stored(run, 2), [stored(run, step) for step in (4, 6, 7)]
    prefix = "task.perceptual.copy."
    names = [name.removeprefix(prefix) for name in later[0] if name.startswith(prefix)]
    assert any(name.startswith("text.") for name in names)
    assert any(name.startswith("denoiser.blocks.0.") for name in names)
    assert not any(name.startswith("denoiser.blocks.1.") for name in names), "block 2 is asked by nobody"
    for checkpoint in later:
        assert all(torch.equal(checkpoint[prefix + name], at_begin[f"model.{name}"]) for name in names)
    moved = [name for name in names if not torch.equal(later[-1][f"model.{name}"], at_begin[f"model.{name}"])]
    assert len(moved) > len(names) / 2
    stale = [name for name in names if not torch.equal(at_begin[prefix + name], at_begin[f"model.{name}"])]
    assert stale, "the copy was taken before the phase began"


def test_the_weight_is_known_from_the_second_step_on(runs: tuple[Path, Any]) -> None:
    records = losses(str(runs[0] / "self"))
    assert [record.get("perceptual_weight", -1.0) > 0 for record in records] == [False] * 3 + [True] * 4
    assert records[2]["perceptual_weight"] == 0
    assert all(0 < record["gate"] < 1 and record["self_perceptual"] > 0 for record in records[2:])
    for record in records[2:]:
        whole = record["denoising"] + record["perceptual_weight"] * record["self_perceptual"]
        assert record["loss"] == pytest.approx(whole, rel=1e-5)


def test_the_ratio_is_measured_for_three_steps(runs: tuple[Path, Any]) -> None:
    ratios = [record["reweighting_ratio"] for record in losses(str(runs[0] / "eq_15"))[2:]]
    assert ratios[0] == 0
    assert len(set(ratios)) == 4
    assert ratios[3] == ratios[4] > 0


# ------------------------------------------------------------------------------------- value and gradient, by the letter


def parts(world: World, mode: str) -> dict[str, Any]:
    """The loss of a sharded copy, on ranks of which one has no sample inside, beside an unsharded computation."""
    run = tiny(*SELF, *MODES[mode])
    task, reference = (LatentDiffusionTask(run, world.device) for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(task.module.parameters(), reference.module.parameters(), strict=True):
            ours.add_(0.1 * torch.randn(ours.shape, generator=torch.Generator().manual_seed(ours.numel())))
            theirs.copy_(ours)
    loss = task.perceptual
    assert isinstance(loss, SelfPerceptualLoss)
    for module, units in [(task.module, task.sharding_units()), *task.frozen_sharded()]:
        parallelize(module, units, world, run.parallel)
    loss.begin_phase(task.module)

    text = task.text.prepare([f"a picture of {world.rank}", "two", None, "four"])
    g = torch.Generator().manual_seed(world.rank)
    z0 = torch.randn(4, 4, 8, 8, generator=g)
    estimate = z0 + 0.5 * torch.randn(z0.shape, generator=g)
    estimate[0] = float("nan")  # a row outside; on the rank that has none inside, the very row that comes along
    inside = torch.tensor([False, True, False, True]) & (world.rank == 0)
    levels = torch.where(inside, 1.0, 9.0)
    context = replace(make_context(z0, text=text), paradigm=task.paradigm(64))

    estimate.requires_grad_()
    with Operations() as seen:
        loss_B, terms = loss(estimate, z0, levels, context)
        loss_B.sum().backward()
    want_B, gradient = by_hand(reference.module, estimate.detach(), z0, inside, context)
    assert estimate.grad is not None
    with torch.no_grad():
        loss(estimate, z0, levels, context)  # leaves the root's parameters gathered
        for module in (task.module, reference.module):
            for parameter in module.parameters():
                parameter.mul_(1.25)
    loss.begin_phase(task.module)
    renewed_B, _ = loss(estimate, z0, levels, context)
    wanted_B, _ = by_hand(reference.module, estimate.detach(), z0, inside, context)
    return {
        "renewed": ((renewed_B.detach() - wanted_B).abs().max().item(), (wanted_B - want_B).abs().max().item()),
        "loss": (loss_B.detach() - want_B).abs().max().item(),
        "gradient": (estimate.grad - gradient).abs().max().item(),
        "scale": (want_B.max().item(), gradient.abs().max().item()),
        "outside": (loss_B[~inside].abs().sum().item(), estimate.grad[~inside].abs().sum().item()),
        "gate": terms["gate"].bool().equal(inside),
        "collectives": Counter(
            {name: n for name, n in seen.count.items() if "gather" in name or "reduce_scatter" in name}
        ),
        "copy_is_frozen": not any(p.requires_grad for p in loss.copy.parameters()),
        "same_weights": all(
            torch.equal(full(p), reference.module.state_dict()[name]) for name, p in loss.copy.state_dict().items()
        ),
    }


def by_hand(module: nn.Module, estimate: Tensor, z0: Tensor, inside: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    """One sample after the other through the whole module, the first block's image tokens caught by a hook."""
    caught: list[Tensor] = []
    module.get_submodule("denoiser.blocks.0").register_forward_hook(lambda _m, _i, out: caught.append(out[0]))
    paradigm = context.paradigm
    t_B, noise = paradigm.sample_t(context.uniform("second_timestep")), context.normal("second_noise")
    losses_B, gradient = torch.zeros(len(z0)), torch.zeros_like(z0)
    for i in torch.arange(len(z0))[inside]:
        row, z = i[None], estimate[i][None].clone().requires_grad_()
        for latents in (z, z0[i][None]):
            zt = (1 - t_B[i]) * latents + t_B[i] * noise[i][None]
            module(zt.float(), 1000.0 * t_B[row].float(), of_rows(context.text, row))
        difference = caught[-2] - caught[-1]
        loss = difference.square().mean()
        (gradient[i],) = torch.autograd.grad(loss, z)[0].detach()
        losses_B[i] = loss.detach()
    return losses_B, gradient


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_are_those_of_an_unsharded_computation(runs: tuple[Path, Any], mode: str) -> None:
    ranks = [rank["parts"][mode] for rank in runs[1]]
    assert min(ranks[0]["scale"]) > 1e-4, "there is something to compare"
    for rank in ranks:
        assert rank["renewed"][0] < 1e-3 * ranks[0]["renewed"][1]
        assert rank["loss"] < 1e-5 * ranks[0]["scale"][0]
        assert rank["gradient"] < 1e-5 * ranks[0]["scale"][1]
        assert rank["outside"] == (0, 0)
        assert rank["gate"]
        assert rank["copy_is_frozen"]
        assert rank["same_weights"]


def test_ranks_take_the_same_collectives_whatever_their_gate(runs: tuple[Path, Any]) -> None:
    for mode in MODES:
        first, second = (rank["parts"][mode]["collectives"] for rank in runs[1])
        assert first == second
        # root, text block and block 1 for the truth; the two blocks again for the estimate; and for the backward pass block
        # 1, behind which FSDP2 fetches the block before it, though no gradient goes there
        assert first["_allgather_base_"] == (3 if mode == "gathered" else 3 + 2 + 2)
        assert "_reduce_scatter_base_" not in first


# --------------------------------------------------------------------------------------------------------- what is refused


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"task\.perceptual\.block: 3, but the denoiser has 2 blocks; take 1 to 2"):
        LatentDiffusionTask(tiny(*SELF, "task.perceptual.block=3"), torch.device("cpu"))


@pytest.mark.parametrize(("blocks", "middle"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_the_middle_block(blocks: int, middle: int) -> None:
    task = LatentDiffusionTask(tiny(f"task.model.num_blocks={blocks}"), torch.device("cpu"))
    assert SelfPerceptualLoss(SelfPerceptualConfig(), task.module).block == middle
