"""What can be refused before anything is queued or written: SLURM's own commands are asked. No torch."""

import math
import re
import shutil
import subprocess
from collections.abc import Sequence

from launch.job import JobSpec
from launch.slurm_job.options import Container
from launch.slurm_job.reports import warned_in_vain
from trainer.errors import UserError, one_line
from trainer.run_folder import JOB, RunFolder

TOOLS = ("sbatch", "srun", "squeue")
TIMEOUT_S = 60.0
IMAGE_TIMEOUT_S = 300.0
START_S = 60
"""Least of a time limit that is left beside its warning."""
END_S = 30
"""After the ranks' end: the batch script starts Python, in a container maybe, reads the run folder, and asks SLURM twice."""
PACKAGES = ("torch", "submitit", "fsspec", "pydantic", "diffusers", "streaming")
"""What an image must bring; the code itself is the job's own copy."""


def check_cluster(spec: JobSpec) -> list[str]:
    """Warnings to print.

    Raises:
        UserError: no SLURM here, no such partition, more nodes than there are, more GPUs or cores than a node has, a container
            that SLURM cannot run.
    """
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise UserError(f"{tool}: not found; submit from a login node of the cluster, or take --cluster local")
    # a QOS may lift a partition's limit
    time_min = spec.slurm.time_min if spec.slurm.qos is None else None
    check_partition(spec.slurm.partition, partitions(), time_min=time_min)
    check_nodes(spec, _sinfo("%N|%G|%c", "--Node", partition=spec.slurm.partition))
    return [*check_after(spec.slurm.after), *(check_container(spec.slurm.container) if spec.slurm.container else [])]


