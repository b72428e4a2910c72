"""Folders of images as people have them: with a metadata.jsonl, with a text beside each image, or one per class."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data import draws
from trainer.errors import UserError

METADATA = "metadata.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_NOTICES = ("notice", "license", "licence", "copying")
_MAX_LINE_CHARACTERS = 1 << 20


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

    def ordered(self, seed: int | None) -> Iterator[Entry]:
        if seed is None:
            return iter(self.entries)
        order = draws.permutation(seed, "build order", length=len(self.entries))
        return (self.entries[i] for i in order)

    def notices(self) -> list[Path]:
        """Licence files at the top of each folder."""
        folders = (self.folder, *self.more_folders)
        return [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file() and p.stem.lower() in _NOTICES]


def open_source(folder: Path) -> Source:
    """Find out a folder's layout and list its images.

    Raises:
        UserError: no such folder, no images, or rows that cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with images")
    try:
        if (folder / METADATA).exists():
            return _from_metadata(folder)
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if any(image.with_suffix(".txt").is_file() for image in images):
            return _from_pairs(folder, images)
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    if not images:
        raise UserError(f"{folder}: no {METADATA} and no {', '.join(SUFFIXES)}; see `loupe data build --help`")
    if stray := [image for image in images if image.parent == folder]:
        raise UserError(f"{stray[0]}: has no text; put one of the same name with .txt beside it, list the images in "
                        f"{METADATA}, or sort them into a folder per class")  # fmt: skip
    return _from_classes(folder, images)


def _from_pairs(folder: Path, images: Sequence[Path]) -> Source:
    entries = []
    for image in images:
        text = image.with_suffix(".txt")
        try:
            lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
        except UnicodeDecodeError as e:
            raise UserError(f"{text}: not UTF-8 ({e.reason}); save it as UTF-8") from None
        captions = _clean(lines)
        note = "its .txt is empty" if text.is_file() else "no .txt of the same name"
        entries.append(Entry(image.relative_to(folder).as_posix(), image, captions, note=note))
    return Source(folder, "texts", entries)


def _from_classes(folder: Path, images: Sequence[Path]) -> Source:
    """The class is the folder at the top, or below `images/` where that is the only one."""
    tops = {image.relative_to(folder).parts[0] for image in images}
    root = folder / "images" if tops == {"images"} else folder
    if any(image.parent == root for image in images):
        raise UserError(
            f"{root}: has images beside class folders; sort them all into folders, or list them in {METADATA}"
        )
    names = tuple(sorted({image.relative_to(root).parts[0] for image in images}))
    entries = []
    for image in images:
        name = image.relative_to(root).parts[0]
        entries.append(Entry(image.relative_to(folder).as_posix(), image, (_words(name),), names.index(name)))
    return Source(folder, "classes", entries, class_names=names)


# ------------------------------------------------------------------------------------------------------- metadata.jsonl


@dataclass
class _Row:
    captions: list[str]
    label: str | int | None
    where: str


def _from_metadata(folder: Path) -> Source:
    rows: dict[str, _Row] = {}
    merged = 0
    for where, row in _read_rows(folder / METADATA):
        file_name = _file_name(row, where)
        new = _Row(_captions(row, where), _label(row, where), where)
        known = rows.setdefault(file_name, new)
        if known is not new:  # some sets have a row for each caption
            if new.label != known.label:
                raise UserError(f"{where}: label {new.label!r} of {file_name} is {known.label!r} in {known.where}")
            known.captions += [caption for caption in new.captions if caption not in known.captions]
            merged += 1
    if not rows:
        raise UserError(f"{folder / METADATA}: has no rows")
    class_names = _class_names(rows)
    entries = []
    for file_name, known in rows.items():
        label = known.label
        captions = known.captions or ([_words(label)] if isinstance(label, str) else [])
        if isinstance(label, str):
            assert class_names is not None
            label = class_names.index(label)
        path = next((p for p in (folder / file_name, folder / "images" / file_name) if p.is_file()), None)
        entries.append(Entry(file_name, path, tuple(captions), -1 if label is None else label))
    return Source(folder, METADATA, entries, class_names, merged)


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line for errors, row) of each line that is not blank."""
    with open(path, encoding="utf-8") as file:
        number = 0
        try:
            while line := file.readline(_MAX_LINE_CHARACTERS):
                number += 1
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: not a JSON object; write one a line")
                yield f"{path}:{number}", row
        except UnicodeDecodeError as e:
            raise UserError(f"{path}:{number + 1}: not UTF-8 ({e.reason}); save it as UTF-8") from None
        except (json.JSONDecodeError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not JSON ({e}); write one object a line") from None


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
    return list(_clean(captions))


def _label(row: dict[str, Any], where: str) -> str | int | None:
    label = row.get("label")
    if label is None or (isinstance(label, str) and label):
        return label
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
        raise UserError(f"{where}: label {label!r} is neither a name nor a number from 0")
    return label


def _class_names(rows: dict[str, _Row]) -> tuple[str, ...] | None:
    kinds = {type(row.label) for row in rows.values() if row.label is not None}
    if len(kinds) > 1:
        raise UserError(f"{METADATA}: labels are names in some rows and numbers in others; use one")
    if kinds != {str}:
        return None
    return tuple(sorted({row.label for row in rows.values() if isinstance(row.label, str)}))


def _clean(texts: Sequence[str]) -> tuple[str, ...]:
    stripped = (" ".join(text.split()) for text in texts)
    return tuple(dict.fromkeys(text for text in stripped if text))


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split())
