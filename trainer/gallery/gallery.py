"""The models of a gallery and whose turn it is: one sampling at a time, newer weights between two of them."""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from PIL import Image

from trainer.checkpoint.errors import CheckpointError
from trainer.config.sampling import samplers_of
from trainer.errors import UserError, one_line, storage_errors
from trainer.gallery.live_run import LiveRun
from trainer.gallery.requests import Request
from trainer.pictures import png
from trainer.sampling.drawing import prepare
from trainer.sampling.options import Options
from trainer.sampling.settings import SampleSettings

T = TypeVar("T")
KEPT_BYTES = 256 << 20
"""Of pictures that browsers can still ask for."""
MOST_WAITING = 16
POLL_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """What one run has drawn."""

    run: str
    step: int
    weights: str
    nfe: int
    seconds: float
    truncated: bool
    """The prompt is longer than its text encoder takes."""
    pictures: tuple[str, ...]
    """Names in `Gallery.png`, by position."""


class Gallery:
    """
    Args:
        poll_s: seconds between two looks for newer checkpoints.

    Raises:
        UserError: the runs take prompts of different kinds.
    """

    def __init__(self, runs: Sequence[LiveRun], *, poll_s: float = POLL_S) -> None:
        self.runs, self.poll_s = runs, poll_s
        kinds = {run.model.task.text.kind == "classes" for run in runs}
        if len(kinds) > 1:
            raise UserError(
                f"{runs[0].source} and {runs[1].source}: one takes captions and one classes; give two of a kind"
            )
        self.of_classes = kinds.pop()
        self.waiting = 0
        """Samplings asked for and not ended, the one under way included."""
        self._turns = ThreadPoolExecutor(1, "gallery")
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    @property
    def num_classes(self) -> int:
        texts = [run.model.task.text for run in self.runs]
        return min(text.num_classes for text in texts if text.kind == "classes")

    @property
    def samplers(self) -> list[str]:
        """Those that all runs take."""
        sets = [samplers_of(run.model.task.paradigm.kind) for run in self.runs]
        return [name for name in sets[0] if all(name in others for others in sets)]

    def defaults(self) -> SampleSettings:
        """The first run's, as in its own sample grids."""
        first = self.runs[0]
        settings = Options(source=first.source).settings(first.model.config)
        return settings if settings.sampler in self.samplers else replace(settings, sampler=self.samplers[0])

    def png(self, name: str) -> bytes | None:
        """A picture drawn not too long ago."""
        return self._kept.get(name)

    async def draw(self, request: Request, wanted: Callable[[], bool] = lambda: True) -> list[Shown]:
        """One run after the other, when all that was asked for before is done. `wanted`: asked when its turn has come.

        Raises:
            UserError: a run cannot draw so, or too many wait.
        """
        if self.waiting >= MOST_WAITING:
            raise UserError(f"{self.waiting} samplings wait already; try again in a while")
        self.waiting += 1
        try:
            return await self._turn(lambda: [self._draw(run, request) for run in self.runs] if wanted() else [])
        finally:
            self.waiting -= 1

    def _draw(self, run: LiveRun, request: Request) -> Shown:
        begun, model = time.monotonic(), run.model
        # as `loupe sample --prompt PROMPT --per-prompt COUNT` does, so that the same pictures come out of it
        work = prepare(model, [request.prompt] * request.count, request.settings, lot=None)
        names = [self._keep(png(Image.fromarray(image))) for image in work.images(range(request.count))]
        return Shown(run.name, model.step, run.weights, model.cost(request.settings).calls, time.monotonic() - begun,
                     any(work.cut), tuple(names))  # fmt: skip

    def _keep(self, data: bytes) -> str:
        name = secrets.token_urlsafe(16)
        self._kept[name] = data
        while sum(map(len, self._kept.values())) > KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return name

    async def _turn(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._turns, work)

    async def follow(self) -> None:
        """Take up newer checkpoints, for ever. Storage that fails is said beside the run and asked again."""
        while True:
            await asyncio.sleep(self.poll_s)
            for run in self.runs:
                try:
                    # a listing that hangs holds up no sampling
                    entry = await asyncio.to_thread(run.newer)
                except storage_errors(CheckpointError, UserError) as e:
                    run.unlisted = f"checkpoints cannot be listed ({one_line(e)})"
                    _log.warning("%s: %s", run.source, run.unlisted)
                    continue
                run.unlisted = None
                if entry is not None:
                    await self._turn(lambda run=run, entry=entry: run.renew(entry))  # type: ignore[misc]
                    _log.info("%s: %s", run.source, run.trouble or f"step {run.model.step}")
