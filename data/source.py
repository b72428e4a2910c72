"""Folders of images as people have them: with a metadata.jsonl, with a text beside each image, or one per class.

`list_images` says what a folder or fsspec URL holds and reads no image and no text; `open_source` does it for a local folder,
with the texts.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data import draws
from data.ingest.ranges import SOURCE_DEADLINE_S, RangeReader, filesystem, is_local
from data.storage import ask
from trainer.errors import UserError

METADATA = "metadata.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUTS = (METADATA, "texts", "classes")
NOTICES = ("notice", "license", "licence", "copying")
"""Names of licence files, whatever their suffix and case."""
_SPLITS = {"train", "val", "valid", "validation", "test"}
"""As ImageNet's folders are called: classes lie below, and what is not `train` is not for training."""
_OTHER_TEXTS = ("captions.json", "captions.jsonl", "captions.txt", "captions.csv", "metadata.json", "metadata.csv")
"""Where people have texts that are not read."""
_MAX_LINE_BYTES = 1 << 20
_LICENCE, _SOURCE = ("licence", "license"), ("source", "url", "source_url", "flickr_url", "coco_url")
"""Names under which rows have them; the first that is there counts."""


@dataclass(frozen=True)
class Listed:
    """One image of a source, before anything of it is read."""

    key: str
    """Its file name within the source, with forward slashes."""
    file: str | None
    """Where it lies in the source; absent: there is no such file."""
    captions: tuple[str, ...] = ()
    text: str | None = None
    """File whose lines are its captions."""
    label: str | int | None = None
    """Class: its name, or its number."""
    note: str = ""
    """Why it has no file or no caption."""
    licence: str | None = None
    source: str | None = None
    """Where it came from, as the source says."""


@dataclass(frozen=True)
class Entry:
    """One image of a source."""

    key: str
    """Its file name within the source, with forward slashes."""
    path: Path | None
    """Absent: there is no such file."""
    captions: tuple[str, ...]
    label: int = -1
    note: str = ""
    """Why it has no path or no caption."""
    licence: str | None = None
    source: str | None = None
    """Where it came from, as the source says."""


@dataclass(frozen=True)
class Source:
    folder: Path
    layout: str
    entries: Sequence[Entry]
    class_names: tuple[str, ...] | None = None
    merged_rows: int = 0
    """Rows that named an image again; their captions went to the first."""
    more_folders: tuple[Path, ...] = ()
    """Further ones that entries lie in."""
    no_row: tuple[str, ...] = ()
    """Image files that no row of metadata.jsonl names; they are not used."""

    def ordered(self, seed: int | None) -> Iterator[Entry]:
        if seed is None:
            return iter(self.entries)
        order = draws.permutation(seed, "build order", length=len(self.entries))
        return (self.entries[i] for i in order)

    def notices(self) -> list[Path]:
        """Licence files at the top of each folder."""
        folders = (self.folder, *self.more_folders)
        return [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file() and is_notice(p.name)]


@dataclass(frozen=True)
class Listing:
    """What `list_images` has found."""

    layout: str
    images: Sequence[Listed]
    merged_rows: int = 0
    left_out: int = 0
    """Images in `val`, `test` and the like, beside `train`."""
    no_row: tuple[str, ...] = ()
    """Image files that no row of metadata.jsonl names."""


def is_notice(file_name: str) -> bool:
    return PurePosixPath(file_name).stem.lower() in NOTICES


