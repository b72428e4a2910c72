"""When is a checkpoint one, which is taken, which is deleted. The format: docs/checkpoint-format.md.

A save goes: new directory, shards and index, manifest, sizes verified, COMMIT. Before COMMIT it does not exist for
anyone; after it, it is never written to again (marks beside its objects excepted).
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from trainer.background import Background
from trainer.checkpoint import folder as names
from trainer.checkpoint import retention
from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.host_copy import HostCopy
from trainer.checkpoint.manifests import read_manifest
from trainer.checkpoint.opened import verify
from trainer.checkpoint.outcomes import CheckpointInfo, Restored, Saved
from trainer.checkpoint.reading import Whole, check_same_tensors, dcp_errors, load, read_index
from trainer.checkpoint.records import MANIFEST_LIMIT, Index, Manifest, ObjectRecord, commit_for, dump, parse_index
from trainer.checkpoint.storage import ShardWriter, refuse_all_but_tensors
from trainer.errors import UserError

log = logging.getLogger(__name__)

Choice = Callable[[Index, str], Mapping[str, torch.Tensor]]
"""Given what a checkpoint holds, and its URL: the tensors to fill, by their names in it."""


class CheckpointManager:
    """Checkpoints of one run, under `url`. Saving and restoring are collective over `process_group` (default: all ranks;
    one process where torch.distributed is not initialised); the rest is for any one process.

    Args:
        keep_last: newest checkpoints that retention leaves, at least 2.
        config_digest: a checkpoint of another is refused, not loaded; None takes any and only reads: damaged
            checkpoints are passed over, not marked.
        code_version: written down, not compared.
        process_group: must carry CPU objects, as gloo does.
        background_group: another such group, which nobody else uses: saves in the background talk over it.
        explain: says in words how a checkpoint's config digest differs from this run's.
        may_commit: called on rank 0 before a save and before its COMMIT; raises CheckpointError where it must not be.
    """

    def __init__(
        self,
        url: str,
        *,
        keep_last: int,
        config_digest: str | None,
        code_version: str,
        process_group: dist.ProcessGroup | None = None,
        background_group: dist.ProcessGroup | None = None,
        explain: Callable[[str], str] | None = None,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        if keep_last < 2:
            raise UserError(
                f"checkpoint.keep_last: at least 2, so one damaged checkpoint never ends a run; got {keep_last}"
            )
        self.folder = CheckpointFolder(url)
        self._keep_last, self._config_digest, self._code_version = keep_last, config_digest, code_version
        self._explain, self._may_commit = explain, may_commit
        self._ranks = Ranks(process_group)
        own_group = background_group if self._ranks.world_size > 1 else process_group  # alone, nobody is in the way
        self._background_ranks = Ranks(own_group) if own_group or self._ranks.world_size == 1 else None
        self._background: Background[Saved] = Background("checkpoint")
        self._host_copy = HostCopy()
        self._finished: Saved | None = None
        self._passed_over: set[str] = set()

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
            What a save in the background before it raised.
        """
        self.finish()
        begun = time.monotonic()
        self._ranks.on_all(lambda: _check_given(tensors, state))
        self._finished = self._write(self._ranks, tensors, step, images_seen, state, begun)
        return self._finished.path

    def begin_save(
        self, tensors: Mapping[str, torch.Tensor], *, step: int, images_seen: int, state: Mapping[str, Any]
    ) -> None:
        """`save` in the background: when this returns, everything has been copied and may change. It waits for the one
        before. Needs memory on the host for this rank's part of the tensors, kept from one save to the next.

        Raises, on every rank: what a save in the background before it raised; UserError as `save`. What goes wrong
            afterwards shows in `failed`, and `finish` raises it.
        """
        self.finish()
        begun = time.monotonic()
        ranks = self._background_ranks
        assert ranks is not None, "saves in the background need a process group of their own"

        def copy() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            _check_given(tensors, state)
            return self._host_copy.take(tensors), json.loads(json.dumps(dict(state)))

        copied_tensors, copied_state = self._ranks.on_all(copy)
        self._background.start(partial(self._write, ranks, copied_tensors, step, images_seen, copied_state, begun))

    def poll(self) -> Saved | None:
        """The newest save, in the background or not, that was committed since the last call. Neither waits nor raises."""
        if not self._background.running and not self.failed:
            self._finished = self._background.collect() or self._finished
        finished, self._finished = self._finished, None
        return finished

    @property
    def failed(self) -> bool:
        """The save in the background has failed on this rank, as it did or will on all. Until `finish` is called."""
        return self._background.failed

    def finish(self) -> None:
        """Wait for the save in the background, if there is one; `poll` then tells of it.

        Raises, on every rank: as `save`.
        """
        self._finished = self._background.collect() or self._finished

    def settle(self, timeout_s: float) -> None:
        """Before a process ends with an error: let the save in the background end, but not for longer. Raises nothing."""
        self._background.wait(timeout_s)

    def _write(
        self,
        ranks: Ranks,
        tensors: Mapping[str, torch.Tensor],
        step: int,
        images_seen: int,
        state: Mapping[str, Any],
        begun: float,
    ) -> Saved:
        """`begun`: when the save was, by the monotonic clock."""
        digest = self._config_digest
        assert digest is not None, "a manager without a config's digest only reads"
        ranks.on_rank_0(self._may_commit)  # again before COMMIT: a save may take long
        checkpoint = ranks.on_rank_0(lambda: self.folder.make(step))
        writer = ShardWriter(self.folder, checkpoint)
        try:
            with dcp_errors(ranks):
                dcp.save(
                    {name: tensor.detach() for name, tensor in tensors.items()},
                    storage_writer=writer,
                    planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=ranks.group,
                    no_dist=not ranks.distributed,
                )
            num_bytes = ranks.on_rank_0(
                lambda: self._commit(checkpoint, writer.objects, digest, step, images_seen, state)
            )
        except (UserError, CheckpointError):
            if ranks.rank == 0:
                retention.remove(self.folder, "what the failed save left", checkpoint)
            raise
        saved = Saved(self.folder.url_of(checkpoint), step, time.time(), time.monotonic() - begun, num_bytes)
        if ranks.rank == 0:
            retention.retain(self.folder, checkpoint, self._keep_last)
        return saved

    def _commit(
        self,
        checkpoint: str,
        objects: tuple[ObjectRecord, ...],
        digest: str,
        step: int,
        images_seen: int,
        state: Mapping[str, Any],
    ) -> int:
        """Returns the size of all objects, in bytes."""
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
        self._may_commit()
        commit = commit_for(manifest)
        self.folder.write(f"{checkpoint}/{names.COMMIT}", commit)
        return sum(size for _, size in expected) + len(commit)

    # ------------------------------------------------------------------------------------------------- restore

    def restore(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        on_set_aside: Callable[[str, str], None] | None = None,
        hold: str | None = None,
    ) -> Restored | None:
        """Load the newest checkpoint that verifies into `tensors`, in place; None where there has never been one.

        Args:
            tensors: exactly those that were saved, in any layout over any number of ranks.
            on_set_aside: told the URL and the reason of each damaged checkpoint, on rank 0.
            hold: as whom to keep the checkpoint from retention while it is read.

        Raises, on every rank:
            UserError: the newest whole checkpoint is of another config, format version or set of tensors; or all are
                damaged, which must not look like a fresh start.
            CheckpointError: storage failed. The tensors may then be partly overwritten.
        """
        self.finish()
        self._ranks.on_all(lambda: _check_given(tensors, {}))

        def all_of_them(index: Index, where: str) -> Mapping[str, torch.Tensor]:
            check_same_tensors(index, tensors, where)
            return tensors

        return self.read(all_of_them, on_set_aside=on_set_aside, hold=hold)

    def read(
        self,
        choose: Choice,
        *,
        path: str | None = None,
        on_set_aside: Callable[[str, str], None] | None = None,
        hold: str | None = None,
    ) -> Restored | None:
        """As `restore`, for the tensors that `choose` takes of what the checkpoint has; only those are read.

        Args:
            path: URL of the one checkpoint to read. Absent: the newest that verifies.
        """
        while True:
            whole = self._ranks.on_rank_0(lambda: self._choose(path, on_set_aside, hold))
            if whole is None:
                return None
            try:
                self._load(whole, choose)
                return Restored(self.folder.url_of(whole.name), whole.manifest.step, whole.manifest.state)
            except CorruptCheckpoint as e:
                if path:
                    raise
                # The same on all ranks, whichever met it. The next one overwrites all that this one has loaded.
                aside = partial(self._set_aside, whole.name, str(e), on_set_aside)
                self._ranks.on_rank_0(aside)
            finally:
                if hold and self._ranks.rank == 0:
                    retention.release(self.folder, whole.name, hold)

    def _load(self, whole: Whole, choose: Choice) -> None:
        where = self.folder.url_of(whole.name)
        # The same bytes on every rank, so that no two can disagree about what is stored where.
        index = self._ranks.on_all(lambda: parse_index(whole.index_data, whole.manifest, f"{where}/{names.INDEX}"))
        load(self.folder, self._ranks, whole.name, index, self._ranks.on_all(lambda: choose(index, where)))

    def _choose(
        self, path: str | None, on_set_aside: Callable[[str, str], None] | None, hold: str | None
    ) -> Whole | None:
        """The checkpoint at `path`, or the newest whose records verify; held from here on."""
        if path:
            return self._whole(self._entry(path), hold)
        for entry in reversed(self.folder.entries()):
            if entry.committed and entry.name not in self._passed_over:
                try:
                    return self._whole(entry, hold)
                except CorruptCheckpoint as e:
                    self._set_aside(entry.name, str(e), on_set_aside)
        damaged = [e for e in self.folder.entries() if e.set_aside or e.name in self._passed_over]
        if damaged:
            fresh = "" if self._config_digest is None else ", or start over with --fresh"
            raise UserError(
                f"{self.folder.url}: all {len(damaged)} checkpoints are damaged and set aside, newest step "
                f"{damaged[-1].step}; mend one and remove its {names.SET_ASIDE}{fresh}"
            )
        return None

    def _whole(self, entry: Entry, hold: str | None) -> Whole:
        if hold:
            try:
                entry = retention.hold(self.folder, entry, hold)
            except UserError as e:  # someone else's run, readable only; checksums tell if it goes while it is read
                log.warning("checkpoint %s is read without being held: %s", entry.name, e)
        try:
            manifest = self._manifest(entry)
            return Whole(entry.name, manifest, read_index(self.folder, entry, manifest))
        except Exception:
            if hold:
                retention.release(self.folder, entry.name, hold)
            raise

    def _manifest(self, entry: Entry) -> Manifest:
        manifest = read_manifest(self.folder, entry)
        if self._config_digest is not None and manifest.config_digest != self._config_digest:
            difference = (
                self._explain(manifest.config_digest)
                if self._explain
                else f"written by a run of config {manifest.config_digest}, this run's is {self._config_digest}"
            )
            raise UserError(
                f"{self.folder.url_of(entry.name)}: {difference}; continue with that run's config, or take another run "
                "folder"
            )
        return manifest

    def _set_aside(self, checkpoint: str, reason: str, on_set_aside: Callable[[str, str], None] | None) -> None:
        url = self.folder.url_of(checkpoint)
        if self._config_digest is None:
            log.warning("checkpoint %s does not verify and is passed over: %s", url, reason)
            self._passed_over.add(checkpoint)
            return
        log.error("checkpoint %s does not verify and is set aside: %s", url, reason)
        retention.set_aside(self.folder, checkpoint, reason)
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
        self._manifest(entry)
        verify(self.folder, entry)

    def hold(self, path: str, name: str) -> None:
        """Keep a checkpoint from retention, for as long as something called `name` reads it; `release` ends it."""
        retention.hold(self.folder, self._entry(path), name)

    def release(self, path: str, name: str) -> None:
        entry = self._entry(path)
        if name in entry.holds:
            retention.release(self.folder, entry.name, name)

    def _entry(self, path: str) -> Entry:
        for entry in self.folder.entries():
            if self.folder.url_of(entry.name) == path and entry.committed:
                return entry
        raise UserError(f"{path}: no committed checkpoint of {self.folder.url}")


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
