"""A stage for tests of the runner: of each item so many numbers, a line each, in small parts."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.stages.receipts import done_receipts
from data.stages.runner import Part, Pass, Stage, Work
from data.stages.store import Json, StageStore
from trainer.errors import UserError


@dataclass
class CountingStage(Stage):
    items: int = 3
    samples: int = 10
    part: int = 4
    seconds: float = 0.0
    """Of a sample."""
    fails: str = ""
    """Item that fails; `all` of them."""
    fails_for_user: bool = False
    log: str | None = None
    """File to which every sample that is worked at is appended, published or not."""

    name = "counting"

    def settings(self) -> dict[str, Json]:
        return {"items": self.items, "samples": self.samples, "part": self.part}

    def passes(self) -> Sequence[Pass]:
        return [
            Pass("count", lambda _: [{"name": f"i{i:03d}"} for i in range(self.items)], self._count),
            Pass("sum", lambda _: [{"name": "all"}], self._sum),
        ]

    def __getstate__(self) -> dict[str, Json]:
        return self.__dict__

    def _count(self, work: Work) -> Iterator[Part]:
        first = work.cursor or 0
        if self.fails in (work.item["name"], "all"):
            why = "bad item" if self.fails != "all" else "bad item " + "x" * 250
            raise UserError(why) if self.fails_for_user else RuntimeError("broken item")
        while first < self.samples:
            end = min(first + self.part, self.samples)
            file = work.scratch / "numbers.txt"
            with open(file, "w") as lines:
                for i in range(first, end):
                    line = f"{work.item['name']}/{i}"
                    if self.log:
                        with open(self.log, "a") as log:
                            log.write(f"{line} {os.getpid()}\n")
                    time.sleep(self.seconds)
                    lines.write(line + "\n")
                    work.advance()
            yield Part({"numbers": file}, {"read": end - first, "kept": end - first}, cursor=end)
            first = end

    def _sum(self, work: Work) -> Iterator[Part]:
        if work.cursor is None:
            file = work.scratch / "sum.json"
            file.write_text(json.dumps(len(published(work.store))))
            yield Part({"sum": file}, {}, cursor=True)


def published(store: StageStore) -> list[str]:
    """All that the receipts name, in order."""
    lines: list[str] = []
    for receipt in done_receipts(store, "count"):
        for part in receipt["parts"]:
            lines += store.read(part["files"]["numbers"]["name"], max_bytes=1 << 20).decode().split()
    return lines


def expected(stage: CountingStage) -> list[str]:
    return [f"i{i:03d}/{n}" for i in range(stage.items) for n in range(stage.samples)]


def worked_at(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]
