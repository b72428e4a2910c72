"""A job: what is asked for, whether it can run, and its record in the run folder. No torch."""

import dataclasses
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.datasets import check_datasets
from launch.folder_lock import LOCK, is_locked
from launch.inputs import check_local, inputs
from launch.pods.heartbeat import is_alive
from launch.queue_states import cluster_name, slurm_state
from launch.slurm_job.options import SlurmOptions
from trainer import recipes
from trainer.config import CODE_ROOT, RunConfig, check_layout, check_sinks
from trainer.config_text import with_overrides
from trainer.errors import UserError, one_line
from trainer.phases import Schedule
from trainer.run_folder import CONFIG, JOB, RunFolder

MAX_EARLIER_JOBS = 50
"""Of which `job.json` keeps restarts and end."""


@dataclass(frozen=True)
class JobSpec:
    """Who runs what where. Validated when made."""

    recipe: str
    """A recipe's name or a config's YAML file, as given."""
    run_dir: str
    """The run folder: an absolute path or a URL."""
    cluster: str
    """`slurm` or `local`."""
    nodes: int = 1
    gpus_per_node: int = 1
    """Ranks per node; each has a GPU of its own unless `cpu`."""
    cpu: bool = False
    max_restarts: int = 5
    """Crashes in 24 hours of training after which the job is not started again. Preemptions do not count."""
    code_dir: str = ""
    """Where the snapshot of the code goes: on a disk that all nodes see."""
    include: tuple[str, ...] = ()
    """Files and folders of the checkout that git does not know and the snapshot holds all the same."""
    preflight: bool = False
    """Check each machine before its ranks start, and go on without those that fail."""
    rehearse_preemption: int | None = None
    """Step after which the first attempt is preempted, as a cluster would; local only."""
    slurm: SlurmOptions = dataclasses.field(default_factory=SlurmOptions)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """As given on the command line, by parameter: what `loupe runs resume` submits again."""

    def __post_init__(self) -> None:
        if self.cluster not in ("slurm", "local"):
            raise UserError(f"--cluster {self.cluster}: slurm or local")
        for option, count in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if count < 1:
                raise UserError(f"{option} {count}: at least 1 (ranks without a GPU: --cpu)")
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts {self.max_restarts}: 0 or more")
        if self.rehearse_preemption is not None and self.cluster != "local":
            raise UserError("--rehearse-preemption: goes with --cluster local; on SLURM preempt the job itself, "
                            "`scancel --signal=TERM JOB_ID`")  # fmt: skip
        if "%" in self.run_dir or "%" in self.code_dir:
            raise UserError(f"--run-dir {self.run_dir}: a % in it would be expanded by SLURM; take another folder")
        if not self.code_dir:
            raise UserError(f"--code-dir: needed with the run folder {self.run_dir}, which is not on a disk; name a "
                            "folder that all nodes of the job see")  # fmt: skip

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def work_dir(self) -> str:
        """Local folder for logs, caches and SLURM's files: the run folder, or beside the code for a remote one."""
        return self.run_dir if RunFolder(self.run_dir).is_local else f"{self.code_dir}-work"


def absolute_run_dir(run_dir: str | None, recipe: str, config: RunConfig) -> tuple[str, str]:
    """(run folder, default place of the code snapshot), the latter empty for a remote run folder.

    By default a run's own `config.yaml` goes on in its folder, anything else in runs/NAME.

    Raises:
        UserError: the run's name cannot be a folder, or the URL's file system is unknown.
    """
    if run_dir is None and os.path.basename(recipe) == CONFIG:
        run_dir = os.path.dirname(recipe) or "."
    if run_dir is None:
        if set(config.name) == {"."}:
            raise UserError(f"name: {config.name!r} cannot be the name of a folder; --set name=... or give --run-dir")
        run_dir = f"runs/{config.name}"
    try:
        folder = RunFolder(run_dir)
    except (ValueError, ImportError, OSError) as e:
        raise UserError(f"--run-dir {run_dir}: {one_line(e)}") from None
    if folder.is_local:
        path = os.path.abspath(folder.root)
        return path, f"{path}/code"
    return folder.url, ""


def trainer_command(run_dir: str, work_dir: str) -> list[str]:
    """What a rank runs. The config is read from a disk: for a remote run folder, from the copy in `work_dir`."""
    return [sys.executable, "-m", "trainer.train", "--config", f"{work_dir}/{CONFIG}", "--run-dir", run_dir]


# ------------------------------------------------------------------------------------------------ can it run as asked?


