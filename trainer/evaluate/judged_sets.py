"""Rows of judges over a whole set of images: made once by all ranks, kept in a folder, and read from there the next time.

    FOLDER/NAME-DIGEST/parts/000012.npz    rows of 64 images; a killed evaluation goes on behind the last
                       rows.npz            all rows, in the order of the selection
                       statistics.npz      mean and covariance of features, once they were needed
                       provenance.json     what they are of, and by what; written last

DIGEST is of all that decides the rows: the images, how they are decoded and resized, the network and its weights. So rows
are found again wherever they fit, and never where they do not. A file that is cut or changed is noticed, and made anew.
"""

import hashlib
import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.images import ImageError
from trainer.checkpoint.collective import Ranks
from trainer.errors import UserError, one_line
from trainer.evaluate.codec_report import Progress, provenance
from trainer.evaluate.image_sets import Picture, Selection
from trainer.evaluate.judges import Judge, Rows, batch_of
from trainer.evaluate.metrics import FeatureStatistics
from trainer.parallel.world import World
from trainer.whole_files import write_whole

FORMAT = 1
PART = 64
"""Images of a part: what a kill costs, and what one rank takes at a time."""
MOST_TRIES = 3
ROWS, STATISTICS, PROVENANCE, PARTS = "rows.npz", "statistics.npz", "provenance.json", "parts"
SKIPPED_LISTED = 100
DECODERS = ("numpy", "opencv-python-headless", "pillow", "simplejpeg")
"""Libraries that make pixels of files: with another version of one, pixels may differ."""


class Stopped(Exception):
    """The process was asked to end, on some rank; what is done is kept."""


@dataclass(frozen=True)
class Judged:
    """What one judge gave for one selection."""

    folder: Path | None
    """None: they are in memory alone."""
    judge: dict[str, Any]
    """`Judge.numbers`."""
    rows: Rows
    provenance: dict[str, Any]
    was_there: bool
    """Read, not made."""

    def __len__(self) -> int:
        return len(self.rows["place"])

    @property
    def features(self) -> NDArray[np.float32]:
        return self.rows["features"]

    @property
    def skipped(self) -> dict[str, Any]:
        found: dict[str, Any] = self.provenance["skipped"]
        return found

    def statistics(self, name: str) -> FeatureStatistics:
        """Kept beside the rows. `name`: whose features they are, for errors."""
        if self.folder is None:
            return FeatureStatistics.of_features(self.features, name=name)
        path = self.folder / STATISTICS
        wanted = self.provenance["rows_sha256"]
        note = path.with_suffix(".json")
        try:
            data = path.read_bytes()
            if json.loads(note.read_text()) == {"rows_sha256": wanted, "sha256": _sha256(data)}:
                return FeatureStatistics.from_bytes(data, source=str(path))
        except (OSError, ValueError):  # none yet, or damaged: they follow from the rows
            pass
        made = FeatureStatistics.of_features(self.features, name=name)
        data = made.to_bytes()
        write_whole(path, data)
        write_whole(note, _json({"rows_sha256": wanted, "sha256": _sha256(data)}))
        return made


