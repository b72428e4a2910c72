"""What a run has become, beside its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.batches import LeftOut, ShardKey
from data.plan import SampleRef
from trainer import bad_shards


@dataclass
class Progress:
    """Saved in the checkpoint; the same on every rank."""

    step: int = 0
    """Steps done: the next one to do."""
    images: int = 0
    steps_skipped: int = 0
    """Not finite, or spikes."""
    skipped_in_a_row: int = 0
    """Not finite; a spike neither counts nor ends the row."""
    init_from: str | None = None
    """URL of the weights that the run began with, where they were another's."""
    roll_backs: int = 0
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    """(step, images) of each roll back: from that step on the stream is so many images further."""
    train_seconds: float = 0.0
    """Time in the steps that stand, over all attempts: not of those that a crash or a roll back has lost, nor of saving and
    sampling."""
    substitutions: dict[SampleRef, SampleRef] = field(default_factory=dict)
    """Undecodable samples and what stands in for them, so that a resume trains on the very same images."""
    bad_shards: dict[ShardKey, LeftOut] = field(default_factory=dict)
    """That could not be read, why, and from which step on they are left out. What stands in for a sample of one follows from
    the sample and from which shards these are."""

    def to_json(self) -> dict[str, Any]:
        pairs = [[bad.dataset, bad.index, used.dataset, used.index] for bad, used in self.substitutions.items()]
        shards = bad_shards.to_json(self.bad_shards)
        passed_over = [list(item) for item in self.passed_over]
        return {**self.__dict__, "substitutions": pairs, "passed_over": passed_over, "bad_shards": shards}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Progress":
        pairs = {SampleRef(a, i): SampleRef(b, j) for a, i, b, j in tree["substitutions"]}
        passed_over = [(step, images) for step, images in tree["passed_over"]]
        # absent in checkpoints that were written before there was such a thing
        shards = bad_shards.from_json(tree.get("bad_shards", []))
        return cls(**{**tree, "substitutions": pairs, "passed_over": passed_over, "bad_shards": shards})
