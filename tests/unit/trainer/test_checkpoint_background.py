"""Saving while training goes on: what is copied, who waits, what a failure does. Ranks: tests/distributed."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.unit.trainer.test_checkpoint_manager import FailingFileSystem, assert_restores, manager, save, steps, tensors
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.host_copy import HostCopy
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import unique_hold


class SlowFileSystem(LocalFileSystem):
    """Storage on which nothing is written until `go` is set."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode:
            self.asked.set()
            assert self.go.wait(30)
        return super().open(path, mode, **kwargs)


def begin(m: CheckpointManager, step: int) -> None:
    m.begin_save(tensors(step), step=step, images_seen=step * 4, state={"step": step})


def test_what_changes_after_the_call_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    m = manager(tmp_path)
    m.folder.fs = slow = SlowFileSystem()
    given, state = tensors(3), {"step": 3, "nested": {"seen": [1, 2]}}
    m.begin_save(given, step=3, images_seen=12, state=state)
    assert slow.asked.wait(30)  # the thread is at its first write, nothing has been read for it
    for tensor in given.values():
        tensor.zero_()
    state["nested"]["seen"].append(3)  # type: ignore[index]
    assert m.poll() is None
    assert not m.failed
    assert not list(tmp_path.glob("*/*"))
    slow.go.set()
    m.finish()
    saved = m.poll()
    assert saved is not None
    assert saved.step == 3
    assert m.poll() is None  # told once
    m.verify(saved.path)
    into = {name: torch.ones_like(tensor) for name, tensor in given.items()}
    restored = m.restore(into)
    assert restored is not None
    assert (restored.path, restored.state) == (saved.path, {"step": 3, "nested": {"seen": [1, 2]}})
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(3).items())


def test_a_new_save_waits_for_the_one_before(tmp_path: Path) -> None:
    m = manager(tmp_path)
    m.folder.fs = slow = SlowFileSystem()
    begin(m, 1)
    second = threading.Thread(target=begin, args=(m, 2), daemon=True)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    slow.go.set()
    second.join(30)
    assert_restores(m, 2)  # which waits as well
    assert steps(m) == [1, 2]


def test_the_memory_of_one_copy_serves_the_next() -> None:
    copy, source = HostCopy(), tensors(1)
    first = copy.take(source)
    places = {name: tensor.data_ptr() for name, tensor in first.items() if tensor.numel()}
    assert not places.keys() & {name for name, tensor in source.items() if tensor.data_ptr() == places.get(name)}
    for name, tensor in source.items():
        tensor.copy_(tensors(2)[name])
    second = copy.take(source)
    assert {name: second[name].data_ptr() for name in places} == places
    assert all(torch.equal(second[name], tensor) for name, tensor in tensors(2).items())


@pytest.mark.parametrize("suffix", [".safetensors", "COMMIT"])
def test_a_failure_is_raised_by_whoever_asks_next_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    m = manager(tmp_path)
    save(m, 1)
    told = m.poll()
    assert told is not None
    assert told.step == 1, "of a save that was waited for too"
    good, m.folder.fs = m.folder.fs, FailingFileSystem(suffix, 5)
    begin(m, 2)
    m.settle(timeout_s=30)
    assert m.failed
    assert m.poll() is None  # raises nothing
    with pytest.raises(CheckpointError, match="Input/output error"):
        begin(m, 3)
    assert not m.failed
    begin(m, 3)
    with pytest.raises(CheckpointError, match="Input/output error"):
        m.finish()
    m.folder.fs = good
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000001"]
    begin(m, 4)
    m.finish()
    assert_restores(m, 4)


def test_what_is_held_while_it_is_read_outlives_newer_ones(tmp_path: Path) -> None:
    writer = manager(tmp_path)
    save(writer, 1)

    class WritingMeanwhile(LocalFileSystem):
        """While the shard is read, the run goes on and would retire it."""

        cachable = False
        seen: list[tuple[str, ...]] = []  # noqa: RUF012

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
            if path.endswith(".safetensors") and not self.seen:
                self.seen.append(writer.list()[0].holds)
                for step in (2, 3, 4):
                    save(writer, step)
            data: bytes = super().cat_file(path, start, end, **kwargs)
            return data

    reader, hold = manager(tmp_path, config_digest=None), unique_hold("export")
    reader.folder.fs = fs = WritingMeanwhile()
    assert_restores(reader, 1, hold=hold)
    assert fs.seen == [(hold,)]
    assert steps(writer) == [1, 3, 4]
    assert not list(tmp_path.glob("*/HOLD-*"))
    save(writer, 5)
    assert steps(writer) == [4, 5]


def test_a_reader_marks_nothing(tmp_path: Path) -> None:
    writer, reader = manager(tmp_path), manager(tmp_path, config_digest=None)
    save(writer, 1)
    bad = save(writer, 2) / "shard-00000.safetensors"
    bad.write_bytes(bad.read_bytes()[:-4] + b"\1\2\3\4")
    assert_restores(reader, 1, hold="warm-start")
    assert sorted(path.name for path in bad.parent.iterdir()) == sorted(
        ["COMMIT", "index.json", "manifest.json", "shard-00000.safetensors"]
    )