@dataclass
class Judging:
    """Who judges, and who is told of it.

    Args:
        world: absent: this process alone.
        stop: whether this process was asked to end.
    """

    device: torch.device
    batch_size: int
    world: World | None = None
    progress: Progress = lambda what, done, total: None
    say: Callable[[str], None] = lambda line: None
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.ranks = Ranks(self.world.host_group if self.world else None)

    def judged(self, selection: Selection, judges: Sequence[Judge], folder: Path, what: str) -> dict[str, Judged]:
        """Rows of all judges, by their names; on ranks other than 0 nothing. A collective: ranks share the images, and the
        folder has to be one that all of them see.

        Args:
            what: "real" or "generated", for messages.

        Raises:
            Stopped: on all ranks.
            UserError: no image can be read, or a rank's parts are not seen by rank 0.
        """
        ranks = self.ranks
        identity = ranks.on_rank_0(lambda: selection.identity)
        stores = {judge.name: _Store(folder, judge, identity) for judge in judges}
        assert len(stores) == len(judges), "judges of one name"
        found: dict[str, Judged] = {}
        made: set[str] = set()

        def read() -> list[str]:
            """Names of those that are not there."""
            for name, store in stores.items():
                judged = None if name in found else store.read(self.say, made=name in made)
                if judged is not None:
                    found[name] = judged
            return [name for name in stores if name not in found]

        for _ in range(MOST_TRIES):
            missing = ranks.on_rank_0(read)
            if not missing:
                return found
            made |= set(missing)
            self._make(selection, {j.name: (j, stores[j.name]) for j in judges if j.name in missing}, what)
        raise UserError(f"{folder}: rows that were written cannot be read again; is this disk in order?")

    def _make(self, selection: Selection, lacking: "Lacking", what: str) -> None:
        """Parts, then the whole. Where images cannot be read, others take their place: a further pass over those."""
        ranks, started = self.ranks, time.monotonic()
        begin, readable = 0, 0
        while readable < selection.target and begin < len(selection.order):
            end = min(begin + selection.target - readable, len(selection.order))
            self._parts(selection, lacking, [range(a, min(a + PART, end)) for a in range(begin, end, PART)], what)
            readable = ranks.on_rank_0(lambda end=end: min(s.count(upto=end) for _, s in lacking.values()))  # type: ignore[misc]
            begin = end
        if not readable:
            raise UserError(f"{selection.images.url}: none of {len(selection.order)} images can be read; look at them with "
                            "`loupe data verify`, or an image viewer")  # fmt: skip
        about = {
            "set": selection.images.about(), "seconds": round(time.monotonic() - started, 1), "ranks": ranks.world_size,
            **provenance(self.device),
        }  # fmt: skip

        def finish() -> None:
            for judge, store in lacking.values():
                store.finish(judge, about)

        ranks.on_rank_0(finish)

    def _parts(self, selection: Selection, lacking: "Lacking", places: Sequence[range], what: str) -> None:
        ranks, size = self.ranks, self.ranks.world_size

        def absent(among: Sequence[int]) -> list[int]:
            return [i for i in among if not all(store.has(places[i]) for _, store in lacking.values())]

        todo = ranks.on_rank_0(lambda: absent(range(len(places))))
        total = sum(map(len, places))
        # in step: a rank waits for the others no longer than a part takes, and all hear of a request to stop, or of an error
        for k in range(0, len(todo), size):
            mine = places[todo[k + ranks.rank]] if k + ranks.rank < len(todo) else range(0)
            ranks.on_all(partial(self._one, selection, lacking, mine))
            if self.world.any(self.stop()) if self.world else self.stop():
                raise Stopped
            self.progress(f"{what} images", total - sum(len(places[i]) for i in todo[k + size :]), total)
        if ranks.on_rank_0(lambda: absent(todo)):
            folder = next(iter(lacking.values()))[1].folder
            raise UserError(
                f"{folder}: rank 0 does not see what the others wrote; --out and --cache have to be on a shared disk"
            )

    def _one(self, selection: Selection, lacking: "Lacking", part: range) -> None:
        """A part; an empty one is nothing."""
        if not part:
            return
        pictures, places, skipped = [], [], []
        for place in part:
            try:
                pictures.append(selection.picture(place))
                places.append(place)
            except ImageError as e:
                name = selection.images.name(int(selection.order[place]))
                skipped.append({"name": name, "reason": e.reason, "detail": e.detail[:200]})
        wants_prompts = any(judge.name == "clip_prompts" for judge, _ in lacking.values())
        prompts = [selection.images.prompt(p.index) if wants_prompts else None for p in pictures]
        rows: dict[str, list[Rows]] = {name: [] for name in lacking}
        for first in range(0, len(pictures), self.batch_size):
            if self.stop():
                return
            some = slice(first, first + self.batch_size)
            judges = [judge for judge, _ in lacking.values()]
            for name, found in batch_rows(judges, pictures[some], prompts[some], self.batch_size, self.device).items():
                rows[name].append(found)
        for name, (_, store) in lacking.items():
            joined = {
                key: np.concatenate([r[key] for r in rows[name]]) for key in (rows[name][0] if rows[name] else ())
            }
            store.add(part, np.array(places, np.int64), selection.order[places], joined, skipped)


def batch_rows(
    judges: Sequence[Judge], pictures: Sequence[Picture], prompts: Sequence[str | None], batch_size: int, device: torch.device
) -> dict[str, Rows]:  # fmt: skip
    """What each judge gives of at most `batch_size` pictures, by its name."""
    batch, found = batch_of(pictures, prompts, batch_size, device), {}
    for judge in judges:
        rows = judge.rows(batch)
        assert all(len(values) == len(batch.pictures) for values in rows.values())
        found[judge.name] = {name: values[: len(pictures)] for name, values in rows.items()}
    return found


