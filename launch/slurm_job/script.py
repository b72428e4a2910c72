"""The sbatch script of a run, of an array of runs, or of a chain. Makes no file and calls no command. No torch."""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import submitit

from launch.job import JobSpec
from launch.slurm_job.container import batch_words, mounts_of, python_words, srun_words
from launch.slurm_job.nodes import chain_lines, requeue_lines
from trainer.config import RunConfig
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """A run as it is submitted."""

    spec: JobSpec
    config: RunConfig
    folder: RunFolder


class Executor(submitit.SlurmExecutor):
    """submitit's, which makes a script also where SLURM is not installed, and whose script says itself where things are."""

    command = ""

    @classmethod
    def affinity(cls) -> int:
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return self.command

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """Without what submitit takes for granted: 5 minutes, and an accounting key of its own name."""
        unasked = [f"#SBATCH --{name}=" for name in ("time", "wckey") if name not in self.parameters]
        lines = super()._make_submission_file_text(command, uid).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(tuple(unasked)))

    def script(self) -> str:
        """As it is submitted."""
        return self._make_submission_file_text(self.command, "")

    def submit_script(self) -> str:
        """Queue it; returns the job's id."""
        return str(self._submit_command(self.command).job_id)


def job_name(spec: JobSpec, config: RunConfig) -> str:
    """The run's. Jobs of a chain wait for those of the same name: theirs has the run folder in it as well."""
    if not spec.slurm.chain:
        return config.name
    return f"{config.name}-{hashlib.sha256(spec.run_dir.encode()).hexdigest()[:8]}"


def slurm_executor(
    jobs: Sequence[Job], *, array_dir: str | None = None, at_once: int | None = None, successor: bool = False
) -> Executor:
    """Asks for the resources of a job, and of each job of an array.

    Args:
        jobs: several: an array. They differ in their config and in where they are.
        array_dir: where an array's own files go.
        at_once: so many of an array run at the same time.
        successor: it waits for the jobs of the same name before it.
    """
    spec, config = jobs[0].spec, jobs[0].config
    options = spec.slurm
    tasks_per_node = 1 if options.launcher == "torchrun" else spec.gpus_per_node
    cpus = options.cpus_per_task and options.cpus_per_task * (spec.gpus_per_node // tasks_per_node)
    executor = Executor(folder=array_dir or f"{spec.work_dir}/slurm")
    parameters = {
        "job_name": job_name(spec, config),
        "nodes": spec.nodes,
        "ntasks_per_node": tasks_per_node,
        "gpus_per_node": None if spec.cpu else spec.gpus_per_node,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time_min,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "cpus_per_task": cpus,
        "signal_delay_s": options.signal_delay_s,
        "dependency": ",".join([*options.after, *(["singleton"] if successor else [])]) or None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": _setup(jobs, array=array_dir is not None),
        "teardown": _teardown(spec, config, env_of(spec)),
    }
    more: dict[str, object] = {"no-requeue" if options.chain else "requeue": True}  # by sbatch's own names
    if options.mem:
        more["mem"] = options.mem
    if options.after:
        more["kill-on-invalid-dep"] = "yes"  # else it would wait, and hold its run folder, for ever
    if array_dir is not None:
        more["array"] = f"0-{len(jobs) - 1}" + (f"%{at_once}" if at_once else "")
        more["output"] = f"{array_dir}/%A_%a.log"
    executor.parameters = {k: v for k, v in parameters.items() if v is not None} | {"additional_parameters": more}
    executor.command = _command(spec, config, cpus)
    return executor


def env_of(spec: JobSpec) -> dict[str, str]:
    return dict(spec.slurm.env)


def _mounts(spec: JobSpec, config: RunConfig) -> str:
    container = spec.slurm.container
    inside = f"{spec.code_dir}/".startswith(f"{spec.work_dir}/")
    return mounts_of(container, config, code_inside=inside) if container else ""


def _command(spec: JobSpec, config: RunConfig, cpus: int | None) -> str:
    """srun with submitit's task. Tasks that outlive the others would hold, and drain, their nodes."""
    container, mounts = spec.slurm.container, _mounts(spec, config)
    srun = [
        "srun",
        "--unbuffered",
        '--output="$work_dir/slurm/${job}_%t_log.out"',
        "--kill-on-bad-exit=1",
        "--wait=600",
    ]
    if cpus:
        srun.append(f"--cpus-per-task={cpus}")  # since SLURM 22.05 srun does not take sbatch's
    python = python_words(container, mounts, python=sys.executable, cpu=spec.cpu, env=env_of(spec))
    task = [*python, "-u", "-m", "submitit.core._submit", '"$work_dir/slurm"']
    return " ".join([*srun, *srun_words(container, mounts), *task])


def _setup(jobs: Sequence[Job], *, array: bool) -> list[str]:
    """Before the tasks: where the run is, and the environment. The task's own launcher comes from the snapshot as well."""
    lines = []
    if array:
        lines += ["job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID", "case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"{i}) {_places(job.spec)} ;;" for i, job in enumerate(jobs)]
        lines += ["*) exit 93 ;;", "esac", 'exec >> "$work_dir/slurm/${job}_0_log.out" 2>&1']
    else:
        lines += ["job=$SLURM_JOB_ID", _places(jobs[0].spec)]
    return [
        *lines,
        "# a cluster that has lost its state counts its jobs anew",
        'rm -rf "$work_dir/slurm/exits/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        "trap : TERM USR2  # bash would die of them while the ranks save; srun passes them on to the tasks",
        'export PYTHONPATH="$code_dir" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1',
        *(f"export {name}={shlex.quote(value)}" for name, value in env_of(jobs[0].spec).items()),
    ]


def _places(spec: JobSpec) -> str:
    places = {"run_dir": spec.run_dir, "work_dir": spec.work_dir, "code_dir": spec.code_dir}
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in places.items())


