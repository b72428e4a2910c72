"""The latent perceptual loss on two ranks: one without any sample inside the gate, and features that are not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.errors import ExitCode
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.slow
"""Of ranks that train or measure: half a minute and more."""

STEPS = 5
SHORT = (
    "phases.low_resolution.steps=1",
    "phases.full_resolution.steps=1",
    f"phases.perceptual.steps={STEPS}",
    "phases.perceptual.batch_size=4",
    "task.model.num_blocks=1",
    "task.paradigm.timestep_draws=independent",
    "checkpoint.every_steps=100",
    "data.num_workers=0",
)
NARROW = "phases.perceptual.perceptual={tau: 0.3}"
"""Of two samples a rank, often none is inside: within five steps on either rank alone, and on both."""
ALL_INSIDE = "phases.perceptual.perceptual={tau: null}"
BROKEN_STEP = 4
OPTIONS = {
    "default": (NARROW,),
    "micro_batches": (NARROW, "parallel.micro_batch_size=1"),
    "options": (
        NARROW,
        "task.perceptual={kind: lpl, tau_reference_px: null, maps: [up0, up1], statistics: separate, over_pixels: sum, "
        "mask_outliers: all, mask_source: target, detach_deviation: true}",
    ),
}
Jobs = list[tuple[RunConfig, str]]


def train(world: World, jobs: Jobs, broken: bool) -> list[dict[str, Any]]:
    """Each run's exit code, and how many samples were inside the gate on this rank at each step."""
    from trainer.run import Run

    out = []
    for config, url in jobs:
        run = Run(config, RunFolder(url), world, StopRequest())
        task: Any = run.task
        inside: dict[int, int] = {}

        def counted(batch: Any, plan: Any, scale: float, inside=inside, forward_backward=task.forward_backward) -> Any:
            terms = forward_backward(batch, plan, scale)
            if "gate" in terms:
                inside[plan.step] = inside.get(plan.step, 0) + int(terms["gate"].sum())
            return terms

        task.forward_backward = counted
        if broken and world.rank == world.size - 1:
            _break_features(task)
        try:
            out.append({"code": run.train(), "inside": inside})
        finally:
            run.exporter.close()
    return out


def _break_features(task: Any) -> None:
    """One feature of one sample's target is not a number, at one step."""
    at, begin_step = [0], task.begin_step

    def begin(plan: Any) -> None:
        at[0] = plan.step
        begin_step(plan)

    def spoil(module: nn.Module, inputs: Any, maps: list[Tensor]) -> None:
        if at[0] == BROKEN_STEP and not torch.is_grad_enabled():
            maps[-1][0, 0, 0, 0] = float("nan")

    task.begin_step = begin
    task.perceptual.decoder.register_forward_hook(spoil)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """By run: what each rank returned."""
    folder = tmp_path_factory.mktemp("perceptual")

    def jobs(prefix: str, configs: dict[str, tuple[str, ...]]) -> Jobs:
        return [(tiny(*SHORT, *overrides), str(folder / f"{prefix}{name}")) for name, overrides in configs.items()]

    whole: dict[str, tuple[str, ...]] = {"finite": (ALL_INSIDE,)}
    results: dict[str, list[dict[str, Any]]] = {}
    for prefix, size, configs, broken in (
        ("one_", 1, {name: OPTIONS[name] for name in ("default", "options")}, False),
        ("two_", 2, OPTIONS | whole, False),
        ("broken_", 2, whole, True),
    ):
        by_rank = run_ranks(size, train, jobs(prefix, configs), broken)
        results |= {f"{prefix}{name}": [rank[i] for rank in by_rank] for i, name in enumerate(configs)}
    assert {rank["code"] for ranks in results.values() for rank in ranks} == {ExitCode.DONE}
    return folder, results


@pytest.mark.parametrize("name", OPTIONS)
def test_a_rank_without_samples_inside_the_gate_trains_as_one_rank_does(runs, name: str) -> None:
    folder, results = runs
    plain = name if name == "options" else "default"
    (one,), (first, second) = results[f"one_{plain}"], results[f"two_{name}"]
    steps = range(2, 2 + STEPS)
    pairs = [(first["inside"][step], second["inside"][step]) for step in steps]
    assert any(a == 0 < b for a, b in pairs), pairs
    assert any(b == 0 < a for a, b in pairs), pairs
    assert (0, 0) in pairs
    assert [a + b for a, b in pairs] == [one["inside"][step] for step in steps]

    want, got = losses(str(folder / f"one_{plain}")), losses(str(folder / f"two_{name}"))
    assert len(want) == len(got) == 2 + STEPS
    for step_want, step_got in zip(want, got, strict=True):
        assert step_got == pytest.approx(step_want, rel=1e-5, abs=1e-5)
    for (a, b), step in zip(pairs, want[2:], strict=True):
        assert step["gate"] == (a + b) / 4
        assert (step["lpl"] > 0) == (a + b > 0)


def test_features_that_are_not_finite_on_one_rank_skip_the_step_on_all(runs) -> None:
    folder, results = runs
    assert all(rank["inside"][BROKEN_STEP] == 2 for rank in results["broken_finite"])
    records = RunFolder(str(folder / "broken_finite")).metrics()
    assert records[-1]["steps_skipped"] == 1
    assert records[-1]["step"] == 2 + STEPS
    # a skipped step has no losses to report
    assert len(records) == 2 + STEPS - 1
    clean, spoiled = losses(str(folder / "two_finite")), losses(str(folder / "broken_finite"))
    assert spoiled[:BROKEN_STEP] == clean[:BROKEN_STEP]
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in spoiled)
    for step in spoiled[2:]:
        assert step["gate"] == 1.0
        assert step["lpl"] > 0
