"""A cluster of a test whose first node does not pass the check before a start."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster


@contextmanager
def cluster_with_a_bad_node(folder: Path) -> Iterator[SlurmCluster]:
    """Each node has a scratch disk of its own, which SLURM's prolog names to the tasks; that of n1 has no room."""
    with slurm_cluster.slurm_cluster(folder) as cluster:
        scratch = tempfile.mkdtemp(prefix="scratch-")  # a short path: sockets are made there
        for node in ("n1", "n2"):
            Path(scratch, node).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", f"{scratch}/n1"], check=True, timeout=20)
        prolog = folder / "prolog.sh"
        prolog.write_text(f"#!/bin/sh\necho export TMPDIR={scratch}/$SLURMD_NODENAME\n")
        prolog.chmod(0o755)
        with open(folder / "slurm.conf", "a") as conf:
            conf.write(f"TaskProlog={prolog}\n")
        cluster.run("scontrol", "reconfigure")
        try:
            yield cluster
        finally:
            subprocess.run(["umount", "--lazy", f"{scratch}/n1"], check=True, timeout=20)
            shutil.rmtree(scratch)
