"""A real SLURM on this machine, for tests: munged, slurmctld and two slurmd, all below a folder that the test owns.

Two partitions as clusters with preemption have them: a job in `high` requeues one in `low` when the nodes are full.
"""

import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "munged")
NUM_NODES = 2
GRACE_S = 60
"""Between a preemption's SIGTERM and its SIGKILL, where a test asks for no other."""


def installed() -> bool:
    """Whether the daemons are here; they need root, since slurmd starts jobs for other users."""
    return all(shutil.which(name, path=_PATH) for name in DAEMONS) and os.geteuid() == 0


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class SlurmCluster:
    folder: Path
    environment: dict[str, str]
    """For commands that talk to this cluster."""
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    """By name: slurmctld, and each node's slurmd by the node's name."""

    def run(self, *command: str, check: bool = True) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240, check=False)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\n{self.logs()}"
        return result.stdout.strip()

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.field(job_id, "JobState")

    def field(self, job_id: str, name: str) -> str:
        facts = self.run("scontrol", "show", "job", "-o", job_id)
        return dict(fact.split("=", 1) for fact in facts.split() if "=" in fact)[name]

    def wait_for(self, job_id: str, *states: str, timeout_s: float) -> str:
        end = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in states:
            assert time.monotonic() < end, (
                f"job {job_id} is {state}, not {states}: {self.run('scontrol', 'show', 'job', job_id)}\n{self.logs()}"
            )
            time.sleep(0.2)
        return state

    def start_now(self, job_id: str) -> None:
        """SLURM holds a requeued job back for two minutes; a test does not wait for them.

        Three seconds it must: slurmd refuses a job whose credential is of the second in which it revoked the last one.
        """
        self.wait_for(job_id, "PENDING", timeout_s=240)
        time.sleep(3)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)

    def start_node(self, name: str) -> None:
        """Start the node's slurmd, also one that has been killed."""
        log = self.folder / f"slurmd-{name[1:]}.log"
        self.daemons[name] = _start(["slurmd", "-D", "-N", name], log, self.environment)

    def node_state(self, name: str) -> str:
        """idle, allocated, down, idle*, ...; the star: it does not answer."""
        return self.run("sinfo", "--noheader", "--nodes", name, "--partition", "low", "--format", "%T")

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def slurm_cluster(folder: Path, *, more: str = "", grace_s: int = GRACE_S) -> Iterator[SlurmCluster]:
    """Start the daemons in `folder`; all of them, and what they run, have ended when the block is left.

    Args:
        more: lines for slurm.conf.
        grace_s: between a preemption's SIGTERM and its SIGKILL.
    """
    # slurmstepd's sockets lie in the spool, and below a test's own folder their names can be too long for one
    with _munged(folder) as munge_socket, tempfile.TemporaryDirectory(prefix="slurmd-") as spool:
        _write_config(folder, munge_socket, Path(spool), more, grace_s)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
        cluster = SlurmCluster(folder, environment)
        daemons = cluster.daemons
        try:
            daemons["slurmctld"] = _start(["slurmctld", "-D"], folder / "slurmctld.log", environment)
            for i in range(NUM_NODES):
                cluster.start_node(f"n{i + 1}")
            _wait_until_idle(cluster, list(daemons.values()))
            yield cluster
        finally:
            _cancel_all(cluster)
            for daemon in reversed(daemons.values()):
                daemon.terminate()
            for daemon in daemons.values():
                try:
                    daemon.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def _cancel_all(cluster: SlurmCluster) -> None:
    cluster.run("scancel", "--user", "root", "--signal", "KILL", "--full", check=False)
    cluster.run("scancel", "--user", "root", check=False)
    end = time.monotonic() + 30
    while cluster.run("squeue", "--noheader", check=False) and time.monotonic() < end:
        time.sleep(0.2)


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )


@contextmanager
def _munged(log_folder: Path) -> Iterator[Path]:
    """A munged with key, socket and files of its own, so that the machine's own munge stays as it is."""
    # not below the test's folder: munge wants every parent to be passable, and pytest's are private
    with tempfile.TemporaryDirectory(prefix="munge-") as name:
        home = Path(name)
        home.chmod(0o755)
        key = home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (home, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        command = [
            "munged", "--foreground", f"--key-file={key}", f"--socket={home / 's'}", f"--pid-file={home / 'pid'}",
            f"--log-file={home / 'log'}", f"--seed-file={home / 'seed'}", "--num-threads=2", "--force",
        ]  # fmt: skip
        with open(log_folder / "munged.log", "ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, user=user.pw_uid, group=user.pw_gid, env={"PATH": _PATH}
            )  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not (home / "s").exists():
                assert process.poll() is None, (log_folder / "munged.log").read_text()
                assert time.monotonic() < end, "munged has not opened its socket in 120 s"
                time.sleep(0.05)
            yield home / "s"
        finally:
            process.terminate()
            process.wait(timeout=120)


def _write_config(folder: Path, munge_socket: Path, spool: Path, more: str, grace_s: int) -> None:
    host = socket.gethostname()
    controller, *ports = _free_ports(1 + NUM_NODES)
    cpus = len(os.sched_getaffinity(0))
    # a job's rendezvous port follows from its number: two clusters on one machine must not count alike
    first_job = random.randrange(1000, 100_000)
    (folder / "state").mkdir()
    nodes = "\n".join(
        f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
        for i, port in enumerate(ports)
    )
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=low Nodes=n[1-{NUM_NODES}] Default=YES MaxTime=60 PriorityTier=1 GraceTime={grace_s} OverSubscribe=NO
PartitionName=high Nodes=n[1-{NUM_NODES}] MaxTime=60 PriorityTier=10 OverSubscribe=NO
{more}
""")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _wait_until_idle(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 240
    while True:
        states = cluster.run(
            "sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%T", check=False
        ).split()
        if states == ["idle"] * NUM_NODES:
            return
        assert all(daemon.poll() is None for daemon in daemons), f"a daemon has ended:\n{cluster.logs()}"
        assert time.monotonic() < end, f"nodes are {states} after 240 s:\n{cluster.logs()}"
        time.sleep(0.2)
