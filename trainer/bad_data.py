"""Samples and shards that cannot be read: agreed on by all ranks, counted, and bounded."""

from collections import Counter
from collections.abc import Callable, Mapping

from data.batches import Batch
from data.loader import OF_SHARDS, Loader
from data.plan import SampleRef
from trainer import metric_names
from trainer.config import DataConfig
from trainer.errors import UserError
from trainer.metrics import Exporter
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
    ) -> None:
        """`name_of_shard`: given the dataset's name and the shard's number; for messages."""
        self._config, self._world, self._exporter, self._reports = config, world, exporter, reports
        self._name_of_shard = name_of_shard
        self._substitutions: dict[SampleRef, tuple[SampleRef, str]] = {}
        self._shards: dict[tuple[str, int], str] = {}
        self._of_shards: Counter[str] = Counter()
        """Samples replaced because of their shards, by reason."""

    def add(self, batch: Batch) -> None:
        """What the maker of this rank's batch came upon."""
        self._shards |= batch.bad_shards
        for s in batch.substitutions:
            if s.reason in OF_SHARDS:  # replaced in every epoch by what follows from the sample: nothing to remember
                self._of_shards[s.reason] += 1
            else:
                self._substitutions[s.bad] = (s.used, s.reason)

    def agree(self, progress: Progress, loader: Loader | None) -> None:
        """All ranks learn of what any came upon since the last call, and stop together when it is too much. A collective.

        Raises:
            UserError: more than data.max_bad_samples or data.max_bad_shards.
        """
        found = self._world.gather((self._substitutions, self._shards, self._of_shards))
        self._substitutions, self._shards, self._of_shards = {}, {}, Counter()
        for _, _, counts in found:
            for reason, count in counts.items():
                self._exporter.of(metric_names.BAD_SAMPLES, reason).inc(count)
        self._agree_on_shards({k: v for _, shards, _ in found for k, v in shards.items()}, progress)
        if loader:
            loader.leave_out(progress.bad_shards)
        self._agree_on_samples({bad: used for samples, _, _ in found for bad, used in samples.items()}, progress)

    def _agree_on_shards(self, found: Mapping[tuple[str, int], str], progress: Progress) -> None:
        known, name = progress.bad_shards, self._name_of_shard
        for shard, reason in sorted(found.items()):
            if shard not in known:
                known[shard] = reason
                self._reports.note(
                    f"WARNING: {name(*shard)} cannot be read ({reason}): its samples are replaced by others"
                )
        self._exporter.of(metric_names.BAD_SHARDS).set(len(known))
        limit = self._config.max_bad_shards
        if len(known) > limit:
            listed = [f"{name(*shard)} ({reason})" for shard, reason in sorted(known.items())]
            more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            raise UserError(
                f"data.max_bad_shards: {len(known)} shards cannot be read, the limit is {limit}: "
                f"{', '.join(listed[:_LISTED])}{more}; upload them again and check with `loupe data verify`, or raise the limit"
            )

    def _agree_on_samples(self, found: Mapping[SampleRef, tuple[SampleRef, str]], progress: Progress) -> None:
        known = progress.substitutions
        for bad, (used, reason) in found.items():
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
