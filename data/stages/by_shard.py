"""What a pass has made of the shards of another stage, by shard: captions, columns, lists of duplicates.

Its items say by their names alone which shards they are of, and each of its parts notes the one that it was made of. So it is
one read to know the items, and one for each of them, however the shards were cut into items: where shards are asked for in
their order. `build` asks in a shuffled one. Of very many shards it then reads an item's receipt for nearly each, some kilobytes
beside the shard's own files: of 300,000 shards and one sidecar 300,000 reads, all its workers and windows together.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from data.stages.receipts import check_name, pass_folder
from data.stages.store import Json, StageStore
from trainer.errors import UserError

KEPT_RECEIPTS = 8
"""Neighbouring shards are of one item: who goes through them in order reads its receipt once for a run of them."""

_Items = Mapping[str, tuple[list[int], list[str]]]
"""Item of the other stage -> the first of its parts that each of our items has, in order, and our items' names."""


class PartsByShard:
    """Of a stage that is finished. For several threads; what is known is not pickled along."""

    def __init__(self, url: str, pass_name: str) -> None:
        self._url, self._pass = url, pass_name
        self._forget()

    def _forget(self) -> None:
        self._items: _Items | None = None
        self._receipts: OrderedDict[str, dict[str, list[Json]]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_pass": self._pass}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def of(self, shard: str) -> list[Json]:
        """Receipts of the parts that were made of the shard of this name, in order; none where nothing was.

        Raises:
            UserError: the stage's folder is damaged.
            StorageError: storage does not answer.
        """
        name = self._item_with(shard)
        if name is None:
            return []
        with self._lock:
            found = self._receipts.get(name)
        if found is None:
            found = self._read(name)
            with self._lock:
                self._receipts[name] = found
                while len(self._receipts) > KEPT_RECEIPTS:
                    self._receipts.popitem(last=False)
        return found.get(shard, [])

    def _read(self, name: str) -> dict[str, list[Json]]:
        found: dict[str, list[Json]] = {}
        receipt_name = f"{pass_folder(self._pass)}/done/{check_name(name, self._url)}.json"
        try:
            receipt = StageStore(self._url).read_json(receipt_name)
        except FileNotFoundError:
            raise UserError(
                f"{self._url}/{receipt_name}: is not there; is the stage being mended, or not finished? run it again"
            ) from None
        for part in receipt["parts"]:
            found.setdefault(part["note"]["shard"], []).append(part)
        return found

    def _item_with(self, shard: str) -> str | None:
        with self._lock:
            if self._items is None:
                self._items = _by_item(StageStore(self._url).read_json(f"{pass_folder(self._pass)}/items.json"))
            item, _, part = shard.rpartition("-")
            firsts, names = self._items.get(item, ([], []))
        place = bisect_right(firsts, int(part)) - 1
        return names[place] if place >= 0 else None


def _by_item(items: list[Json]) -> _Items:
    found: dict[str, list[tuple[int, str]]] = {}
    for item in items:
        found.setdefault(item["of"], []).append((item.get("first", 0), item["name"]))
    return {of: ([first for first, _ in sorted(own)], [name for _, name in sorted(own)]) for of, own in found.items()}
