"""A folder of drawn pictures that can be continued.

images/00000000.png    a picture by its position
samples.json           settings, source, what it cost; `complete` once all pictures are there
samples.jsonl          then, a line a picture: position, prompt, file, whether the prompt was cut
parts/0-of-4.json      pictures and seconds of a part's starts, for the sums in samples.json
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.errors import UserError, one_line
from trainer.pictures import png
from trainer.sampling.options import Part
from trainer.sampling.prompts import Prompt
from trainer.whole_files import write_whole

ABOUT, ROWS, IMAGES, PARTS = "samples.json", "samples.jsonl", "images", "parts"
_NAME = re.compile(r"\d{8,9}\.png")
_LIMIT = 1 << 20
"""Largest samples.json that is read."""
FORMAT = 1


def name_of(position: int) -> str:
    """Below the folder."""
    return f"{IMAGES}/{position:08d}.png"


class SampleFolder:
    def __init__(self, out: str) -> None:
        if "://" in out:
            raise UserError(f"--out: {out} is no local folder; write to one and copy it")
        self.path = Path(out)

    def about(self) -> dict[str, Any] | None:
        """What is known of the pictures that are there; None: nothing.

        Raises:
            UserError: its samples.json is not ours or damaged.
        """
        path = self.path / ABOUT
        try:
            if not path.exists():
                return None
            with path.open("rb") as file:
                tree = json.loads(file.read(_LIMIT))
        except OSError as e:
            raise UserError(f"--out: {path} cannot be read ({one_line(e)})") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not JSON ({one_line(e)}); remove it, or give another --out") from None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT or not isinstance(tree.get("identity"), dict):
            raise UserError(f"{path}: not of this command, or of another version of it; give another --out")
        return tree

    def check(self, about: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
        """What is known of the pictures that are there, if these may be among them. `about["identity"]` is all that pictures
        follow from. Writes nothing.

        Raises:
            UserError: it holds pictures that were drawn otherwise.
        """
        found = self.about()
        if found is not None and found["identity"] != about["identity"] and not overwrite:
            raise UserError(
                f"--out: {self.path} holds pictures that were drawn otherwise ({_differences(found, about)}); give another, or "
                "--overwrite"
            )
        if found is None and not overwrite and self.present():
            raise UserError(f"--out: {self.path} has pictures and no {ABOUT} that says what they are; give another, or "
                            "--overwrite")  # fmt: skip
        return found

    def claim(self, about: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder these pictures', or confirm that it is.

        Raises:
            UserError: as `check`; or it cannot be written.
        """
        found = self.check(about, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".loupe-{secrets.token_hex(4)}.tmp"
            probe.touch()
            probe.unlink()
            if overwrite:
                self._clear()
            if found is None or overwrite:
                for path in (self.path / PARTS).glob("*.json"):
                    path.unlink(missing_ok=True)
                self.note(about)
            elif found.get("complete") and self.missing(about["identity"]["prompts"]["count"]):
                self.note(found)  # it was whole, and pictures were taken out
        except OSError as e:
            raise UserError(f"--out: {self.path} cannot be written to ({one_line(e)}); give another folder") from None

    def _clear(self) -> None:
        """The numbers first: pictures without them are nobody's."""
        for name in (ABOUT, ROWS):
            (self.path / name).unlink(missing_ok=True)
        for name in self.present():
            (self.path / IMAGES / name).unlink(missing_ok=True)

    def present(self) -> set[str]:
        """Names of the pictures that are there."""
        try:
            return {p.name for p in (self.path / IMAGES).iterdir() if _NAME.fullmatch(p.name)}
        except FileNotFoundError:
            return set()
        except OSError as e:
            raise UserError(
                f"--out: {self.path / IMAGES} cannot be read ({one_line(e)}); give another folder"
            ) from None

    def missing(self, count: int) -> list[int]:
        """Positions without a picture."""
        there = self.present()
        return [position for position in range(count) if Path(name_of(position)).name not in there]

    def add(self, position: int, image_HWC: np.ndarray) -> None:
        """Whole, by rename.

        Raises:
            UserError: it cannot be written.
        """
        self._write(name_of(position), png(Image.fromarray(image_HWC)))

    def image(self, position: int) -> np.ndarray:
        """(H, W, 3), as it was written."""
        with Image.open(self.path / name_of(position)) as image:
            return np.asarray(image.convert("RGB"))

    def add_work(self, part: Part, drawn: int, seconds: float) -> None:
        """What a start has done, beside what earlier ones of its part have. In a file of its own: parts end when they will."""
        name = f"{part.index}-of-{part.count}"
        before = self.work()["parts"].get(name, {"drawn": 0, "seconds": 0.0})
        now = {"drawn": before["drawn"] + drawn, "seconds": round(before["seconds"] + seconds, 3)}
        self._write(f"{PARTS}/{name}.json", json.dumps(now) + "\n")

    def work(self) -> dict[str, Any]:
        """`drawn` and `seconds` of all parts together, and of each by its name.

        Raises:
            UserError: a record is damaged.
        """
        parts: dict[str, dict[str, Any]] = {}
        for path in sorted((self.path / PARTS).glob("*-of-*.json")):
            try:
                tree = json.loads(path.read_text())
                parts[path.stem] = {"drawn": int(tree["drawn"]), "seconds": float(tree["seconds"])}
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
                raise UserError(f"{path}: not of this command ({one_line(e)}); remove it") from None
        return {
            "drawn": sum(part["drawn"] for part in parts.values()),
            "seconds": round(sum(part["seconds"] for part in parts.values()), 3),
            "parts": parts,
        }

    def note(self, about: Mapping[str, Any]) -> None:
        """What is known so far."""
        self._write(ABOUT, json.dumps({**about, **self.work(), "complete": False}, indent=1) + "\n")

    def finish(self, about: Mapping[str, Any], prompts: Sequence[Prompt], cut: Sequence[bool]) -> None:
        """All pictures are there: say so."""
        rows = (
            {
                "position": i,
                ("class" if isinstance(prompt, int) else "prompt"): prompt,
                "file": name_of(i),
                "truncated": is_cut,
            }
            for i, (prompt, is_cut) in enumerate(zip(prompts, cut, strict=True))
        )
        self._write(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        work = None
        while work != (work := self.work()):  # another part may end at the same time: whoever is last has seen both
            self._write(ABOUT, json.dumps({**about, **work, "complete": True}, indent=1) + "\n")

    def _write(self, name: str, data: str | bytes) -> None:
        try:
            write_whole(self.path / name, data.encode() if isinstance(data, str) else data)
        except OSError as e:
            raise UserError(f"--out: {self.path / name} cannot be written ({one_line(e)}); make room, and give the "
                            "same command again") from None  # fmt: skip


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first few, in words."""
    old, new = _flat(there["identity"]), _flat(here["identity"])
    found = [
        f"{key}: {old.get(key)} there, {new.get(key)} here" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    return "; ".join(found[:3])


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
