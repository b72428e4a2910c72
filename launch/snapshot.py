"""The code as it was at submission, copied beside the run: a requeued job must not pick up later edits. No torch."""

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.config import CODE_ROOT
from trainer.errors import UserError

PACKAGES = ("trainer", "launch", "data", "ops")
RECORD = "SNAPSHOT.json"
PATCH = "SNAPSHOT.patch"
GIT_S = 300.0
"""Longest wait for git; to compare a checkout on a slow disk takes a while."""


@dataclass(frozen=True)
class Snapshot:
    """What was copied, and from which state; written beside the copy as `SNAPSHOT.json`."""

    source: str
    """`git`, or `packages` where the code is no checkout (a container)."""
    commit: str | None
    dirty: bool
    """The working tree differed from the commit; `SNAPSHOT.patch` is the difference."""
    untracked: tuple[str, ...]
    """Python files of our packages that git does not know. They run, so they are in the copy; the patch lacks them."""
    included: tuple[str, ...]
    """What was declared besides: `--include`. The patch lacks it."""
    num_files: int
    num_bytes: int
    taken_at: float
    """Unix time."""


def take(destination: Path, *, root: Path = CODE_ROOT, include: Sequence[str] = ()) -> Snapshot:
    """Copy the code below `root` to `destination`, whole or not at all; an earlier copy there is replaced.

    Args:
        include: files and folders to copy besides, relative to `root`, as `declared` gives them.

    Raises:
        UserError: the destination lies within the copied code's packages, is not a snapshot of ours, or cannot be
            written; a tracked file is missing, is a submodule, or links out of the checkout.
    """
    destination = destination.absolute()
    if destination == root or any(destination.is_relative_to(root / package) for package in PACKAGES):
        raise UserError(f"--code-dir {destination}: lies within the code itself; give a folder outside of the packages")
    if destination.exists() and not (destination / RECORD).is_file():
        raise UserError(f"--code-dir {destination}: exists and is not a snapshot (no {RECORD}); give another folder")
    commit, dirty, patch, names, untracked = _state(root)
    names = [*dict.fromkeys([*names, *_files_of(root, include)])]
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    try:
        num_bytes = _copy(root, names, temporary)
        snapshot = Snapshot(
            "git" if commit else "packages", commit, dirty, tuple(untracked), tuple(include), len(names), num_bytes,
            time.time(),
        )  # fmt: skip
        if patch:
            (temporary / PATCH).write_bytes(patch)
        (temporary / RECORD).write_text(json.dumps(asdict(snapshot), indent=1) + "\n")
        if destination.exists():
            earlier = temporary.with_suffix(".old")
            destination.rename(earlier)
            temporary.rename(destination)
            shutil.rmtree(earlier)
        else:
            temporary.rename(destination)
    except OSError as e:
        raise UserError(f"{destination}: the code cannot be copied there ({e}); give a writable --code-dir") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return snapshot


def declared(paths: Sequence[str], *, root: Path = CODE_ROOT) -> tuple[str, ...]:
    """The files and folders of `--include`, relative to `root`: there the copy holds them too.

    Raises:
        UserError: one is not there, or lies outside of the checkout or in .git.
    """
    names = []
    for text in paths:
        path = Path(text).absolute()
        if not path.exists():
            raise UserError(f"--include {text}: not there")
        real, base = path.resolve(), root.resolve()
        if not real.is_relative_to(base) or real == base or real.relative_to(base).parts[0] == ".git":
            raise UserError(f"--include {text}: not a file or folder below {root}; what lies elsewhere goes into the config "
                            "by its whole path")  # fmt: skip
        names.append(str(real.relative_to(base)))
    return tuple(dict.fromkeys(names))


def _files_of(root: Path, include: Sequence[str]) -> list[str]:
    names = []
    for name in include:
        if not (root / name).is_dir():
            names.append(name)
        for folder, folders, files in os.walk(root / name):
            folders[:] = sorted(inner for inner in folders if inner != "__pycache__")
            names += [str(Path(folder, file).relative_to(root)) for file in sorted(files) if not file.endswith(".pyc")]
    return names


def would_hold(path: Path, *, root: Path = CODE_ROOT, included: Sequence[str] = ()) -> bool:
    """Whether a file or folder below `root` would be in a snapshot: git knows it, or there is no git; or it is `included`."""
    if any(path.resolve().is_relative_to((root / name).resolve()) for name in included):
        return True
    if not _is_checkout(root):
        return path.relative_to(root).parts[0] in PACKAGES
    return bool(_git(root, "ls-files", "-z", "--cached", "--", str(path)))


def _is_checkout(root: Path) -> bool:
    return (root / ".git").exists() and shutil.which("git") is not None


def _state(root: Path) -> tuple[str | None, bool, bytes, list[str], list[str]]:
    """(commit, dirty, patch, files to copy, untracked Python files), files relative to `root`."""
    if not _is_checkout(root):
        return None, False, b"", _package_files(root), []
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    patch = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color")
    deleted = set(_names(_git(root, "ls-files", "-z", "--deleted")))
    tracked = [name for name in _names(_git(root, "ls-files", "-z", "--cached")) if name not in deleted]
    others = _names(_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES))
    untracked = [name for name in others if name.endswith(".py")]
    return commit, bool(patch or untracked), patch, [*dict.fromkeys(tracked), *untracked], untracked


def _git(root: Path, *arguments: str) -> bytes:
    # a checkout that another user owns (a container's mount) is read, never run: git's guard against its hooks is moot
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, check=False, timeout=GIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{root}: git {arguments[0]} gives no answer in {GIT_S:.0f} s; see whether its disk hangs"
        ) from None
    if result.returncode:
        reason = " ".join(result.stderr.decode(errors="replace").split()) or f"exit code {result.returncode}"
        raise UserError(f"{root}: git {arguments[0]} failed ({reason}); mend the checkout, it is copied for the job")
    return result.stdout


def _names(listing: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listing.split(b"\0") if name]


def _package_files(root: Path) -> list[str]:
    names = []
    for package in PACKAGES:
        if not (root / package / "__init__.py").is_file():
            raise UserError(
                f"{root}: no package {package}/; run from a checkout, or install all of {', '.join(PACKAGES)}"
            )
        for folder, folders, files in os.walk(root / package):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            names += [str(Path(folder, name).relative_to(root)) for name in sorted(files) if not name.endswith(".pyc")]
    return names


def _copy(root: Path, names: list[str], destination: Path) -> int:
    """Copy files, contents of links included; returns the bytes copied."""
    num_bytes = 0
    made: set[Path] = set()
    destination.mkdir(parents=True)
    for name in names:
        source, target = root / name, destination / name
        if source.is_symlink() and not source.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{name}: links out of the checkout; the job's copy of the code cannot follow it")
        if source.is_dir():
            raise UserError(f"{name}: a submodule or a link to a folder, which the job's copy of the code cannot hold")
        if not source.is_file():
            raise UserError(f"{name}: known to git and not in the working tree; restore it or remove it from git")
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        shutil.copy(source, target)
        num_bytes += target.stat().st_size
    return num_bytes
