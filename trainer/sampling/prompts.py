"""What is to be drawn, from the command line's words and files. No torch."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.errors import UserError, one_line

Prompt = str | int | None
"""A caption, a class's number, or nothing: the null condition of classifier-free guidance."""
MAX_FILE_BYTES = 1 << 30
MAX_PICTURES = 100_000_000
MAX_CHARACTERS = 100_000
"""Of one prompt: no text encoder takes more."""


def check_words(prompts: Sequence[str], files: Sequence[str], classes: Sequence[str]) -> None:
    """What can be told before a file is read.

    Raises:
        UserError: none, both prompts and classes, classes that are none, or a file that is not there.
    """
    if classes and (prompts or files):
        raise UserError("--classes: goes without --prompt and --prompts; a model takes one or the other")
    if not (prompts or files or classes):
        raise UserError(
            "--prompt: nothing to draw; give --prompt TEXT, --prompts FILE, or of a model of classes --classes 0-9"
        )
    for word in classes:
        parse_classes(word)
    for file in files:
        if file != "-" and not os.path.exists(file):
            raise UserError(f"--prompts: {file} is not there; give a file of prompts, or - for the standard input")


def gathered(
    prompts: Sequence[str], files: Sequence[str], classes: Sequence[str], *, per_prompt: int = 1
) -> list[Prompt]:
    """Of each picture, by position: `prompts`, then those of `files`, or `classes`; and then all of them again, up to
    `per_prompt` times, so that more of them later leave the first as they are.

    Raises:
        UserError: none, both prompts and classes, or a file that cannot be read.
    """
    check_words(prompts, files, classes)
    found: list[Prompt] = [*prompts]
    for file in files:
        found += read_prompts(file)
    for word in classes:
        found += parse_classes(word)
    if len(found) * per_prompt > MAX_PICTURES:
        raise UserError(
            f"--per-prompt: {per_prompt} pictures of each of {len(found)} are more than {MAX_PICTURES} pictures"
        )
    for i, prompt in enumerate(found):
        if isinstance(prompt, str) and len(prompt) > MAX_CHARACTERS:
            raise UserError(f"--prompts: prompt {i} has {len(prompt)} characters, {MAX_CHARACTERS} at most")
    return found * per_prompt


def num_classes_of(config: RunConfig) -> int | None:
    """Of a model that is told classes; None: it takes captions."""
    task = config.task
    return task.text.num_classes if isinstance(task, LatentDiffusionConfig) and task.text.kind == "classes" else None


def caption_of(prompt: Prompt, num_classes: int | None, option: str | None = None) -> str | None:
    """As the text encoder takes it.

    Args:
        num_classes: of a model of classes; None: it takes captions.
        option: where the prompt is from; absent: --prompt or --classes, by what it is.

    Raises:
        UserError: a caption for a model of classes, or the other way round; no such class.
    """
    if prompt is None:
        return None
    if num_classes is None:
        if isinstance(prompt, str):
            return prompt
        raise UserError(
            f"{option or '--classes'}: class {prompt} for a model that takes captions; give --prompt or --prompts with texts"
        )
    if isinstance(prompt, str) and not (prompt.strip().isdecimal() and prompt.isascii()):
        raise UserError(
            f"{option or '--prompt'}: {prompt!r} for a model of {num_classes} classes; give --classes 0-{num_classes - 1}"
        )
    if not 0 <= int(prompt) < num_classes:
        raise UserError(f"{option or '--classes'}: {int(prompt)} is no class of the model's 0 to {num_classes - 1}")
    return str(int(prompt))


def check_kinds(prompts: Iterable[Prompt], num_classes: int | None, option_of: Callable[[int], str]) -> None:
    """`caption_of` each, before a model is opened.

    Args:
        option_of: where the prompt of a position is from.

    Raises:
        UserError: as it does.
    """
    for position, prompt in enumerate(prompts):
        caption_of(prompt, num_classes, option_of(position))


def parse_classes(word: str) -> list[Prompt]:
    """`0,5-9`: 0 and 5 to 9.

    Raises:
        UserError: it is not of that form.
    """
    found: list[Prompt] = []
    for part in word.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part, flags=re.ASCII)
        if not match:
            raise UserError(f"--classes: {part!r} is no class; give numbers and ranges, as 0,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MAX_PICTURES:
            raise UserError(f"--classes: {part.strip()} is empty or too long; give the smaller number first")
        found += range(first, last + 1)
    return found


def read_prompts(file: str) -> list[Prompt]:
    """A text file has a prompt a line, empty lines aside; .jsonl a JSON value a line; .json a list of them. A value is a
    string, a class's number, null for no prompt, or an object with "prompt", "caption" or "class". `-`: lines of the
    standard input.

    Raises:
        UserError: it cannot be read, or is not of that form; names the line.
    """
    text = _text(file)
    suffix = Path(file).suffix.lower()
    if suffix == ".json":
        tree = _json(text, file)
        if not isinstance(tree, list):
            raise UserError(
                f"--prompts: {file} is no JSON list; a list of prompts is asked for, or a .jsonl or text file"
            )
        found = [_prompt(value, f"{file}, item {i}") for i, value in enumerate(tree)]
    elif suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [_prompt(_json(line, f"{file}, line {i}"), f"{file}, line {i}") for i, line in lines]
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"--prompts: {file} has no prompts; give one a line")
    return found


def _text(file: str) -> str:
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with open(file, "rb") as opened:
                data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise UserError(f"--prompts: {file} cannot be read ({one_line(e)})") from None
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"--prompts: {file} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"--prompts: {file} is not UTF-8 text ({one_line(e)})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"--prompts: {where}: not JSON ({one_line(e)})") from None


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, dict):
        named = [value[key] for key in ("prompt", "caption", "class") if key in value]
        if len(named) != 1:
            raise UserError(f'--prompts: {where}: an object needs one of "prompt", "caption" and "class"')
        value = named[0]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return value
    raise UserError(f"--prompts: {where}: {str(value)[:80]} is neither a string nor a class's number")


def digest(prompts: Iterable[Prompt]) -> str:
    """Changes with any prompt, and with their order."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps(prompt).encode() + b"\n")
    return found.hexdigest()
