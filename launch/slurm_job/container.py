"""Tasks within a container, as words of the job's script: by pyxis, which is srun's own, or by apptainer. No torch.

A word here is text for bash: what holds the script's own variables stands in double quotes, all else is quoted by shlex.
"""

import os
import shlex
from collections.abc import Mapping, Sequence

from launch.inputs import inputs
from launch.slurm_job.options import PLAIN_PATH, Container, parse_mount
from trainer.config import RunConfig, resolve_url
from trainer.discovery import discovery_dir
from trainer.errors import UserError

ONE_TASK = ["srun", "--overlap", "--immediate=60", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
"""Beside what may be left of the ranks' step: one that a hung disk or driver holds keeps its cores and GPUs. Where it cannot
start beside it, soon and without: rank 0's own word is left then."""


def mounts_of(container: Container, config: RunConfig, *, code_inside: bool) -> str:
    """The run folder and the code where the script says, what the config reads from disks, and what was asked for.

    Args:
        code_inside: the code lies in the run folder, which is mounted anyway.
    """
    own = ["$work_dir:$work_dir", *([] if code_inside else ["$code_dir:$code_dir"])]
    found_by = discovery_dir(config.metrics.discovery_dir, os.environ)
    # one that is not there would keep the container from starting
    if found_by and PLAIN_PATH.fullmatch(found_by) and os.path.isdir(found_by):
        own.append(f"{found_by}:{found_by}")
    given = mount_words(container)
    local = [url.removeprefix("file://") for _, url, _ in inputs(config)]
    read = dict.fromkeys(f"{path}:{path}:ro" for path in local if path.startswith("/"))
    destinations = {parse_mount(mount)[1] for mount in container.mounts}
    return ",".join([*own, *given, *(mount for mount in read if mount.split(":")[1] not in destinations)])


def mount_words(container: Container) -> list[str]:
    """What was asked for."""
    return [":".join(part for part in parse_mount(mount) if part) for mount in container.mounts]


def srun_words(container: Container | None, mounts: str, *, folder: str = "$code_dir") -> list[str]:
    """Options of srun, for pyxis.

    Args:
        folder: that tasks start in.
    """
    if container is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={shlex.quote(container.image)}", f'--container-mounts="{mounts}"',
        f'--container-workdir="{folder}"',
    ]  # fmt: skip


def python_words(
    container: Container | None, mounts: str, *, python: str, cpu: bool, env: Mapping[str, str]
) -> list[str]:
    """What runs Python in a task, with its modules found in the job's code.

    Args:
        python: outside of containers; one has its own.
    """
    if container is None:
        return [shlex.quote(python)]
    return words_within(container, mounts, [container.python], cpu=cpu, env=env)


def words_within(
    container: Container, mounts: str, command: Sequence[str], *, cpu: bool, env: Mapping[str, str],
    folder: str = "$code_dir",
) -> list[str]:  # fmt: skip
    """What runs a command in a task's container. The variables are set within: an image's own would win over the script's."""
    set_within = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    inside = [
        "env", 'PYTHONPATH="$code_dir"', "PYTHONSAFEPATH=1", "PYTHONUNBUFFERED=1", "PYTHONNOUSERSITE=1", *set_within,
        *map(shlex.quote, command),
    ]  # fmt: skip
    if container.runtime == "pyxis":
        return inside
    return [
        "apptainer", "exec", *([] if cpu else ["--nv"]), "--bind", f'"{mounts}"', "--pwd", f'"{folder}"',
        shlex.quote(container.image), *inside,
    ]  # fmt: skip


def batch_words(container: Container | None, mounts: str, task: Sequence[str]) -> list[str]:
    """`task`, the words of `python_words`, once on the first node: from the batch script, after all tasks."""
    if container is not None and container.runtime == "pyxis":
        return [*ONE_TASK, *srun_words(container, mounts), *task]
    return list(task)


# -------------------------------------------------------------------------------------------- before anything is queued


def check_mounts(container: Container, config: RunConfig, *, code_dir: str, work_dir: str) -> None:
    """Whether what the run reads and writes can be seen, under its own path, in the container.

    Raises:
        UserError: a path that the runtimes' lists of mounts cannot hold; a cache of shards that is not mounted.
    """
    local = {field: path for field, url, _ in inputs(config) if (path := url.removeprefix("file://")).startswith("/")}
    check_paths({"--run-dir": work_dir, "--code-dir": code_dir, **local})
    cache = config.data.cache_dir
    remote = any(
        "://" in resolve_url(dataset.url) and dataset.fetch == "shards" for dataset in config.data.datasets.values()
    )
    if cache is None or not remote:
        return
    path = os.path.abspath(os.path.expanduser(cache))
    seen = ["/tmp", work_dir, code_dir, *(parse_mount(mount)[1] for mount in container.mounts)]
    if not any(f"{path}/".startswith(f"{folder.rstrip('/')}/") for folder in seen):
        raise UserError(f"data.cache_dir: {cache} is not mounted in the container, which would have no room for shards; add "
                        f"--container-mount {path} (it must be there on all nodes), or take a folder below /tmp")  # fmt: skip


def check_paths(paths: Mapping[str, str]) -> None:
    """
    Args:
        paths: of folders that are mounted at their own path, by what names them.

    Raises:
        UserError: one that cannot be written in a list of mounts.
    """
    for name, path in paths.items():
        if not PLAIN_PATH.fullmatch(path):
            raise UserError(f"{name}: {path} cannot be mounted in a container, whose list of mounts has no room for spaces, "
                            "commas, colons and quotes; name it otherwise")  # fmt: skip
