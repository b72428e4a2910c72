"""What to do about items that have failed for good: try them again, or do without them."""

import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from data.ahead import in_order
from data.mend_stage import mend
from data.stages import failures, leases
from data.stages.receipts import (
    GIVEN_UP,
    NOT_DONE,
    READERS,
    check_mending,
    epoch_of,
    items_name,
    part_receipts,
    pass_folder,
    sum_counts,
)
from data.stages.runner import ATTEMPTS, LEASE_S, Pass, Stage
from data.stages.store import STAGE, SUMMARY, Json, StageStore
from data.verify_stage import Damage, StageReport
from trainer.errors import UserError

SPARED_SHARE, SPARED_LEAST = 0.01, 3
"""Of a pass's items, given up without being told how many: more are no bad files, but storage or settings."""
_LOOKED_AT = 200
"""Reasons, to find the commonest."""


@dataclass(frozen=True)
class GivenUp:
    pass_name: str
    item: str
    why: str
    parts: int
    """That it has, and keeps."""


def retry_failed(store: StageStore, stage: Stage) -> int:
    """Forget why items failed, and which workers died at them, so that they are tried again; returns how many there were. Those
    that were given up are among them until the pass that follows has begun, or the stage is finished: without them.

    Raises:
        UserError: there are such, and workers are at the stage.
    """
    items = set() if store.exists(SUMMARY) else _take_up(store, stage)
    for one_pass in stage.passes():
        folder = pass_folder(one_pass.name)
        done = _done(store, one_pass)
        for item, files in failures.listed(store, folder).items():
            if item not in done:
                items.add((one_pass.name, item))
                for file in files:
                    store.delete(f"{folder}/failed/{file}")
        folder = f"{folder}/leases"
        for item, generation in leases.held(store.names(folder)).items():
            found = leases.holder(store, folder, item, generation)
            if found and found.deaths and found.deadline < time.time():
                for old in range(generation + 1):
                    store.delete(f"{folder}/{leases.lease_name(item, old)}")
    return len(items)


def _take_up(store: StageStore, stage: Stage) -> set[tuple[str, str]]:
    """Forget that items of the pass at work were given up, as of what is damaged."""
    begun = [one_pass for one_pass in stage.passes() if store.exists(items_name(one_pass.name))]
    items = {(one_pass.name, item) for one_pass in begun[-1:] for item in _given_up(store, one_pass)}
    if items:
        check_mending(store)
        report = StageReport(stage.name, finished=False, epoch=epoch_of(store))
        for pass_name, item in sorted(items):
            report.fail("given up", Damage(pass_name, item))
        mend(store.url, report)
    return items


def give_up_failed(
    store: StageStore, stage: Stage, *, at_most: int | None = None, lease_s: float = LEASE_S
) -> list[GivenUp]:
    """Call items whole that have failed for good until now, with the parts they have, and say so in their receipts.

    Args:
        at_most: of a pass's items, with those that were given up before; absent: `SPARED_SHARE` or `SPARED_LEAST` of them, and
            never all where none has any part.

    Raises:
        UserError: they are more; of a pass that what follows cannot do without; a worker is at such an item.
    """
    if not store.exists(STAGE):
        return []
    check_mending(store)
    found = []
    for one_pass in stage.passes():
        failed = _failed_for_good(store, one_pass)
        if not failed:
            continue
        if not one_pass.spares:
            item, file = next(iter(failed.items()))
            why = failures.reason(store, pass_folder(one_pass.name), file)
            raise UserError(
                f"{store.url}: {one_pass.name} {item}: cannot be given up, what follows needs it ({why}); mend the cause "
                "and run again with --retry-failed"
            )
        items = {item["name"]: item for item in store.read_json(f"{pass_folder(one_pass.name)}/items.json")}
        _check_share(store, one_pass, failed, len(items), at_most)
        for item, why in _reasons(store, one_pass, failed):
            if one := _give_up(store, one_pass, items[item], why, lease_s):
                found.append(one)
    return found


def _done(store: StageStore, one_pass: Pass) -> set[str]:
    return {name.removesuffix(".json") for name in store.names(f"{pass_folder(one_pass.name)}/done")}