def open_source(folder: Path) -> Source:
    """Find out a local folder's layout and list its images, with their texts.

    Raises:
        UserError: no such folder, no images, or rows that cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with images")
    listing = list_images(str(folder))
    names = _class_names(listing.images)
    entries = []
    for image in listing.images:
        captions, note = image.captions, image.note
        if image.text is not None:
            captions, note = _read_text(folder / image.text), "its .txt is empty"
        label = image.label
        if isinstance(label, str):
            assert names is not None
            label = names.index(label)
        path = None if image.file is None else folder / image.file
        entries.append(
            Entry(image.key, path, captions, -1 if label is None else label, note, image.licence, image.source)
        )
    return Source(folder, listing.layout, entries, names, listing.merged_rows, no_row=listing.no_row)


def list_images(url: str, layout: str | None = None, *, uncaptioned: bool = False) -> Listing:
    """List the images of a folder.

    Args:
        url: path or fsspec URL.
        layout: one of `LAYOUTS`; absent: found out.
        uncaptioned: images that are in no class folder and have no text are wanted, too.

    Raises:
        UserError: no images, or rows that cannot be used.
        StorageError: storage does not answer.
    """
    assert layout is None or layout in LAYOUTS
    folder = _Folder(url)
    if layout == METADATA or (layout is None and folder.has(METADATA)):
        return _from_metadata(folder)
    names = folder.names()
    images = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
    if layout is None:
        known = set(names)
        texts = any(_text_of(image) in known for image in images) or (uncaptioned and _stray(images))
        layout = "texts" if texts else "classes"
    if not images:
        raise UserError(f"{url}: no {METADATA} and no {', '.join(SUFFIXES)}; see `loupe data build --help`")
    if layout == "texts":
        return _from_pairs(images, set(names))
    if stray := _stray(images):
        raise UserError(_no_text(folder, stray))
    return _from_classes(images)


class _Folder:
    """Files by their names within a folder, at a path or URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, root = filesystem(self.url)
        self._root = root.rstrip("/")
        self.is_local = is_local(self._fs)
        self._names: list[str] | None = None
        self._known: set[str] = set()

    def names(self) -> list[str]:
        """Of all files, however deep, in the order of their paths' parts."""
        if self._names is None:
            found = self._walk() if self.is_local else self._find()
            self._names = sorted(found, key=lambda name: name.split("/"))
            self._known = set(found)
        return self._names

    def _walk(self) -> list[str]:
        found: list[str] = []

        def refuse(error: OSError) -> None:
            raise UserError(f"{error.filename or self.url}: cannot be read ({error.strerror})") from None

        for folder, _, files in os.walk(self._root, onerror=refuse):
            # Plain files only: who opens a pipe of such a name waits for ever.
            of_use = [f for f in files if f.lower().endswith((*SUFFIXES, ".txt")) and os.path.isfile(f"{folder}/{f}")]
            inside = os.path.relpath(folder, self._root).replace(os.sep, "/")
            found += of_use if inside == "." else [f"{inside}/{file}" for file in of_use]
        return found

    def _find(self) -> list[str]:
        def find() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.find(self._root))

        found = ask(find, self.url, deadline_s=SOURCE_DEADLINE_S, verb="listed")
        return [path[len(self._root) :].lstrip("/") for path in found if path.startswith(f"{self._root}/")]

    def has(self, name: str) -> bool:
        if self.is_local:
            return os.path.isfile(f"{self._root}/{name}")
        if self._names is None and name == METADATA:
            return ask(lambda: self._is_file(name), f"{self.url}/{name}", verb="found")
        self.names()
        return name in self._known

    def _is_file(self, name: str) -> bool:
        try:
            # Not by `isfile`, which answers with no where it has failed.
            return bool(self._fs.info(f"{self._root}/{name}")["type"] == "file")
        except FileNotFoundError:
            return False


def _text_of(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(".txt"))


def _from_pairs(images: Sequence[str], names: set[str]) -> Listing:
    listed = []
    for image in images:
        text = _text_of(image)
        has_text = text in names
        note = "its .txt is empty" if has_text else "no .txt of the same name"
        listed.append(Listed(image, image, text=text if has_text else None, note=note))
    return Listing("texts", listed)


def _no_text(folder: _Folder, stray: Sequence[str]) -> str:
    """An error for those who have images and no texts, or texts in a form that is not read."""
    other = next((f"{name} is not read, " for name in _OTHER_TEXTS if folder.has(name)), "")
    return (
        f"{folder.url}: {len(stray)} without text, such as {stray[0]}; {other}write {METADATA}, a row of file_name and text "
        "for each image, or put a .txt of the same name beside each, or sort them into a folder per class (without texts: "
        "`loupe data ingest --keep-uncaptioned`, then `recaption`)"
    )


def _classed(images: Sequence[str]) -> tuple[Sequence[str], int]:
    """Images that count, and how many folders lie above those of classes: `images/` where that is the only one, or ImageNet's
    `train/`."""
    tops = {image.partition("/")[0] for image in images}
    training = [image for image in images if image.startswith("train/")]
    if training and tops <= _SPLITS and all(image.count("/") > 1 for image in training):
        return training, 1
    return images, 1 if tops == {"images"} else 0


def _stray(images: Sequence[str]) -> list[str]:
    """Those in no class folder."""
    images, depth = _classed(images)
    return [image for image in images if image.count("/") < depth + 1]


