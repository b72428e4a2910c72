"""What other stages have made of the samples: captions, which are few bytes, and columns, which may be many."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import COLUMNS
from data.stages.by_shard import PartsByShard
from data.stages.samples import MAX_INDEX_BYTES, MAX_TAR_BYTES, Samples, Shard, fetch
from data.stages.store import SUMMARY, Json, StageStore, read_stage
from trainer.errors import UserError
from trainer.urls import public_url


@dataclass(frozen=True)
class Sidecar:
    """Captions or columns that a stage has made of the samples."""

    url: str
    kind: str | None = None
    """Of captions: what they are called here, instead of as their stage called them."""


def parse_captions_option(text: str) -> Sidecar:
    """`URL` or `KIND=URL`.

    Raises:
        UserError: the kind is no word.
    """
    kind, equals, url = text.partition("=")
    if not equals or "/" in kind:  # an equals sign within the URL
        return Sidecar(text.rstrip("/"))
    if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", kind):
        raise UserError(f"--captions: {kind!r} is no word to call captions by; write such as detailed=URL")
    return Sidecar(url.rstrip("/"), kind)


class SidecarFiles:
    """A sidecar's files, by the shards of the samples that it is joined to."""

    def __init__(self, samples: Samples, sidecar: Sidecar, stage: str, role: str, option: str) -> None:
        """
        Args:
            stage: that has made it; its pass is called so, too.
            option: how the user has named it.

        Raises:
            UserError: it is not that stage's output, not finished, or made of other samples.
        """
        self.url, self.kind = sidecar.url, sidecar.kind
        self._role = role
        self._level = _level(samples, sidecar.url, stage, option)
        told = read_stage(StageStore(sidecar.url))["settings"].get({"recaption": "prompts", "encode": "columns"}[stage])
        self.names: tuple[str, ...] = (sidecar.kind,) if sidecar.kind else tuple(told) if isinstance(told, dict) else ()
        """Of the captions' kinds or the columns that it was to make of each sample."""
        self._parts = PartsByShard(sidecar.url, stage)

    def of(self, shard: Shard) -> list[Json]:
        name = (shard.name, *shard.before)[self._level]
        return [part["files"][self._role] for part in self._parts.of(name) if self._role in part["files"]]


def _level(samples: Samples, url: str, stage: str, option: str) -> int:
    """0: the sidecar was made of the samples themselves; 1: of what they were made of; and so on."""
    store, shown = StageStore(url), public_url(url)
    about = read_stage(store)
    if about["stage"] != stage:
        raise UserError(f"{option}: {shown} is the output of `{about['stage']}`, give that of `{stage}`")
    if not store.exists(SUMMARY):
        raise UserError(
            f"{option}: `loupe data {stage}` is not finished at {shown}; run it again, it goes on where it stopped"
        )
    settings = about["settings"]
    made_of = settings.get("made_of")
    if not made_of or made_of[0] not in samples.ids:
        theirs = f"{settings.get('input') or settings.get('source')} (id {(made_of or ['unknown'])[0]})"
        ours = public_url(samples.url)
        raise UserError(
            f"{option}: {shown} was made of {theirs}; {ours} (id {samples.ids[0]}) holds other samples, and none made of "
            f"those; run `loupe data {stage}` on {ours}"
        )
    return samples.ids.index(made_of[0])


def captions_files(samples: Samples, sidecars: Sequence[Sidecar]) -> list[SidecarFiles]:
    return [SidecarFiles(samples, sidecar, "recaption", "captions", "--captions") for sidecar in sidecars]


def columns_files(samples: Samples, sidecars: Sequence[Sidecar]) -> list[SidecarFiles]:
    return [SidecarFiles(samples, sidecar, "encode", "columns", "--columns") for sidecar in sidecars]


