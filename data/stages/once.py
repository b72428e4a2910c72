"""Receipts read once by whoever goes through all of them more than once."""

import json
import tempfile
import threading
from types import TracebackType

from data.stages.store import Json, StageStore, to_json


class OnceReadStore(StageStore):
    """Keeps receipts of whole items on this machine's disk, where thousands of them would fill memory. For when no item is
    open any more, so that they cannot change."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._file = tempfile.TemporaryFile(prefix="loupe-receipts-")  # noqa: SIM115
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "OnceReadStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read_json(self, name: str) -> Json:
        if "/done/" not in name:
            return super().read_json(name)
        with self._lock:
            if (place := self._places.get(name)) is not None:
                self._file.seek(place[0])
                return json.loads(self._file.read(place[1]))
        tree = super().read_json(name)
        data = to_json(tree)
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
            self._places[name] = (self._end, len(data))
            self._end += len(data)
        return tree
