"""What the user names, as work: single tars, manifests and folders."""

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from data.ingest.ranges import SOURCE_DEADLINE_S, filesystem, is_local
from data.ingest.tars import refuse_compressed
from data.source import METADATA, is_notice
from data.storage import ask
from trainer.errors import UserError
from trainer.urls import holds_credentials, public_url

LAYOUTS = ("auto", "tars", "manifest", "images", "metadata", "texts", "classes")
"""`images`: which of the three that follow is found out."""
_MANIFESTS = (".parquet", ".jsonl", ".ndjson")
_PACKED_TARS = (".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")

Unit = dict[str, Any]


def check_sources(sources: Sequence[str], out: str) -> None:
    """
    Raises:
        UserError: a source holds credentials, which would be written down, or overlaps the output.
    """
    out_fs, out_path = filesystem(out)
    for source in sources:
        if holds_credentials(source):
            raise UserError(
                f"{public_url(source)}: the URL holds credentials, which would be written down; give them by the environment"
            )
        fs, path = filesystem(source)
        if type(fs) is type(out_fs) and f"{out_path.rstrip('/')}/".startswith(f"{path.rstrip('/')}/"):
            raise UserError(f"{out}: lies in the source {source}; name a folder elsewhere")


def expand(sources: Sequence[str], layout: str) -> list[Unit]:
    """Units of work, in order: `{"kind": "tars", "prefix": ..., "tars": [...]}`, one `manifest` or one `folder`.

    Each thing whose samples have names of their own gets a `prefix` of its own, so that keys are unique.

    Raises:
        UserError: nothing is there, or it is of mixed kinds.
    """
    units: list[Unit] = []
    taken: set[str] = set()
    for source in sources:
        kind, files, notices = _look(source, layout)
        if kind == "tars":
            tars = [{**tar, "prefix": _unique(_stem(tar["url"]), taken)} for tar in files]
            units.append({"kind": "tars", "url": source, "tars": tars, "notices": notices})
        elif kind == "manifest":
            for file in files:
                units.append(
                    {"kind": "manifest", **file, "prefix": _unique(_stem(file["url"]), taken), "notices": notices}
                )
                notices = []
        else:
            # Of one folder alone the files' own names are keys.
            prefix = _unique(_stem(source), taken) if len(sources) > 1 else ""
            units.append({"kind": "folder", "url": source, "prefix": prefix, "notices": notices})
    return units


def _look(source: str, layout: str) -> tuple[str, list[Unit], list[str]]:
    """(kind, files of it, licence files beside them)."""
    fs, path = filesystem(source)
    if any(c in path for c in "*?["):
        found = _listed(fs, source, lambda: fs.glob(path, detail=True))
        files = sorted((info for info in found.values() if info["type"] == "file"), key=lambda info: str(info["name"]))
        if not files:
            raise UserError(f"{source}: matches nothing")
        names = [str(info["name"]) for info in files]
        _refuse_packed(fs, [name for name in names if not name.lower().endswith((".tar", *_MANIFESTS))], source)
        return _kind_of(names, source, layout), _urls(fs, files), []
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".tar" or suffix in _MANIFESTS or (layout in ("tars", "manifest") and suffix):
        try:
            info = _listed(fs, source, lambda: fs.info(path))
        except FileNotFoundError:
            raise UserError(f"{source}: no such file") from None
        if info["type"] == "file":
            return _kind_of([path], source, layout), _urls(fs, [{**info, "name": path}]), []
    return _look_into(fs, source, path, layout)


def _look_into(fs: fsspec.AbstractFileSystem, source: str, path: str, layout: str) -> tuple[str, list[Unit], list[str]]:
    try:
        fs.invalidate_cache()
        infos = _listed(fs, source, lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        raise UserError(f"{source}: no such folder; give tars, manifests, or a folder of images") from None
    files = sorted((info for info in infos if info["type"] == "file"), key=lambda info: str(info["name"]))
    by_name = {str(info["name"]).rpartition("/")[2]: info for info in files}
    if [str(info["name"]).rstrip("/") for info in infos] == [path.rstrip("/")]:  # a file lists itself
        _refuse_packed(fs, [path], source)
    # Beside others they would be left out unseen.
    _refuse_packed(fs, [str(i["name"]) for name, i in by_name.items() if name.lower().endswith(_PACKED_TARS)], source)
    notices = [name for name in by_name if is_notice(name)]
    tars = [info for name, info in by_name.items() if name.lower().endswith(".tar")]
    # img2dataset leaves a parquet beside each tar: where there are tars, they are what is meant.
    manifests = [
        info for name, info in by_name.items() if name.lower().endswith(_MANIFESTS) and name.lower() != METADATA
    ]
    if layout == "tars" or (layout == "auto" and tars):
        if not tars:
            raise UserError(f"{source}: no .tar in it; deeper ones are found by a pattern such as '{source}/**/*.tar'")
        return "tars", _urls(fs, tars, by_name), notices
    if layout == "manifest" or (layout == "auto" and manifests and METADATA not in by_name):
        if not manifests:
            raise UserError(f"{source}: no {', '.join(_MANIFESTS)} in it")
        return "manifest", _urls(fs, manifests), notices
    return "folder", [], notices


def _refuse_packed(fs: fsspec.AbstractFileSystem, names: Sequence[str], source: str) -> None:
    """
    Raises:
        UserError: the first of these files is compressed.
    """
    if not names:
        return
    head = ask(lambda: bytes(fs.cat_file(names[0], start=0, end=6)), names[0])
    name = names[0].rpartition("/")[2]
    refuse_compressed(head, source if source.endswith(name) else f"{source}: {name}")


def _kind_of(names: Sequence[str], source: str, layout: str) -> str:
    if layout in ("tars", "manifest"):
        return layout
    if all(name.lower().endswith(".tar") for name in names):
        return "tars"
    if all(name.lower().endswith(_MANIFESTS) for name in names):
        return "manifest"
    raise UserError(f"{source}: neither tars alone nor manifests alone ({', '.join(_MANIFESTS)}); narrow the pattern")


def _urls(fs: fsspec.AbstractFileSystem, infos: Sequence[Any], beside: dict[str, Any] | None = None) -> list[Unit]:
    local, units = is_local(fs), []
    for info in infos:
        name = str(info["name"])
        unit = {"url": name if local else fs.unstrip_protocol(name), "bytes": info["size"]}
        stats = f"{PurePosixPath(name).stem}_stats.json"
        if beside and stats in beside:
            stats_path = f"{name.rpartition('/')[0]}/{stats}"
            unit["stats"] = stats_path if local else fs.unstrip_protocol(stats_path)
        units.append(unit)
    return units


def _listed(fs: fsspec.AbstractFileSystem, source: str, call: Callable[[], Any]) -> Any:
    def look() -> Any:
        try:
            return call()
        except NotADirectoryError:
            raise FileNotFoundError(source) from None

    return ask(look, source, deadline_s=SOURCE_DEADLINE_S, verb="listed")


def _stem(url: str) -> str:
    return PurePosixPath(urlsplit(url).path.rstrip("/") or url).stem


def _unique(name: str, taken: set[str]) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in name)[:60] or "images"
    unique, number = plain, 2
    while unique in taken:
        unique, number = f"{plain}-{number}", number + 1
    taken.add(unique)
    return unique
