"""One submission of several runs: what `--array FIELD=VALUES` and `--seeds N` ask for, as overrides and names. No torch."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.job import JobSpec
from trainer.errors import UserError

MAX_RUNS = 1000
"""SLURM's own limit of an array (MaxArraySize) is 1001 by default."""


@dataclass(frozen=True)
class Element:
    label: str
    """What tells it from the others, in the name of its run folder: `seed-3`, `rate-0.001-seed-0`."""
    overrides: tuple[str, ...]


def elements(sweeps: Sequence[str], seeds: int | None) -> list[Element]:
    """All combinations, the last field's values next to each other.

    Raises:
        UserError: no FIELD=VALUES, a field or a value twice, or more runs than an array holds.
    """
    if seeds is not None:
        sweeps = [*sweeps, f"seed=0-{seeds - 1}"]
    fields: dict[str, list[str]] = {}
    for text in sweeps:
        field, equals, values = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.]+", field):
            raise UserError(f"--array {text}: write it as FIELD=VALUE,VALUE,... or FIELD=0-7")
        if field in fields:
            raise UserError(f"--array {field}: given twice" + ("; --seeds is --array seed=..." * (field == "seed")))
        fields[field] = values_of(text, values)
    count = 1
    for values_of_field in fields.values():
        count *= len(values_of_field)
    if count > MAX_RUNS:
        raise UserError(f"--array: {count} runs; at most {MAX_RUNS} at a time")
    found = []
    for combination in itertools.product(*fields.values()):
        pairs = list(zip(fields, combination, strict=True))
        label = "-".join(f"{field.rpartition('.')[2]}-{_plain(value)}" for field, value in pairs)
        found.append(Element(label, tuple(f"{field}={value}" for field, value in pairs)))
    if len({element.label for element in found}) < len(found) or any(len(element.label) > 150 for element in found):
        # values that differ only in what a folder's name cannot show, or are long
        found = [Element(f"{i:03d}", element.overrides) for i, element in enumerate(found)]
    return found


def values_of(text: str, values: str) -> list[str]:
    """`a,b,c` at commas outside of brackets, or `0-7`.

    Raises:
        UserError: an empty value, a value twice, or a range that goes down.
    """
    span = re.fullmatch(r"(\d+)-(\d+)", values)
    if span:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < MAX_RUNS:
            raise UserError(f"--array {text}: from the smaller number to the larger, at most {MAX_RUNS} of them")
        return [str(value) for value in range(first, last + 1)]
    found, depth = [""], 0
    for letter in values:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    found = [value.strip() for value in found]
    if not all(found) or len(set(found)) < len(found):
        raise UserError(f"--array {text}: a value is empty or there twice; write FIELD=VALUE,VALUE,... or FIELD=0-7")
    return found


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+]+", "-", value).strip("-.") or "x"


def spec_of_element(spec: JobSpec, element: Element) -> JobSpec:
    """The run's own folder beside the one that was asked for, and its own copy of the code."""
    own_place = spec.code_dir == f"{spec.run_dir}/code"
    run_dir = f"{spec.run_dir.rstrip('/')}-{element.label}"
    code_dir = f"{run_dir}/code" if own_place else f"{spec.code_dir.rstrip('/')}-{element.label}"
    return replace(spec, run_dir=run_dir, code_dir=code_dir)
