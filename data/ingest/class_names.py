"""What the classes of a folder are called in words."""

import json
from pathlib import Path
from typing import Any

from data.source import words
from trainer.errors import UserError

_MAX_BYTES = 64 << 20


def read_class_names(path: Path) -> dict[str, str]:
    """Class, such as `n01440764`, to words, such as `tench`: of several names that commas part, the first.

    The file has a line for each class, `n01440764 tench, Tinca tinca`, or is a JSON object of texts, or of pairs as in Keras's
    `imagenet_class_index.json`: `{"0": ["n01440764", "tench"]}`.

    Raises:
        UserError: neither.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"--class-names: {path} is larger than {_MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--class-names: {path} cannot be read ({e})") from None
    rows = _from_json(path, text) if text.lstrip().startswith("{") else _from_lines(path, text)
    named = {name: words(value.partition(",")[0]) for name, value in rows}
    if not named:
        raise UserError(f"--class-names: {path} names no class")
    if empty := [name for name, value in named.items() if not value]:
        raise UserError(f"--class-names: {path}: {empty[0]} has no words")
    return named


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, *rest = line.split(maxsplit=1)[:2] if line.strip() else ("",)
        if name and not rest:
            raise UserError(f"--class-names: {path}:{number}: has no words; write the class, a space and its words")
        if name:
            rows.append((name, rest[0]))
    return rows


def _from_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        tree: Any = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"--class-names: {path}: not JSON ({e})") from None
    rows = []
    for key, value in tree.items():
        pair = [key, value] if isinstance(value, str) else value
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"--class-names: {path}: {key} is neither a text nor a pair of a class and its words")
        rows += [(pair[0], pair[1]), (key, pair[1])]  # tars name classes by their numbers
    return rows
