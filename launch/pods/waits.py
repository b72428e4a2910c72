"""What a pod waits for in the run folder: for an earlier start's end, for rank 0's pod, for a failure elsewhere. No torch."""

import threading
import time
from collections.abc import Callable

from data.deadlines import call_within
from launch.pods.heartbeat import DEAD_AFTER_S, beat_of, newest_beat
from launch.pods.records import PodJob, a_pod_has_failed
from trainer.errors import UserError, one_line
from trainer.run_folder import RunFolder

POLL_S = 2.0
LOOK_S = 5.0
"""Between two looks for a pod that has failed."""
ANSWER_S = 30.0
"""Longest wait for storage in one look."""


def wait_until_free(
    folder: RunFolder, job: PodJob, *, grace_s: float, stopped: Callable[[], bool], poll_s: float = POLL_S
) -> None:
    """Until no pod of another start of this job is at work: one that was deleted saves for up to its grace period, and a
    new job of the same name may come before it has ended. Ends early once `stopped`.

    Raises:
        UserError: it lives on beyond its grace period.
        TimeoutError: storage does not say.
    """

    def look() -> bool:
        beat = newest_beat(folder)
        return beat is None or beat.job != job.name or beat.attempt == job.attempt

    def late() -> Exception:
        return UserError(
            f"{folder.url}: in use by another start of Kubernetes job {job.name}, of this namespace or another, which does not "
            "end; delete that one first, or take another --run-dir"
        )

    _wait(
        look, grace_s + DEAD_AFTER_S, stopped, poll_s, late, f"an earlier start of {job.name} is still at work: waiting"
    )


def wait_for_main(
    folder: RunFolder, job: PodJob, *, timeout_s: float, stopped: Callable[[], bool], poll_s: float = POLL_S
) -> None:
    """Until the pod of rank 0 has begun this start: its name may as yet be that of an earlier start's, which still saves.

    Raises:
        TimeoutError: it has not.
    """

    def look() -> bool:
        beat = beat_of(folder)
        return beat is not None and beat.attempt == job.attempt

    def late() -> Exception:
        return TimeoutError(f"the pod of rank 0 has not begun this start after {timeout_s:.0f} s; does it run?")

    _wait(look, timeout_s, stopped, poll_s, late, "waiting for the pod of rank 0")


def _wait(
    look: Callable[[], bool], timeout_s: float, stopped: Callable[[], bool], poll_s: float, late: Callable[[], Exception],
    word: str,
) -> None:  # fmt: skip
    """Until `look`. Storage that fails is asked again, until the time is over."""
    deadline, told = time.monotonic() + timeout_s, ""
    while not stopped():
        failure: Exception | None = None
        try:
            if call_within(look, time.monotonic() + ANSWER_S, "run folder"):
                return
        except Exception as e:  # whatever a storage client raises
            failure = e
        if time.monotonic() > deadline:
            if failure is None:
                raise late()
            raise TimeoutError(
                f"the run folder gives no answer in {timeout_s:.0f} s ({one_line(failure)})"
            ) from failure
        said = f"warning: {word}, and the run folder gives no answer ({one_line(failure)})" if failure else word
        if said != told:
            print(f"loupe pod: {said}", flush=True)
            told = said
        time.sleep(poll_s)


class FailureWatch:
    """Looks whether a pod of this start has failed, from a thread of its own: storage that hangs or refuses must keep neither
    signals from the ranks nor the end of their grace period."""

    def __init__(self, folder: RunFolder, job: PodJob, *, every_s: float = LOOK_S, answer_s: float = ANSWER_S) -> None:
        self._folder, self._job, self._every_s, self._answer_s = folder, job, every_s, answer_s
        self._seen, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def seen(self) -> bool:
        """Whether one has. Begins to look at the first call."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="failed pods")
            self._thread.start()
        return self._seen.is_set()

    def finish(self) -> None:
        self._over.set()

    def _run(self) -> None:
        told = ""
        while not self._over.is_set():
            try:
                deadline = time.monotonic() + self._answer_s
                if call_within(lambda: a_pod_has_failed(self._folder, self._job), deadline, "failed pods"):
                    self._seen.set()
                    return
            except Exception as e:  # whatever a storage client raises: the ranks go on saving
                said = f"{self._folder.url}: whether another pod has failed cannot be read ({one_line(e)})"
                if said != told:
                    print(f"loupe pod: warning: {said}", flush=True)
                    told = said
            self._over.wait(self._every_s)
