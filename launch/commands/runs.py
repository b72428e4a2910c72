"""A run as a command names it, or one of its checkpoints. No torch."""

import re
from collections.abc import Sequence

from launch.runs.find import find_run

_CHECKPOINT = re.compile(r"(?P<run>.+)/checkpoints/(?P<name>step-\d{8,18}-[0-9a-f]{8})/*")


def run_or_checkpoint(name: str, roots: Sequence[str]) -> str:
    """URL of a run, by its folder, its URL or its name below a root; or of the checkpoint `RUN/checkpoints/step-...`.

    Raises:
        UserError: there is no such run.
    """
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        return find_run(name, roots).url
    return f"{find_run(match['run'], roots).url}/checkpoints/{match['name']}"
