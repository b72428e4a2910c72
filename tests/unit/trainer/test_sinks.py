"""TensorBoard and Weights & Biases get the figures under their names, go on over restarts, and end no run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny
from trainer import metric_names
from trainer.config import check_sinks, run
from trainer.errors import UserError
from trainer.exporter import Exporter
from trainer.run_folder import RunFolder
from trainer.sinks import Sinks


def started(folder: Path, *names: str) -> tuple[Sinks, Exporter, list[str]]:
    said: list[str] = []
    exporter = Exporter(metric_names.OF_RANK_0)
    return (
        Sinks(tiny(f"metrics.sinks=[{', '.join(names)}]"), RunFolder(str(folder)), exporter, said.append),
        exporter,
        said,
    )


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_goes_on_and_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    for first in (10, 30):
        sinks, exporter, said = started(tmp_path, "tensorboard")
        for step in (first, first + 10, first + 20):
            exporter.of(metric_names.LOSS, "denoising").set(first + step / 100)
            sinks.write(step, {"encode": 0.5})
        sinks.close()
        assert said == []
    found = scalars(tmp_path, "loupe_loss/denoising")
    assert found == pytest.approx({10: 10.1, 20: 10.2, 30: 30.3, 40: 30.4, 50: 30.5})
    assert set(scalars(tmp_path, "loupe_step_seconds/encode").values()) == {0.5}


def test_wandb_offline_is_one_run_over_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for step in (10, 20):
        sinks, exporter, said = started(tmp_path, "wandb")
        exporter.of(metric_names.LOSS, "denoising").set(0.5)
        sinks.write(step, {})
        sinks.close()
        assert said == []
        ids.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert ids[0] == ids[1]
    files = list((tmp_path / "wandb").rglob(f"run-{ids[0]}.wandb"))
    assert files
    assert any(b"loupe_loss/denoising" in file.read_bytes() for file in files)


def test_a_sink_that_fails_is_counted_and_said_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    sinks, exporter, said = started(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        sinks.write(step, {"encode": math.nan})
    sinks.close()
    assert exporter.registry.get_sample_value("loupe_sink_failures_total", {"sink": "tensorboard"}) == 3
    assert len(said) == 1
    assert "training goes on" in said[0]


def test_what_is_not_there_is_said_before_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        return None

    check_sinks(tiny("metrics.sinks=[tensorboard, wandb]"))
    monkeypatch.setattr(run, "find_spec", nothing)
    check_sinks(tiny())
    with pytest.raises(
        UserError, match=r"metrics\.sinks: the package wandb is not installed; pip install -e '\.\[wandb\]'"
    ):
        check_sinks(tiny("metrics.sinks=[wandb]"))


def test_tensorboard_needs_a_disk() -> None:
    with pytest.raises(
        UserError, match=r"metrics\.sinks: tensorboard writes to a disk, and the run folder is memory://run"
    ):
        Sinks(tiny("metrics.sinks=[tensorboard]"), RunFolder("memory://run"), Exporter(), print)
