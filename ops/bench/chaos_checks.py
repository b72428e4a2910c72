"""What must hold after all faults, and the figures of them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from launch.console import Record
from launch.job import MAX_EARLIER_JOBS
from launch.runs.numbers import goodput
from launch.runs.read import read_facts
from ops.bench.chaos_faults import Struck
from ops.bench.chaos_jobs import DONE, events_of
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Index
from trainer.checkpoint.storage import DTYPE_NAMES
from trainer.run_folder import CHECKPOINTS, JOB, RunFolder

LOSS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-4, 1e-4
"""Of a run that was resized, relative: sums over ranks have another order, and hundreds of steps carry that on."""
TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Check:
    name: str
    holds: bool
    found: str


# ------------------------------------------------------------------------------------------------- the state at the end


def final_tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint of a run has: weights, averages, moments."""
    found: dict[str, torch.Tensor] = {}

    def choose(index: Index, where: str) -> Mapping[str, torch.Tensor]:
        for name, record in index.tensors.items():
            found[name] = torch.empty(record.size, dtype=TYPES[record.dtype])
        return found

    manager = CheckpointManager(f"{run.url}/{CHECKPOINTS}", keep_last=2, config_digest=None, code_version="")
    assert manager.read(choose) is not None, f"{run.url}: no checkpoint"
    return found


def different(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    names = found.keys() | expected.keys()
    return sorted(
        name
        for name in names
        if name not in found or name not in expected or not _same_bits(found[name], expected[name])
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference of the model's weights over their norm."""
    names = [name for name in expected if name.startswith("model.")]
    off = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in names)
    whole = sum(float(expected[name].double().square().sum()) for name in names)
    return float((off / whole) ** 0.5)


# ------------------------------------------------------------------------------------------------------------ the checks


def same_weights(run: RunFolder, undisturbed: RunFolder, *, exactly: bool) -> Check:
    found, expected = final_tensors(run), final_tensors(undisturbed)
    off = distance(found, expected)
    if not exactly:
        name = f"final weights: norm of the difference at most {WEIGHTS_TOLERANCE:g} of the weights'"
        return Check(name, off <= WEIGHTS_TOLERANCE, f"{off:.2g}")
    wrong = different(found, expected)
    texts = f"{len(expected) - len(wrong)} of {len(expected)} tensors"
    return Check(
        "final weights, averages and moments equal bit by bit",
        not wrong,
        texts + (f", off by {off:.2g}" if wrong else ""),
    )


def same_losses(
    starts: Mapping[int, Sequence[Record]], undisturbed: Mapping[int, Sequence[Record]], *, exactly: bool
) -> Check:
    """Of every step of every start, also of those that were done again."""
    expected = {record["step"]: record for records in undisturbed.values() for record in records}
    pairs = [(record, expected[record["step"]]) for records in starts.values() for record in records]
    worst = max(_relative(a, b) for a, b in pairs)
    done = {record["step"] for records in starts.values() for record in records}
    complete = done == set(expected)
    name = "losses of each step in each start equal"
    if exactly:
        same = sum(_figures(a) == _figures(b) for a, b in pairs)
        return Check(
            f"{name} bit by bit", complete and same == len(pairs), f"{same} of {len(pairs)}, {len(done)} steps"
        )
    return Check(
        f"{name} to {LOSS_TOLERANCE:g}", complete and worst <= LOSS_TOLERANCE, f"off by {worst:.2g}, {len(done)} steps"
    )


def _figures(record: Record) -> Any:
    return record["loss"], record["gradient_norm"], record["images"]


def _relative(a: Record, b: Record) -> float:
    return max((abs(a["loss"][term] - value) / max(abs(value), 1e-9) for term, value in b["loss"].items()), default=0.0)


def bounded_losses(struck: Sequence[Struck]) -> Check:
    beyond = [s for s in struck if s.lost > s.allowed or s.lost < 0]
    text = (
        ", ".join(f"{s.kind} at {s.step}: {s.lost} of {s.allowed}" for s in beyond)
        or f"{sum(s.lost for s in struck)} in all"
    )
    return Check("no fault lost more steps than it may", not beyond, text)


def from_the_newest(struck: Sequence[Struck]) -> Check:
    wrong = [s for s in struck if s.resumed != s.newest_whole]
    text = (
        ", ".join(f"{s.kind} at {s.step}: from {s.resumed}, not {s.newest_whole}" for s in wrong)
        or f"{len(struck)} starts"
    )
    return Check("each start went on from the newest whole checkpoint", not wrong, text)


def accounted(run: RunFolder, struck: Sequence[Struck]) -> Check:
    """A start for each fault and one in the beginning; and job.json says why."""
    found, expected = events_of(run.read_json(JOB)), [*(s.event for s in struck), DONE]
    starts = len(run.names("attempts"))
    full = len(run.read_json(JOB)["earlier"]) == MAX_EARLIER_JOBS
    same = found == expected or (full and found == expected[-len(found) :])
    holds = same and starts == len(struck) + 1
    first = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    text = f"{starts} starts, {len(found)} entries"
    return Check(
        "no restart that job.json does not account for",
        holds,
        text if same else f"{text}; the first that differs: {first + 1}",
    )


def complete(run: RunFolder, code: int, steps: int) -> Check:
    facts = read_facts(run)
    reached = facts.last.step if facts and facts.last else 0
    holds = code == 0 and bool(facts and facts.finished) and reached == steps
    return Check("the run is complete", holds, f"{reached} of {steps} steps, exit code {code}")


# ----------------------------------------------------------------------------------------------------------- the figures


def goodput_of(run: RunFolder) -> float | None:
    """As `loupe runs` shows it (launch/runs/numbers.py)."""
    facts = read_facts(run)
    return goodput(facts, now=time.time(), alive=False) if facts else None


COLUMNS = (
    "fault",
    "number",
    "steps lost, median",
    "largest",
    "s until noticed, median",
    "largest",
    "s to a new step, median",
    "largest",
)


def medians(struck: Sequence[Struck]) -> list[tuple[str, ...]]:
    """A line for each kind, and one for all."""
    kinds = [*dict.fromkeys(sorted(s.kind for s in struck)), None]
    lines = []
    for kind in kinds:
        of = [s for s in struck if kind in (None, s.kind)]
        cells = [kind or "all", str(len(of))]
        for values, digits in (
            ([float(s.lost) for s in of], 0), ([s.noticed_s for s in of], 1), ([s.new_step_s for s in of], 1)
        ):  # fmt: skip
            cells += [f"{median(values):.{digits}f}", f"{max(values):.{digits}f}"]
        lines.append(tuple(cells))
    return lines
