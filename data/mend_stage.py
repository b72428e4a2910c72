"""Take what is damaged out of a stage's output, so that running the stage again makes exactly that anew.

Of an item, what is forgotten begins with its first damaged part, since the next worker goes on behind the last that is left;
of the passes that follow, everything, since it follows. Damaged files go to the folder `quarantine`.

What is to be forgotten is written down first, and while that stands nobody works there: a kill leaves a stage that is not
finished, and whoever mends it next goes on with what was written down. Before nobody is kept away any longer the stage has
another epoch, so that workers that were there all the while begin again.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data.ahead import in_order
from data.repair import QUARANTINE, set_aside
from data.stages import failures, leases
from data.stages.receipts import (
    EPOCH,
    MENDING,
    READERS,
    check_name,
    epoch_of,
    is_file_name,
    is_file_of,
    part_name,
    pass_folder,
)
from data.stages.store import SUMMARY, Json, StageStore, read_stage, to_json
from data.stages.upkeep import TREE_DEADLINE_S, check_idle, remove_tree
from data.storage import DamagedFile
from data.verify_stage import Damage, StageReport
from trainer.errors import UserError

REMAKE_FILES = 1000
REMAKE_BYTES = 100_000_000
"""Of the passes that follow a damaged one: more are deleted only if that was asked for."""
LEASES = "work/mending/leases"
LEASE_S = 120.0
"""For what a pass has, or the copy of a damaged file."""


@dataclass
class Mended:
    """What was taken out."""

    stage: str
    items: dict[str, list[str]] = field(default_factory=dict)
    """By pass: those to be made anew, in whole or from a part on."""
    parts: int = 0
    """Of those items, that were forgotten."""
    passes: list[str] = field(default_factory=list)
    """To be done anew."""
    files: list[str] = field(default_factory=list)
    """That lie in the quarantine."""


def mend(
    url: str,
    report: StageReport | None = None,
    *,
    remake_later: bool = False,
    hint: str = "add --remake-later-passes if that is meant",
    tell: Callable[[str], None] = lambda line: None,
) -> Mended | None:
    """Forget what is damaged; None: there is nothing to forget.

    Args:
        report: what `verify_stage` has found; absent: only go on with what was stopped in the midst.
        remake_later: of passes that follow a damaged one, also when they have much.
        hint: what else to do then, for the error.
        tell: called with lines about what is to go, before it goes.

    Raises:
        UserError: no stage's output, workers are at it, somebody else mends it or has done so since it was verified, or
            too much would go.
        StorageError: storage fails.
    """
    store = StageStore(url)
    stage = read_stage(store)
    generation = leases.held(store.names(LEASES)).get("mending")
    lease = leases.take(
        store, LEASES, "mending", generation, worker="verify --quarantine", attempt=secrets.token_hex(6), seconds=LEASE_S,
        parts=lambda: 0,
    )  # fmt: skip
    if lease is None:
        raise UserError(f"{store.url}: somebody else takes damaged files out of it, or was stopped at that; try again in "
                        f"{LEASE_S:.0f} s")  # fmt: skip
    with lease:
        passes = [check_name(name, store.url) for name in stage["passes"]]
        plan = _plan_there(store, passes)
        if plan is None:
            if report is None or not (report.damaged or report.bad_summary):
                return None
            _check_report(store, report)
            plan = _plan(store, passes, report.damaged)
            check_idle(store, passes)
            _tell_cost(store, plan, tell, None if remake_later else hint)
            _begin(store, passes, plan)
        done = _follow(store, lease, plan, Mended(str(stage["stage"])))
        _check_held(store, lease)
        store.replace(EPOCH, to_json({"epoch": secrets.token_hex(8)}))
        store.delete(MENDING)
    return done


def _check_report(store: StageStore, report: StageReport) -> None:
    """
    Raises:
        UserError: it does not tell what is there now.
    """
    if report.stopped:
        raise UserError(f"{store.url}: was not looked at to its end; mend the access to the storage, then verify again")
    if epoch_of(store) != report.epoch:
        raise UserError(f"{store.url}: somebody else has taken damage out since it was looked at; verify again")


def _tell_cost(store: StageStore, plan: Json, tell: Callable[[str], None], hint: str | None) -> None:
    """
    Raises:
        UserError: more would be deleted than goes without saying.
    """
    sizes = {name: _size(store, name) for name in plan["passes"]}
    about = [
        f"{name}, {items} items with {files} files of {num_bytes / 1e6:,.1f} MB"
        for name, (items, files, num_bytes) in sizes.items()
        if items
    ]
    files, num_bytes = (sum(size[i] for size in sizes.values()) for i in (1, 2))
    if hint is not None and (files > REMAKE_FILES or num_bytes > REMAKE_BYTES):
        raise UserError(
            f"{store.url}: what follows {plan['pass']} would be deleted and made anew: {'; '.join(about)}; {hint}"
        )
    for line in about:
        tell(f"to be deleted and made anew, since it follows {plan['pass']}: {line}")


def _size(store: StageStore, pass_name: str) -> tuple[int, int, int]:
    """Items of a pass that are done, their files and bytes, by receipts."""

    def of(name: str) -> tuple[int, int]:
        try:
            parts = store.read_json(f"{folder}/{name}")["parts"]
            sizes = [int(file["bytes"]) for part in parts for file in part["files"].values()]
        except (FileNotFoundError, DamagedFile, KeyError, TypeError, AttributeError):
            return 0, 0
        return len(sizes), sum(sizes)

    folder = f"{pass_folder(pass_name)}/done"
    names = store.names(folder)
    found = [future.result() for _, future in in_order(of, names, threads=READERS, ahead=4 * READERS)]
    return len(names), sum(files for files, _ in found), sum(num_bytes for _, num_bytes in found)


def _begin(store: StageStore, passes: Sequence[str], plan: Json) -> None:
    """Write down what is to be done."""
    store.delete(SUMMARY)  # from here on nobody takes the stage for a whole one
    store.create_json(MENDING, plan)
    try:
        check_idle(store, passes)  # who takes an item from now on sees that we are at it
    except UserError:
        store.delete(MENDING)
        raise


def _plan_there(store: StageStore, passes: Sequence[str]) -> Json | None:
    """What somebody has begun and not ended. It decides what is deleted, so it is not believed."""
    try:
        plan = store.read_json(MENDING)
    except FileNotFoundError:
        return None
    except DamagedFile:
        plan = None
    try:
        for name in plan["items"]:
            check_name(name, store.url)
        sound = (
            {plan["pass"], *plan["passes"]} <= set(passes)
            and all(isinstance(keep, int) and keep >= 0 for keep in plan["items"].values())
            and all(map(is_file_name, plan["files"]))
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{store.url}/{MENDING}: is not ours or damaged; delete it and run this again")
    return plan


def _plan(store: StageStore, passes: Sequence[str], damaged: Sequence[Damage]) -> Json:
    """Items with the number of parts they keep, passes to forget, files to set aside."""
    first = min((list(passes).index(one.pass_name) for one in damaged), default=len(passes) - 1)
    keep: dict[str, int | None] = {}
    for one in damaged:
        if one.pass_name == passes[first]:
            known = keep.get(one.item)
            keep[one.item] = one.part if known is None else known if one.part is None else min(known, one.part)
    items = {
        check_name(item, store.url): _sound_parts(store, passes[first], item, most)
        for item, most in sorted(keep.items())
    }
    # A receipt that is damaged may name anything.
    files = sorted({one.file for one in damaged if one.file and is_file_of(one.file, one.pass_name, one.item)})
    return {
        "pass": passes[first],
        "items": items,
        "passes": list(passes[first + 1 :]) if damaged else [],
        "files": files,
    }


def _sound_parts(store: StageStore, pass_name: str, item: str, most: int | None) -> int:
    """How many of the first parts can stay: whose receipts are there, and say what the item's receipt said of them."""
    try:
        told = store.read_json(f"{pass_folder(pass_name)}/done/{item}.json")["parts"]
    except (FileNotFoundError, DamagedFile, KeyError, TypeError):
        told = None
    names = store.names(f"{pass_folder(pass_name)}/parts/{item}")
    most = len(names) if most is None else min(most, len(names))
    for number, name in enumerate(names[:most]):
        try:
            receipt = store.read_json(part_name(pass_name, item, number))
        except (FileNotFoundError, DamagedFile):
            return number
        if name != f"{number:06d}.json" or (told is not None and receipt not in told[number : number + 1]):
            return number
    return most


