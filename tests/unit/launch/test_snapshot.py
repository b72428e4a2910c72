"""What a job's copy of the code holds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch.snapshot import PACKAGES, PATCH, RECORD, declared, take, would_hold
from trainer.errors import UserError


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    (root / "trainer/model.py").write_text("width = 1\n")
    (root / "trainer/gone.py").write_text("\n")
    (root / ".gitignore").write_text("runs/\n__pycache__/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "first")
    return root


def test_holds_the_working_tree_with_its_changes(checkout: Path, tmp_path: Path) -> None:
    (checkout / "trainer/model.py").write_text("width = 2\n")
    (checkout / "trainer/gone.py").unlink()
    (checkout / "trainer/new.py").write_text("depth = 3\n")
    (checkout / "notes.txt").write_text("not code")
    (checkout / "runs").mkdir()
    (checkout / "runs/ignored.py").write_text("")
    code = tmp_path / "run/code"
    snapshot = take(code, root=checkout)
    assert (code / "trainer/model.py").read_text() == "width = 2\n"
    assert not (code / "trainer/gone.py").exists()
    assert (code / "trainer/new.py").read_text() == "depth = 3\n"
    assert not (code / "notes.txt").exists()
    assert not (code / "runs").exists()
    assert snapshot.dirty
    assert snapshot.untracked == ("trainer/new.py",)
    assert "+width = 2" in (code / PATCH).read_text()
    record = json.loads((code / RECORD).read_text())
    assert len(record["commit"]) == 40
    assert record["dirty"] is True
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["code"], "nothing else is left"


def test_a_clean_checkout_is_said_to_be_clean(checkout: Path, tmp_path: Path) -> None:
    snapshot = take(tmp_path / "code", root=checkout)
    assert not snapshot.dirty
    assert not (tmp_path / "code" / PATCH).exists()


def test_a_later_snapshot_replaces_the_earlier_whole(checkout: Path, tmp_path: Path) -> None:
    code = tmp_path / "run/code"
    take(code, root=checkout)
    git(checkout, "rm", "-q", "trainer/gone.py")
    take(code, root=checkout)
    assert not (code / "trainer/gone.py").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["code"]


def test_without_git_the_packages_are_copied(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".git").rename(tmp_path / "elsewhere")
    (checkout / "trainer/__pycache__").mkdir()
    (checkout / "trainer/__pycache__/model.cpython-311.pyc").write_bytes(b"")
    snapshot = take(tmp_path / "code", root=checkout)
    assert snapshot.source == "packages"
    assert snapshot.commit is None
    assert (tmp_path / "code/trainer/model.py").exists()
    assert not (tmp_path / "code/trainer/__pycache__").exists()


def test_refuses_a_folder_that_is_not_a_snapshot(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a snapshot"):
        take(tmp_path / "mine", root=checkout)
    assert (tmp_path / "mine/thesis.tex").exists()
    with pytest.raises(UserError, match="within the code itself"):
        take(checkout / "trainer/code", root=checkout)


def test_refuses_links_out_of_the_checkout_and_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    (checkout / "trainer/secrets.py").symlink_to("/etc/passwd")
    git(checkout, "add", "trainer/secrets.py")
    with pytest.raises(UserError, match=r"trainer/secrets.py: links out"):
        take(tmp_path / "run/code", root=checkout)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_git_that_hangs_ends_the_submission(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr("launch.snapshot.GIT_S", 0.2)
    with pytest.raises(UserError, match="git rev-parse gives no answer in 0 s"):
        take(tmp_path / "copy", root=checkout)


def test_knows_what_git_would_leave_out(checkout: Path) -> None:
    (checkout / "data/assets").mkdir()
    (checkout / "data/assets/index.json").write_text("{}")
    assert not would_hold(checkout / "data/assets", root=checkout)
    git(checkout, "add", "data/assets")
    assert would_hold(checkout / "data/assets", root=checkout)


def test_holds_what_was_declared_though_git_does_not_know_it(checkout: Path, tmp_path: Path) -> None:
    (checkout / "runs/weights").mkdir(parents=True)
    (checkout / "runs/weights/a.bin").write_text("a")
    (checkout / "notes.txt").write_text("not code")
    include = declared([str(checkout / "runs/weights"), str(checkout / "notes.txt")], root=checkout)
    assert include == ("runs/weights", "notes.txt")
    assert not would_hold(checkout / "runs/weights", root=checkout)
    assert would_hold(checkout / "runs/weights/a.bin", root=checkout, included=include)
    snapshot = take(tmp_path / "code", root=checkout, include=include)
    assert (tmp_path / "code/runs/weights/a.bin").read_text() == "a"
    assert (tmp_path / "code/notes.txt").exists()
    assert snapshot.included == include
    (checkout / "link").symlink_to("/etc")
    for bad in ("nowhere", ".git/config", "link", "."):
        with pytest.raises(UserError, match="--include"):
            declared([str(checkout / bad)], root=checkout)
