"""A rank of a real job that is killed within a save. The product has no place for that: `sitecustomize` of the job's own copy
of the code arms it, in the ranks' processes alone."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SITECUSTOMIZE = "from tests.faulty_saves import arm\n\narm({plan!r})\n"
STAGES = {
    "half a shard": ".safetensors",
    "before the manifest": "manifest.json",
    "half a COMMIT": "COMMIT",
}


def plan(code_dir: Path, file: Path, kills: list[dict[str, Any]]) -> None:
    """Have ranks of the job that runs the copy in `code_dir` killed: a list of {start, rank, step, stage}."""
    file.write_text(json.dumps(kills))
    (code_dir / "sitecustomize.py").write_text(SITECUSTOMIZE.format(plan=str(file)))


def arm(plan_file: str) -> None:
    """In a rank that the plan names, of this start; anywhere else nothing happens."""
    if "trainer.train" not in sys.orig_argv:
        return
    start, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["RANK"])
    for kill in json.loads(Path(plan_file).read_text()):
        if (kill["start"], kill["rank"]) == (start, rank):
            _kill_within_save(f"step-{kill['step']:08d}-", kill["stage"])


def _kill_within_save(checkpoint: str, stage: str) -> None:
    from trainer.checkpoint.folder import CheckpointFolder

    create = CheckpointFolder.create

    @contextmanager
    def struck(folder: CheckpointFolder, name: str) -> Iterator[IO[bytes]]:
        hit = name.startswith(checkpoint) and name.endswith(STAGES[stage])
        if hit and stage.startswith("before"):
            _die()
        with create(folder, name) as file:
            yield _Dying(file) if hit else file  # type: ignore[misc]

    CheckpointFolder.create = struck  # type: ignore[method-assign,assignment]


class _Dying:
    """A file whose writer dies with half of what it writes on the disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
