"""The run folder: whose it is, attempts, and metrics over restarts."""

import errno
import json
import os

import pytest

from trainer.config_text import with_overrides
from trainer.errors import UserError
from trainer.recipes import load
from trainer.run_folder import RunFolder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run")


def test_a_folder_belongs_to_one_config(folder: RunFolder) -> None:
    demo = load("demo")
    folder.claim(demo)
    folder.claim(demo)
    folder.claim(with_overrides(demo, ["metrics.every_steps=1"]))  # how often it reports may change
    assert folder.config().metrics.every_steps == 1
    with pytest.raises(UserError, match="holds run 'demo' of another config"):
        folder.claim(with_overrides(demo, ["seed=9"]))
    assert folder.config().seed == 0


def test_unwritable_folder_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(str(tmp_path / "file" / "run")).claim(load("demo"))


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EIO, errno.ETIMEDOUT])
def test_a_bad_moment_of_storage_is_no_mistake_of_the_user(folder: RunFolder, monkeypatch, code: int) -> None:
    """s3fs gives EBUSY for a 503: a start that meets it is a crash, which is tried again."""

    def fail(path: str, data: bytes) -> None:
        raise OSError(code, "Please reduce your request rate")

    monkeypatch.setattr(folder.fs, "pipe_file", fail)
    with pytest.raises(OSError, match="reduce") as e:
        folder.claim(load("demo"))
    assert not isinstance(e.value, UserError)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_no_room_and_no_permission_are_for_a_person(folder: RunFolder, monkeypatch, code: int) -> None:
    def fail(path: str, data: bytes) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder.fs, "pipe_file", fail)
    with pytest.raises(UserError, match="cannot be written"):
        folder.claim(load("demo"))


def test_a_later_attempt_overrides_the_steps_it_repeats(folder: RunFolder) -> None:
    assert [folder.start_attempt({"time": 1.0}), folder.start_attempt({"time": 2.0})] == [0, 1]
    first, second = folder.metrics_writer(0), folder.metrics_writer(1)
    for step, writer, loss in [(1, first, 0.1), (2, first, 0.2), (3, first, 0.3), (2, second, 0.25), (4, second, 0.4)]:
        writer.write({"step": step, "loss": loss})
    first.close()
    second.close()
    assert [(r["step"], r["loss"]) for r in folder.metrics()] == [(1, 0.1), (2, 0.25), (3, 0.3), (4, 0.4)]


def test_storage_that_cannot_append_gets_records_while_they_come(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.run_folder.FLUSH_S", 0.0)
    folder = RunFolder(f"memory://{tmp_path}/run")
    writer = folder.metrics_writer(0)
    writer.write({"step": 1})
    assert [r["step"] for r in folder.metrics()] == [1]  # not closed: the process may be killed


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path) -> None:
    folder = RunFolder(str(tmp_path))
    writer = folder.metrics_writer(0)
    writer.write({"step": 1})
    with open(tmp_path / "metrics" / "0000.jsonl", "a") as file:
        file.write(json.dumps({"step": 2})[:-3])
    assert [r["step"] for r in folder.metrics()] == [1]


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_text("x", "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        folder.write_text("x", "new")
    assert folder.read_text("x") == "old"
    assert folder.names(".") == ["x"]
