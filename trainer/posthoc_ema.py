"""Averages of a width that was not kept while training, from a run's snapshots (Karras et al. 2024, section 3.2).
The mathematics: `trainer.power_profiles`; who writes them: `trainer.ema_snapshots`.

Nothing here is a collective: each process reads for itself, one tensor's snapshots at a time beside the sum.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint import retention
from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import INDEX, CheckpointFolder, Entry
from trainer.checkpoint.manifests import read_manifest
from trainer.checkpoint.reading import load, read_index
from trainer.checkpoint.records import ITEM_BYTES, Index, Manifest, TensorRecord, parse_index
from trainer.checkpoint.retention import unique_hold
from trainer.checkpoint.storage import DTYPES
from trainer.errors import UserError
from trainer.power_profiles import combine, exponent
from trainer.run_folder import EMA_SNAPSHOTS, RunFolder
from trainer.train_state import profile_prefix

log = logging.getLogger(__name__)

MOST_ERROR = 0.1
"""Of a profile: one that is farther from what was asked for is refused."""
NEGLIGIBLE = 1e-6
"""Of the largest weight: a stored average of less is not read. float16 rounds by more."""
MODEL = "model."
"""What a snapshot holds beside averages, as the model had it: buffers."""
PART_BYTES = 512 << 20
"""Of a snapshot's tensors that are read at a time."""
READERS = 8
"""Snapshots whose records are read at once."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A snapshot whose records verify."""

    entry: Entry
    manifest: Manifest
    widths: tuple[float, ...]

    @property
    def step(self) -> int:
        return self.entry.step

    @property
    def bytes_each(self) -> int:
        """Of one of its averages."""
        return sum(record.bytes for record in self.manifest.objects if record.path != INDEX) // len(self.widths)


@dataclass(frozen=True)
class Plan:
    """How to make one average."""

    width: float
    """sigma_rel."""
    step: int
    error: float
    """Of its profile, relative."""
    amplification: float
    """By which the rounding of what is stored comes through."""
    parts: tuple[tuple[Stored, float, float], ...]
    """(snapshot, width of one of its averages, weight), by step."""

    @property
    def num_snapshots(self) -> int:
        return len({stored.step for stored, _, _ in self.parts})

    @property
    def num_bytes(self) -> int:
        """To read."""
        return sum(stored.bytes_each for stored, _, _ in self.parts)


