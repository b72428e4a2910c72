"""Being stopped politely: a signal sets a flag, ranks agree on it (`trainer.parallel.agreement`), and only then does
anything happen. No torch: the handlers are in place before the slow imports begin."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within, signals ask to stop; afterwards they do what they did before."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield StopRequest()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
