"""What the tests of several ranks stand on: results in order, errors with their reason, an environment as the test's."""

import os

import pytest

from tests.distributed.harness import RankError, run_ranks
from trainer.parallel.world import World


def answer(world: World, name: str) -> tuple[int, str | None]:
    return world.rank, os.environ.get(name)


def fail(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 is broken")
    world.barrier()


def test_results_come_in_the_order_of_ranks_and_the_environment_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOUPE_TEST", "first")
    assert run_ranks(2, answer, "LOUPE_TEST") == [(0, "first"), (1, "first")]
    monkeypatch.delenv("LOUPE_TEST")
    assert run_ranks(1, answer, "LOUPE_TEST") == [(0, None)]


def test_an_error_on_a_rank_is_raised_here() -> None:
    with pytest.raises(RankError, match="rank 1 is broken"):
        run_ranks(2, fail)
    assert run_ranks(1, answer, "LOUPE_TEST") == [(0, None)], "and the next one is not touched by it"
