"""Being stopped politely: a signal sets a flag, ranks agree on it, and only then does anything happen."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""SIGTERM: preemption and Kubernetes. SIGUSR2: SLURM's warning before the time limit. Both mean save and stop."""


class StopRequest:
    """Set by a signal, at any moment, on any rank. No collective can run in a handler, so it only takes a note."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class Agreement:
    """Has any rank raised its flag? Each call starts this step's reduction and reads the one before: nobody waits for it.

    All ranks read the same reduction, so all act at the same step.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._work: dist.Work | None = None
        self._flag = torch.zeros(1)

    def poll(self, raised: bool) -> bool:
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._flag.item())
        self._flag = torch.tensor([float(raised)])
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        """Let the last reduction end, so that the group can be torn down."""
        if self._work is not None:
            self._work.wait()
            self._work = None
