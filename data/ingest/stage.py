"""`loupe data ingest`: whatever people have, to shards of samples, counted.

list     what the sources hold: slices of manifests, files of folders; an item is a manifest, a folder or a set of tars
ingest   read, look, keep: shards of samples; an item is a tar, 10,000 rows of a manifest or 1,000 files of a folder
plan     which samples are copies of an earlier one; one item
drops    the same by shard, as later stages read it; an item is a shard that has copies
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import xxhash

from data.ingest.drops import PLAN, drop_items, drop_parts, plan_parts
from data.ingest.examine import Filters
from data.ingest.expand import expand
from data.ingest.from_folders import SLICE_FILES, folder_parts, list_folder, read_notices
from data.ingest.from_tars import tar_parts
from data.ingest.from_urls import UrlOptions, url_parts
from data.ingest.manifests import Columns, slices
from data.stages.runner import Part, Pass, Stage, Work, done_receipts, pass_folder
from data.stages.samples import MAX_INDEX_BYTES
from data.stages.store import Json, StageStore


@dataclass
class IngestStage(Stage):
    """
    Args:
        sources: paths or fsspec URLs of tars, manifests and folders, or patterns of them.
        layout: one of `expand.LAYOUTS`.
        class_words: class name to words, which become captions.
        distance: bits in which perceptual hashes of copies may differ; None: only exact copies are dropped.
    """

    sources: Sequence[str]
    layout: str = "auto"
    columns: Columns = field(default_factory=Columns)
    filters: Filters = field(default_factory=Filters)
    urls: UrlOptions = field(default_factory=UrlOptions)
    class_words: Mapping[str, str] = field(default_factory=dict)
    distance: int | None = 0

    name: ClassVar[str] = "ingest"

    def __post_init__(self) -> None:
        assert self.filters.near_duplicates == (self.distance is not None)

    def settings(self) -> dict[str, Json]:
        named = json.dumps(dict(self.class_words), sort_keys=True).encode()
        return {
            "sources": list(self.sources),
            "layout": self.layout,
            "columns": asdict(self.columns),
            "filters": self.filters.settings(),
            "allow_private": self.urls.allow_private,
            "allow_local": self.urls.allow_local,
            "allow_object_stores": self.urls.allow_object_stores,
            "class_names": xxhash.xxh64(named).hexdigest() if self.class_words else None,
            "phash_distance": self.distance,
        }

    def passes(self) -> Sequence[Pass]:
        return (
            Pass("list", self._list_items, self._list_parts),
            Pass("ingest", self._ingest_items, self._ingest_parts),
            Pass(PLAN, lambda store: [{"name": PLAN}], lambda work: plan_parts(work, self.distance)),
            Pass("drops", drop_items, drop_parts),
        )

    # ------------------------------------------------------------------------------------------------------------ list

    def _list_items(self, store: StageStore) -> list[Json]:
        units = expand(self.sources, self.layout)
        return [{"name": f"{i:05d}-{unit['kind']}", **unit} for i, unit in enumerate(units)]

    def _list_parts(self, work: Work) -> Iterator[Part]:
        """What is listed; and first of all, if there are any, the licence files, of the role `notices`."""
        unit, cursor = work.item, work.cursor
        listed = cursor["listed"] if cursor else None
        if cursor is None and unit["notices"]:
            folder = unit["url"] if unit["kind"] != "manifest" else unit["url"].rpartition("/")[0]
            notices = read_notices(folder, unit["notices"], work.scratch / "notices.json")
            yield Part({"notices": notices}, {}, {"listed": None})
        if unit["kind"] == "manifest" and listed is None:
            found = list(slices(unit["url"], unit["bytes"], self.columns))
            work.advance(sum(one["rows"] for one in found))
            yield Part({}, {"listed": sum(one["rows"] for one in found)}, {"listed": "all"}, {"slices": found})
        elif unit["kind"] == "folder":
            for part in list_folder(work, self.layout, listed):
                yield Part(part.files, part.counts, {"listed": part.cursor}, part.note)

    # ---------------------------------------------------------------------------------------------------------- ingest

    def _ingest_items(self, store: StageStore) -> list[Json]:
        units = {unit["name"]: unit for unit in store.read_json(f"{pass_folder('list')}/items.json")}
        items: list[Json] = []
        for receipt in done_receipts(store, "list"):
            unit = units[receipt["item"]]
            if unit["kind"] == "tars":
                items += [{"kind": "tar", **tar} for tar in unit["tars"]]
            for part in receipt["parts"]:
                base = {"kind": unit["kind"], "url": unit["url"], "prefix": unit.get("prefix", "")}
                if "entries" in part["files"]:
                    for begin in range(0, part["counts"]["listed"], SLICE_FILES):
                        items.append({**base, "entries": part["files"]["entries"], "begin": begin})
                for one in (part["note"] or {}).get("slices", ()):
                    items.append({**base, "bytes": unit["bytes"], "slice": one})
        return [{"name": f"{i:07d}-{(item['prefix'] or 'images')[:40]}", **item} for i, item in enumerate(items)]

    def _ingest_parts(self, work: Work) -> Iterator[Part]:
        kind = work.item["kind"]
        if kind == "tar":
            return tar_parts(work, self.filters, self.class_words)
        if kind == "manifest":
            return url_parts(work, self.columns, self.filters, self.urls)
        assert kind == "folder"
        return folder_parts(work, self.filters, self.class_words)

    # ------------------------------------------------------------------------------------------------------------- end

    def finish(self, store: StageStore) -> dict[str, Json]:
        """Licence files of the sources, into `notices/`."""
        written: list[str] = []
        for number, receipt in enumerate(done_receipts(store, "list")):
            for part in receipt["parts"]:
                if "notices" in part["files"]:
                    file = part["files"]["notices"]
                    for name, text in json.loads(store.read(file["name"], max_bytes=MAX_INDEX_BYTES)).items():
                        path = f"notices/{number:05d}-{_plain(name)}"
                        store.replace(path, text.encode())
                        written.append(path)
        return {"notices": written}


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:100]
