"""A run that is stopped, or killed, and started again computes bit for bit what an undisturbed one does. Real processes."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.harness import TrainerProcess, free_port
from tests.tiny import tiny
from trainer.config import RunConfig
from trainer.config_text import to_yaml, with_overrides
from trainer.errors import ExitCode
from trainer.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
WORLD_SIZE = 2
WITH_WORKERS = tiny("optim.spikes={sigma: 100, window_steps: 8}")
"""No spike occurs, but the window of past losses is part of what must come back."""
WITHOUT = with_overrides(WITH_WORKERS, ["data.num_workers=0"])
"""The same steps, sooner begun."""


def start(config: RunConfig, folder: Path) -> list[TrainerProcess]:
    """A job's ranks, each a process of its own."""
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(to_yaml(config))
    common = {
        "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": 1,
    }  # fmt: skip
    return [
        TrainerProcess(
            ["--config", str(path), "--run-dir", str(folder)],
            folder.parent / f"{folder.name}.{rank}.log",
            environment={
                **os.environ,
                **{k: str(v) for k, v in common.items()},
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            folder="/",
        )
        for rank in range(WORLD_SIZE)
    ]


def finish(ranks: list[TrainerProcess]) -> list[int]:
    try:
        return [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def at_step(folder: Path, step: int, ranks: list[TrainerProcess], act: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    run = RunFolder(str(folder))
    while not any(record["step"] >= step for record in run.metrics()):
        assert time.monotonic() < deadline, "the run does not get to the step"
        if any(rank.poll() is not None for rank in ranks):
            logs = "\n".join(path.read_text() for path in folder.parent.glob(f"{folder.name}.*.log"))
            raise AssertionError(f"a rank ended before it was disturbed:\n{logs}")
        time.sleep(0.02)
    act()


def trace(folder: Path) -> list[tuple[int, dict[str, float], float]]:
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in RunFolder(str(folder)).metrics()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start(WITHOUT, folder)) == [0, 0]
    assert len(trace(folder)) == 20
    return folder


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> list[tuple[int, dict[str, float], float]]:
    return trace(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_at_the_very_step_with_bit_equal_losses(number, undisturbed, tmp_path) -> None:
    folder = tmp_path / "run"
    ranks = start(WITH_WORKERS, folder)
    at_step(folder, 6, ranks, lambda: ranks[1].send_signal(number))  # one rank alone: the others must hear of it
    assert finish(ranks) == [ExitCode.REQUEUE] * WORLD_SIZE
    stopped_at = trace(folder)[-1][0]
    assert 6 <= stopped_at < 20
    assert finish(start(WITH_WORKERS, folder)) == [ExitCode.DONE] * WORLD_SIZE
    assert trace(folder) == undisturbed
    second = [r for r in (folder / "metrics" / "0001.jsonl").read_text().splitlines() if f'"step": {stopped_at},' in r]
    assert not second  # no step was done twice
    summary = RunFolder(str(folder)).read_json("summary.json")
    assert (summary["restarts"], summary["images_seen"]) == (1, 160)


def test_a_killed_run_repeats_from_its_checkpoint_with_bit_equal_losses(undisturbed, tmp_path) -> None:
    folder = tmp_path / "run"
    ranks = start(WITHOUT, folder)
    at_step(folder, 8, ranks, ranks[1].kill)
    ranks[0].wait(timeout=240) if ranks[0].poll() is None else None
    codes = finish(ranks)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.STOP)  # a crash, to be restarted
    assert finish(start(WITHOUT, folder)) == [ExitCode.DONE] * WORLD_SIZE
    assert trace(folder) == undisturbed


def test_a_finished_run_has_nothing_to_do(finished: Path) -> None:
    before = (finished / "summary.json").stat().st_mtime
    assert finish(start(WITHOUT, finished)) == [ExitCode.DONE] * WORLD_SIZE
    assert (finished / "summary.json").stat().st_mtime == before