def read_captions(sidecars: Sequence[SidecarFiles], shard: Shard, scratch: Path) -> dict[str, dict[str, list[str]]]:
    """Key -> kind -> texts.

    Raises:
        UserError: a sidecar is damaged, or of several kinds where it is to have one name.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for number, sidecar in enumerate(sidecars):
        store = StageStore(sidecar.url)
        kinds = set()
        for i, file in enumerate(sidecar.of(shard)):
            path = fetch(store, file, scratch / f"{shard.name}.captions{number}.{i}.parquet", MAX_INDEX_BYTES)
            try:
                rows = pq.read_table(path, columns=["key", "kind", "caption"]).to_pylist()
            except (pa.ArrowException, OSError) as e:
                raise UserError(
                    f"{store.url}/{file['name']}: not a file of captions ({e}); run the stage again"
                ) from None
            path.unlink()
            for row in rows:
                if not row["caption"]:
                    continue
                kinds.add(row["kind"])
                found.setdefault(row["key"], {}).setdefault(sidecar.kind or row["kind"], []).append(row["caption"])
        if sidecar.kind and len(kinds) > 1:
            raise UserError(
                f"--captions {sidecar.kind}={sidecar.url}: has the kinds {', '.join(sorted(kinds))}, which cannot all be "
                f"called {sidecar.kind}; give the URL alone"
            )
    return found


class ColumnValues:
    """Values of further columns of a window's samples, on disk."""

    def __init__(self, scratch: Path, sidecars: Sequence[SidecarFiles]) -> None:
        self._scratch, self._sidecars = scratch, sidecars
        self._tables: dict[int, list[pa.Table]] = {}
        """Of each shard, memory-mapped."""
        self._places: dict[int, dict[str, list[_Place]]] = {}
        """Of each shard, by key."""
        self._descriptions: dict[int, dict[str, Json]] = {}
        self.largest = 0
        """Bytes of a sample's values, at most."""

    @property
    def described(self) -> dict[str, Json]:
        described: dict[str, Json] = {}
        for shard in sorted(self._descriptions):
            for name, description in self._descriptions[shard].items():
                if described.setdefault(name, description) != description:
                    raise UserError(
                        f"column {name}: shards of it were encoded in different ways; encode anew into one folder"
                    )
        return described

    @property
    def names(self) -> list[str]:
        return sorted(self.described)

    def load(self, number: int, shard: Shard) -> None:
        """Called from several threads, each with a shard of its own."""
        tables: list[pa.Table] = []
        places: dict[str, list[_Place]] = {}
        described: dict[str, Json] = {}
        for of, sidecar in enumerate(self._sidecars):
            store = StageStore(sidecar.url)
            of_sidecar: set[str] = set()
            for i, file in enumerate(sidecar.of(shard)):
                where = f"{store.url}/{file['name']}"
                path = self._scratch / f"columns-{number}-{of}-{i}.parquet"
                fetch(store, file, path, MAX_TAR_BYTES)
                mapped = _map_columns(path, where)
                if clash := sorted((set(mapped.described) & set(described)) - of_sidecar):
                    raise UserError(f"--columns: {clash[0]} stands in two of them; leave one out")
                of_sidecar |= set(mapped.described)
                described |= mapped.described
                for row, (key, content) in enumerate(zip(mapped.keys, mapped.contents, strict=True)):
                    place = _Place(len(tables), row, content if mapped.of_images else None, where)
                    places.setdefault(key, []).append(place)
                tables.append(mapped.table)
        self._tables[number], self._places[number], self._descriptions[number] = tables, places, described

    def check(self, shard: int, key: str, content: bytes) -> None:
        """
        Raises:
            UserError: a column is of another image than this one, such as one whose faces were not blurred yet.
        """
        for place in self._places[shard].get(key, []):
            if place.content is not None and place.content != content:
                raise UserError(
                    f"{place.where}: {key}: the latents are of another image than the one to be stored; encode the very "
                    "samples that the dataset is built from"
                )

    def num_bytes(self, shard: int, key: str) -> int:
        total = sum(len(value) for value in self._values(shard, key).values())
        self.largest = max(self.largest, total)
        return total

    def missing(self, shard: int, key: str) -> list[str]:
        """Columns that the sample has no value of. Also of a shard of which the stage has made nothing."""
        values = self._values(shard, key)
        names = {name for sidecar in self._sidecars for name in sidecar.names} | set(self._descriptions[shard])
        return [name for name in sorted(names) if not values.get(name)]

    def _values(self, shard: int, key: str) -> dict[str, memoryview]:
        """Without copying them."""
        found: dict[str, memoryview] = {}
        for place in self._places[shard].get(key, []):
            table = self._tables[shard][place.table]
            for name in table.column_names:
                if (value := table.column(name)[place.row]).is_valid:
                    found[name] = memoryview(value.as_buffer())
        return found

    def write(self, path: Path, keys: Sequence[tuple[int, str]]) -> Path:
        """A slice: the columns of these samples in this order; empty where a sample has none."""
        rows = [self._values(shard, key) for shard, key in keys]
        columns = {
            name: pa.array([bytes(row.get(name, b"")) for row in rows], pa.large_binary()) for name in self.names
        }
        pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
        return path


class _Place(NamedTuple):
    table: int
    row: int
    content: bytes | None
    """Hash of the image that the values were made of; None: they follow from captions."""
    where: str


class _Mapped(NamedTuple):
    keys: list[str]
    contents: list[bytes]
    table: pa.Table
    """The values alone."""
    described: dict[str, Json]
    of_images: bool


def _map_columns(parquet: Path, where: str) -> _Mapped:
    """A parquet file of columns, turned into one that is mapped into memory rather than read."""
    from data.encode.columns import (  # torch, of seconds in each worker
        CONTENT,
        KEY,
        METADATA,
        LatentsColumn,
        parse_column,
    )

    mapped = parquet.with_suffix(".arrow")
    try:
        file = pq.ParquetFile(parquet)
        described = json.loads((file.schema_arrow.metadata or {})[METADATA])
        names = list(described)
        sides = file.read([KEY, CONTENT])
        keys, contents = (sides.column(name).to_pylist() for name in (KEY, CONTENT))
        schema = pa.schema([(name, pa.large_binary()) for name in names])
        with pa.OSFile(str(mapped), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in file.iter_batches(batch_size=64, columns=names):
                writer.write_table(pa.Table.from_batches([batch.select(names)]).cast(schema))
        table = pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError) as e:
        raise UserError(f"{where}: not a file of columns ({e}); run `loupe data encode` again") from None
    parquet.unlink()
    of_images = False
    for name, tree in described.items():
        if name in COLUMNS:
            raise UserError(f"{where}: a column may not be called {name!r}; encode again with another name")
        of_images |= isinstance(parse_column(tree, where=f"{where}: {name}"), LatentsColumn)
    return _Mapped(keys, contents, table, described, of_images)
