"""Whether the ranks stop, agreed by all of them at the same step; also amid what takes long between two steps."""

from collections.abc import Callable

import torch.distributed as dist

from trainer.parallel.agreement import Agreement
from trainer.preemption import StopRequest


class Interrupted(Exception):
    """An action was left midway, on all ranks at the same place: the run is asked to stop."""


class Stopping:
    """Every call but `close` is a collective.

    Args:
        save_failed: whether a save in the background has, on this rank.
    """

    def __init__(self, group: dist.ProcessGroup, stop: StopRequest, save_failed: Callable[[], bool]) -> None:
        self._agreement, self._stop, self._save_failed = Agreement(group), stop, save_failed

    def poll(self, *, at_once: bool = False) -> frozenset[str]:
        """`stop` and `save_failed`, where any rank has raised it by the last call.

        Args:
            at_once: or by now, which the ranks wait for.
        """
        agreed = self._poll()
        return agreed | self._poll() if at_once else agreed

    def _poll(self) -> frozenset[str]:
        return self._agreement.poll(stop=self._stop.received is not None, save_failed=self._save_failed())

    def go_on(self) -> None:
        """Within an action, between its passes: as many times on each rank.

        Raises:
            Interrupted: on all ranks at the same call, when the run is asked to stop.
        """
        if "stop" in self.poll():
            raise Interrupted

    def close(self) -> None:
        self._agreement.close()
