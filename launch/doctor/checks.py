"""What `loupe doctor` finds, how checks are run, and those of the host itself. No torch."""

import dataclasses
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement

from data.deadlines import Call
from trainer.errors import UserError, one_line

Status = Literal["ok", "warning", "failed", "not here"]
Blame = Literal["node", "run", "nobody"]

GIB = 1 << 30
MIB = 1 << 20
MAX_NAMED = 4
"""Of many alike, so many are named."""
LEAST_TMP_BYTES, USUAL_TMP_BYTES = 64 * MIB, GIB
LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
"""Linux takes 107 bytes for the path of a socket."""
LEAST_SHM_BYTES, USUAL_SHM_BYTES = 16 * MIB, GIB
"""Data workers hand batches over in shared memory; a container has 64 MiB of it unless it is given more."""
LEAST_RAM_BYTES, USUAL_RAM_BYTES = 256 * MIB, 2 * GIB
"""Of a rank."""


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    figure: str
    mend: str = ""
    blame: Blame = "nobody"
    """Whose fault a failure is: the node's, which the job can do without; what the run asks for, which another start does not
    change; or nobody's, where trying again may help."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by name with its unit."""


@dataclass(frozen=True)
class Check:
    name: str
    function: Callable[[], list[Finding]]
    deadline_s: float
    blame: Blame = "nobody"
    """Whose fault it is where the check hangs."""
    mend: str = ""
    """What to do then."""


def run_checks(checks: Sequence[Check], begin: Callable[[str], object] = lambda name: None) -> list[Finding]:
    """All of them at once, each until its deadline; findings in the order of the checks. One that hangs is left behind.

    Args:
        begin: told the name of each check that is waited for.
    """
    started = time.monotonic()
    calls = [Call(check.function, check.name) for check in checks]
    findings = []
    for check, call in zip(checks, calls, strict=True):
        begin(check.name)
        try:
            findings += call.wait(started + check.deadline_s)
        except TimeoutError:
            findings.append(
                Finding(check.name, "failed", f"no answer within {check.deadline_s:.0f} s", check.mend, check.blame)
            )
        except UserError as e:
            findings.append(Finding(check.name, "failed", str(e), blame="run"))
        except Exception as e:  # whatever a file system or a storage client raises is this check's finding
            findings.append(
                Finding(check.name, "failed", f"{type(e).__name__}: {one_line(e)}", check.mend, check.blame)
            )
    return [dataclasses.replace(finding, figure=without_secrets(finding.figure)) for finding in findings]


def without_secrets(text: str) -> str:
    """URLs without user names, passwords and queries, where signatures stand; clients' errors quote them."""
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]+", r"\1?***", re.sub(r"://[^\s/@]+@", "://***@", text))


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


