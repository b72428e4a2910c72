"""Which restarts of a job count against it, as whoever decides about the next one and the metrics both say. No torch.

A restart is an entry of `restarts` in job.json: its reason, the newest step and checkpoint by then, and the seconds of training
until then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

BAD_NODE = "bad node"
"""For a machine that failed the check before the ranks start; the next start goes without it."""
WARNED = "asked by SIGUSR2: its time limit, or a preemption that warns"
"""In words, a restart for `preempted` whose `signal` is SIGUSR2: SLURM sends it for both."""
REQUEUED = "requeued by SLURM"
"""The cluster's own doing, such as for a lost node."""
CRASHES = ("crash", "hang", BAD_NODE)
"""Reasons that count against the budget of `--max-restarts`."""
BUDGET_WINDOW_S = 24 * 3600.0
"""Seconds of training within which they count: a run of months meets more faults than one budget holds, and gets on."""
NO_STEP_EXPECTED = ("preempted", BAD_NODE, REQUEUED)
"""Reasons that say nothing of whether the run itself gets on: a busy cluster preempts before the first step."""
MAX_WITHOUT_CHECKPOINT = 3
"""Restarts in a row without a newer checkpoint; more of them would only burn the allocation."""


def used_of_budget(restarts: Sequence[Mapping[str, Any]], train_seconds: float) -> int:
    """Restarts that count against `max_restarts` of job.json.

    Args:
        train_seconds: of the run until now, in the steps that stand.
    """
    return sum(
        entry["reason"] in CRASHES and train_seconds - float(entry.get("train_seconds") or 0.0) < BUDGET_WINDOW_S
        for entry in restarts
    )


def without_checkpoint(restarts: Sequence[Mapping[str, Any]], checkpoint: int) -> int:
    """Restarts in a row, the newest last, since which no newer checkpoint has come, and which should have brought one.

    Args:
        checkpoint: step of the newest that is committed; -1 where there is none.
    """
    count = 0
    for entry in reversed(restarts):
        if int(entry.get("checkpoint", -1)) < checkpoint:
            break
        count += entry["reason"] not in NO_STEP_EXPECTED
    return count
