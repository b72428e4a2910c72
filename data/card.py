"""A dataset's card: README.md for people who look at files, card.html for those who look at pages, samples.png for both.

All of it follows from what is handed in, so equal builds have equal cards. Texts of the data are quoted, never marked up.
"""

import base64
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.images import ImageError, read_image
from data.provenance import Record
from data.schema import DatasetInfo
from data.stages.receipts import GIVEN_UP, NOT_DONE
from data.stats import OTHERS, SHAPES, SIDES, SIZES_KIB, WORDS, Statistics, bin_names, median
from data.transforms import resize, square_crop

README, PAGE, GRID = "README.md", "card.html", "samples.png"

GRID_COLUMNS, GRID_ROWS = 8, 6
_CELL = 96
_LISTED = 40
"""Licences, classes and given up items that a card lists; the rest is in stats.json and in their stage's summary.json."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } .bar { background: #4472a8; height: .8em }
blockquote { margin: .3rem 0 .3rem 1rem; color: #444 } pre { white-space: pre-wrap; background: #f5f5f5; padding: .6rem }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } pre { background: #242424 }
  blockquote { color: #aaa } .bar { background: #7ba3d4 } }
"""


@dataclass(frozen=True)
class Section:
    title: str
    rows: Sequence[tuple[str, int, float]] = ()
    """(name, number, share)."""
    lines: Sequence[str] = ()
    quotes: Sequence[tuple[str, str]] = ()
    """(text, where it is from)."""


@dataclass(frozen=True)
class Card:
    info: DatasetInfo
    stats: Statistics
    num_shards: int
    num_bytes: int
    bucket_samples: Sequence[tuple[str, int]] = ()
    merged_buckets: Sequence[str] = ()
    records: Sequence[Record] = ()
    notices: Sequence[str] = ()
    """Names of the licence files."""
    grid: bytes | None = field(default=None, repr=False)
    """samples.png."""

    def files(self) -> dict[str, bytes]:
        """By name."""
        files = {README: self.markdown().encode(), PAGE: self.page().encode()}
        return files | ({GRID: self.grid} if self.grid else {})

    # ------------------------------------------------------------------------------------------------------- content

    def facts(self) -> list[tuple[str, str]]:
        info = self.info
        facts = [
            ("samples", f"{info.num_samples:,}"),
            ("shards", f"{self.num_shards:,}"),
            ("size", _size(self.num_bytes)),
            ("shorter side, median", f"{median(SIDES, self.stats.short_sides)} px"),
            ("captions", ", ".join(f"{kind} ({c.samples:,} samples)" for kind, c in _kinds(self.stats)) or "none"),
        ]
        for record in self.records:
            faces = record.facts.get("faces")
            if isinstance(faces, dict) and isinstance(share := faces.get("blurred_share"), float):
                facts.append(("images with blurred faces", f"{share:.1%}"))
        if info.class_names:
            facts.append(("classes", f"{len(info.class_names):,}"))
        if info.columns:
            facts.append(("further columns", ", ".join(info.columns)))
        if info.resize.short_side:
            facts.append(("shrunk to", f"{info.resize.short_side} px, by {info.resize.method}"))
        facts.append(("digest", info.digest))
        return facts

    def sections(self) -> list[Section]:
        stats, info = self.stats, self.info
        sections = [
            Section("Aspect buckets", _rows(self.bucket_samples), self.merged_buckets)
            if self.bucket_samples
            else Section("Shapes, width to height", _histogram(SHAPES, stats.shapes)),
            Section("Shorter side, px", _histogram(SIDES, stats.short_sides)),
            Section("Image files, KiB", _histogram(SIZES_KIB, stats.sizes_kib)),
            Section("Licences", _rows(_most(stats.known_licences)), [] if stats.known_licences else ["not given"]),
        ]
        for kind, captions in _kinds(stats):
            missing = stats.samples - captions.samples
            lines = [
                f"{captions.texts:,} texts of {captions.samples:,} samples"
                + (f", {missing:,} have none" * bool(missing))
            ]
            quotes = [(text, key) for _, key, text in captions.examples]
            sections.append(Section(f"Captions: {kind}, words", _histogram(WORDS, captions.words), lines, quotes))
        if stats.classes:
            sections.append(Section("Classes", _rows(_most(stats.classes))))
        left_out = _rows(list(info.rejected.items()))
        given_up = [line for record in self.records for line in _num_given_up(record)]
        sections.append(Section("Left out, by reason", left_out, given_up or ([] if left_out else ["nothing"])))
        sections.append(Section("Where it came from", lines=[line for r in self.records for line in told(r)]))
        if self.notices:
            sections.append(Section("Licence files", lines=list(self.notices)))
        return [s for s in sections if s.rows or s.lines or s.quotes]

    # ------------------------------------------------------------------------------------------------------- writing

    def markdown(self) -> str:
        lines = [f"# {_plain(self.info.name)}", ""]
        lines += _markdown_table(("", ""), self.facts())
        if self.grid:
            lines += ["", f"![Some of its images]({GRID})"]
        for section in self.sections():
            lines += ["", f"## {_plain(section.title)}", ""]
            lines += [f"- {_plain(line)}" for line in section.lines]
            if section.rows:
                lines += [""] if section.lines else []
                rows = [(name, f"{number:,}", f"{share:.1%}") for name, number, share in section.rows]
                lines += _markdown_table(("", "samples", "share"), rows)
            for text, source in section.quotes:
                lines += ["", f"> {_plain(text)}  ", f"> {_plain(source)}"]
        lines += ["", "Train on it with `data.datasets.NAME.url`, check it with `loupe data verify`.", ""]
        return "\n".join(lines)

    def page(self) -> str:
        e = html.escape
        body = [f"<h1>{e(self.info.name)}</h1>", _html_table(self.facts())]
        if self.grid:
            body.append(f'<p><img alt="Some of its images" src="data:image/png;base64,{_base64(self.grid)}"></p>')
        for section in self.sections():
            body.append(f"<h2>{e(section.title)}</h2>")
            body += [f"<div>{e(line)}</div>" for line in section.lines]
            if section.rows:
                body.append(_html_bars(section.rows))
            body += [
                f"<blockquote>{e(text)}<br><small>{e(source)}</small></blockquote>" for text, source in section.quotes
            ]
        if self.info.notice:
            body.append(f"<h2>Notice</h2><pre>{e(self.info.notice)}</pre>")
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{e(self.info.name)}</title>'
            f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
        )


