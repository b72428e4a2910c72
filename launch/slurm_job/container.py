"""Tasks within a container, as words of the job's script: by pyxis, which is srun's own, or by apptainer. No torch.

A word here is text for bash: what holds the script's own variables stands in double quotes, all else is quoted by shlex.
"""

import shlex
from collections.abc import Mapping, Sequence

from launch.inputs import inputs
from launch.slurm_job.options import Container, parse_mount
from trainer.config import RunConfig

ONE_TASK = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]


def mounts_of(container: Container, config: RunConfig, *, code_inside: bool) -> str:
    """The run folder and the code where the script says, what the config reads from disks, and what was asked for.

    Args:
        code_inside: the code lies in the run folder, which is mounted anyway.
    """
    own = ["$work_dir:$work_dir", *([] if code_inside else ["$code_dir:$code_dir"])]
    given = [":".join(part for part in parse_mount(mount) if part) for mount in container.mounts]
    local = [url.removeprefix("file://") for _, url, _ in inputs(config)]
    read = dict.fromkeys(f"{path}:{path}:ro" for path in local if path.startswith("/"))
    destinations = {parse_mount(mount)[1] for mount in container.mounts}
    return ",".join([*own, *given, *(mount for mount in read if mount.split(":")[1] not in destinations)])


def srun_words(container: Container | None, mounts: str) -> list[str]:
    """Options of srun, for pyxis."""
    if container is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={shlex.quote(container.image)}", f'--container-mounts="{mounts}"',
        '--container-workdir="$code_dir"',
    ]  # fmt: skip


def python_words(
    container: Container | None, mounts: str, *, python: str, cpu: bool, env: Mapping[str, str]
) -> list[str]:
    """What runs Python in a task, with its modules found in the job's code.

    The variables are set within: an image's own would win over the script's.
    """
    if container is None:
        return [shlex.quote(python)]
    set_within = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    inside = [
        "env", 'PYTHONPATH="$code_dir"', "PYTHONSAFEPATH=1", "PYTHONUNBUFFERED=1", "PYTHONNOUSERSITE=1", *set_within,
        shlex.quote(container.python),
    ]  # fmt: skip
    if container.runtime == "pyxis":
        return inside
    return [
        "apptainer", "exec", *([] if cpu else ["--nv"]), "--bind", f'"{mounts}"', "--pwd", '"$code_dir"',
        shlex.quote(container.image), *inside,
    ]  # fmt: skip


def batch_words(container: Container | None, mounts: str, task: Sequence[str]) -> list[str]:
    """`task`, the words of `python_words`, once on the first node: from the batch script, after all tasks."""
    if container is not None and container.runtime == "pyxis":
        return [*ONE_TASK, *srun_words(container, mounts), *task]
    return list(task)
