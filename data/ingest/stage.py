"""`loupe data ingest`: whatever people have, to shards of samples, counted.

list     what the sources hold: slices of manifests, files of folders; an item is a manifest, a folder or a set of tars
ingest   read, look, keep: shards of samples; an item is a tar or some, 10,000 rows of a manifest or 1,000 files of a folder
plan     which samples are copies of an earlier one; one item
drops    the same by shard, as later stages read it; an item is one of `ingest` that has copies
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
from data.ingest.from_tars import tar_parts, tars_left
from data.ingest.from_urls import UrlOptions, rows_left, url_parts
from data.ingest.manifests import Columns, slices
from data.stages.receipts import done_receipts, file_name, pass_folder, sum_counts
from data.stages.runner import Part, Pass, Stage, Work
from data.stages.samples import MAX_INDEX_BYTES
from data.stages.store import Json, StageStore

TAR_ITEMS = 10_000
"""Items, about, that tars make at most: of more tars, some that follow one another are one."""


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
    version: ClassVar[int] = 2

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
            Pass("list", self._list_items, self._list_parts, spares=True, left=_list_left),
            Pass("ingest", self._ingest_items, self._ingest_parts, spares=True, left=_ingest_left),
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
            for part in list_folder(work, self.layout, listed, uncaptioned=self.filters.keep_uncaptioned):
                yield Part(part.files, part.counts, {"listed": part.cursor}, part.note)

    # ---------------------------------------------------------------------------------------------------------- ingest

    def _ingest_items(self, store: StageStore) -> list[Json]:
        units = {unit["name"]: unit for unit in store.read_json(f"{pass_folder('list')}/items.json")}
        items: list[Json] = []
        size = max(1, -(-sum(len(unit.get("tars", ())) for unit in units.values()) // TAR_ITEMS))
        for receipt in done_receipts(store, "list"):
            unit = units[receipt["item"]]
            if unit["kind"] == "tars":
                some = [unit["tars"][i : i + size] for i in range(0, len(unit["tars"]), size)]
                items += [{"kind": "tars", "prefix": tars[0]["prefix"], "tars": tars} for tars in some]
            for part in receipt["parts"]:
                base = {"kind": unit["kind"], "url": unit["url"], "prefix": unit.get("prefix", "")}
                if "entries" in part["files"]:
                    for begin in range(0, part["counts"]["listed"], SLICE_FILES):
                        files = min(SLICE_FILES, part["counts"]["listed"] - begin)
                        items.append({**base, "entries": part["files"]["entries"], "begin": begin, "files": files})
                for one in (part["note"] or {}).get("slices", ()):
                    items.append({**base, "bytes": unit["bytes"], "slice": one})
        return [{"name": f"{i:07d}-{(item['prefix'] or 'images')[:40]}", **item} for i, item in enumerate(items)]

    def _ingest_parts(self, work: Work) -> Iterator[Part]:
        kind = work.item["kind"]
        if kind == "tars":
            return tar_parts(work, self.filters, self.class_words)
        if kind == "manifest":
            return url_parts(work, self.columns, self.filters, self.urls)
        assert kind == "folder"
        return folder_parts(work, self.filters, self.class_words)

    # ------------------------------------------------------------------------------------------------------------- end

    def finish(self, store: StageStore) -> dict[str, Json]:
        """Licence files of the sources, into `notices/`; and how many samples the next stage finds."""
        written: list[str] = []
        for number, receipt in enumerate(done_receipts(store, "list")):
            for part in receipt["parts"]:
                if "notices" in part["files"]:
                    file = file_name(part["files"]["notices"]["name"], store.url)
                    for name, text in json.loads(store.read(file, max_bytes=MAX_INDEX_BYTES)).items():
                        path = f"notices/{number:05d}-{_plain(name)}"
                        store.replace(path, text.encode())
                        written.append(path)
        counts = {name: sum_counts(r["counts"] for r in done_receipts(store, name)) for name in ("ingest", "drops")}
        return {"notices": written, "samples": samples_left(counts)}


def _list_left(item: Json, receipts: Sequence[Json]) -> dict[str, int]:
    return {"tars": len(item["tars"])} if item["kind"] == "tars" else {"sources": 1}


def _ingest_left(item: Json, receipts: Sequence[Json]) -> dict[str, int]:
    match item["kind"]:
        case "tars":
            return tars_left(item, receipts)
        case "manifest":
            return rows_left(item, receipts)
        case kind:
            assert kind == "folder"
            return {"samples": item["files"] - sum(receipt["counts"]["read"] for receipt in receipts)}


def samples_left(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """How many samples the next stage finds, by the counts of the passes."""
    kept = counts["ingest"].get("kept", 0)
    copies = sum(number for name, number in counts.get("drops", {}).items() if name.startswith("duplicate/"))
    return {"kept": kept, "after_duplicates": kept - copies}


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[:100]
