"""Claims of storage that pods mount. No torch."""

import os
import re
from dataclasses import dataclass

from trainer.errors import UserError


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim and where pods see it: at the path where it is mounted here."""

    claim: str
    path: str

    def holds(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path.rstrip('/')}/")


def parse_volume(text: str) -> Volume:
    """`CLAIM:/path`.

    Raises:
        UserError: it is not that.
    """
    claim, _, path = text.partition(":")
    plain = path.startswith("/") and os.path.normpath(path) == path and path not in ("/", "/tmp")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", claim) or not plain or ":" in path:
        raise UserError(f"--volume-claim {text}: write the name of a PersistentVolumeClaim and where it is mounted, as "
                        "CLAIM:/path")  # fmt: skip
    return Volume(claim, path)
