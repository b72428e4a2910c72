"""A run that is drawn with while it trains: its newest weights, read again when it has saved newer ones."""

import torch

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.errors import UserError, one_line, storage_errors
from trainer.run_folder import CHECKPOINTS
from trainer.sampling.model import SamplingModel
from trainer.sampling.source import EMA, RAW, opened
from trainer.sampling.weights import fill
from trainer.tasks.latent_diffusion import TextToImage


class LiveRun:
    """
    Args:
        source: a run folder, whose newest checkpoint is followed; or one checkpoint, which stays.
        weights: as `SamplingModel.open` takes them.

    Raises:
        UserError, CheckpointError: as `SamplingModel.open`.
    """

    def __init__(self, source: str, device: torch.device, *, weights: str = EMA) -> None:
        self.source, self.weights = source, weights
        run = opened(source)
        self._follows = run.checkpoint is None and not weights.endswith(".safetensors")
        self._folder = CheckpointFolder(f"{run.url}/{CHECKPOINTS}")
        # before the weights are read: what is saved meanwhile is read again, and not missed
        newest = self._newest()
        self.model = SamplingModel.open(source, device, weights=weights)
        self._tried = self._name if weights in (EMA, RAW) else newest and newest.name
        self.name = run.url.rpartition("/")[2] or run.config.name
        self.trouble: str | None = None
        """Why the newest checkpoint is not the one that is drawn with."""
        self.unlisted: str | None = None
        """Why nobody knows whether there are newer ones."""

    @property
    def title(self) -> str:
        return f"{self.name}, step {self.model.step}, {self.weights}"

    @property
    def _name(self) -> str:
        """Of the checkpoint that was read."""
        return self.model.source.rpartition("/")[2]

    def newer(self) -> Entry | None:
        """The newest checkpoint, where it is not the one that was read last. One that cannot be read is tried once.

        Raises:
            CheckpointError: storage failed.
        """
        newest = self._newest() if self._follows else None
        return newest if newest and newest.name != self._tried else None

    def _newest(self) -> Entry | None:
        return next((entry for entry in reversed(self._folder.entries()) if entry.committed), None)

    def renew(self, entry: Entry) -> None:
        """Read the newest weights, of which `entry` was seen; what is there stays in use where that fails."""
        self._tried = entry.name
        try:
            self.model = self._read()
        except storage_errors(UserError, CheckpointError, torch.OutOfMemoryError) as e:
            self.trouble = f"step {entry.step} cannot be read ({one_line(e)})"
        else:
            other = self.weights in (EMA, RAW) and self._name != entry.name
            self.trouble = f"step {entry.step} does not verify" if other else None

    def _read(self) -> SamplingModel:
        old, run = self.model, opened(self.source)
        if run.config.task != old.task:
            return SamplingModel.open(self.source, old.device, weights=self.weights)
        # frozen text encoders and codecs may be far larger than what was trained, and have not changed
        with torch.device("meta"):
            module = TextToImage(old.task)
        module.to_empty(device=old.device).eval().requires_grad_(False)
        found = fill(module, run, self.weights, None)
        return SamplingModel(run.config, module, module.text or old.text, old.codec, old.device, step=found.step,
                             weights=found.weights, source=found.source)  # fmt: skip
