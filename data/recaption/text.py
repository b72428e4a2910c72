"""Captions as a model writes them: cleaned, and what is wrong with them."""

from collections import Counter
from itertools import pairwise

KINDS = {"<CAPTION>": "short", "<DETAILED_CAPTION>": "detailed", "<MORE_DETAILED_CAPTION>": "long"}
"""Florence-2's prompts for captions, and the kinds of captions that they give."""

EMPTY, OVER_LONG, REPEATING = "empty", "over_long", "repeating"

_PHRASE = 4
"""Words. Of a phrase that comes three times a caption repeats itself; so it does of a word five times in a row."""


def clean(text: str) -> str:
    """On one line, without what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def flaw(text: str, *, ended: bool) -> str | None:
    """What is wrong with a clean caption, if anything.

    Args:
        ended: the model ended it by itself, rather than at the limit of tokens.
    """
    if not text:
        return EMPTY
    if repeats(text):
        return REPEATING
    return None if ended else OVER_LONG


def repeats(text: str) -> bool:
    words = text.lower().split()
    phrases = Counter(tuple(words[i : i + _PHRASE]) for i in range(len(words) - _PHRASE + 1))
    if phrases and max(phrases.values()) >= 3:
        return True
    run = 1
    for before, word in pairwise(words):
        run = run + 1 if word == before else 1
        if run == 5:
            return True
    return False
