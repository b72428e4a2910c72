"""When is a checkpoint one, which is taken, which is deleted. The format: docs/checkpoint-format.md.

A save goes: new directory, shards and index, manifest, sizes verified, COMMIT. Before COMMIT it does not exist for
anyone; after it, it is never written to again (marks beside its objects excepted).
"""

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from trainer.checkpoint import folder as names
from trainer.checkpoint.collective import Ranks, error_of_ranks
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.records import (
    COMMIT_LIMIT,
    INDEX_LIMIT,
    MANIFEST_LIMIT,
    Index,
    Manifest,
    ObjectRecord,
    check_sizes,
    commit_for,
    dump,
    parse_commit,
    parse_index,
    parse_manifest,
    xxh64,
)
from trainer.checkpoint.storage import DTYPE_NAMES, ShardReader, ShardWriter, refuse_all_but_tensors
from trainer.errors import UserError

log = logging.getLogger(__name__)


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


class CheckpointManager:
    """Checkpoints of one run, under `url`. `save` and `restore` are collective over `process_group` (default: all
    ranks; one process where torch.distributed is not initialised); the rest is for any one process.

    Args:
        keep_last: newest checkpoints that retention leaves, at least 2.
        config_digest: a checkpoint of another is refused, not loaded; None takes any, for reading alone.
        code_version: written down, not compared.
        process_group: must carry CPU objects, as gloo does.
    """

    def __init__(
        self,
        url: str,
        *,
        keep_last: int,
        config_digest: str | None,
        code_version: str,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep_last < 2:
            raise UserError(
                f"checkpoint.keep_last: at least 2, so one damaged checkpoint never ends a run; got {keep_last}"
            )
        self.folder = CheckpointFolder(url)
        self._keep_last, self._config_digest, self._code_version = keep_last, config_digest, code_version
        self._ranks = Ranks(process_group)

    # ---------------------------------------------------------------------------------------------------- save

    def save(
        self, tensors: Mapping[str, torch.Tensor], *, step: int, images_seen: int, state: Mapping[str, Any]
    ) -> str:
        """Write a checkpoint, and delete what retention no longer keeps. Returns its URL once it is durable.

        Args:
            tensors: the same keys on every rank; DTensors, or plain tensors that are equal on all ranks.
            state: JSON; rank 0's is stored.

        Raises, on every rank, and then there is no checkpoint:
            UserError: storage is full or may not be written; something is not a tensor, `state` is not JSON.
            CheckpointError: storage failed otherwise.
        """
        digest = self._config_digest
        assert digest is not None, "a manager without a config's digest only reads"
        self._ranks.on_all(lambda: _check_given(tensors, state))
        checkpoint = self._ranks.on_rank_0(lambda: self.folder.make(step))
        writer = ShardWriter(self.folder, checkpoint)
        try:
            with _dcp_errors(self._ranks):
                dcp.save(
                    {name: tensor.detach() for name, tensor in tensors.items()},
                    storage_writer=writer,
                    planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=self._ranks.group,
                    no_dist=not self._ranks.distributed,
                )
            self._ranks.on_rank_0(lambda: self._commit(checkpoint, writer.objects, digest, step, images_seen, state))
        except (UserError, CheckpointError):
            if self._ranks.rank == 0:
                self._remove("what the failed save left", checkpoint)
            raise
        if self._ranks.rank == 0:
            self._retain(checkpoint)
        return self.folder.url_of(checkpoint)

    def _commit(
        self,
        checkpoint: str,
        objects: tuple[ObjectRecord, ...],
        digest: str,
        step: int,
        images_seen: int,
        state: Mapping[str, Any],
    ) -> None:
        world_size, version = self._ranks.world_size, self._code_version
        manifest = dump(Manifest(step, images_seen, world_size, digest, version, dict(state), objects))
        if len(manifest) > MANIFEST_LIMIT:
            raise UserError(f"checkpoint: `state` makes the manifest {len(manifest)} bytes; {MANIFEST_LIMIT} at most")
        self.folder.write(f"{checkpoint}/{names.MANIFEST}", manifest)
        expected = (*((o.path, o.bytes) for o in objects), (names.MANIFEST, len(manifest)))
        sizes = self.folder.sizes(checkpoint)
        for path, size in expected:
            if sizes.get(path) != size:
                raise CheckpointError(
                    f"{self.folder.url_of(checkpoint)}/{path}: {sizes.get(path, 'no')} bytes after writing {size}"
                )
        self.folder.write(f"{checkpoint}/{names.COMMIT}", commit_for(manifest))

    # ------------------------------------------------------------------------------------------------- restore

    def restore(
        self, tensors: Mapping[str, torch.Tensor], *, on_set_aside: Callable[[str, str], None] | None = None
    ) -> Restored | None:
        """Load the newest checkpoint that verifies into `tensors`, in place; None where there has never been one.

        Args:
            tensors: exactly those that were saved, in any layout over any number of ranks.
            on_set_aside: told the URL and the reason of each damaged checkpoint, on rank 0.

        Raises, on every rank:
            UserError: the newest whole checkpoint is of another config, format version or set of tensors; or all are
                damaged, which must not look like a fresh start.
            CheckpointError: storage failed. The tensors may then be partly overwritten.
        """
        self._ranks.on_all(lambda: _check_given(tensors, {}))
        while True:
            chosen = self._ranks.on_rank_0(lambda: self._newest_whole(on_set_aside))
            if chosen is None:
                return None
            checkpoint, manifest, index_data = chosen
            try:
                self._load(checkpoint, manifest, index_data, tensors)
            except CorruptCheckpoint as e:
                # The same on all ranks, whichever met it. The next one overwrites all that this one has loaded.
                aside = partial(self._set_aside, checkpoint, str(e), on_set_aside)
                self._ranks.on_rank_0(aside)
            else:
                return Restored(self.folder.url_of(checkpoint), manifest.step, manifest.state)

    def _load(
        self, checkpoint: str, manifest: Manifest, index_data: bytes, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        where = self.folder.url_of(checkpoint)
        # The same bytes on every rank, so that no two can disagree about what is stored where.
        index = self._ranks.on_all(lambda: parse_index(index_data, manifest, f"{where}/{names.INDEX}"))
        self._ranks.on_all(lambda: _check_same_tensors(index, tensors, where))
        with _dcp_errors(self._ranks):
            dcp.load(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_reader=ShardReader(self.folder, checkpoint, index),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._ranks.group,
                no_dist=not self._ranks.distributed,
            )

    def _newest_whole(self, on_set_aside: Callable[[str, str], None] | None) -> tuple[str, Manifest, bytes] | None:
        """The newest checkpoint whose records verify and whose objects have their sizes, with its unparsed index."""
        entries = self.folder.entries()
        for entry in reversed(entries):
            if entry.committed:
                try:
                    manifest = self._manifest(entry)
                    return entry.name, manifest, self._index_data(entry, manifest)
                except CorruptCheckpoint as e:
                    self._set_aside(entry.name, str(e), on_set_aside)
        damaged = [entry for entry in self.folder.entries() if entry.set_aside]
        if damaged:
            raise UserError(
                f"{self.folder.url}: all {len(damaged)} checkpoints are damaged and set aside, newest step "
                f"{damaged[-1].step}; mend one and remove its {names.SET_ASIDE}, or start over with --fresh"
            )
        return None

    def _manifest(self, entry: Entry) -> Manifest:
        where = self.folder.url_of(entry.name)
        commit_data = self.folder.read_small(
            f"{entry.name}/{names.COMMIT}", size=entry.sizes[names.COMMIT], limit=COMMIT_LIMIT
        )
        commit = parse_commit(commit_data, f"{where}/{names.COMMIT}")
        if entry.sizes.get(names.MANIFEST) != commit.manifest_bytes:
            raise CorruptCheckpoint(
                f"{where}/{names.MANIFEST}: {entry.sizes.get(names.MANIFEST, 'no')} bytes, "
                f"{commit.manifest_bytes} were written"
            )
        data = self.folder.read_small(
            f"{entry.name}/{names.MANIFEST}", size=commit.manifest_bytes, limit=MANIFEST_LIMIT
        )
        manifest = parse_manifest(data, commit, f"{where}/{names.MANIFEST}")
        if self._config_digest is not None and manifest.config_digest != self._config_digest:
            raise UserError(
                f"{where}: written by a run of config {manifest.config_digest}, this run's is {self._config_digest}; "
                "continue with that run's config, or take another run folder"
            )
        check_sizes(manifest.objects, entry.sizes, where)
        return manifest

    def _index_data(self, entry: Entry, manifest: Manifest) -> bytes:
        """Verified already here, so that a damaged index is found before other ranks are sent it."""
        name = f"{entry.name}/{names.INDEX}"
        data = self.folder.read_small(name, size=entry.sizes[names.INDEX], limit=INDEX_LIMIT)
        expected = next(record.xxh64 for record in manifest.objects if record.path == names.INDEX)
        if xxh64(data) != expected:
            raise CorruptCheckpoint(f"{self.folder.url_of(name)}: its checksum does not match the manifest")
        return data

    def _set_aside(self, checkpoint: str, reason: str, on_set_aside: Callable[[str, str], None] | None) -> None:
        """Mark it with an object of its own: object stores cannot rename, and the evidence stays as it is."""
        url = self.folder.url_of(checkpoint)
        log.error("checkpoint %s does not verify and is set aside: %s", url, reason)
        mark = {"reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.folder.write(f"{checkpoint}/{names.SET_ASIDE}", json.dumps(mark, indent=1).encode() + b"\n")
        if on_set_aside:
            on_set_aside(url, reason)

    # ----------------------------------------------------------------------------------- listing, holds, retention

    def list(self) -> "list[CheckpointInfo]":
        """Committed checkpoints that are not set aside, newest last."""
        return [
            CheckpointInfo(self.folder.url_of(entry.name), entry.step, entry.holds)
            for entry in self.folder.entries()
            if entry.committed
        ]

    def verify(self, path: str) -> None:
        """Read a whole checkpoint and compare every object with its checksum.

        Raises:
            CorruptCheckpoint: naming the object.
            UserError: there is no such checkpoint, or it is another config's.
        """
        entry = self._entry(path)
        manifest = self._manifest(entry)
        for record in manifest.objects:
            name = f"{entry.name}/{record.path}"
            if self.folder.checksum(name, record.bytes) != record.xxh64:
                raise CorruptCheckpoint(f"{self.folder.url_of(name)}: its checksum does not match the manifest")
        parse_index(self._index_data(entry, manifest), manifest, f"{path}/{names.INDEX}")

    def hold(self, path: str, name: str) -> None:
        """Keep a checkpoint from retention, for as long as something called `name` reads it; `release` ends it."""
        entry = self._entry(path)
        self.folder.write(f"{entry.name}/{_hold_object(name)}", b"")

    def release(self, path: str, name: str) -> None:
        entry = self._entry(path)
        if name in entry.holds:
            self.folder.remove_object(f"{entry.name}/{_hold_object(name)}")

    def _entry(self, path: str) -> Entry:
        for entry in self.folder.entries():
            if self.folder.url_of(entry.name) == path and entry.committed:
                return entry
        raise UserError(f"{path}: no committed checkpoint of {self.folder.url}")

    def _retain(self, just_written: str) -> None:
        """Delete what a newer checkpoint has made needless. The new one is durable, so a failure here is only told."""
        try:
            entries = self.folder.entries()
        except (UserError, CheckpointError) as e:
            log.warning("old checkpoints were not looked through: %s", e)
            return
        committed = [entry for entry in entries if entry.committed]
        kept = committed[-self._keep_last :]
        step = next(entry.step for entry in entries if entry.name == just_written)
        for entry in entries:
            if entry.holds or entry in kept or entry.name == just_written:
                continue
            if entry.set_aside:  # evidence, until every kept checkpoint is newer
                needless = len(kept) == self._keep_last and entry.step < kept[0].step
            elif entry.committed:
                needless = True
            else:  # an earlier attempt's that never came to its COMMIT; a newer one may be being written
                needless = entry.step <= step
            if needless:
                self._remove("an old checkpoint", entry.name)

    def _remove(self, what: str, checkpoint: str) -> None:
        try:
            self.folder.remove(checkpoint)
        except (UserError, CheckpointError) as e:
            log.warning("%s could not be removed: %s", what, e)


def _hold_object(name: str) -> str:
    if not names.HOLD_NAME.fullmatch(name):
        raise UserError(f"hold {name!r}: a name of letters, digits, '_', '.' and '-'")
    return names.HOLD_PREFIX + name


def _check_given(tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    for name, value in tensors.items():
        refuse_all_but_tensors(name, value)
    try:
        back = json.loads(json.dumps(dict(state), allow_nan=False))
    except (TypeError, ValueError) as e:
        raise UserError(f"checkpoint: `state` is not JSON ({e})") from None
    for key, value in state.items():
        if back.get(key) != value:
            raise UserError(
                f"checkpoint: state.{key} does not survive JSON; use lists, and dicts whose keys are strings"
            )


def _check_same_tensors(index: Index, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Everything that the run has must be in the checkpoint, in its shape and type, and nothing else."""
    only_stored, only_run = sorted(set(index.tensors) - set(tensors)), sorted(set(tensors) - set(index.tensors))
    if only_stored or only_run:
        raise UserError(
            f"{where}: the checkpoint has {_some(only_stored)} that this run lacks, this run has {_some(only_run)} "
            "that the checkpoint lacks; continue with the code and config that wrote it, or take another run folder"
        )
    for name, tensor in tensors.items():
        stored = index.tensors[name]
        if (stored.dtype, stored.size) != (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)):
            raise UserError(
                f"{where}: {name} is {stored.dtype} {list(stored.size)} in the checkpoint and "
                f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} in this run; continue with the code and config that "
                "wrote it, or take another run folder"
            )


def _some(tensor_names: "list[str]") -> str:
    if not tensor_names:
        return "no tensor"
    more = f" and {len(tensor_names) - 3} more" if len(tensor_names) > 3 else ""
    return ", ".join(tensor_names[:3]) + more


@contextlib.contextmanager
def _dcp_errors(ranks: Ranks) -> Iterator[None]:
    """DCP's own exception is a BaseException that holds one error a rank: raise the same ordinary one on all."""
    with warnings.catch_warnings():
        if not ranks.distributed:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as e:
            own = e.failures.get(ranks.rank)
            if own and not isinstance(own[0], Exception):  # an interrupt, which DCP has caught as well
                raise own[0] from None
            raise error_of_ranks({rank: error for rank, (error, _trace) in e.failures.items()}) from e