def tensors(run_url: str, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of width `sigma_rel` after `step` steps (None: at the newest snapshot): the model's parameters by their
    names, float32, and its buffers, on the CPU.

    Raises:
        UserError: no snapshots, none so late, or none that this width can be made of; one is damaged.
        CheckpointError: storage failed.
    """
    averages = StoredAverages(run_url)
    return dict(averages.read(averages.plan(sigma_rel, step)))


class StoredAverages:
    """Of a run, as they are listed now."""

    def __init__(self, run_url: str) -> None:
        """
        Raises:
            UserError: there are none.
        """
        self.url = RunFolder(run_url).url
        self._folder = CheckpointFolder(f"{self.url}/{EMA_SNAPSHOTS}")
        self.damaged: list[str] = []
        """Why some are left out, a line each."""
        committed = [entry for entry in self._folder.entries() if entry.committed]
        by_step: dict[int, Stored] = {}
        with ThreadPoolExecutor(READERS, "snapshots") as pool:  # of storage far away each takes its time
            for found in pool.map(self._opened, committed):
                if isinstance(found, Stored):
                    by_step[found.step] = found
                    continue
                self.damaged.append(found)
                log.warning("a snapshot does not verify and is left out: %s", found)
        self.stored = [by_step[step] for step in sorted(by_step)]
        if not self.stored:
            why = f" ({self.damaged[0]})" if self.damaged else ""
            raise UserError(
                f"{self.url}: no snapshots of averages{why}; a training writes them whose config has ema.profiles "
                "and ema.snapshot_steps"
            )

    def _opened(self, entry: Entry) -> Stored | str:
        """A text where it is left out, which says why."""
        try:
            manifest = read_manifest(self._folder, entry)
        except CorruptCheckpoint as e:
            return str(e)
        listed = manifest.state.get("profiles")
        if not isinstance(listed, list) or not listed or not all(isinstance(width, float) for width in listed):
            raise UserError(
                f"{self._folder.url_of(entry.name)}: its manifest names no profiles; it is no snapshot of averages"
            )
        return Stored(entry, manifest, tuple(listed))

    def plan(
        self, width: float, step: int | None = None, *, most_error: float = MOST_ERROR, width_field: str = "sigma_rel",
        step_field: str = "step",
    ) -> Plan:  # fmt: skip
        """
        Args:
            width_field, step_field: what the user has given them by, for messages.

        Raises:
            UserError: no snapshot so late, or the profile's error is more than `most_error`.
        """
        newest = self.stored[-1].step
        step = newest if step is None else step
        # later ones hold nothing of these steps that these do not
        usable = [stored for stored in self.stored if stored.step <= step]
        if step > newest or not usable:
            raise UserError(
                f"{step_field} {step}: snapshots of {self.url} are of steps {self.stored[0].step} to {newest}; take one within"
            )
        exponent(width, width_field)
        averages = [(stored, kept) for stored in usable for kept in stored.widths]
        found = combine([stored.step for stored, _ in averages], [kept for _, kept in averages], step, width)
        if not found.error <= most_error:
            raise UserError(
                f"{width_field} {width:g} at step {step}: the nearest of {len(usable)} snapshots is off by {found.error:.0%}; "
                "take a width nearer to those of ema.profiles, a step that has a snapshot, or a run with more of them"
            )
        kept_N = abs(found.weights_N) >= NEGLIGIBLE * abs(found.weights_N).max()
        whole = found.weights_N[kept_N].sum()
        parts = tuple(
            (*average, float(weight / whole))
            for average, weight, kept in zip(averages, found.weights_N, kept_N, strict=True)
            if kept
        )
        return Plan(width, step, found.error, found.amplification, parts)

    # ---------------------------------------------------------------------------------------------------------- reading

    def records(self) -> dict[str, TensorRecord]:
        """Names and shapes of what `read` gives, by the newest snapshot."""
        newest = self.stored[-1]
        index, prefix = self._index(newest), profile_prefix(newest.widths[0])
        found = {name.removeprefix(prefix): record for name, record in index.tensors.items() if name.startswith(prefix)}
        return found | {
            name.removeprefix(MODEL): record for name, record in index.tensors.items() if name.startswith(MODEL)
        }

    def read(
        self, plan: Plan, names: Sequence[str] | None = None, *, on_read: Callable[[int], None] = lambda num_bytes: None
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, those asked for or all. Memory: as much as they take in float32, and a part of a snapshot.

        Args:
            on_read: told how many bytes of averages have been read since the last call.

        Raises:
            UserError: a snapshot is damaged; or what comes of them is not finite.
            CheckpointError: storage failed.
        """
        records = self.records()
        names = list(records) if names is None else names
        newest = self._index(self.stored[-1])
        buffers = [name for name in names if f"{MODEL}{name}" in newest.tensors]
        averaged = [name for name in names if name not in set(buffers)]
        sums = {name: torch.zeros(records[name].size, dtype=torch.float32) for name in averaged}
        for stored in dict.fromkeys(stored for stored, _, _ in plan.parts):
            weights = {width: weight for other, width, weight in plan.parts if other is stored}
            with self._held(stored):
                index = self._index(stored)
                for part in _in_parts(averaged, records):
                    for width, weight in weights.items():
                        prefix = profile_prefix(width)
                        found = self._load(stored, index, [f"{prefix}{name}" for name in part])
                        for name in part:
                            sums[name].add_(found[f"{prefix}{name}"], alpha=weight)
                        on_read(sum(tensor.nbytes for tensor in found.values()))
        kept = self._load(self.stored[-1], newest, [f"{MODEL}{name}" for name in buffers]) if buffers else {}
        for name in names:
            tensor = kept[f"{MODEL}{name}"] if name in set(buffers) else sums.pop(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{self.url}: {name} of the average is not finite, so a snapshot's is not; look at the run's "
                                "metrics")  # fmt: skip
            yield name, tensor

    def _index(self, stored: Stored) -> Index:
        where = f"{self._folder.url_of(stored.entry.name)}/{INDEX}"
        try:
            return parse_index(read_index(self._folder, stored.entry, stored.manifest), stored.manifest, where)
        except CorruptCheckpoint as e:
            raise _damaged(e) from e

    def _load(self, stored: Stored, index: Index, names: Sequence[str]) -> dict[str, Tensor]:
        where = self._folder.url_of(stored.entry.name)
        if lost := [name for name in names if name not in index.tensors]:
            raise UserError(
                f"{where}: has no {lost[0]} ({len(lost)} such), which other snapshots have; remove its folder"
            )
        found = {name: torch.empty(index.tensors[name].size, dtype=DTYPES[index.tensors[name].dtype]) for name in names}
        try:
            load(self._folder, _Alone(), stored.entry.name, index, found)
        except CorruptCheckpoint as e:
            raise _damaged(e) from e
        return found

    @contextlib.contextmanager
    def _held(self, stored: Stored) -> Iterator[None]:
        """Kept from a live run's retention, where the folder may be written."""
        name = unique_hold("posthoc-ema")
        try:
            retention.hold(self._folder, stored.entry, name)
        except CorruptCheckpoint as e:
            raise UserError(f"{e}; try again") from e
        except (UserError, CheckpointError) as e:  # someone else's run; checksums tell if it goes while it is read
            log.warning("snapshot %s is read without being held: %s", stored.entry.name, e)
        try:
            yield
        finally:
            retention.release(self._folder, stored.entry.name, name)


class _Alone(Ranks):
    """This process, whatever group it is in."""

    def __init__(self) -> None:
        self.distributed, self.group, self.rank, self.world_size = False, None, 0, 1


def _damaged(error: CorruptCheckpoint) -> UserError:
    return UserError(f"a snapshot is damaged ({error}); remove its folder, and the others take its place")


def _in_parts(names: Iterable[str], records: dict[str, TensorRecord]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        num_bytes = math.prod(records[name].size) * ITEM_BYTES["F32"]
        if part and size + num_bytes > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += num_bytes
    if part:
        yield part
