"""What a pod waits for in the run folder, and that nothing which storage does there ends ranks that save."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import pytest

from launch.pods import heartbeat, task, waits
from launch.pods.heartbeat import ALIVE, Heartbeat, beat_of
from launch.pods.records import FAILED, PodJob, attempt_folder, judge, record_name, write_end
from launch.pods.waits import FailureWatch, wait_for_main, wait_until_free
from launch.ranks import log_path
from trainer.errors import UserError
from trainer.recipes import load
from trainer.run_folder import JOB, RunFolder

SAVES = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep({save_s}), sys.exit(75))); print('up', flush=True)"


def pod_job(attempt: str) -> PodJob:
    return PodJob("demo", nodes=1, gpus_per_node=1, cpu=True, max_restarts=5, attempt=attempt)


def never() -> bool:
    return False


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def later(seconds: float, what: Callable[[], object]) -> None:
    threading.Timer(seconds, what).start()


# ----------------------------------------------------------------------------------------------- a job of the same name


def test_a_new_job_of_the_same_name_waits_for_the_old_ones_pods(folder: RunFolder) -> None:
    old = Heartbeat(folder, "demo", "old")
    old.__enter__()
    began = time.monotonic()
    later(0.5, lambda: old.__exit__())
    wait_until_free(folder, pod_job("new"), grace_s=60, stopped=never, poll_s=0.05)
    assert time.monotonic() - began >= 0.5
    beat = beat_of(folder)
    assert beat is not None
    assert beat.time == 0.0, "it has ended"


def test_the_wait_for_a_lost_pod_ends_when_its_last_beat_is_old(folder: RunFolder) -> None:
    dead_at = time.time() + 1.0
    beat = {"job": "demo", "attempt": "old", "time": dead_at - heartbeat.DEAD_AFTER_S}
    folder.write_json(ALIVE, beat)
    wait_until_free(folder, pod_job("new"), grace_s=60, stopped=never, poll_s=0.05)
    assert dead_at - 0.1 <= time.time() < dead_at + 300


def test_one_that_lives_beyond_its_grace_is_another_job(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "DEAD_AFTER_S", 0.2)
    folder.write_json(ALIVE, {"job": "demo", "attempt": "old", "time": time.time()})
    with pytest.raises(UserError, match="in use by another start of Kubernetes job demo"):
        wait_until_free(folder, pod_job("new"), grace_s=0.1, stopped=never, poll_s=0.05)


def test_nobody_waits_for_its_own_start_nor_when_told_to_stop(folder: RunFolder) -> None:
    folder.write_json(ALIVE, {"job": "demo", "attempt": "one", "time": time.time()})
    wait_until_free(folder, pod_job("one"), grace_s=600, stopped=never)
    wait_until_free(folder, pod_job("two"), grace_s=600, stopped=lambda: True)


def test_other_pods_join_no_start_but_their_own(folder: RunFolder) -> None:
    """The name of rank 0's pod may as yet be an earlier start's, whose rendezvous has the same port."""
    folder.write_json(ALIVE, {"job": "demo", "attempt": "old", "time": time.time()})
    with pytest.raises(TimeoutError, match="the pod of rank 0 has not begun this start"):
        wait_for_main(folder, pod_job("new"), timeout_s=0.2, stopped=never, poll_s=0.05)
    later(0.3, lambda: folder.write_json(ALIVE, {"job": "demo", "attempt": "new", "time": time.time()}))
    wait_for_main(folder, pod_job("new"), timeout_s=300, stopped=never, poll_s=0.05)


def test_storage_that_fails_for_a_while_ends_no_wait(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [OSError("503"), OSError("503"), None]

    def beat(_: RunFolder) -> None:
        if answers and (error := answers.pop(0)):
            raise error

    monkeypatch.setattr(waits, "newest_beat", beat)
    wait_until_free(folder, pod_job("new"), grace_s=60, stopped=never, poll_s=0.01)
    assert not answers


# ------------------------------------------------------------------------------------------------- ranks that are saving


class Rank:
    """A pod with one rank that saves for a while when asked, and then ends with 75."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str, *, save_s: float) -> None:
        program = f"{SAVES.format(save_s=save_s)}\nwhile True: time.sleep(0.1)"
        monkeypatch.setattr(task, "trainer_command", lambda *_: [sys.executable, "-c", program])
        monkeypatch.setattr(task.signal, "signal", lambda *_: None)  # type: ignore[attr-defined]
        self.options = task.PodOptions(
            pod_job("uid.1"), 0, run_dir, "127.0.0.1", 600, tmp_path / "scratch", preflight=False
        )
        self.pod = task.Pod(poll_s=0.02)

    def run(self, *, until: Callable[[], bool] = lambda: True) -> int:
        """Its exit code; it is asked to stop once its rank runs and `until` is so."""
        threading.Thread(target=self._ask, args=(until,), daemon=True).start()
        return self.pod.run(self.options, load("demo"))

    def _ask(self, until: Callable[[], bool]) -> None:
        log = log_path(self.options.work_dir, 0)
        while not (log.exists() and "\nup" in log.read_text() and until()):
            time.sleep(0.02)
        self.pod._on_signal(15, None)