def some(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


# ------------------------------------------------------------------------------------------------------------- packages


def packages(constraints: Path, distribution: str = "loupe") -> list[Finding]:
    """Whether what `distribution` requires is installed, and whether versions are those of `constraints`, where that is."""
    name, python = "packages", f"Python {platform.python_version()}"
    mend = "install Loupe with -c constraints.txt, or take the image"
    try:
        required = [Requirement(text) for text in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        return [Finding(name, "failed", f"{python}; {distribution} itself is not installed", mend, "run")]
    wrong = []
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = _version(requirement.name)
            if found is None:
                wrong.append(f"{requirement.name} is missing")
            elif not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    figure = f"{python}, {len(required)} requirements"
    if wrong:
        return [Finding(name, "failed", f"{figure}: {some(wrong)}", mend, "run")]
    pins = _pins(constraints)
    other = []
    for pin in pins:
        found = _version(pin.name)
        if found is not None and not pin.specifier.contains(found, prereleases=True):
            other.append(f"{pin.name} {found}, tested with {str(pin.specifier).removeprefix('==')}")
    if other:
        return [Finding(name, "warning", f"{figure}; of other versions: {some(other)}", mend)]
    return [Finding(name, "ok", f"{figure}, versions as pinned" if pins else f"{figure} met")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pins(path: Path) -> list[Requirement]:
    if not path.is_file():
        return []
    pins = []
    for line in path.read_text().splitlines():
        text = line.partition("#")[0].strip()
        try:
            pins += [Requirement(text)] if text else []
        except InvalidRequirement:
            raise UserError(f"{path}: {text!r} is no requirement; write it again with `make lock`") from None
    return pins


# ---------------------------------------------------------------------------------------------- processors and memory


def cores(ranks: int) -> list[Finding]:
    count, (load, _, _) = len(os.sched_getaffinity(0)), os.getloadavg()
    figure = f"{count} for {ranks} rank(s), load {load:.1f}"
    figures = {"cores": float(count), "load": load}
    if count < ranks:
        return [Finding("cores", "warning", figure, "ask for more, such as --cpus-per-task", figures=figures)]
    if load > 2 * count:
        return [Finding("cores", "warning", figure, "others are at work on this machine", figures=figures)]
    return [Finding("cores", "ok", figure, figures=figures)]


def memory(ranks: int, cgroup_root: Path = Path("/sys/fs/cgroup")) -> list[Finding]:
    """Of the machine and of this process's control groups, whichever has less."""
    info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = min([int(info["MemAvailable"].split()[0]) * 1024, *_left_in_cgroups(cgroup_root)])
    figure, figures = f"{gib(free)} free for {ranks} rank(s)", {"free_bytes": float(free)}
    mend = "ask for more, such as --mem; or others hold this machine's"
    if free < ranks * LEAST_RAM_BYTES:
        return [Finding("memory", "failed", figure, mend, "node", figures)]
    status: Status = "warning" if free < ranks * USUAL_RAM_BYTES else "ok"
    return [Finding("memory", status, figure, mend if status == "warning" else "", figures=figures)]


def _left_in_cgroups(root: Path) -> list[int]:
    """Bytes that each limit above this process leaves; page cache that nobody needs counts as left."""
    left = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            try:
                limit = (group / files[0]).read_text().strip()
                used = int((group / files[1]).read_text())
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            except FileNotFoundError:  # the root has none, and a container does not see those above it
                continue
            if limit != "max":
                left.append(max(0, int(limit) - used + int(stat.get(files[2], 0))))
    return left


def shared_memory(path: str = "/dev/shm") -> list[Finding]:
    mend = "data workers hand batches over there; docker: --shm-size, Kubernetes: an emptyDir of medium Memory"
    if not os.path.isdir(path):
        return [Finding("shared memory", "failed", f"no {path}", mend, "node")]
    free = shutil.disk_usage(path).free
    figure, figures = f"{gib(free)} free in {path}", {"free_bytes": float(free)}
    if free < LEAST_SHM_BYTES:
        return [Finding("shared memory", "failed", figure, mend, "node", figures)]
    status: Status = "warning" if free < USUAL_SHM_BYTES else "ok"
    return [Finding("shared memory", status, figure, mend if status == "warning" else "", figures=figures)]


# ---------------------------------------------------------------------------------------------------------- disk, ports


def disk(
    name: str, path: str, *, least: int, usual: int, blame: Blame, mend: str, needed_for: str = ""
) -> list[Finding]:
    """Whether files can be written in `path`, or where it would be made, and whether the disk has room.

    Args:
        least: bytes below which it fails.
        usual: bytes below which it is worth a warning.
        blame: whose fault a disk is that is full or cannot be written.
        needed_for: what the larger of them is for.
    """
    above = path
    while not os.path.exists(above) and os.path.dirname(above) != above:
        above = os.path.dirname(above)
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        return [Finding(name, "failed", f"{path}: cannot be written ({e.strerror})", mend, blame)]
    free = shutil.disk_usage(above).free
    figures = {"free_bytes": float(free)}
    figure = f"{gib(free)} free in {path}" + (f"; {needed_for}" if needed_for else "")
    if free < least:
        return [Finding(name, "failed", figure, mend, blame, figures)]
    if free < usual:
        return [Finding(name, "warning", figure, mend, figures=figures)]
    return [Finding(name, "ok", figure, figures=figures)]


def temporary_files() -> list[Finding]:
    name, mend = "temporary files", "make room, or set TMPDIR to a folder on a larger disk"
    path = os.environ.get("TMPDIR") or tempfile.gettempdir()
    if not os.path.isdir(path):  # Python would take /tmp without a word; libraries in C do not
        return [Finding(name, "failed", f"TMPDIR: no folder {path}", "make it, or set TMPDIR to another", "node")]
    if len(os.fsencode(path)) > LONGEST_TMPDIR:
        figure = f"TMPDIR: {path} is longer than {LONGEST_TMPDIR} bytes, so data workers' sockets there have no name"
        return [Finding(name, "failed", figure, "set TMPDIR to a shorter path", "run")]
    return disk(name, path, least=LEAST_TMP_BYTES, usual=USUAL_TMP_BYTES, blame="node", mend=mend)


def ports(wanted: Mapping[str, tuple[str, int]]) -> list[Finding]:
    """Whether each can be listened on: by what it is for, (address, port)."""
    taken = []
    for what, (address, port) in wanted.items():
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address, port))
            except OSError as e:
                taken.append(f"{port} for {what} ({e.strerror})")
    if taken:
        mend = "free it; a rank's metrics would take the next free one, but the ranks' rendezvous has this one alone"
        return [Finding("ports", "warning", f"not free: {some(taken)}", mend)]
    return [Finding("ports", "ok", f"{len(wanted)} free")]
