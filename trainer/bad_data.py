"""Samples and shards that cannot be read: agreed on by all ranks, counted, and bounded."""

from collections import Counter
from collections.abc import Callable, Mapping

from data.batches import OF_SHARDS, Batch, LeftOut, ShardKey
from data.loader import Loader
from data.plan import SampleRef
from trainer import metric_names
from trainer.bad_shards import BadShardRecord
from trainer.config import DataConfig
from trainer.errors import UserError
from trainer.exporter import Exporter
from trainer.parallel.world import World
from trainer.progress import Progress
from trainer.reports import Reports

_LISTED = 8
"""Shards that an error names."""


class BadData:
    def __init__(
        self,
        config: DataConfig,
        world: World,
        exporter: Exporter,
        reports: Reports,
        name_of_shard: Callable[[str, int], str],
        record: BadShardRecord | None = None,
    ) -> None:
        """
        Args:
            name_of_shard: given the dataset's name and the shard's number; for messages.
            record: what starts from an earlier checkpoint go by, or from none.
        """
        self._config, self._world, self._exporter, self._reports = config, world, exporter, reports
        self._name_of_shard, self._record = name_of_shard, record
        self._substitutions: dict[SampleRef, tuple[SampleRef, str]] = {}
        self._of_shards: Counter[str] = Counter()
        """Samples replaced because of their shards, by reason."""

    def recall(self, progress: Progress) -> None:
        """Add the shards that were found bad after what `progress` was restored from. A collective."""
        if self._record:
            for shard, how in self._record.read(self._world).items():
                known = progress.bad_shards.get(shard)
                if known is None or how.since < known.since:
                    progress.bad_shards[shard] = how
        self._exporter.of(metric_names.BAD_SHARDS).set(len(progress.bad_shards))

    def none_is_new(self, batch: Batch, progress: Progress, loader: Loader) -> bool:
        """Whether all ranks may train on their parts of a step's batch: none came upon a shard that cannot be read and that
        not all know of. Else that is agreed on and recorded, and the loader makes the batch again. A collective.

        Raises:
            UserError: more than data.max_bad_shards.
        """
        if not self._world.any(bool(batch.bad_shards)):
            return True
        self._exporter.add(batch.counts)
        # sorted: what several ranks came upon in different ways has one reason
        found = sorted(item for shards in self._world.gather(dict(batch.bad_shards)) for item in shards.items())
        known = progress.bad_shards
        for shard, reason in found:
            if shard not in known or batch.step < known[shard].since:
                known[shard] = LeftOut(reason, since=batch.step)
                self._reports.note(
                    f"WARNING: {self._name_of_shard(*shard)} cannot be read ({reason}): its samples are replaced by others "
                    f"from step {batch.step} on"
                )
        self._exporter.of(metric_names.BAD_SHARDS).set(len(known))
        self._check_limit(known)
        if self._record:
            self._record.write(known, self._world)
        loader.leave_out(known)
        return False

    def _check_limit(self, known: Mapping[ShardKey, LeftOut]) -> None:
        limit = self._config.max_bad_shards
        if len(known) > limit:
            listed = [f"{self._name_of_shard(*shard)} ({how.reason})" for shard, how in sorted(known.items())]
            more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            raise UserError(
                f"data.max_bad_shards: {len(known)} shards cannot be read, the limit is {limit}: "
                f"{', '.join(listed[:_LISTED])}{more}; upload them again and check with `loupe data verify`, or raise the limit"
            )

    def add(self, batch: Batch) -> None:
        """What the maker of this rank's batch has replaced."""
        for s in batch.substitutions:
            if s.reason in OF_SHARDS:  # replaced in every epoch by what follows from the sample: nothing to remember
                self._of_shards[s.reason] += 1
            else:
                self._substitutions[s.bad] = (s.used, s.reason)

    def agree(self, progress: Progress) -> None:
        """All ranks learn which samples any has replaced since the last call, and stop together when it is too much. A
        collective.

        Raises:
            UserError: more than data.max_bad_samples.
        """
        found = self._world.gather((self._substitutions, self._of_shards))
        self._substitutions, self._of_shards = {}, Counter()
        for _, counts in found:
            for reason, count in counts.items():
                self._exporter.of(metric_names.BAD_SAMPLES, reason).inc(count)
        known = progress.substitutions
        for bad, (used, reason) in (item for samples, _ in found for item in samples.items()):
            if bad not in known:
                known[bad] = used
                self._exporter.of(metric_names.BAD_SAMPLES, reason).inc()
                self._reports.print(
                    f"sample {bad.index} of {bad.dataset} is unreadable ({reason}): replaced by {used.index}"
                )
        limit = self._config.max_bad_samples
        if len(known) > limit:
            raise UserError(
                f"data.max_bad_samples: {len(known)} samples were unreadable, the limit is {limit}; check the dataset with "
                "`loupe data verify`, or raise the limit"
            )
