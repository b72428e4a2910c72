"""Flags that all ranks act on at the same step."""

import torch
import torch.distributed as dist


class Agreement:
    """Which flags has any rank raised? Each call starts this step's reduction and reads the one before: nobody waits for
    it. All ranks read the same reduction, so all act at the same step."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._size = group, dist.get_world_size(group)
        self._work: dist.Work | None = None
        self._names: tuple[str, ...] = ()
        self._flags = torch.zeros(0)

    def poll(self, **raised: bool) -> frozenset[str]:
        """Names of the flags that were raised anywhere, one call ago. Every rank gives the same names, always."""
        if self._work is not None:
            self._work.wait()
        agreed = frozenset(name for name, flag in zip(self._names, self._flags.tolist(), strict=True) if flag)
        self._names = tuple(raised)
        self._flags = torch.tensor([float(flag) for flag in raised.values()])
        if self._size > 1:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        """Let the last reduction end, so that the group can be torn down."""
        if self._work is not None:
            self._work.wait()
            self._work = None
