"""Which checkpoints stay: the newest ones, and those that someone holds while reading them."""

import json
import logging
import secrets
import time

from trainer.checkpoint import folder as names
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.errors import UserError

log = logging.getLogger(__name__)


def unique_hold(purpose: str) -> str:
    """A name for a hold that no other reader has."""
    return f"{purpose}-{secrets.token_hex(4)}"


def hold(folder: CheckpointFolder, entry: Entry, name: str) -> Entry:
    """Keep a checkpoint from retention until `release`. Returns what storage lists once it is held.

    Raises:
        CorruptCheckpoint: retention was faster.
        UserError: the folder may not be written.
    """
    mark = _mark(entry.name, name)
    try:
        folder.write(mark, b"")
    except CheckpointError:
        if names.COMMIT in folder.sizes(entry.name):
            raise
    sizes = folder.sizes(entry.name)
    if names.COMMIT not in sizes:
        release(folder, entry.name, name)  # on an object store the mark alone would make it a folder again
        raise CorruptCheckpoint(f"{folder.url_of(entry.name)}: deleted before it could be held")
    return Entry(entry.name, entry.step, sizes)


def release(folder: CheckpointFolder, checkpoint: str, name: str) -> None:
    """End a hold. Where that fails, the checkpoint stays too long, which is told and harms nobody."""
    try:
        if names.HOLD_PREFIX + name in folder.sizes(checkpoint):
            folder.remove_object(_mark(checkpoint, name))
    except (UserError, CheckpointError) as e:
        log.warning("a hold stays, and its checkpoint until the hold is removed by hand: %s", e)


def _mark(checkpoint: str, name: str) -> str:
    if not names.HOLD_NAME.fullmatch(name):
        raise UserError(f"hold {name!r}: a name of letters, digits, '_', '.' and '-'")
    return f"{checkpoint}/{names.HOLD_PREFIX}{name}"


def retain(folder: CheckpointFolder, just_written: str, keep_last: int) -> None:
    """Delete what a newer checkpoint has made needless. The new one is durable, so a failure here is only told."""
    try:
        entries = folder.entries()
    except (UserError, CheckpointError) as e:
        log.warning("old checkpoints were not looked through: %s", e)
        return
    kept = [entry for entry in entries if entry.committed][-keep_last:]
    step = next(entry.step for entry in entries if entry.name == just_written)
    for entry in entries:
        if entry.holds or entry in kept or entry.name == just_written:
            continue
        if entry.set_aside:  # evidence, until every kept checkpoint is newer
            needless = len(kept) == keep_last and entry.step < kept[0].step
        elif entry.committed:
            needless = True
        else:  # an earlier attempt's that never came to its COMMIT; a newer one may be being written
            needless = entry.step <= step
        if needless:
            remove(folder, "an old checkpoint", entry.name)


def set_aside(folder: CheckpointFolder, checkpoint: str, reason: str) -> None:
    """Mark it with an object of its own, so that nobody takes it any more: object stores cannot rename, and what is in it stays
    as it is."""
    mark = {"reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    folder.write(f"{checkpoint}/{names.SET_ASIDE}", json.dumps(mark, indent=1).encode() + b"\n")


def remove(folder: CheckpointFolder, what: str, checkpoint: str) -> None:
    try:
        folder.remove(checkpoint)
    except (UserError, CheckpointError) as e:
        log.warning("%s could not be removed: %s", what, e)