def _from_classes(images: Sequence[str]) -> Listing:
    used, depth = _classed(images)
    listed = [Listed(image, image, (words(image.split("/")[depth]),), label=image.split("/")[depth]) for image in used]
    return Listing("classes", listed, left_out=len(images) - len(used))


def _read_text(path: Path) -> tuple[str, ...]:
    try:
        return clean(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 ({e.reason}); save it as UTF-8") from None
    except OSError as e:
        raise UserError(f"{e.filename or path}: cannot be read ({e.strerror})") from None


# ------------------------------------------------------------------------------------------------------- metadata.jsonl


@dataclass
class _Row:
    captions: list[str]
    label: str | int | None
    where: str
    licence: str | None
    source: str | None


def _from_metadata(folder: _Folder) -> Listing:
    rows: dict[str, _Row] = {}
    merged = 0
    for where, row in _read_rows(f"{folder.url}/{METADATA}"):
        file_name = _file_name(row, where)
        new = _Row(
            _captions(row, where), _label(row, where), where, first_text(row, _LICENCE), first_text(row, _SOURCE)
        )
        known = rows.setdefault(file_name, new)
        if known is not new:  # some sets have a row for each caption
            if new.label != known.label:
                raise UserError(f"{where}: label {new.label!r} of {file_name} is {known.label!r} in {known.where}")
            known.captions += [caption for caption in new.captions if caption not in known.captions]
            merged += 1
    if not rows:
        raise UserError(f"{folder.url}/{METADATA}: has no rows")
    listed = []
    for file_name, known in rows.items():
        captions = known.captions or ([words(known.label)] if isinstance(known.label, str) else [])
        file = next((name for name in (file_name, f"images/{file_name}") if folder.has(name)), None)
        note = "" if file else "no such file"
        listed.append(Listed(file_name, file, tuple(captions), None, known.label, note, known.licence, known.source))
    _class_names(listed)
    used = {one.file for one in listed}
    no_row = (name for name in folder.names() if PurePosixPath(name).suffix.lower() in SUFFIXES and name not in used)
    return Listing(METADATA, listed, merged, no_row=tuple(no_row))


def _read_rows(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line for errors, row) of each line that is not blank."""
    for number, (_, line) in enumerate(RangeReader(url).lines(0, _MAX_LINE_BYTES), start=1):
        if line is not None and not line.strip():
            continue
        yield f"{url}:{number}", parse_row(line, f"{url}:{number}")


def parse_row(line: bytes | None, where: str) -> dict[str, Any]:
    """A line of JSON; None: one that was too long.

    Raises:
        UserError: it is no JSON object.
    """
    if line is None:
        raise UserError(f"{where}: longer than {_MAX_LINE_BYTES} bytes; write one object a line")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 ({e.reason}); save it as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}); write one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; write one a line")
    return row


def _file_name(row: dict[str, Any], where: str) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no file_name; name the image")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{where}: file_name {name!r} leads out of the folder; give a path within it")
    return path.as_posix()


def _captions(row: dict[str, Any], where: str) -> list[str]:
    captions = row.get("captions", row.get("text"))
    if captions is None:
        return []
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: captions must be a list of texts, or text a text")
    return list(clean(captions))


def _label(row: dict[str, Any], where: str) -> str | int | None:
    label = row.get("label")
    if label is None or (isinstance(label, str) and label):
        return label
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
        raise UserError(f"{where}: label {label!r} is neither a name nor a number from 0")
    return label


def _class_names(images: Sequence[Listed]) -> tuple[str, ...] | None:
    kinds = {type(image.label) for image in images if image.label is not None}
    if len(kinds) > 1:
        raise UserError(f"{METADATA}: labels are names in some rows and numbers in others; use one")
    if kinds != {str}:
        return None
    return tuple(sorted({image.label for image in images if isinstance(image.label, str)}))


# --------------------------------------------------------------------------------------------------------------- texts


def clean(texts: Sequence[str]) -> tuple[str, ...]:
    """Each on one line with single spaces, fit for UTF-8, without empty ones and repetitions."""
    stripped = (" ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split()) for text in texts)
    return tuple(dict.fromkeys(text for text in stripped if text))


def first_text(row: dict[str, Any], names: Sequence[str], max_characters: int = 1000) -> str | None:
    """The first of these fields that is a text and not blank."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and (text := "".join(clean([value[:max_characters]]))):
            return text
    return None


def words(name: str) -> str:
    """Of a class folder's name."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())
