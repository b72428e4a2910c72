"""`loupe data build` of what stages have written: captions and columns joined, buckets, shards of about equal size, an index.

    windows   some input shards each: what is known of their samples, joined, sorted into buckets, shuffled
    plan      one item: which sample stands in which shard, from sizes alone
    shards    some output shards each: images by ranges from the source's tars
    publish   one item: labels, card, index.json, and dataset.json last

The stage's folder lies beside the dataset, OUT.work unless told otherwise, so that OUT is a dataset and nothing else, to be
copied or removed as one. Shards are written to OUT at once, since object storage cannot rename; without index.json and
dataset.json nobody takes them for a dataset.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from data.mdsbuild.plan import PLAN, WINDOWS, plan_items, plan_parts
from data.mdsbuild.publish import Publication, publish_parts
from data.mdsbuild.shards import SHARDS, Plans, shard_items, shard_parts
from data.mdsbuild.sidecars import Sidecar, SidecarFiles, captions_files, columns_files
from data.mdsbuild.windows import window_items, window_parts
from data.publish import check_writable
from data.schema import DATASET, INDEX, MAX_SHARD_BYTES
from data.stages.runner import Part, Pass, Stage, Work
from data.stages.samples import Samples, open_samples
from data.stages.store import STAGE, Json, StageStore, read_stage
from data.storage import Storage
from trainer.errors import UserError
from trainer.urls import public_url

PUBLISH = "publish"
MAX_SHARD_MIB = MAX_SHARD_BYTES >> 21
"""A shard may hold one sample more than its size, which may be as large."""


@dataclass
class BuildStage(Stage):
    """
    Args:
        source: output of `ingest` or `faces`.
        aspects: width / height of the buckets by name; empty: none.
        min_samples: of a bucket; the samples of smaller ones go to the nearest that is large enough.
        captions, columns: outputs of `recaption` and `encode`.
    """

    name: ClassVar[str] = "build"

    source: str
    out: str
    dataset_name: str
    aspects: Mapping[str, float]
    shard_mib: int = 64
    order_seed: int = 0
    min_samples: int = 1000
    captions: Sequence[Sidecar] = ()
    columns: Sequence[Sidecar] = ()
    overwrite: bool = False
    _plans: Plans = field(default_factory=Plans, repr=False, compare=False)

    def settings(self) -> dict[str, Json]:
        return {
            "source": public_url(self.source),
            "made_of": list(self.samples.ids),
            "out": public_url(self.out),
            "name": self.dataset_name,
            "buckets": dict(self.aspects),
            "min_samples_of_a_bucket": self.min_samples,
            "shard_mib": self.shard_mib,
            "order_seed": self.order_seed,
            "captions": [[sidecar.kind, public_url(sidecar.url), _id(sidecar.url)] for sidecar in self.captions],
            "columns": [[public_url(sidecar.url), _id(sidecar.url)] for sidecar in self.columns],
        }

    def passes(self) -> Sequence[Pass]:
        return [
            Pass(WINDOWS, self._window_items, self._windows),
            Pass(PLAN, plan_items, self._plan),
            Pass(SHARDS, self._shard_items, self._shards),
            Pass(PUBLISH, lambda store: [{"name": "publish"}], self._publish),
        ]

    def finish(self, store: StageStore) -> dict[str, Json]:
        receipt = store.read_json(f"work/{PUBLISH}/done/publish.json")
        return {"dataset": {"url": public_url(self.out), **receipt["parts"][0]["note"]}}

    # -------------------------------------------------------------------------------------------------------- passes

    @cached_property
    def samples(self) -> Samples:
        return open_samples(self.source)

    @cached_property
    def _captions(self) -> list[SidecarFiles]:
        return captions_files(self.samples, self.captions)

    @cached_property
    def _columns(self) -> list[SidecarFiles]:
        return columns_files(self.samples, self.columns)

    def check_sidecars(self) -> None:
        """
        Raises:
            UserError: one is another stage's output, not finished, or made of other samples.
        """
        _ = self._captions, self._columns  # opening one checks it

    def _window_items(self, _store: StageStore) -> list[Json]:
        self.check_sidecars()
        return window_items(self.samples, self.order_seed, self._columns)

    def _windows(self, work: Work) -> Iterator[Part]:
        return window_parts(
            work,
            self.samples,
            aspects=self.aspects,
            seed=self.order_seed,
            shard_bytes=self._shard_bytes,
            captions=self._captions,
            columns=self._columns,
        )

    def _plan(self, work: Work) -> Iterator[Part]:
        return plan_parts(work, aspects=self.aspects, min_samples=self.min_samples, shard_bytes=self._shard_bytes)

    def _shard_items(self, store: StageStore) -> list[Json]:
        with tempfile.TemporaryDirectory(prefix="loupe-plan-") as scratch:
            return shard_items(self._plans.get(store, Path(scratch)))

    def _shards(self, work: Work) -> Iterator[Part]:
        plan = self._plans.get(work.store, work.scratch)
        return shard_parts(work, plan, StageStore(self.source), Storage(self.out))

    def _publish(self, work: Work) -> Iterator[Part]:
        plan = self._plans.get(work.store, work.scratch)
        sidecars = [sidecar.url for sidecar in (*self.captions, *self.columns)]
        how = Publication(self.dataset_name, self.order_seed, self.settings(), sidecars, self.overwrite)
        return publish_parts(work, plan, StageStore(self.source), Storage(self.out), how)

    @property
    def _shard_bytes(self) -> int:
        return self.shard_mib << 20


def _id(url: str) -> str:
    """Of a stage's output: what is made anew at its place has another."""
    return str(read_stage(StageStore(url))["id"])


def check_place(stage: BuildStage, work_url: str, *, write: bool = True) -> None:
    """Before the first worker begins: whether a dataset may come to `out`. A build that has begun goes on unasked.

    Args:
        write: try whether storage can be written.

    Raises:
        UserError: it may not, or storage cannot be written.
    """
    out, work, source = Storage(stage.out), StageStore(work_url), Storage(stage.source)
    if not 0 < stage.shard_mib <= MAX_SHARD_MIB:
        raise UserError(f"--shard-mib: {stage.shard_mib} is not between 1 and {MAX_SHARD_MIB}")
    for other, name in ((source, "the source"), (work, "--work")):
        if _overlap(out, other) or (other is work and _overlap(work, source)):
            raise UserError(f"{stage.out}: overlaps {name}, {other.url}; name a folder elsewhere")
    if out.is_local and Path(out.root).is_file():
        raise UserError(f"{stage.out}: is a file; name a folder")
    names = [name for name in out.names(hidden=True) if name != "quarantine"]
    if names and not work.exists(STAGE):
        if INDEX not in names and DATASET not in names:
            raise UserError(f"{stage.out}: holds other files and no dataset; name a new folder")
        if not stage.overwrite:
            raise UserError(
                f"{stage.out}: holds a dataset already; add --overwrite to replace it, or name another folder"
            )
    if not work.exists(STAGE):
        stage.check_sidecars()
    if write:
        check_writable(out)


def _overlap(a: Storage, b: Storage) -> bool:
    if type(a.fs) is not type(b.fs):
        return False
    one, other = (str(Path(s.root).resolve()) if s.is_local else s.root for s in (a, b))
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")
