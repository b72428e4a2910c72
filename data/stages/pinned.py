"""What there is to do in a pass: listed once, the same for all workers at all times, and all of it done in the end."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data.stages.receipts import items_name, pass_folder
from data.stages.store import Json, StageStore, item_names, to_json
from trainer.errors import UserError

if TYPE_CHECKING:
    from data.stages.runner import Pass


class BeginAgain(Exception):
    """What a worker knows of the stage is no longer so."""


def pinned_items(store: StageStore, one_pass: "Pass", *, check: Callable[[], None] = lambda: None) -> list[Json]:
    """The items of a pass.

    Args:
        check: that what they follow from is still so: called between listing them and making that last.
    """
    name = items_name(one_pass.name)
    try:
        found = store.read_json(name)
    except FileNotFoundError:
        items = list(one_pass.items(store))
        names = item_names(items)
        assert len(set(names)) == len(names), "items of one name"
        made = to_json(items)
        check()
        found = json.loads(made) if store.create(name, made) else store.read_json(name)
    assert isinstance(found, list)
    return found


def check_all_done(store: StageStore, pass_name: str, items: Sequence[str]) -> None:
    """
    Raises:
        BeginAgain: not every item is done.
        UserError: there is a receipt of no item.
    """
    done = {name.removesuffix(".json") for name in store.names(f"{pass_folder(pass_name)}/done")}
    if missing := set(items) - done:
        raise BeginAgain(f"{pass_name} {min(missing)} has no receipt")
    if more := done - set(items):
        raise UserError(
            f"{store.url}: {pass_name} has a receipt of {min(more)}, which is none of its items; run `loupe data verify "
            f"{store.url} --quarantine`, then this again"
        )
