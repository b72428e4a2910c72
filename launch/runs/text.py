"""Times, sizes and untrusted text for people to read. No torch."""

import re
import time

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
"""Terminal control sequences: colours, cursor movements, window titles."""
_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if code != ord("\t")}


def printable(text: str) -> str:
    """One line that cannot command a terminal: it comes from storage, or from a log. Of a progress bar its last state."""
    visible = next((part for part in reversed(text.split("\r")) if part.strip()), "")
    return _ESCAPES.sub("", visible).translate(_CONTROLS)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def ago(then: float, now: float) -> str:
    return f"{duration(max(0.0, now - then))} ago"


def age(then: float, now: float) -> str:
    """`45s`, `4m`, `3h`, `2d`: for a table."""
    seconds = max(0.0, now - then)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def moment(then: float) -> str:
    """Local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))
    except (OverflowError, ValueError, OSError):
        return "at a time that is none"


def size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
