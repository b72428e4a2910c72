"""Which files of a discovery folder are of jobs that are gone: whoever is there renews its file. No torch."""

import os
import time
from collections.abc import Iterator

from trainer.discovery import BEAT_S, START_LABEL, files_in, read_groups
from trainer.errors import UserError, one_line

DEAD_AFTER_S = 10 * BEAT_S
"""Without a renewal. Covers a shared disk that was away for a while, and clocks that differ."""


def look_through(path: str, *, dead_after_s: float = DEAD_AFTER_S) -> Iterator[tuple[str, bool, str]]:
    """(file, whether it is of a job that is gone, why or why that is not known) of each file in discovery folder `path`.
    Another program's never is.

    Raises:
        UserError: it cannot be listed, or holds too many files.
    """
    for file in files_in(path):
        try:
            if not any(START_LABEL in group["labels"] for group in read_groups(file)):
                yield file, False, "another program's"
                continue
            age_s = time.time() - os.path.getmtime(file)
        except FileNotFoundError:  # taken back meanwhile
            continue
        except (OSError, UserError) as e:
            yield file, False, one_line(e)
            continue
        yield file, age_s > dead_after_s, f"not renewed for {age_s:.0f} s" if age_s > dead_after_s else ""
