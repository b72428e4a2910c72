"""The last pass: everything but the shards, which lie in their places already. What opens the dataset is written last."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import draws
from data.card import GRID, GRID_COLUMNS, GRID_ROWS, PAGE, README, Card, grid
from data.mdsbuild.plan import PLAN, Piece, Plan
from data.mdsbuild.shards import SHARDS, Slices, read_images, shard_writer
from data.provenance import Record, read_notices, read_record, rejected, trace
from data.publish import file_details, put_bytes, put_whole
from data.schema import (
    DATASET,
    HASH,
    INDEX,
    LABELS,
    MAX_INDEX_BYTES,
    ORIGINAL,
    REJECTED,
    Bucket,
    DatasetInfo,
    index_digest,
    parse_dataset,
    parse_index,
)
from data.stages.receipts import done_receipts
from data.stages.runner import Part, Work
from data.stages.samples import fetch
from data.stages.store import Json, StageStore
from data.stats import STATS, Statistics
from data.storage import Storage
from trainer.errors import UserError

MAX_LABELS_BYTES = 64 << 30
_SHOWN_SHARDS = 12
"""That the card's images come from."""


@dataclass(frozen=True)
class Publication:
    """What a dataset is called, and what of its making is told."""

    name: str
    order_seed: int
    settings: Mapping[str, Any]
    sidecars: Sequence[str]
    """URLs of the stages whose captions and columns went in."""
    overwrite: bool


def publish_parts(work: Work, plan: Plan, source: StageStore, out: Storage, how: Publication) -> Iterator[Part]:
    """One part, without files: they go to `out`.

    Raises:
        UserError: a shard has gone, or a dataset has come there meanwhile.
    """
    if work.cursor is not None:
        return
    shards = [part["note"] for receipt in done_receipts(work.store, SHARDS) for part in receipt["parts"]]
    assert len(shards) == plan.num_shards
    present = file_details(out)
    for shard in shards:
        if present.get(shard["name"]) != shard["bytes"]:
            raise UserError(
                f"{out.url}/{shard['name']}: is not there as this build wrote it; remove {work.store.url} and build again"
            )
    index = _write_index(work.scratch / INDEX, shards, list(plan.about["columns"]))
    digest = index_digest(index)
    parse_index(index, source=f"{out.url}/{INDEX}")
    if DATASET in present and not how.overwrite and _digest_of(out) != digest:
        raise UserError(
            f"{out.url}: a dataset has come there meanwhile; add --overwrite to replace it, or build elsewhere"
        )
    card = _card(work, plan, source, how, digest, shards)
    files = {**card.files(), **read_notices(source.url)}
    files[STATS] = card.stats.model_dump_json(indent=1).encode()
    work.advance(0)
    out.delete(DATASET)
    for name, content in files.items():
        put_bytes(out, content, name)
    if card.info.labels:
        put_whole(out, _labels(work), LABELS)
    put_whole(out, work.scratch / INDEX, INDEX)
    put_bytes(out, card.info.model_dump_json(indent=1).encode() + b"\n", DATASET)
    _sweep(out, present, {shard["name"] for shard in shards}, {*files, *([LABELS] if card.info.labels else [])})
    note = {
        "digest": card.info.digest,
        "samples": card.info.num_samples,
        "shards": len(shards),
        "bytes": card.num_bytes,
        "buckets": [
            {key: b[key] for key in ("name", "samples", "num_shards")} for b in plan.about["buckets"] if b["name"]
        ],
        "merged_buckets": plan.about["joined"],
        "files": sorted(name for name in files if name in (README, PAGE, GRID)),
    }
    yield Part({}, {"kept": card.info.num_samples}, cursor="end", note=note)