@pytest.fixture
def remote() -> Iterator[str]:
    url = "memory://pod-waits/run"
    yield url
    fsspec.filesystem("memory").rm("/pod-waits", recursive=True)


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError("503 SlowDown")


def hang(*_: Any, **__: Any) -> NoReturn:
    time.sleep(1000)
    raise AssertionError


@pytest.mark.parametrize("storage", [refuse, hang])
def test_storage_that_fails_while_ranks_save_neither_ends_them_nor_changes_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], storage: Callable[..., NoReturn]
) -> None:
    monkeypatch.setattr(waits, "a_pod_has_failed", storage)
    monkeypatch.setattr(task, "write_end", storage)
    monkeypatch.setattr(task, "RECORD_S", 0.3)
    rank = Rank(tmp_path, monkeypatch, str(tmp_path / "run"), save_s=1.0)
    assert rank.run() == 75
    said = capfd.readouterr().out
    assert "end of pod 0: not recorded in the run folder" in said
    if storage is refuse:
        assert "whether another pod has failed cannot be read (503 SlowDown)" in said


def test_the_grace_period_is_watched_though_storage_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waits, "a_pod_has_failed", hang)
    monkeypatch.setattr(task, "END_S", 599.0)
    rank = Rank(tmp_path, monkeypatch, str(tmp_path / "run"), save_s=500.0)
    began = time.monotonic()
    assert rank.run() == 75
    assert time.monotonic() - began < 300
    assert "not saved within --grace 600 s" in capfd.readouterr().out


def test_one_mark_says_that_a_pod_has_failed(folder: RunFolder) -> None:
    job = pod_job("uid.1")
    watch = FailureWatch(folder, job, every_s=0.02)
    assert not watch.seen
    # what other pods have recorded is not read: a damaged record is no failure, and their number does not matter
    folder.write_text(record_name("uid.1", 7), "{")
    time.sleep(0.1)
    assert not watch.seen
    write_end(folder, job, 3, node="n", codes={3: 1}, last_lines={}, asked_at=None, crashed_at=1.0)
    assert json.loads(folder.read_text(f"{attempt_folder('uid.1')}/{FAILED}"))["pod"] == 3
    end = time.monotonic() + 120
    while not watch.seen:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_damaged_record_counts_as_a_lost_pod_and_ends_no_start(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_json(JOB, {"cluster": "kubernetes", "job": "demo", "attempt": "uid.1", "nodes": 1, "gpus_per_node": 1,
                            "restarts": [], "ended": None})  # fmt: skip
    folder.write_text(record_name("uid.1", 0), '{"ended": 5, "codes"')
    decision = judge(folder, pod_job("uid.2"), folder.read_json(JOB), tmp_path)
    assert decision is not None
    assert decision.restart
    assert [entry["reason"] for entry in folder.read_json(JOB)["restarts"]] == ["lost"]


def test_the_logs_of_a_pod_that_is_lost_are_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str
) -> None:
    """While its ranks run, not at its own end: there may be none."""
    kept = task.tails_kept
    monkeypatch.setattr(task, "tails_kept", lambda *args, **more: kept(*args, **more, interval_s=0.05))
    seen: list[str] = []

    def uploaded() -> bool:
        folder = RunFolder(remote)
        for name in folder.names("logs"):
            text = folder.read_text(f"logs/{name}")
            if "\nup" in text:
                seen.append(name)
        return bool(seen)

    assert Rank(tmp_path, monkeypatch, remote, save_s=0.0).run(until=uploaded) == 75
    (name,) = RunFolder(remote).names("logs")
    assert name == seen[0]
    assert name.startswith("rank-0.2"), "a start has logs of its own"