def load_config(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The resolved config, its local folders as absolute paths: a job may be started again from elsewhere.

    Raises:
        UserError: unknown recipe, field or value.
    """
    config = with_overrides(recipes.load(recipe), overrides)
    return with_overrides(
        config,
        [f"{field}={json.dumps(os.path.abspath(url))}" for field, url, _ in inputs(config) if "://" not in url],
    )


def profiled(overrides: Sequence[str]) -> tuple[str, ...]:
    """What `--profile` makes of `--set`: a profile as it is by default, but for what they say of it.

    Raises:
        UserError: they say that there is none.
    """
    for override in overrides:
        field, _, value = override.partition("=")
        if field.strip() == "profile" and value.strip() in ("null", "~", ""):
            raise UserError(f"--profile: --set {override} says that nothing is traced; leave out one of them")
    return ("profile={}", *overrides)


def check(spec: JobSpec, config: RunConfig) -> list[str]:
    """Everything that can be refused before the job exists, the run folder aside; returns warnings to print.

    Raises:
        UserError: layout, a local dataset or codec that is not there, a dataset without the buckets, captions, labels or
            columns that the config asks for, a rehearsal outside of the schedule.
    """
    check_layout(config, spec.world_size)
    if not spec.slurm.container:
        check_sinks(config)
    missing: list[UserError] = []
    for field, url, files in inputs(config):
        try:
            check_local(field, url, files, included=spec.include)
        except UserError as e:
            missing.append(e)
    if missing:
        others = "".join(f"; also {str(e).partition(': ')[0]}" for e in missing[1:])
        raise UserError(f"{missing[0]}{others}")
    total_steps = Schedule(config.phases).total_steps
    if spec.rehearse_preemption is not None and not 0 < spec.rehearse_preemption < total_steps:
        raise UserError(f"--rehearse-preemption {spec.rehearse_preemption}: the run has {total_steps} steps; "
                        f"take 1 to {total_steps - 1}")  # fmt: skip
    return check_datasets(config)


# ------------------------------------------------------------------------------------------------------ the run folder


def check_folder(
    folder: RunFolder, config: RunConfig, *, fresh: bool, mend: str = "give another --run-dir, or set the storage keys",
    have_lock: bool = False,
) -> None:  # fmt: skip
    """Whether the run folder may be taken; writes nothing.

    Args:
        mend: what helps where it cannot be looked at.
        have_lock: this process has the folder's lock itself.

    Raises:
        UserError: a job lives in it, it holds a run of another config, or something that is not a run; or storage does not show
            it.
    """
    try:
        live = live_job(folder, have_lock=have_lock)
        if live:
            raise UserError(f"{folder.url}: in use by {live}; stop that one first or take another --run-dir")
        if not folder.exists(CONFIG):
            if set(folder.names("")) - {LOCK}:
                raise UserError(
                    f"{folder.url}: holds something that is not a run (no {CONFIG}); take another --run-dir"
                )
            return
        if fresh:
            _check_removable(folder)
        else:
            folder.check(config)
    except UserError:
        raise
    except Exception as e:  # whatever a storage client raises that knows no keys here, or finds nobody
        raise UserError(f"--run-dir {folder.url}: cannot be looked at from here ({one_line(e)}); {mend}") from e


def _check_removable(folder: RunFolder) -> None:
    """Raises UserError unless the folder is recognisably a run, and holds neither us nor the code."""
    try:
        tree = yaml.safe_load(folder.read_text(CONFIG))
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, Mapping) or not {"name", "task", "data", "phases"} <= tree.keys():
        raise UserError(f"{folder.url}: its {CONFIG} is not a run's; --fresh removes runs only, remove it yourself")
    if folder.is_local:
        root = Path(folder.root).resolve()
        for kept in (Path.cwd(), CODE_ROOT, Path(sys.executable), Path.home()):
            if kept.resolve().is_relative_to(root):
                raise UserError(f"{folder.url}: contains {kept}; --fresh does not remove that, take another --run-dir")


def remove_run(folder: RunFolder) -> None:
    """Remove an earlier run, all but its lock. Its config goes last: a removal cut short is still recognisably a run.

    Raises:
        UserError: it is not a run of ours, or cannot be removed.
    """
    if not folder.exists(CONFIG):
        return
    _check_removable(folder)
    try:
        for entry in folder.fs.ls(folder.path(""), detail=False):
            if os.path.basename(entry.rstrip("/")) not in (CONFIG, LOCK, ""):
                folder.fs.rm(entry, recursive=True)
        folder.fs.rm(folder.path(CONFIG))
    except OSError as e:
        raise UserError(f"{folder.url}: cannot be removed ({e})") from None


def make_work_dir(spec: JobSpec, folder: RunFolder) -> None:
    try:
        os.makedirs(spec.work_dir, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder.url}: the run folder cannot be written ({e}); give a writable --run-dir") from None


def record_job(folder: RunFolder, spec: JobSpec, **what: Any) -> None:
    """Write `job.json`: how the run was started, by whom, and from now on every restart and the end. Of the jobs that had
    the folder before, it keeps their restarts and ends."""
    earlier = folder.read_json(JOB) if folder.exists(JOB) else {}
    folder.write_json(JOB, {
        "cluster": spec.cluster, "recipe": spec.recipe, "nodes": spec.nodes, "gpus_per_node": spec.gpus_per_node,
        "cpu": spec.cpu, "max_restarts": spec.max_restarts, "code_dir": spec.code_dir, "work_dir": spec.work_dir,
        "host": socket.gethostname(), "submitted_at": time.time(), "options": dict(spec.options), **what,
        "restarts": [], "ended": None, "stop_s": earlier.get("stop_s"), "earlier": earlier_jobs(folder),
    })  # fmt: skip


def earlier_jobs(folder: RunFolder) -> list[dict[str, Any]]:
    if not folder.exists(JOB):
        return []
    job = folder.read_json(JOB)
    kept = {name: job.get(name) for name in ("cluster", "job_id", "host", "submitted_at", "restarts", "ended")}
    earlier = job.get("earlier")  # absent in records of earlier versions
    return [*(earlier if isinstance(earlier, list) else []), kept][-MAX_EARLIER_JOBS:]


def update_job(folder: RunFolder, **what: Any) -> None:
    folder.write_json(JOB, {**folder.read_json(JOB), **what})


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot: with it a reused pid is told apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def live_job(folder: RunFolder, *, have_lock: bool = False) -> str | None:
    """The job that this run folder belongs to right now, in words; None when there is none.

    Args:
        have_lock: this process has the folder's lock itself.

    Raises:
        UserError: it cannot be told, because its scheduler or its machine cannot be asked.
    """
    if not folder.exists(JOB):
        return None
    job = folder.read_json(JOB)
    if job.get("cluster") == "slurm":
        return _live_slurm_job(folder, job)
    if job.get("cluster") == "kubernetes":
        return f"Kubernetes job {job.get('job')}" if not job.get("ended") and is_alive(folder) else None
    name = f"process {job.get('pid')} on {job.get('host')}"
    if folder.is_local:
        return name if not have_lock and is_locked(folder.path(LOCK)) else None
    if job.get("ended"):
        return None
    if job.get("host") == socket.gethostname():
        started = process_start(int(job.get("pid", 0)))
        return name if started is not None and started == job.get("pid_start") else None
    raise UserError(f"{folder.url}: started by {name}, which cannot be asked from here; "
                    f"if it is gone, remove {folder.url}/{JOB}")  # fmt: skip


def given_away(folder: RunFolder, job_id: str) -> str | None:
    """The job that the run folder is of, in words, where that is not this one: two were submitted at the same time."""
    job = folder.read_json(JOB) if folder.exists(JOB) else None
    if job is None or job_id in (job.get("job_id"), *(job.get("chain") or ())):
        return None
    return f"{job.get('cluster')} job {job.get('job_id') or job.get('pid')}"


def _live_slurm_job(folder: RunFolder, job: Mapping[str, Any]) -> str | None:
    if elsewhere := other_cluster_of(job):
        if job.get("ended"):
            return None
        raise UserError(
            f"{folder.url}: SLURM job {job.get('job_id')} of cluster {elsewhere} has it, which cannot be asked from "
            f"here, cluster {cluster_name()}; submit there, or if that job is gone, remove {folder.url}/{JOB}"
        )
    name = job.get("job_name")
    for job_id in slurm_jobs_of(job):
        state = slurm_state(job_id, name if isinstance(name, str) else None)
        if state:
            return f"SLURM job {job_id} ({state})"
    return None


def other_cluster_of(job: Mapping[str, Any]) -> str | None:
    """The cluster that this SLURM job was submitted to, where it is known not to be the one that is asked from here."""
    theirs = job.get("slurm_cluster")
    ours = cluster_name() if isinstance(theirs, str) else None
    return str(theirs) if ours is not None and ours != theirs else None


def slurm_jobs_of(job: Mapping[str, Any]) -> list[str]:
    """The SLURM job that `job.json` is of, and those of its chain that may come after it."""
    current, chain = str(job.get("job_id")), [str(job_id) for job_id in job.get("chain") or ()]
    return [current, *chain[chain.index(current) + 1 if current in chain else 0 :]]


# --------------------------------------------------------------------------------------------------------------- units


def time_limit_min(text: str) -> int:
    """SLURM's notation for a time limit to minutes: `90`, `12:00:00`, `2-0`, `2-12:30`, `2-00:00:00`.

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(\d+):(\d+):(\d+))|(\d+)", text.strip())
    if not match:
        raise UserError(f"--time {text}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds, h, m, s, only_minutes = (int(group or 0) for group in match.groups())
    total_s = ((days * 24 + hours + h) * 60 + minutes + m + only_minutes) * 60 + seconds + s
    if total_s < 60:
        raise UserError(f"--time {text}: at least one minute")
    return -(-total_s // 60)


def signal_name(code: int) -> str:
    """An exit code in words: of a process that a signal ended, the signal."""
    number = -code if code < 0 else code - 128
    if code < 0 or 128 < code < 160:
        try:
            return f"{signal.Signals(number).name} (code {code})"
        except ValueError:
            pass
    return f"code {code}"
