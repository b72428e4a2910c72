"""What a page's fields ask for, checked. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.errors import UserError
from trainer.sampling.prompts import Prompt
from trainer.sampling.settings import SampleSettings

MOST_STEPS, MOST_PX, MOST_PICTURES = 1000, 2048, 16
"""Of one press of the button: others wait for it."""
MOST_CHARACTERS = 4000
MOST_SEED = 2**53 - 1
"""The largest whole number that a browser does not round."""
FIELDS = ("prompt", "classes", "sampler", "steps", "guidance", "seed", "size", "per-prompt")
"""Named as the options of `loupe sample`, which errors name."""


@dataclass(frozen=True)
class Request:
    prompt: Prompt
    count: int
    """Pictures: positions 0 to count - 1 of one seed."""
    settings: SampleSettings


def parse(fields: Mapping[str, Any], own: SampleSettings, *, of_classes: bool) -> Request:
    """Values as a browser sends them, and of `own`, the run's, what has no field. Whether the models can draw so they say
    themselves.

    Raises:
        UserError: "--FIELD: ...".
    """
    prompt: Prompt
    if of_classes:
        prompt = _whole(fields, "classes", 0, MOST_SEED)
    else:
        prompt = str(fields.get("prompt") or "").strip()
        if len(prompt) > MOST_CHARACTERS:
            raise UserError(f"--prompt: {len(prompt)} characters; {MOST_CHARACTERS} at most")
    settings = replace(
        own,
        sampler=str(fields.get("sampler")),
        steps=_whole(fields, "steps", 1, MOST_STEPS),
        guidance=_number(fields, "guidance"),
        seed=_whole(fields, "seed", 0, MOST_SEED),
        resolution=_whole(fields, "size", 1, MOST_PX),
        width=None,
    )
    return Request(prompt, _whole(fields, "per-prompt", 1, MOST_PICTURES), settings)


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"--{name}: give a number")
    return float(value)


def _whole(fields: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = _number(fields, name)
    if value != int(value) or not least <= value <= most:
        raise UserError(f"--{name}: give a whole number from {least} to {most}")
    return int(value)


def field_of(message: str) -> tuple[str | None, str]:
    """(the field that an error's message is about, the message for a reader who sees the field)."""
    head, colon, rest = message.partition(": ")
    name = head.removeprefix("--")
    return (name, rest) if colon and head.startswith("--") and name in FIELDS else (None, message)