def _check_held(store: StageStore, lease: leases.Lease) -> None:
    if lease.lost.is_set():
        raise UserError(f"{store.url}: storage was too slow to keep others from mending it meanwhile; run this again")


def _follow(store: StageStore, lease: leases.Lease, plan: Json, done: Mended) -> Mended:
    """Do what is written down; what was done of it before is done again without harm."""
    for name in plan["files"]:
        _check_held(store, lease)
        if set_aside(store, name, deadline_s=TREE_DEADLINE_S):
            done.files.append(f"{QUARANTINE}/{name}")
    for name in reversed(plan["passes"]):
        for folder in (pass_folder(name), f"files/{name}"):
            _check_held(store, lease)
            remove_tree(store, folder)
    done.passes = list(plan["passes"])
    folder = pass_folder(plan["pass"])
    failed = failures.listed(store, folder) if plan["items"] else {}
    for item, keep in plan["items"].items():
        _check_held(store, lease)
        store.delete(f"{folder}/done/{item}.json")
        for part in reversed(store.names(f"{folder}/parts/{item}")[keep:]):
            store.delete(f"{folder}/parts/{item}/{part}")
            done.parts += 1
        for file in failed.get(item, ()):
            store.delete(f"{folder}/failed/{file}")
    if plan["items"]:
        done.items[plan["pass"]] = list(plan["items"])
    return done
