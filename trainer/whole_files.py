"""Local files that are complete wherever they are there."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """By rename, once the data is durable; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
