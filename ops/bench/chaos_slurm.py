"""Chaos on a real SLURM of two nodes, started on this machine for it: the tests' own. No torch."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ops.bench.chaos_jobs import END_S, Broken
from trainer.errors import UserError
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from tests.slurm_cluster import SlurmCluster

LIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


class SlurmJob:
    """One rank on each node. SLURM starts it again by itself; there is no launcher that could be killed alone."""

    launcher_dies, again_by_itself = False, True

    def __init__(
        self, cluster: "SlurmCluster", run_dir: Path, code: Path, overrides: Sequence[str], *, max_restarts: int
    ) -> None:
        self.folder = RunFolder(str(run_dir))
        self._cluster, self._job_id, self._run_dir = cluster, "", run_dir
        self._command = [
            sys.executable, str(code / "launch/slurm.py"), "demo", "--cluster", "slurm", "--cpu", "--run-dir", str(run_dir),
            "--max-restarts", str(max_restarts), *(word for text in overrides for word in ("--set", text)),
        ]  # fmt: skip

    def begin(self, ranks: int) -> None:
        done = subprocess.run(
            [*self._command, "--nodes", str(ranks)], env=self._cluster.environment, cwd=self._run_dir.parent,
            capture_output=True, text=True, check=False, timeout=END_S,
        )  # fmt: skip
        if done.returncode:
            raise Broken(f"the submission ended with {done.returncode}: {done.stderr.strip()}")
        self._job_id = done.stdout.split()[1].rstrip(":")

    def tell(self, number: int) -> None:
        self._cluster.run("scancel", f"--signal={number}", self._job_id)

    def kill_launcher(self) -> None:
        raise NotImplementedError("no launcher stands apart from SLURM's own")

    def wait_stopped(self) -> None:
        """It is queued again, which `job.json` says."""

    def go_on(self) -> None:
        self._cluster.start_now(self._job_id)

    def check(self) -> None:
        state = self._cluster.state(self._job_id)
        if state not in LIVE_STATES:
            raise Broken(f"SLURM job {self._job_id} is {state}; see {self._run_dir}/slurm")

    def code(self) -> int | None:
        state = self._cluster.state(self._job_id)
        return None if state in LIVE_STATES else int(state != "COMPLETED")

    def end(self) -> None:
        if self._job_id:
            self._cluster.run("scancel", self._job_id, check=False)


@contextmanager
def slurm_jobs(out: Path, overrides: Sequence[str], *, max_restarts: int) -> Iterator[tuple[SlurmJob, SlurmJob]]:
    """(an undisturbed job, one to be struck), not yet submitted.

    Raises:
        UserError: there is no SLURM to be started here.
    """
    try:
        from tests.slurm_cluster import installed, slurm_cluster
    except ImportError:
        raise UserError("--cluster slurm: starts the SLURM of the tests; run it from the root of a checkout") from None
    if not installed():
        raise UserError(
            "--cluster slurm: needs slurmctld, slurmd and munged, and root; .ci/install-services.sh installs them"
        )
    (out / "slurm").mkdir()
    with slurm_cluster(out / "slurm") as cluster:
        yield (SlurmJob(cluster, out / "undisturbed", out / "code", overrides, max_restarts=0),
               SlurmJob(cluster, out / "disturbed", out / "code", overrides, max_restarts=max_restarts))  # fmt: skip
