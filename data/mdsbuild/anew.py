"""Whether a build can go on from its state, or is still what its dataset is; and how it is begun anew.

The state is removed, and never the dataset: that is replaced when the new one is whole, as any dataset at OUT is.
"""

import secrets
from collections.abc import Sequence

from data.publish import file_details
from data.repair import QUARANTINE
from data.schema import DATASET, INDEX, MAX_DATASET_BYTES, MAX_INDEX_BYTES, parse_dataset, parse_index
from data.stages import leases
from data.stages.receipts import EPOCH
from data.stages.store import STAGE, SUMMARY, Json, StageStore, read_stage, to_json
from data.stages.upkeep import check_idle, remove_tree
from data.storage import Storage
from trainer.errors import UserError

INPUTS = "work/inputs.json"
"""When each input was finished, as this build found it."""
LEASES = "work/anew/leases"
LEASE_S = 120.0
_REMOVED = "being_removed"
"""The setting of a state that is on its way out: no build has such, so nobody goes on with a half."""
_KEPT = {"anew", EPOCH.rpartition("/")[2]}
"""In the folder `work`, while the rest goes: the lease, and what workers that are still about know it by."""


def is_being_removed(work: StageStore) -> bool:
    return work.exists(STAGE) and _REMOVED in read_stage(work)["settings"]


def note_inputs(work: StageStore, urls: Sequence[str]) -> None:
    """Of a build that has not begun: when its inputs were finished. They are mended in place, under the same id."""
    if not work.exists(STAGE):
        work.create_json(INPUTS, _finished(urls))


def why_not(work: StageStore, out: Storage, urls: Sequence[str]) -> str | None:
    """Why a build with these settings is not to go on, or is not what lies at `out`; None: it is.

    Raises:
        UserError: a file is damaged.
        StorageError: storage fails.
    """
    if not work.exists(STAGE):
        return None
    try:
        summary = work.read_json(SUMMARY)
    except FileNotFoundError:
        return _mended(work, urls)
    return _changed(out, str(summary["dataset"]["digest"]))


def _mended(work: StageStore, urls: Sequence[str]) -> str | None:
    try:
        before = work.read_json(INPUTS)
    except FileNotFoundError:  # begun by an earlier version
        return None
    for url, time_now in _finished(urls).items():
        if before.get(url, time_now) != time_now:
            return f"{url}: was mended or written anew since this build began, whose plan names files of before"
    return None


def _finished(urls: Sequence[str]) -> dict[str, Json]:
    found = {}
    for url in urls:
        store = StageStore(url)
        if store.exists(SUMMARY):
            found[store.url] = store.read_json(SUMMARY).get("time")
    return found


def _changed(out: Storage, digest: str) -> str | None:
    try:
        description = out.read(DATASET, max_bytes=MAX_DATASET_BYTES)
        index = out.read(INDEX, max_bytes=MAX_INDEX_BYTES)
    except FileNotFoundError:
        return f"{out.url}: this build was finished, and its dataset is no longer there"
    now = parse_dataset(description, source=f"{out.url}/{DATASET}").digest
    if now != digest:
        return (
            f"{out.url}: is no longer what this build made (digest {digest}, now {now}): `loupe data verify --quarantine` has "
            "taken shards out, or another dataset has come there"
        )
    present = file_details(out)
    for shard in parse_index(index, source=f"{out.url}/{INDEX}"):
        if present.get(shard.name) != shard.num_bytes:
            return f"{out.url}/{shard.name}: is missing, or of another size than this build gave it"
    return None


def begin_anew(work: StageStore) -> None:
    """Remove a build's state. Whoever is killed at it leaves a state that nobody goes on with; the next one ends it.

    Raises:
        UserError: workers are at it, or another command removes it.
        StorageError: storage fails.
    """
    before = read_stage(work)
    lease = leases.take(
        work, LEASES, "anew", leases.held(work.names(LEASES)).get("anew"), worker="build --overwrite",
        attempt=secrets.token_hex(6), seconds=LEASE_S, parts=lambda: 0,
    )  # fmt: skip
    if lease is None:
        raise UserError(
            f"{work.url}: another command begins this build anew, or was stopped at that; try again in {LEASE_S:.0f} s"
        )
    with lease:
        if not work.exists(STAGE) or read_stage(work)["id"] != before["id"]:  # another has done it meanwhile
            return
        check_idle(work, before["passes"])
        work.replace(STAGE, to_json({**before, "settings": {_REMOVED: True}}))
        work.replace(EPOCH, to_json({"epoch": secrets.token_hex(8)}))
        check_idle(work, before["passes"])
        work.delete(SUMMARY)
        for name in ["files", QUARANTINE, *(f"work/{name}" for name in work.names("work") if name not in _KEPT)]:
            if lease.lost.is_set():
                raise UserError(f"{work.url}: storage was too slow to keep others away meanwhile; run this again")
            remove_tree(work, name)
        work.delete(STAGE)