def _failed_for_good(store: StageStore, one_pass: Pass) -> dict[str, str]:
    """Item to the file of its last failure."""
    done = _done(store, one_pass)
    listed = failures.listed(store, pass_folder(one_pass.name))
    return {item: files[-1] for item, files in listed.items() if item not in done and len(files) >= ATTEMPTS}


def _given_up(store: StageStore, one_pass: Pass) -> list[str]:
    """Items that were, whose failures are still there. Few are done and have failed, so their receipts alone are read."""
    folder = pass_folder(one_pass.name)
    done = _done(store, one_pass)
    items = [item for item in failures.listed(store, folder) if item in done]
    reads = in_order(
        lambda item: store.read_json(f"{folder}/done/{item}.json"), items, threads=READERS, ahead=4 * READERS
    )
    return [item for item, receipt in reads if receipt.result().get("given_up") is not None]


def _reasons(store: StageStore, one_pass: Pass, failed: dict[str, str]) -> Iterator[tuple[str, str]]:
    folder = pass_folder(one_pass.name)
    reads = in_order(
        lambda pair: failures.reason(store, folder, pair[1]), failed.items(), threads=READERS, ahead=READERS
    )
    for (item, _), why in reads:
        yield item, why.result()


def _check_share(
    store: StageStore, one_pass: Pass, failed: dict[str, str], num_items: int, at_most: int | None
) -> None:
    before = len(_given_up(store, one_pass))
    all_of_them = before + len(failed)
    if at_most is None:
        at_most = max(SPARED_LEAST, int(num_items * SPARED_SHARE))
        if all_of_them == num_items and not store.names(f"{pass_folder(one_pass.name)}/parts"):
            at_most = min(at_most, num_items - 1)
    if all_of_them <= at_most:
        return
    some = dict(list(failed.items())[:: -(-len(failed) // _LOOKED_AT)])
    reasons = [why for _, why in _reasons(store, one_pass, some)]
    ((kind, number),) = Counter(map(_kind, reasons)).most_common(1)
    example = next(why for why in reasons if _kind(why) == kind)
    given_up = f", {before} were given up before" if before else ""
    raise UserError(
        f"{store.url}: {one_pass.name}: {len(failed)} of {num_items} items have failed{given_up}, and --give-up-failed does "
        f"without {at_most} at most; the commonest reason, of {number} of {len(reasons)}: {example}; mend it and run again "
        f"with --retry-failed, or add --give-up-at-most {all_of_them}"
    )


def _kind(why: str) -> str:
    """A reason without what names its item."""
    return re.sub(r"\S*[/\\]\S*|\d+", "", why)


def _give_up(store: StageStore, one_pass: Pass, item: Json, why: str, lease_s: float) -> GivenUp | None:
    """None: it was done meanwhile."""
    folder, name = pass_folder(one_pass.name), item["name"]
    attempt = secrets.token_hex(6)
    lease = leases.take(
        store, f"{folder}/leases", name, leases.held(store.names(f"{folder}/leases")).get(name), worker="--give-up-failed",
        attempt=attempt, seconds=lease_s, parts=lambda: 0,
    )  # fmt: skip
    if lease is None:
        raise UserError(f"{store.url}: {one_pass.name} {name}: a worker is at it; stop the workers, then give it up")
    with lease:
        check_mending(store)
        if store.exists(f"{folder}/done/{name}.json"):  # between the listing and the lease
            return None
        receipts = part_receipts(store, one_pass.name, name)
        counts = sum_counts(receipt["counts"] for receipt in receipts)
        counts[GIVEN_UP] += 1
        for what, number in one_pass.left(item, receipts).items():
            counts[f"{NOT_DONE}{what}"] += number
        whole = {
            "item": name, "counts": dict(counts), "parts": receipts, "given_up": why, "attempt": attempt,
            "worker": lease.worker, "time": time.time(),
        }  # fmt: skip
        if not store.create_json(f"{folder}/done/{name}.json", whole):
            return None
    return GivenUp(one_pass.name, name, why, len(receipts))
