"""Pieces of HTML, and figures in words. Whatever comes from a run folder passes `text` here. No torch."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from launch.runs.text import printable

MAX_CHARS = 2000


def text(value: Any, limit: int = MAX_CHARS) -> str:
    """Untrusted text, fit to stand in an element or a quoted attribute."""
    shown = printable(str(value)[: 4 * limit])
    return html.escape(shown if len(shown) <= limit else shown[: limit - 1] + "…", quote=True)


def script_json(tree: Any) -> str:
    """JSON that nothing in it can end the script element of, nor begin a comment."""
    dumped = json.dumps(tree, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return dumped.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def element(tag: str, content: str, **attributes: str) -> str:
    """`content` is HTML; attributes are escaped."""
    shown = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return f"<{tag}{shown}>{content}</{tag}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, class_: str = "") -> str:
    """Cells are HTML; the first of a row heads it. In a box that scrolls by itself, by keyboard, too."""
    top = "".join(element("th", cell, scope="col") for cell in head)
    body = "".join(
        f"<tr>{element('th', row[0], scope='row')}{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return element(
        "div", element("table", inner, class_=class_), class_="scroll", tabindex="0", role="region", aria_label=label
    )


def pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """A list of facts; those without a value are left out."""
    inner = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in rows
        if value not in (None, "", [], {})
    )
    return f'<dl class="pairs">{inner}</dl>'


def section(name: str, title: str, content: str, *, tools: str = "") -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><div class="section-head">'
        f'<h2 id="{name}-title">{text(title)}</h2>{tools}</div>{content}</section>'
    )


def figure(value: Any) -> str:
    """Four digits, of large numbers all before the point; `-` where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 10_000 else f"{value:.4g}"


def count(number: Any, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def iso(when: float) -> str | None:
    """Local time as charts take it; None for a time that is none."""
    try:
        return datetime.fromtimestamp(when).isoformat(sep=" ", timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return None
