"""What a user can mend, and how a process tells its launcher what to do next. No torch."""

import sys
from enum import IntEnum

_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
    ("aiohttp.client_exceptions", "ClientError"),
)
"""What storage clients raise besides OSErrors: no keys, no such endpoint. By module, which is not imported for it."""


class UserError(ValueError):
    """Bad input. The message is one line that names the field or file and the mend; it is shown without a traceback."""


def one_line(error: BaseException) -> str:
    """A library's message, fit to stand in one of ours; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading from storage may raise, by the clients in use, and `more`: for `except storage_errors() as e`."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _CLIENT_ERRORS)
    return (OSError, *more, *(error for error in found if isinstance(error, type) and issubclass(error, Exception)))


KEYS_MEND = "set the storage keys (of S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
"""What mends most of them."""


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