def _write_index(path: Path, shards: Sequence[Json], columns: Sequence[str]) -> bytes:
    """index.json, as MDS has it.

    Raises:
        UserError: it would be larger than readers take.
    """
    writer = shard_writer(path.with_name("index"), columns)
    config = writer.get_config()
    writer.cancel_future_jobs()
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"shards": [')
        for i, shard in enumerate(shards):
            raw = {"basename": shard["name"], "bytes": shard["bytes"], "hashes": {HASH: shard[HASH]}}
            entry = {**config, "raw_data": raw, "samples": shard["samples"], "zip_data": None}
            file.write((", " if i else "") + json.dumps(entry, sort_keys=True))
        file.write('], "version": 2}')
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{len(shards):,} shards are more than an {INDEX} may list; build with a larger --shard-mib")
    return path.read_bytes()


def _card(work: Work, plan: Plan, source: StageStore, how: Publication, digest: str, shards: Sequence[Json]) -> Card:
    about = plan.about
    stats = Statistics.model_validate(about["stats"])
    records = [*trace(source.url), *(read_record(url) for url in how.sidecars)]
    records.append(Record("build", how.settings, {"samples": about["counts"]}))
    notices = read_notices(source.url)
    labels = work.store.read_json(f"work/{PLAN}/done/plan.json")["parts"][0]["files"].get("labels")
    buckets, first = [], 0
    for bucket in about["buckets"]:
        if bucket["name"]:
            buckets.append(
                Bucket(name=bucket["name"], aspect=bucket["aspect"], first_shard=first, num_shards=bucket["num_shards"])
            )
        first += bucket["num_shards"]
    info = DatasetInfo(
        name=how.name,
        num_samples=about["samples"],
        index_digest=digest,
        order_seed=how.order_seed,
        class_names=tuple(about["class_names"]) or None,
        notice="\n\n".join(text.decode("utf-8", "replace").strip() for text in notices.values()) or None,
        rejected=rejected(records),
        buckets=tuple(buckets),
        caption_kinds=tuple(sorted(stats.captions, key=lambda kind: (kind != ORIGINAL, kind))) or (ORIGINAL,),
        labels=LABELS if labels else None,
        labels_xxh64=labels["xxh64"] if labels else None,
        licences=stats.known_licences,
        columns=about["columns"],
    )
    return Card(
        info,
        stats,
        len(shards),
        sum(shard["bytes"] for shard in shards),
        bucket_samples=[(b["name"], b["samples"]) for b in about["buckets"] if b["name"]],
        merged_buckets=about["joined"],
        records=records,
        notices=list(notices),
        grid=_grid(work, plan, source, how.order_seed),
    )


def _grid(work: Work, plan: Plan, source: StageStore, seed: int) -> bytes | None:
    """Some images of shards drawn at random."""
    chosen = draws.permutation(seed, "card", length=plan.num_shards)[:_SHOWN_SHARDS]
    each = -(-GRID_COLUMNS * GRID_ROWS // len(chosen))
    slices = Slices(work.store, work.scratch)
    rows: list[dict[str, Any]] = []
    for shard in chosen:
        left = each
        for piece in plan.of_shard(int(shard)):
            some = piece._replace(stop=min(piece.stop, piece.start + left))
            rows += slices.rows(Piece(*some))
            left -= some.stop - some.start
            if not left:
                break
    return grid(image for _, image in read_images(source, rows))


def _labels(work: Work) -> Path:
    file = work.store.read_json(f"work/{PLAN}/done/plan.json")["parts"][0]["files"]["labels"]
    return fetch(work.store, file, work.scratch / LABELS, MAX_LABELS_BYTES)


def _digest_of(out: Storage) -> str | None:
    """Of the dataset that is there."""
    data = out.read(DATASET, max_bytes=MAX_INDEX_BYTES)
    return parse_dataset(data, source=f"{out.url}/{DATASET}").index_digest


def _sweep(out: Storage, before: Mapping[str, int], shards: set[str], files: set[str]) -> None:
    """Remove what an earlier dataset or attempt has left: shards that no index names, halves of files, and what would be told
    of the wrong dataset."""
    for name in before:
        stale_shard = name.endswith(".mds") and name not in shards
        half = name.startswith(".") and name.endswith(".tmp")
        told = name in (REJECTED, LABELS, GRID) or name.partition(".")[0].upper() in ("NOTICE", "LICENSE", "LICENCE")
        if stale_shard or half or (told and name not in files):
            out.delete(name)
