"""Other places for the metrics, beside /metrics and the run's records: TensorBoard, Weights & Biases. Rank 0's alone.

The names are those of `trainer.metric_names`, with the labels' values behind a slash: `loupe_loss/denoising`.
"""

import secrets
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from trainer import metric_names
from trainer.config import RunConfig, check_sinks
from trainer.discovery import in_time
from trainer.errors import UserError, one_line
from trainer.exporter import Exporter
from trainer.run_folder import RunFolder

TENSORBOARD, WANDB = "tensorboard", "wandb"
"""Folders in the run folder."""
WANDB_RECORD = "wandb.json"
_INIT_S = 60.0
_CLOSE_S = 60.0


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """A start's own file of events; of what an earlier start has written, the steps that this one does again do not count."""

    def __init__(self, folder: RunFolder, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(f"{folder.root}/{TENSORBOARD}", purge_step=step)  # type: ignore[no-untyped-call]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run there for all starts: its id is kept in the run folder. WANDB_* variables say where and how, as ever."""

    def __init__(self, folder: RunFolder, config: RunConfig, step: int) -> None:
        import wandb

        known = folder.read_json(WANDB_RECORD) if folder.exists(WANDB_RECORD) else {}
        run_id = str(known.get("id") or secrets.token_hex(8))
        if not known:
            folder.write_json(WANDB_RECORD, {"id": run_id})
        self._run: Any = wandb.init(
            id=run_id, resume="allow", name=config.name, config=config.model_dump(mode="json"),
            dir=folder.root if folder.is_local else tempfile.mkdtemp(prefix="wandb-"),
            settings=wandb.Settings(init_timeout=_INIT_S, console="off", silent=True),
        )  # fmt: skip
        # steps that a restart does again are no news to its own step, which only goes up
        self._run.define_metric("*", step_metric=metric_names.STEP.name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, metric_names.STEP.name: step})

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[RunFolder, RunConfig, int], Sink]] = {
    TENSORBOARD: TensorBoard,
    WANDB: WeightsAndBiases,
}


class Sinks:
    """All that `metrics.sinks` names. One that cannot be opened, or does not take a record, is counted and said once; training
    goes on."""

    def __init__(self, config: RunConfig, folder: RunFolder, exporter: Exporter, say: Callable[[str], None]) -> None:
        """
        Raises:
            UserError: a sink's package is not there, or TensorBoard has no disk to write to.
        """
        check_sinks(config)
        if TENSORBOARD in config.metrics.sinks and not folder.is_local:
            raise UserError(f"metrics.sinks: tensorboard writes to a disk, and the run folder is {folder.url}; leave it out, "
                            "or take a --run-dir on a disk")  # fmt: skip
        self._config, self._folder, self._exporter, self._say = config, folder, exporter, say
        self._open: dict[str, Sink] = {}
        self._said: set[str] = set()
        self._given_up: set[str] = set()

    def write(self, step: int, stages: Mapping[str, float]) -> None:
        """Every gauge and counter as it stands, and the mean seconds of a step's stages."""
        if not self._config.metrics.sinks:
            return
        values = {"/".join((metric_names.STEP_SECONDS.name, stage)): seconds for stage, seconds in stages.items()}
        for metric in metric_names.OF_RANK_0:
            if metric.kind in ("gauge", "counter"):
                for labels, value in self._exporter.values(metric):
                    values["/".join((metric.name, *labels))] = value
        for name in self._config.metrics.sinks:
            if name in self._given_up:
                self._exporter.of(metric_names.SINK_FAILURES, name).inc()
                continue
            try:
                if name not in self._open:
                    self._open[name] = _KINDS[name](self._folder, self._config, step)
                self._open[name].write(step, values)
            except Exception as e:  # each library has errors of its own, and no run ends for a copy of its figures
                self._failed(name, one_line(e))

    def _failed(self, name: str, why: str) -> None:
        self._exporter.of(metric_names.SINK_FAILURES, name).inc()
        if name not in self._open:
            # an opening that fails may take a minute each time
            self._given_up.add(name)
        if name not in self._said:
            self._said.add(name)
            self._say(f"WARNING: metrics.sinks: {name} has not taken a record ({why}); training goes on")

    def close(self) -> None:
        for name, sink in self._open.items():
            if trouble := in_time(sink.close, seconds=_CLOSE_S):
                self._failed(name, trouble)
        self._open.clear()
