"""Every environment variable that a rank gets from us, each with its reason. One table, no torch.

What the user's own environment holds (credentials of object storage among it) passes through to the ranks and is never
printed: only this table's variables are.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.secret_names import looks_secret

FIRST_PORT, NUM_PORTS = 15_000, 15_000
"""Rendezvous ports: below Linux's ephemeral range (32768 and up), above what services take."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs: what differs between ranks, nodes and jobs."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    code_dir: str
    """Root of the code that the rank runs."""
    work_dir: str
    """Local folder, shared by the job's nodes."""
    use_gpus: bool = True
    num_threads: int = 0
    """CPU threads per rank; 0: cores that this process may use over ranks on the machine."""
    one_machine: bool = False
    """All ranks are on this machine."""


@dataclass(frozen=True)
class Variable:
    name: str
    value: Callable[[Place], str | None]
    """None: not set."""
    reason: str
    keep: bool = False
    """The user's own value stands."""


def _threads(place: Place) -> str:
    return str(place.num_threads or max(1, len(os.sched_getaffinity(0)) // place.local_world_size))


VARIABLES = (
    Variable("RANK", lambda p: str(p.rank), "torch's env:// rendezvous: place among all ranks"),
    Variable("WORLD_SIZE", lambda p: str(p.world_size), "torch's env:// rendezvous: number of ranks"),
    Variable("LOCAL_RANK", lambda p: str(p.local_rank), "place among the machine's ranks: which GPU"),
    Variable("LOCAL_WORLD_SIZE", lambda p: str(p.local_world_size), "ranks on the machine: shares of its cores"),
    Variable("MASTER_ADDR", lambda p: p.master_addr, "torch's env:// rendezvous: host of rank 0"),
    Variable("MASTER_PORT", lambda p: str(p.master_port), "rendezvous port; a fixed one collides on shared nodes"),
    Variable("PYTHONPATH", lambda p: p.code_dir, "the job's own copy of the code, ahead of any installed one"),
    Variable("PYTHONSAFEPATH", lambda p: "1", "with `python -m` a `data/` in the current folder would hide ours"),
    Variable("PYTHONUNBUFFERED", lambda p: "1", "the last lines before a kill are in the log"),
    Variable("PYTHONFAULTHANDLER", lambda p: "1", "a crash in native code leaves a Python traceback in the log"),
    Variable("OMP_NUM_THREADS", _threads, "ranks that each take all cores slow one another down", keep=True),
    Variable(
        "LOUPE_DEVICE", lambda p: "cuda" if p.use_gpus else "cpu", "a rank without its GPU must not train on CPU unawares"
    ),
    Variable(
        "CUDA_VISIBLE_DEVICES", lambda p: None if p.use_gpus else "", "--cpu: ranks leave the machine's GPUs alone"
    ),
    Variable(
        "GLOO_SOCKET_IFNAME", lambda p: "lo" if p.one_machine else None,
        "one machine: gloo needs no host name that resolves, and no firewall rule", keep=True,
    ),
    Variable("TORCH_NCCL_ENABLE_MONITORING", lambda p: "1", "a thread ends a rank whose collective hangs", keep=True),
    Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", lambda p: "1", "a hung collective says which one it was", keep=True),
    Variable("TORCH_FR_BUFFER_SIZE", lambda p: "2000", "the last collectives of each rank, for that dump", keep=True),
    Variable("HF_HUB_OFFLINE", lambda p: "1", "ranks never download; nodes may have no way out"),
    Variable("HF_HUB_DISABLE_TELEMETRY", lambda p: "1", "a training job calls nobody"),
    Variable(
        "TORCHINDUCTOR_CACHE_DIR", lambda p: f"{p.work_dir}/cache/inductor",
        "compiled kernels outlive a restart, which would compile them all again", keep=True,
    ),
    Variable("TRITON_CACHE_DIR", lambda p: f"{p.work_dir}/cache/triton", "as TORCHINDUCTOR_CACHE_DIR", keep=True),
)  # fmt: skip


def variables_of(place: Place, inherited: Mapping[str, str]) -> dict[str, str]:
    """What we set for a rank at `place`, over the environment `inherited` from the user."""
    ours: dict[str, str] = {}
    for variable in VARIABLES:
        value = variable.value(place)
        users_stands = variable.keep and variable.name in inherited
        if variable.name == "OMP_NUM_THREADS" and place.num_threads:
            users_stands = False  # the config's field is the user's own word too, and nearer
        if value is not None and not users_stands:
            ours[variable.name] = value
    return ours


def rank_environment(place: Place, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of a rank's process."""
    inherited = os.environ if inherited is None else inherited
    return {**inherited, **variables_of(place, inherited)}


def given_variables(texts: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` of `--env`, which the script and the run's record show to all.

    Raises:
        UserError: it is not that, looks like a secret, or is ours to set.
    """
    ours = {variable.name for variable in VARIABLES if not variable.keep}
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {text.partition('=')[0]}: write it as NAME=VALUE")
        if looks_secret(name, value):
            raise UserError(f"--env {name}: looks like a secret, and would stand in the job's script and record; export it "
                            "in the shell that you submit from, SLURM passes it on")  # fmt: skip
        if not equals:
            raise UserError(f"--env {name}: write it as NAME=VALUE; what the shell exports is passed on anyway")
        if name in ours or name.startswith(("SLURM_", "SUBMITIT_", "LOUPE_")):
            raise UserError(f"--env {name}: is set by the launcher; leave it out")
        if name in found:
            raise UserError(f"--env {name}: given twice")
        if "\n" in value or "\0" in value:
            raise UserError(f"--env {name}: one line")
        found[name] = value
    return found


def port_of_job(job_id: int, restart: int) -> int:
    """Rendezvous port of a cluster job. Moves on with each restart: a rank that lingers must not be met again. Jobs with
    numbers side by side, as an array's that share a node, are far apart."""
    return FIRST_PORT + (_number_of(str(job_id)) + restart) % NUM_PORTS


def port_of_name(name: str) -> int:
    """Rendezvous port of a job whose ranks have a network of their own, as pods do, where no other job can collide."""
    return FIRST_PORT + _number_of(name) % NUM_PORTS


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
