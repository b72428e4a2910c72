"""Which shards a run has left out, and from which step on, beside its checkpoints.

A checkpoint holds what was known when it was saved. What is found later is recorded here before any step is trained without
it: a start from that checkpoint then leaves the shard out from the very same step on, and not before.
"""

from collections.abc import Mapping
from typing import Any

from data.batches import OF_SHARDS, LeftOut, ShardKey
from trainer.errors import UserError
from trainer.parallel.world import World
from trainer.run_folder import BAD_SHARDS, RunFolder


def to_json(bad_shards: Mapping[ShardKey, LeftOut]) -> list[list[Any]]:
    return [[dataset, shard, how.reason, how.since] for (dataset, shard), how in sorted(bad_shards.items())]


def from_json(entries: Any) -> dict[ShardKey, LeftOut]:
    """
    Raises:
        ValueError: not what `to_json` makes.
    """
    found = {}
    for entry in entries:
        # checkpoints had no step here once: those shards were left out since an earlier one than is saved
        dataset, shard, reason, since = (*entry, 0) if len(entry) == 3 else entry
        if not (isinstance(dataset, str) and type(shard) is int and type(since) is int and reason in OF_SHARDS):
            raise ValueError(f"{entry!r} is no shard, reason and step")
        found[dataset, shard] = LeftOut(reason, since)
    return found


class BadShardRecord:
    def __init__(self, folder: RunFolder, digest: str) -> None:
        """`digest`: of config and datasets. A record of others says nothing about these."""
        self._folder, self._digest = folder, digest

    def read(self, world: World) -> dict[ShardKey, LeftOut]:
        """What was recorded last; on every rank alike. A collective.

        Raises:
            UserError: the file is damaged.
        """
        found: dict[ShardKey, LeftOut] | str = {}
        if world.is_main and self._folder.exists(BAD_SHARDS):
            try:
                tree = self._folder.read_json(BAD_SHARDS)
                if tree.get("digest") == self._digest:
                    found = from_json(tree["shards"])
            except (ValueError, KeyError, TypeError) as e:
                found = f"{self._folder.url}/{BAD_SHARDS}: is damaged ({e}); remove it, and bad shards are found anew"
        found = world.broadcast(found)
        if isinstance(found, str):
            raise UserError(found)
        return found

    def write(self, bad_shards: Mapping[ShardKey, LeftOut], world: World) -> None:
        """Returns on every rank when it is durable. A collective."""
        if world.is_main:
            self._folder.write_json(BAD_SHARDS, {"digest": self._digest, "shards": to_json(bad_shards)})
        world.barrier()
