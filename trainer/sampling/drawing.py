"""Many pictures from one model: shared by ranks and jobs, continued where an earlier start ended."""

import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.collective import Ranks
from trainer.config import config_digest
from trainer.parallel.world import World
from trainer.sampling.model import LOT, SamplingModel
from trainer.sampling.options import Part
from trainer.sampling.prompts import Prompt, digest
from trainer.sampling.settings import SampleSettings

Progress = Callable[[str, int, int], None]
"""(what is being done, done, in all)"""
WRITERS = 4


@dataclass(frozen=True)
class Work:
    """What is drawn, all of it known before the first picture."""

    model: SamplingModel
    settings: SampleSettings
    prompts: Sequence[Prompt]
    cut: Sequence[bool]
    """Of each prompt, whether the text encoder takes only its beginning."""
    lot: int

    def about(self) -> dict[str, Any]:
        """`identity`: all that the pictures follow from, but for the machine's rounding."""
        model, cost = self.model, self.model.cost(self.settings)
        return {
            "format": 1,
            "identity": {
                "run": model.config.name,
                "config_digest": config_digest(model.config),
                "checkpoint": model.source.rpartition("/")[2],
                "step": model.step,
                "weights": model.weights,
                **({"weights_sha256": model.sha256} if model.sha256 else {}),
                "settings": self.settings.to_json(),
                "lot": self.lot,
                "prompts": {"count": len(self.prompts), "sha256": digest(self.prompts)},
            },
            "source": model.source,
            "cost": {"nfe": cost.calls, "network_passes": cost.passes},
            "truncated": sum(self.cut),
            "versions": {
                name: version(name) for name in ("loupe", "torch", "diffusers", "transformers")
            } | {"python": platform.python_version()},
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        }  # fmt: skip

    def images(self, positions: Sequence[int]) -> list[np.ndarray]:
        """(H, W, 3) each, on the host."""
        pixels = self.model.images([self.prompts[p] for p in positions], positions, self.settings)
        return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def prepare(model: SamplingModel, prompts: Sequence[Prompt], settings: SampleSettings, *, lot: int | None) -> Work:
    """Check everything that can be wrong.

    Raises:
        UserError: the model cannot draw so, or not these prompts.
    """
    settings.check(model.task)
    unique = list(dict.fromkeys(prompts))
    cut = dict(zip(unique, model.check_prompts(unique), strict=True))
    # of a few pictures a lot has just as many places, so that one picture does not cost eight
    model.lot = lot or min(LOT, len(prompts))
    return Work(model, settings, prompts, [cut[prompt] for prompt in prompts], model.lot)


def lots_to_draw(positions: Sequence[int], lot: int, part: Part) -> list[list[int]]:
    """Positions that are to be drawn, by their lots, as far as they are this part's."""
    lots: dict[int, list[int]] = {}
    for position in positions:
        lots.setdefault(position // lot, []).append(position)
    return [lots[number] for number in sorted(lots) if number % part.count == part.index]


@dataclass
class Drawn:
    count: int
    """Pictures, of all ranks."""
    seconds: float
    stopped: bool
    """A signal asked for it before all were there."""


def draw_all(
    work: Work,
    lots: Sequence[Sequence[int]],
    keep: Callable[[int, np.ndarray], None],
    *,
    world: World | None,
    lots_at_once: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> Drawn:
    """Draw `lots`, the same on every rank, each rank its share, and `keep` each picture under its position. Ranks go in step,
    so an error or a stop on one ends all of them at once. `keep` is called in other threads."""
    ranks = Ranks(world.host_group if world else None)
    size, rank = ranks.world_size, ranks.rank
    begun, done, total = time.monotonic(), 0, sum(map(len, lots))
    pending: list[Future[None]] = []

    with ThreadPoolExecutor(WRITERS, "pictures") as pool:

        def step(mine: Sequence[Sequence[int]]) -> None:
            for positions in mine:
                images = work.images(positions)
                # the ones before have been written while these were drawn
                settle(pending)
                pending.extend(pool.submit(keep, *pair) for pair in zip(positions, images, strict=True))

        for start in range(0, len(lots), size * lots_at_once):
            if world.any(stop()) if world else stop():
                ranks.on_all(lambda: settle(pending))
                return Drawn(done, time.monotonic() - begun, stopped=True)
            now = lots[start : start + size * lots_at_once]
            mine = now[rank * lots_at_once : (rank + 1) * lots_at_once]
            ranks.on_all(lambda mine=mine: step(mine))  # type: ignore[misc]
            done += sum(map(len, now))
            progress("drawing", done, total)
        ranks.on_all(lambda: settle(pending))
    return Drawn(done, time.monotonic() - begun, stopped=False)


def settle(pending: list[Future[None]]) -> None:
    """Wait for them; what one of them raised is raised."""
    try:
        for future in pending:
            future.result()
    finally:
        pending.clear()
