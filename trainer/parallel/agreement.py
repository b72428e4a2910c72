"""A flag that all ranks act on at the same step."""

import torch
import torch.distributed as dist


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