def grid(images: Iterable[bytes]) -> bytes | None:
    """A PNG of the middles of some images, `GRID_COLUMNS` in a row; None of no images. What cannot be decoded is left out:
    verifying counts it, a picture need not."""
    cells: list[NDArray[np.uint8]] = []
    for data in images:
        try:
            cells.append(resize(square_crop(read_image(data, min_side=_CELL)), _CELL, _CELL))
        except ImageError:
            continue
        if len(cells) == GRID_COLUMNS * GRID_ROWS:
            break
    if not cells:
        return None
    rows = -(-len(cells) // GRID_COLUMNS)
    sheet_HWC = np.full((rows * _CELL, min(len(cells), GRID_COLUMNS) * _CELL, 3), 255, dtype=np.uint8)
    for i, cell_HWC in enumerate(cells):
        y, x = (i // GRID_COLUMNS) * _CELL, (i % GRID_COLUMNS) * _CELL
        sheet_HWC[y : y + _CELL, x : x + _CELL] = cell_HWC
    done, encoded = cv2.imencode(".png", cv2.cvtColor(sheet_HWC, cv2.COLOR_RGB2BGR))
    assert done
    return bytes(encoded.tobytes())


# ---------------------------------------------------------------------------------------------------------------- parts


def _kinds(stats: Statistics) -> list[tuple[str, Any]]:
    return sorted(stats.captions.items(), key=lambda item: (item[0] != "original", item[0]))


def _rows(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int, float]]:
    total = sum(number for _, number in counts)
    return [(name, number, number / total) for name, number in counts if number]


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(number for _, number in ordered[_LISTED:])
    return ordered[:_LISTED] + ([(OTHERS, rest)] if rest else [])


def _histogram(edges: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int, float]]:
    """Without the empty bins at both ends."""
    rows = [(n, c, c / max(1, sum(counts))) for n, c in zip(bin_names(edges), counts, strict=True)]
    filled = [i for i, (_, count, _) in enumerate(rows) if count]
    return rows[filled[0] : filled[-1] + 1] if filled else []


def told(record: Record) -> list[str]:
    """What a stage has done, in lines."""
    settings = ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in record.settings.items())
    lines = [f"{record.stage}: {settings}"]
    for name, counts in record.counts.items():
        if counts:
            numbers = ", ".join(f"{reason} {number:,}" for reason, number in sorted(counts.items()))
            lines.append(f"{record.stage}, {name}: {numbers}")
    for name, value in record.facts.items():
        if name == "given_up" and isinstance(value, dict):
            lines += _given_up(record.stage, value)
        elif isinstance(value, int | float | str):
            lines.append(f"{record.stage}, {name}: {value}")
        elif isinstance(value, dict):
            flat = {key: v for key, v in value.items() if isinstance(v, int | float | str)}
            if flat:
                lines.append(f"{record.stage}, {name}: " + ", ".join(f"{key} {v}" for key, v in sorted(flat.items())))
    return lines


def _num_given_up(record: Record) -> Iterator[str]:
    """Items have no number of samples: what a stage has not read it has not counted."""
    for name, counts in record.counts.items():
        if number := counts.get(GIVEN_UP, 0):
            left = [
                f"{n:,} {key.removeprefix(NOT_DONE)}" for key, n in sorted(counts.items()) if key.startswith(NOT_DONE)
            ]
            what = f", with {' and '.join(left)} of them not done" if left else ""
            yield f"given up by {record.stage}: {number:,} item{'s' * (number != 1)} of {name}{what}; named below"


def _given_up(stage: str, passes: Mapping[str, Any]) -> list[str]:
    """Items that a stage went on without, each with why."""
    lines: list[str] = []
    for name, items in passes.items():
        if isinstance(items, dict):
            lines += [f"{stage}, given up of {name}: {item}: {why}" for item, why in list(items.items())[:_LISTED]]
            if len(items) > _LISTED:
                lines.append(f"{stage}, given up of {name}: and {len(items) - _LISTED:,} more")
    return lines


def _size(num_bytes: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"


def _plain(text: str) -> str:
    """Without line ends, and with all that Markdown reads as markup set apart by a backslash."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!~&" else c for c in flat)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _html_table(rows: Iterable[Sequence[str]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        + "</table>"
    )


def _html_bars(rows: Sequence[tuple[str, int, float]]) -> str:
    widest = max(share for _, _, share in rows)
    cells = (
        f'<tr><td>{html.escape(name)}</td><td class="n">{number:,}</td><td class="n">{share:.1%}</td>'
        f'<td><div class="bar" style="width:{share / widest * 16:.2f}rem"></div></td></tr>'
        for name, number, share in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