def _teardown(spec: JobSpec, config: RunConfig, env: dict[str, str]) -> list[str]:
    """After all tasks: requeue or not. 75 is also what `RequeueExit=75` in slurm.conf would requeue on."""
    container, mounts = spec.slurm.container, _mounts(spec, config)
    python = python_words(container, mounts, python=sys.executable, cpu=True, env=env)
    end = " ".join(batch_words(container, mounts, [*python, "-m", "launch.slurm_job.task"]))
    squeue = 'squeue --noheader --jobs "$job" --format %T'
    lines = [
        "code=$?",
        "# a node that SLURM takes for lost may live on: the job has another start by now, which is not this one's to end",
        'restarts=$(squeue --noheader --jobs "$job" --Format RestartCnt 2> /dev/null)',
        "restarts=${restarts//[^0-9]/}",
        'if [ -n "$restarts" ] && [ "$restarts" != "${SLURM_RESTART_COUNT:-0}" ]; then',
        '  echo "job $job: queued again by SLURM itself; this start has ended"',
        "  exit 143",
        "fi",
    ]
    if container:
        no_python = f"no {container.python} in {container.image}, or the image cannot be run"
        lines.append(f'[ "$code" -eq 127 ] && echo {shlex.quote(no_python)} >&2')
    lines += [
        f"export LOUPE_JOB_STATE=$({squeue} 2> /dev/null)  # for an end within a container, which has no squeue",
        'decided="$work_dir/slurm/exits/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/decision"',
        f'{end} "$run_dir" "$work_dir" {spec.world_size} {spec.max_restarts} "$code"',
        "# no file: no Python on this node, or none of the container; then rank 0's own word holds",
        'decision=$(cat "$decided" 2> /dev/null || echo "$code")',
    ]
    if spec.slurm.chain:
        return [
            *lines,
            "# the next job of the chain goes on: RequeueExit=75 in slurm.conf would start this one again, --no-requeue or not",
            'if [ "$decision" -eq 75 ]; then',
            *chain_lines(),
            "  exit 1",
            "fi",
            'exit "$decision"',
        ]
    return [
        *lines,
        'if [ "$decision" -eq 75 ] && command -v scontrol > /dev/null; then',
        "  # scancel: SLURM would take the requeue all the same, and the cancelled job would be back",
        f'  [ "$({squeue})" = COMPLETING ] && exit 143',
        *requeue_lines(),
        '  echo "SLURM does not requeue job $job: loupe runs resume goes on, or submit with --chain" >&2',
        'elif [ "$decision" -eq 75 ]; then',
        '  echo "no scontrol on this node: SLURM requeues job $job where slurm.conf has RequeueExit=75" >&2',
        "fi",
        'exit "$decision"',
    ]