class _Store:
    """Files of one judge and one selection."""

    def __init__(self, root: Path, judge: Judge, identity: Mapping[str, Any]) -> None:
        self.key = {
            "format": FORMAT,
            "images": dict(identity),
            "judge": judge.numbers(),
            "decoders": {name: version(name) for name in DECODERS},
        }
        digest = hashlib.sha256(_json(self.key)).hexdigest()
        self.folder = root / f"{judge.name}-{digest[:24]}"

    # ---------------------------------------------------------------------------------------------------------- parts

    def _part(self, places: range) -> Path:
        return self.folder / PARTS / f"{places.start:09d}-{places.stop:09d}.npz"

    def has(self, places: range) -> bool:
        """Whether a part is there and whole; a damaged one is removed."""
        path = self._part(places)
        try:
            _unpacked(path.read_bytes())
        except FileNotFoundError:
            return False
        except _DAMAGE:
            path.unlink(missing_ok=True)
            return False
        return True

    def add(
        self, part: range, places: NDArray[np.int64], indices: NDArray[np.int64], rows: Rows, skipped: Sequence[Any]
    ) -> None:
        told = np.frombuffer(_json({"skipped": skipped}), np.uint8)
        write_whole(self._part(part), _packed({"place": places, "index": indices, **rows, "_told": told}))

    def _read_parts(self, upto: int | None = None) -> list[Rows]:
        """In order of their places."""
        paths = sorted((self.folder / PARTS).glob("*.npz"))
        ends = [int(path.stem.split("-")[1]) for path in paths]
        return [
            _unpacked(path.read_bytes()) for path, end in zip(paths, ends, strict=True) if upto is None or end <= upto
        ]

    def count(self, upto: int) -> int:
        """Images that could be read, of places before `upto`."""
        return sum(len(part["place"]) for part in self._read_parts(upto))

    # ---------------------------------------------------------------------------------------------------------- whole

    def finish(self, judge: Judge, about: Mapping[str, Any]) -> None:
        parts = self._read_parts()
        skipped = [entry for part in parts for entry in json.loads(part["_told"].tobytes())["skipped"]]
        filled = [part for part in parts if len(part["place"])]
        names = [name for name in filled[0] if name != "_told"]
        rows = {name: np.concatenate([part[name] for part in filled]) for name in names}
        data = _packed(rows)
        reasons: dict[str, int] = {}
        for entry in skipped:
            reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
        told = {
            "key": self.key,
            "judge": judge.numbers(),
            "count": len(rows["place"]),
            "skipped": {"count": len(skipped), "reasons": reasons, "listed": skipped[:SKIPPED_LISTED]},
            "rows_sha256": _sha256(data),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **about,
        }
        write_whole(self.folder / ROWS, data)
        write_whole(self.folder / PROVENANCE, json.dumps(told, indent=1).encode() + b"\n")
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def read(self, say: Callable[[str], None], *, made: bool) -> Judged | None:
        """None where they are not whole; what is damaged is removed, and said."""
        path = self.folder / PROVENANCE
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as e:
            self._anew(say, f"{PROVENANCE}: {one_line(e)}")
            return None
        try:
            data = (self.folder / ROWS).read_bytes()
            if told["key"] != json.loads(_json(self.key)) or told["rows_sha256"] != _sha256(data):
                raise ValueError(f"{ROWS} is not what {PROVENANCE} says")
            rows = _unpacked(data)
            if told["count"] != len(rows["place"]):
                raise ValueError("rows are missing")
        except (*_DAMAGE, KeyError, TypeError) as e:
            self._anew(say, one_line(e))
            return None
        return Judged(self.folder, told["judge"], rows, told, was_there=not made)

    def _anew(self, say: Callable[[str], None], why: str) -> None:
        say(f"warning: {self.folder}: damaged ({why}); it is made anew")
        for name in (PROVENANCE, ROWS, STATISTICS):
            (self.folder / name).unlink(missing_ok=True)


Lacking = Mapping[str, tuple[Judge, _Store]]
_DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError)


def _packed(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **rows)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Rows:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True).encode()


def described(about: Mapping[str, Any], size: int, pixels: Judged) -> dict[str, Any]:
    """A set, for a report: what it is, and what is odd about it.

    Args:
        about: `ImageSet.about`.
        size: side at which its images are compared, in pixels.
        pixels: of the `PixelJudge`.
    """
    from trainer.evaluate.judges import FORMATS

    rows = pixels.rows
    identity = pixels.provenance["key"]["images"]
    sizes: dict[str, int] = {}
    for width, height in zip(rows["width"].tolist(), rows["height"].tolist(), strict=True):
        sizes[f"{width}x{height}"] = sizes.get(f"{width}x{height}", 0) + 1
    common = dict(sorted(sizes.items(), key=lambda item: -item[1])[:20])
    return {
        **about,
        "identity": identity,
        "used": len(pixels),
        "skipped": pixels.skipped,
        "replaced": int((rows["place"] >= identity.get("target", len(pixels))).sum()),
        "sizes": common,
        "num_sizes": len(sizes),
        "enlarged": int((np.minimum(rows["width"], rows["height"]) < size).sum()),
        "formats": {name: int((rows["format"] == i).sum()) for i, name in enumerate(FORMATS)},
        "grey": int(rows["grey"].sum()),
        "flat": int(rows["flat"].sum()),
    }
