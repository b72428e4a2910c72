"""In which fields configs differ. No torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launch.runs.read import RunFacts
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.recipes import RECIPES

ABSENT = "absent"
LOCATIONS = ("name",)
"""Fields that differ between any two runs, and say nothing."""


@dataclass(frozen=True)
class Difference:
    field: str
    """`phases.full_resolution.batch_size`"""
    values: tuple[str, ...]
    """One a config, in their order."""


def against_recipe(facts: RunFacts) -> list[Difference]:
    """(recipe, run) where they differ.

    Raises:
        UserError: the recipe is a file, or not known to this version.
    """
    assert facts.config is not None
    name = str((facts.job or {}).get("recipe") or facts.config.name)
    if name not in RECIPES:
        raise UserError(f"{name}: no recipe of this version, so there is nothing to compare the config with")
    return differences([RECIPES[name](), facts.config])


def differences(configs: Sequence[RunConfig]) -> list[Difference]:
    """Fields in the order of the configs."""
    flat = [dict(_flat(config.model_dump(mode="json"), "")) for config in configs]
    fields = dict.fromkeys(name for one in flat for name in one)
    return [
        Difference(name, values)
        for name in fields
        if name not in LOCATIONS and len(set(values := tuple(one.get(name, ABSENT) for one in flat))) > 1
    ]


def _flat(tree: Any, field: str) -> Iterator[tuple[str, str]]:
    """A list of sections goes by their names, as phases do in an override."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = {str(item.get("name", i)): item for i, item in enumerate(tree)}
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{field}.{key}" if field else str(key))
    else:
        yield field, "none" if tree is None else json.dumps(tree, ensure_ascii=False).strip('"')
