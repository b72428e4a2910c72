"""200 steps of the demo recipe against the losses on record. A difference means that training computes something else:
if that is meant, `make golden` records it, and the commit says why."""

import pytest

from tests import golden

pytestmark = pytest.mark.slow


def test_losses_are_those_on_record() -> None:
    found, expected = golden.measure(), golden.recorded()
    assert len(found) == len(expected) == 200
    for step, (now, then) in enumerate(zip(found, expected, strict=True)):
        assert now.keys() == then.keys(), f"step {step}"
        for name, value in now.items():
            assert value == pytest.approx(then[name], rel=1e-4, abs=1e-6), f"step {step}, {name}"
