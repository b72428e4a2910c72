"""A killed run of stage 1, started again, ends with every tensor as an undisturbed one's. Real processes."""

import signal

import pytest

from tests.integration.test_resume import at_step, finish, start, trace
from tests.stage1 import RUNNING_MEANS, checkpoint, stage1, unequal
from trainer.errors import ExitCode

pytestmark = pytest.mark.slow


def test_a_killed_run_repeats_from_its_checkpoint_bit_equal(tmp_path) -> None:
    """Killed while the discriminator plays, with both optimizers, codes that are means, and spectral norms."""
    config = stage1(
        RUNNING_MEANS, "task.discriminator.norm=spectral", "phases.train.steps=16", "checkpoint.every_steps=3"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(config, whole)) == [ExitCode.DONE] * 2
    ranks = start(config, killed)
    at_step(killed, 8, ranks, ranks[1].kill)
    codes = finish(ranks)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.STOP)
    assert finish(start(config, killed)) == [ExitCode.DONE] * 2
    assert trace(killed) == trace(whole)
    assert len(trace(whole)) == 16
    assert unequal(checkpoint(whole), checkpoint(killed)) == []
