"""What can be asked of SLURM, validated when made. No torch."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.errors import UserError

RUNTIMES = ("pyxis", "apptainer")
LAUNCHERS = ("srun", "torchrun")
MAX_CHAIN = 100
PLAIN_PATH = re.compile(r"/[^,:;\s\"'$`\\]*")
"""What the runtimes' lists of mounts can hold."""


@dataclass(frozen=True)
class Container:
    """Where tasks run. The code is the snapshot's; of the image they take Python and its packages."""

    image: str
    """A file, or what the runtime fetches: `docker://...` for apptainer, enroot's `REGISTRY#NAME:TAG` for pyxis."""
    runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()
    """`SRC[:DST[:ro]]`, absolute, besides the run folder, the code and local data."""
    python: str = "python"
    """In the image."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_./~][A-Za-z0-9_.:/@#+~-]*", self.image):
            raise UserError(f"--container {self.image!r}: not the name of an image or its file")
        if re.search(r"://[^/]*:[^/]*@", self.image):
            raise UserError("--container: holds a password; keep it in the registry's credentials of the runtime")
        for mount in self.mounts:
            parse_mount(mount)

    @property
    def is_file(self) -> bool:
        return self.image.startswith(("/", "."))


def parse_mount(text: str) -> tuple[str, str, str]:
    """(source, destination, `ro` or nothing) of `SRC[:DST[:ro]]`.

    Raises:
        UserError: it is not that.
    """
    source, _, rest = text.partition(":")
    destination, _, mode = rest.partition(":")
    destination = destination or source
    if not PLAIN_PATH.fullmatch(source) or not PLAIN_PATH.fullmatch(destination) or mode not in ("", "ro", "rw"):
        raise UserError(f"--container-mount {text}: write it as /SRC:/DST or /SRC:/DST:ro, absolute paths without "
                        "spaces, commas and colons")  # fmt: skip
    return source, destination, mode


def parse_after(text: str) -> str:
    """`JOB` or `any:JOB` as sbatch's dependency.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(?:(ok|any):)?(\d+(?:_\d+)?)", text)
    if match is None:
        raise UserError(f"--after {text}: write a job's number, to start when it has succeeded, or any:NUMBER, however "
                        "it ends")  # fmt: skip
    return f"after{match[1] or 'ok'}:{match[2]}"


@dataclass(frozen=True)
class SlurmOptions:
    """Options of sbatch; None leaves the cluster's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_min: int | None = None
    """Time limit, in minutes. The job is saved and requeued before it, so it bounds an attempt and not the run."""
    constraint: str | None = None
    exclude: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    """Memory per node, in SLURM's notation (64G)."""
    signal_delay_s: int = 120
    """Warning before the time limit: the save must fit."""
    launcher: str = "srun"
    """`srun`: a task per rank. `torchrun`: a task per node, which runs torchrun."""
    container: Container | None = None
    after: tuple[str, ...] = ()
    """Dependencies as sbatch writes them."""
    chain: int = 0
    """Further jobs that wait for this one and go on with the run, where SLURM does not requeue."""
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(f"--launcher {self.launcher}: {' or '.join(LAUNCHERS)}")
        if not 0 <= self.chain <= MAX_CHAIN:
            raise UserError(f"--chain {self.chain}: 0 to {MAX_CHAIN} jobs")


def container_of(image: str | None, runtime: str, mounts: Sequence[str], python: str) -> Container | None:
    """From the command line; an image's file by its whole path.

    Raises:
        UserError: mounts without an image, or what is no image.
    """
    if image is None:
        if mounts:
            raise UserError("--container-mount: goes with --container")
        return None
    return Container(whole_path(image), runtime, tuple(mounts), python)


def whole_path(image: str) -> str:
    """Of an image's file, which means the same from any folder; another image's name as it is."""
    if image.startswith(("./", "../", "~/")) or os.path.exists(image):
        return os.path.abspath(os.path.expanduser(image))
    return image
