"""An item of several pieces, of which some cannot be done: the others are done first, and then it is told."""

from collections.abc import Iterable, Iterator

from data.stages.failures import is_final
from data.stages.runner import Part, Stopped
from trainer.errors import UserError, one_line

IN_A_ROW = 3
"""Pieces that may fail of what trying again may mend: then it is storage or this machine, which the others wait for as long."""


def spared(pieces: Iterable[Iterator[Part]], what: str) -> Iterator[Part]:
    """The parts of each piece, so that giving up the item costs the pieces that fail and no more.

    Args:
        what: pieces are called, such as `shards`.

    Raises:
        Stopped: at once.
        UserError: all that failed has failed for good.
        Exception: trying again may help some of what failed.
    """
    problems: list[Exception] = []
    in_a_row = 0
    for piece in pieces:
        try:
            yield from piece
            in_a_row = 0
        except Stopped:
            raise
        except Exception as e:  # of whatever kind: told in the end
            problems.append(e)
            in_a_row += not isinstance(e, UserError)
            if in_a_row == IN_A_ROW:
                break
    if not problems:
        return
    worst = next((e for e in problems if not is_final(e)), problems[0])
    if len(problems) == 1:
        raise worst
    kind = UserError if is_final(worst) else RuntimeError
    raise kind(f"{one_line(worst)} (and {len(problems) - 1} more of its {what})") from worst