def check_after(dependencies: Sequence[str]) -> list[str]:
    """Warnings of jobs to wait for that squeue does not know: sbatch takes such a dependency and starts at once."""
    found = []
    for job_id in (dependency.partition(":")[2] for dependency in dependencies):
        command = ["squeue", "--noheader", "--jobs", job_id, "--states", "all", "--format", "%i"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        if "Invalid job id" in result.stderr or (result.returncode == 0 and not result.stdout.strip()):
            found.append(f"--after {job_id}: SLURM knows no such job (any more), so it is not waited for")
    return found


# --------------------------------------------------------------------------------------------------------- time limits


def check_time(spec: JobSpec, folder: RunFolder) -> None:
    """
    Raises:
        UserError: the warning before the time limit leaves no time to train; the run's last save took longer, with what comes
            after it, or was never through.
    """
    options = spec.slurm
    save_s = last_stop_s(folder)
    if save_s is not None and save_s + END_S > options.signal_delay_s:
        raise UserError(f"--signal-delay {options.signal_delay_s}: the run took {save_s:.0f} s to save and stop the last time, "
                        f"which must fit between the warning and the time limit, with {END_S} s to be queued again; give "
                        f"{int(save_s * 1.5) + END_S}")  # fmt: skip
    too_short = vain_delay_s(spec, folder)
    if too_short is not None and options.signal_delay_s <= too_short:
        raise UserError(f"--signal-delay {options.signal_delay_s}: the last save did not fit into {too_short} s before the "
                        f"time limit; give {2 * too_short}")  # fmt: skip
    if options.time_min is not None and options.time_min * 60 < options.signal_delay_s + START_S:
        raise UserError(f"--time: {options.time_min * 60} s are no longer than the warning before the limit "
                        f"(--signal-delay {options.signal_delay_s}) and a start; give at least "
                        f"{math.ceil((options.signal_delay_s + START_S) / 60)} minutes, or a shorter warning that a save still "
                        "fits in")  # fmt: skip


def vain_delay_s(spec: JobSpec, folder: RunFolder) -> int | None:
    """The last submission's time between warning and limit, where its last start did not save in it."""
    job = folder.read_json(JOB) if folder.exists(JOB) else {}
    delay_s, since = job.get("signal_delay_s"), job.get("submitted_at")
    if not isinstance(delay_s, int) or not isinstance(since, int | float):
        return None
    return delay_s if warned_in_vain(spec.work_dir, float(since)) else None


def last_stop_s(folder: RunFolder) -> float | None:
    """Seconds from the last request to stop to the end of the ranks, which had saved; None where there was none."""
    found = folder.read_json(JOB).get("stop_s") if folder.exists(JOB) else None
    return float(found) if isinstance(found, int | float) else None


# --------------------------------------------------------------------------------------------------------------- nodes


def check_partition(name: str | None, listing: str, *, time_min: int | None = None) -> None:
    """
    Args:
        name: one, or several with commas between, or None for the default one.
        listing: of sinfo, a line a partition: name, with * for the default one, and longest time of a job.
        time_min: what the job asks for; None: not checked.

    Raises:
        UserError: there is no such partition; the job would wait for ever for one that lets it run so long.
    """
    rows = [line.strip().split("|") for line in listing.splitlines() if line.count("|") == 1]
    limits = {row[0].rstrip("*"): _minutes(row[1]) for row in rows}
    asked = name.split(",") if name else [row[0].rstrip("*") for row in rows if row[0].endswith("*")]
    unknown = [part for part in asked if part not in limits]
    if rows and unknown:
        raise UserError(f"--partition {unknown[0]}: not on this cluster, which has {', '.join(sorted(limits))}")
    longest = max((limits[part] for part in asked if part in limits), default=math.inf)
    if time_min is not None and time_min > longest:
        raise UserError(f"--time: {time_min} minutes, and partition {','.join(asked)} lets a job run for {longest:.0f}; give "
                        "that, the job saves and is queued again before its limit")  # fmt: skip


def _minutes(limit: str) -> float:
    """sinfo's [[D-]HH:]MM:SS; anything else, as `infinite`, is no limit."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", limit.strip())
    if match is None:
        return math.inf
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def partitions() -> str:
    """For `check_partition`."""
    return _sinfo("%P|%l", "--all")


def _sinfo(form: str, *options: str, partition: str | None = None) -> str:
    """Empty where it cannot be asked: then SLURM's own answer to the job must do."""
    command = ["sinfo", "--noheader", *options, "--format", form]
    if shutil.which("sinfo") is None:
        return ""
    try:
        result = subprocess.run(
            [*command, *(["--partition", partition] if partition else [])], capture_output=True, text=True, check=False,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"sinfo: no answer in {TIMEOUT_S:.0f} s; SLURM's controller is down or busy") from None
    return result.stdout if result.returncode == 0 else ""


def check_nodes(spec: JobSpec, listing: str) -> None:
    """
    Args:
        listing: of sinfo, a line a node: name, GRES, cores.

    Raises:
        UserError: there are not so many nodes, or none has so many GPUs or cores.
    """
    nodes = [line.split("|") for line in listing.splitlines() if line.count("|") == 2]
    if not nodes:
        return
    where = f"partition {spec.slurm.partition}" if spec.slurm.partition else "this cluster"
    gpus = {name: gpus_in(gres) for name, gres, _ in nodes}
    if len(gpus) < spec.nodes:
        raise UserError(f"--nodes {spec.nodes}: {where} has {len(gpus)}; give fewer")
    if not spec.cpu and max(gpus.values()) < spec.gpus_per_node:
        largest = max(gpus, key=lambda name: gpus[name])
        if not gpus[largest]:
            raise UserError(f"--gpus-per-node {spec.gpus_per_node}: no node of {where} has GPUs that SLURM knows of (sinfo "
                            "--format %G); another --partition, or ranks without GPUs: --cpu")  # fmt: skip
        raise UserError(f"--gpus-per-node {spec.gpus_per_node}: no node of {where} has so many; {largest} has "
                        f"{gpus[largest]}: give that and more --nodes")  # fmt: skip
    cores = max(int(re.sub(r"\D.*", "", cpus) or 0) for _, _, cpus in nodes)
    wanted = (spec.slurm.cpus_per_task or 1) * spec.gpus_per_node
    if cores and wanted > cores:
        raise UserError(f"--cpus-per-task: {wanted} cores for {spec.gpus_per_node} rank(s) of a node, and no node of {where} "
                        f"has more than {cores}; give fewer ranks or cores")  # fmt: skip


def gpus_in(gres: str) -> int:
    """Of a node, from sinfo's GRES: `gpu:a100:8(S:0-1),nvme:1`, `gpu:4`, `(null)`."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,(]*[A-Za-z][^:,(]*)?(?::(\d+))?(?=\(|,|$)", gres.strip())
    return sum(int(count or 1) for count in counts)


# ---------------------------------------------------------------------------------------------------------- containers


def check_container(container: Container, *, python: bool = True) -> list[str]:
    """Warnings to print.

    Args:
        python: the image is to run our code.

    Raises:
        UserError: the runtime is not there, or the image lacks what ranks import.
    """
    if container.runtime == "pyxis":
        if "--container-image" not in _help_of_srun():
            raise UserError("--container-runtime pyxis: srun has no --container-image here, so this SLURM has no pyxis; take "
                            "--container-runtime apptainer, or ask the cluster's administrators")  # fmt: skip
        return []
    if shutil.which("apptainer") is None:
        return [f"apptainer: not on this machine, so {container.image} is not looked into; nodes must have it"]
    return _look_into(container) if python else []


def _help_of_srun() -> str:
    result = subprocess.run(["srun", "--help"], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    return result.stdout + result.stderr


def _look_into(container: Container) -> list[str]:
    """Whether the image has Python and the packages; without importing them, which would take its time."""
    code = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
    command = ["apptainer", "exec", container.image, container.python, "-c", code, *PACKAGES]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=IMAGE_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return [f"apptainer: {container.image} has not answered in {IMAGE_TIMEOUT_S:.0f} s, so it is not looked into"]
    if result.returncode:
        reason = one_line(RuntimeError((result.stderr or result.stdout).strip() or f"exit code {result.returncode}"))
        raise UserError(f"--container {container.image}: {container.python} does not run in it ({reason}); "
                        "see --container-python")  # fmt: skip
    missing = result.stdout.split()
    if missing:
        raise UserError(f"--container {container.image}: its {container.python} lacks {', '.join(missing)}; take an image "
                        "of `make image`, or one with the packages of pyproject.toml")  # fmt: skip
    return []
