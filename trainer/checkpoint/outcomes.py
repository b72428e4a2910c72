"""What a checkpoint manager says of a save, a restore, and what there is. Values only."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Saved:
    path: str
    """URL of the checkpoint."""
    step: int
    time: float
    """When it was committed, Unix time."""
    seconds: float
    """From the begin of the save until then."""
    bytes: int
    """Of all its objects."""


@dataclass(frozen=True)
class Restored:
    path: str
    """URL of the checkpoint."""
    step: int
    state: dict[str, Any]
    """What the caller gave to `save`."""


@dataclass(frozen=True)
class CheckpointInfo:
    path: str
    """URL of the checkpoint."""
    step: int
    holds: tuple[str, ...]
    """Who keeps it from being deleted."""
