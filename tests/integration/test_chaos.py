"""A few faults of `ops/bench/chaos.py` on a real run, and that its checks see what they are for."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.console import Record
from ops.bench import chaos_checks as checks
from ops.bench.chaos import RESULTS, undisturbed_run
from ops.bench.chaos_faults import SAVE, Steps, Struck
from ops.bench.chaos_jobs import LocalJob, settings
from trainer.config import CODE_ROOT
from trainer.run_folder import JOB, RunFolder

pytestmark = [pytest.mark.long, pytest.mark.timeout(1600)]

KINDS = ("bit flip", SAVE, "preemption")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of the bench that has ended well."""
    out = tmp_path_factory.mktemp("chaos") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "ops.bench.chaos", "--faults", "3", "--seed", "2", "--out", str(out),
         *(word for kind in KINDS for word in ("--kind", kind))],
        cwd=CODE_ROOT, capture_output=True, text=True, check=False, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    return out


@pytest.fixture
def struck(out: Path) -> list[Struck]:
    faults = json.loads((out / RESULTS).read_text())["faults"]
    return [Struck(**{name: value for name, value in fault.items() if name != "lost"}) for fault in faults]


def starts_of(run: Path) -> dict[int, list[Record]]:
    steps = Steps(RunFolder(str(run)))
    steps.poll()
    return steps.by_start


def test_each_fault_is_told_with_what_it_cost(out: Path, struck: list[Struck]) -> None:
    found = json.loads((out / RESULTS).read_text())
    assert found["holds"]
    assert {s.kind for s in struck} == set(KINDS)
    assert len(starts_of(out / "disturbed")) == 4
    for s in struck:
        again = [r["step"] for r in starts_of(out / "disturbed")[struck.index(s) + 1]]
        assert s.resumed == again[0] - 1
        assert (s.lost == 0) == (s.kind == "preemption")
        assert s.new_step_s > s.noticed_s >= 0
    said = (out / "disturbed/logs/rank-0.log").read_text()
    # the checkpoint itself goes when newer ones are there
    assert said.count("does not verify and is set aside (") == 1


def test_weights_of_another_seed_are_seen_to_differ(out: Path, tmp_path: Path) -> None:
    run, expected = RunFolder(str(out / "disturbed")), RunFolder(str(out / "undisturbed"))
    assert checks.same_weights(run, expected, exactly=True).holds
    another = LocalJob(tmp_path / "another", out / "code", settings(10, 5, 3, 10.0), max_restarts=0)
    undisturbed_run(another)
    for exactly in (True, False):
        check = checks.same_weights(another.folder, expected, exactly=exactly)
        assert not check.holds, check
    assert not checks.same_losses(starts_of(tmp_path / "another"), starts_of(out / "undisturbed"), exactly=True).holds


def test_one_bit_of_one_tensor_is_seen(out: Path) -> None:
    expected = checks.final_tensors(RunFolder(str(out / "undisturbed")))
    found = {name: tensor.clone() for name, tensor in expected.items()}
    assert checks.different(found, expected) == []
    name = next(name for name in sorted(found) if name.startswith("ema.") and found[name].numel())
    found[name].view(-1).view(checks.torch.uint8)[0] ^= 1
    assert checks.different(found, expected) == [name]


def test_one_loss_that_differs_is_seen_and_a_step_that_is_missing(out: Path) -> None:
    starts, expected = starts_of(out / "disturbed"), starts_of(out / "undisturbed")
    assert checks.same_losses(starts, expected, exactly=True).holds
    other = copy.deepcopy(starts)
    other[1][0]["loss"]["denoising"] *= 1 + 1e-15
    other[1][0]["loss"]["denoising"] += 1e-12
    assert not checks.same_losses(other, expected, exactly=True).holds
    last = max(starts)
    assert not checks.same_losses({**starts, last: starts[last][:-1]}, expected, exactly=True).holds


def test_lost_steps_and_older_checkpoints_are_seen(struck: list[Struck]) -> None:
    assert checks.bounded_losses(struck).holds
    assert checks.from_the_newest(struck).holds
    further = [replace(s, resumed=s.reached - s.allowed - 1) for s in struck]
    assert not checks.bounded_losses(further).holds
    assert not checks.from_the_newest(further).holds


@pytest.mark.parametrize("what", ["a restart more", "another reason", "a start without a word"])
def test_a_restart_that_nothing_accounts_for_is_seen(
    out: Path, struck: list[Struck], tmp_path: Path, what: str
) -> None:
    job = json.loads((out / "disturbed" / JOB).read_text())
    run = RunFolder(str(tmp_path))
    starts = len(struck) + 1 + (what == "a start without a word")
    for i in range(starts):
        run.write_json(f"attempts/{i:04d}.json", {})
    entries = [entry for one in [*job["earlier"], job] for entry in one["restarts"]]
    if what == "a restart more":
        job["restarts"].append({"reason": "crash", "code": 1})
    if what == "another reason":
        entries[0]["reason"] = "hang"
    run.write_json(JOB, job)
    assert not checks.accounted(run, struck).holds
    assert checks.accounted(RunFolder(str(out / "disturbed")), struck).holds
