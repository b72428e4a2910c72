"""What a stage's folder was begun with: its command, kept for people, and its settings by the names of options."""

import os
import re
import shlex
from collections.abc import Sequence

import click

from data.stages.runner import Stage
from data.stages.store import STAGE, Difference, Json, OtherSettings, StageStore, check_claim, claim, read_stage
from trainer.errors import UserError
from trainer.urls import SECRET, public_url

_IN = {"input": "IN", "source": "IN", "made_of": "IN (its id, which is new whenever it is written anew)"}
_OPTIONS = {
    "ingest": {
        "sources": "SOURCE",
        "columns.url": "--url-column",
        "columns.caption": "--caption-column",
        "columns.licence": "--licence-column",
        "filters.near_duplicates": "search for near duplicates, which --keep-near-duplicates turns off,",
    },
    "faces": {
        "detector": "--detector",
        "detector.name": "--detector",
        "detector.weights_sha256": "--weights (their sha256)",
    },
    "recaption": {"revision": "--model (sha256 of its files)", "prompts": "--prompt"},
    "encode": {},
    "build": {"out": "OUT", "made_of": _IN["made_of"]},
}
_ENCODED = {
    "holds": "--latents",
    "codec": "--codec",
    "codec_class": "--codec (its class)",
    "revision": "--codec or --text (sha256 of the weights)",
    "encoder": "--text",
}


def option_of(stage: str, key: str) -> str:
    """What the user calls a setting: an option, where there is one."""
    names = _IN | _OPTIONS.get(stage, {})
    head, _, last = key.rpartition(".")
    if key in names:
        return names[key]
    if stage == "encode" and head.startswith("columns."):
        column = head.split(".")[1]
        return f"{_ENCODED.get(last, _dashed(last))} of the column {column}"
    if head in ("detector", "prompts"):
        return f"{'--detector-option' if head == 'detector' else '--prompt'} {last}"
    if stage in _OPTIONS and (not head or head in ("filters", "buckets")):
        return _dashed(head if head == "buckets" else last)
    return key


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def shown_settings(stage: str, name: str, value: Json) -> list[tuple[str, Json]]:
    """By the names of options; filters and the like one by one."""
    if name in ("filters", "columns", "detector") and isinstance(value, dict) and stage != "encode":
        return [(option_of(stage, f"{name}.{key}"), one) for key, one in value.items()]
    return [(option_of(stage, name), value)]


def check_begun(stage: Stage, out: str) -> None:
    """
    Raises:
        OtherSettings: the folder was begun with others; names the options.
        UserError: it is another stage's.
    """
    store = StageStore(out)
    if not store.exists(STAGE):
        return
    try:
        check_claim(store, stage.name, stage.version, stage.settings())
    except OtherSettings as e:
        raise OtherSettings(
            e.url,
            _folded(e.differences, read_stage(store)["settings"], stage.settings()),
            name=lambda key: option_of(stage.name, key),
            mend=f"{_repeat(store)}, or name a new folder",
        ) from None


def _folded(found: Sequence[Difference], before: Json, now: Json) -> list[Difference]:
    """As options have them: buckets as one list of names."""
    rest = [one for one in found if not one.key.startswith("buckets.")]
    if len(rest) == len(found):
        return rest
    names = [",".join(settings.get("buckets", {})) or "none" for settings in (before, now)]
    return [*rest, Difference("buckets", *names)]


def _repeat(store: StageStore) -> str:
    command = begun_by(store)
    return f"repeat the first command, `{command}`" if command else "repeat the first command"


def begun_by(store: StageStore) -> str | None:
    """The command line that began a stage, for people to repeat; None where none was kept."""
    command = read_stage(store).get("command")
    return command if isinstance(command, str) and command.isprintable() else None


def begin(stage: Stage, out: str, words: list[str] | None) -> None:
    """Claim the folder, and keep the command in it.

    Raises:
        UserError: the folder is of another stage or settings, or holds other files.
    """
    command = None if words is None else shlex.join(["loupe", *map(public_word, words)])
    passes = [one_pass.name for one_pass in stage.passes()]
    claim(StageStore(out), stage.name, stage.version, stage.settings(), passes, command=command)


def public_word(word: str) -> str:
    """A word of a command line as it may be written down."""
    name, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name):
        return f"{name}={'(hidden)' if SECRET.search(name) else public_word(value)}"
    if re.search(r"\s|\{", word):  # YAML: nobody knows where a password would stand
        return "(hidden)" if "@" in word or SECRET.search(word) else word
    try:
        return public_url(word)
    except UserError:
        return "(hidden)"


def absolute(url: str) -> str:
    """A path of this machine as it is found from any folder, so that a setting says the same wherever a command is given."""
    return url.rstrip("/") if "://" in url or "::" in url else os.path.abspath(url)


def whole(param: click.Parameter, text: str) -> str:
    """An argument's or option's value, as it is found from any folder."""
    is_place = isinstance(param, click.Argument) or isinstance(param.type, click.Path)
    is_folder = param.name in ("captions", "columns", "codec", "model", "work") and os.path.isdir(text)
    return absolute(text) if is_place or is_folder else text
