"""What a user can mend, and how a process tells its launcher what to do next. No torch."""

from enum import IntEnum


class UserError(ValueError):
    """Bad input. The message is one line that names the field or file and the mend; it is shown without a traceback."""


def one_line(error: BaseException) -> str:
    """A library's message, fit to stand in one of ours; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class ExitCode(IntEnum):
    """Exit codes of a job's processes; any other code is a crash, restarted within the budget."""

    DONE = 0
    USAGE = 2
    """Bad input on the command line, before a job exists."""
    HANG = 70
    """No step came within the watchdog's limit; a crash of a kind of its own."""
    BAD_NODE = 71
    """The machine is not fit to start on; start me again, elsewhere."""
    REQUEUE = 75
    """Stopped cleanly after saving; start me again."""
    STOP = 93
    """Do not start me again: bad config or data, or losses that stay non-finite."""
