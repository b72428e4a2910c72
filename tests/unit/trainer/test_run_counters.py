"""A run's counters over restarts of a real run in this process, and what its metrics say of restarts and checkpoints."""

import math
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import tiny
from trainer import metric_names
from trainer.errors import ExitCode, UserError
from trainer.exporter import Exporter
from trainer.goodput import Ledger, read_goodput, read_record
from trainer.goodput_keeper import GoodputKeeper
from trainer.preemption import StopRequest
from trainer.restarts import MAX_WITHOUT_CHECKPOINT
from trainer.run_counters import Restarts, at_least, counters_of, take_up
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from trainer.parallel.world import World

CONFIG = tiny(
    "checkpoint.every_steps=4",
    "data.num_workers=0",
    "phases=[{name: only, steps: 10, resolution: 32, batch_size: 8, learning_rate: 1e-4}]",
)


def job(*reasons: str, **changes: Any) -> dict[str, Any]:
    restarts = [{"reason": reason, "step": 6, "checkpoint": 4, "train_seconds": 5.0} for reason in reasons]
    return {"max_restarts": 4, "restarts": restarts, "earlier": [], **changes}


def value(exporter: Exporter, metric: metric_names.Metric, *labels: str) -> float:
    return dict(exporter.values(metric)).get(labels, 0.0)


def start(alone: "World", folder: RunFolder, *, end_at: int | None = None) -> tuple[dict[str, float], Exporter]:
    """One start of the run, killed before the step after `end_at` others; what /metrics says at its end."""
    from trainer.run import Run

    with GoodputKeeper(Ledger(age_s=1.0)) as keeper:
        run = Run(CONFIG, folder, alone, StopRequest(), goodput=keeper)
        forward_backward = run.task.forward_backward

        def step(batch: Any, plan: Any, scale: float) -> Any:
            if plan.step == end_at:
                raise UserError("killed")
            return forward_backward(batch, plan, scale)

        run.task.forward_backward = step  # type: ignore[method-assign]
        if end_at is None:
            assert run.train() is ExitCode.DONE
        else:
            with pytest.raises(UserError, match="killed"):
                run.train()
        keeper._write(ended=False)
        target = folder.read_json("metrics_targets.json")["targets"][0]
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
    return {
        name: float(text) for name, _, text in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }, run.exporter  # fmt: skip


def test_a_restart_goes_on_counting(alone: "World", tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    first, exporter = start(alone, folder, end_at=7)
    exporter.close()
    assert (first["loupe_steps_total"], first["loupe_images_total"]) == (7, 56)
    assert first["loupe_restarts_left_ratio"] == 1.0
    folder.write_json("job.json", job("crash"))
    second, exporter = start(alone, folder)
    exporter.close()
    # from the checkpoint of step 4: three steps once more
    assert (second["loupe_step"], second["loupe_steps_total"], second["loupe_images_total"]) == (10, 13, 104)
    assert second['loupe_restarts_total{reason="crash"}'] == 1
    assert second["loupe_restarts_left_ratio"] == pytest.approx(3 / 4)
    assert second["loupe_restarts_without_checkpoint"] == 0, "one has come since"
    states = [second[f'loupe_goodput_seconds_total{{state="{state}"}}'] for state in metric_names.GOODPUT_STATES]
    assert math.fsum(states) == pytest.approx(math.fsum(read_goodput(folder).values()), abs=2.0)
    for state in ("rework", "productive", "restore", "init", "checkpoint"):
        assert second[f'loupe_goodput_seconds_total{{state="{state}"}}'] > 0
    record = read_record(folder, 1)
    assert record is not None
    newest = max((tmp_path / "r/checkpoints").iterdir())
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert second["loupe_checkpoint_bytes"] == size
    assert second["loupe_restore_seconds"] > 0
    assert first["loupe_restore_seconds"] == 0
    assert 0 < second["loupe_checkpoint_duration_seconds"] < 60
    told = second["loupe_checkpoint_interval_seconds"] / CONFIG.checkpoint.every_steps
    assert 0 < told < record.end_s - record.begin_s


def test_counters_are_recorded_and_taken_up_by_label() -> None:
    first, second = Exporter(), Exporter()
    first.of(metric_names.STEPS_SKIPPED, "spike").inc(3)
    first.of(metric_names.CHECKPOINT_FAILURES, "save").inc()
    counters = counters_of(first)
    take_up(second, {**counters, "loupe_roll_backs_total": [(("what", "is"), 9.0)], "another": [((), 1.0)]})
    assert counters_of(second) == counters
    at_least(second, steps=5, images=40, roll_backs=2)
    at_least(second, steps=4, images=30, roll_backs=1)
    assert [value(second, m) for m in (metric_names.STEPS, metric_names.IMAGES, metric_names.ROLL_BACKS)] == [5, 40, 2]


def test_restarts_by_reason_over_all_jobs(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    earlier = [job("preempted", "crash"), job("hang")]
    folder.write_json("job.json", job("crash", "preempted", "crash", earlier=earlier))
    folder.write_json("hangs/0003.json", {})
    exporter = Exporter()
    restarts = Restarts(exporter, folder)
    by_reason = {labels[0]: count for labels, count in exporter.values(metric_names.RESTARTS)}
    assert by_reason == {"preempted": 2, "crash": 3, "hang": 1, "submitted again": 2}
    assert value(exporter, metric_names.HANGS) == 1
    # of this job's budget of four
    assert value(exporter, metric_names.RESTARTS_LEFT) == pytest.approx(0.5)
    restarts.tell(train_seconds=10.0, checkpoint=4)
    assert value(exporter, metric_names.RESTARTS_IN_PLACE) == 2 < MAX_WITHOUT_CHECKPOINT, "a preemption says nothing"
    restarts.tell(train_seconds=10.0, checkpoint=8)
    assert value(exporter, metric_names.RESTARTS_IN_PLACE) == 0
    restarts.tell(train_seconds=5.0 + 24 * 3600, checkpoint=8)
    assert value(exporter, metric_names.RESTARTS_LEFT) == 1.0, "a day of training later they count no more"


@pytest.mark.parametrize(
    ("budget", "reasons", "left"), [(0, (), 1.0), (0, ("crash",), 0.0), (1, ("crash", "hang"), 0.0), (None, (), 1.0)]
)
def test_what_is_left_of_a_budget(tmp_path: Path, budget: int | None, reasons: tuple[str, ...], left: float) -> None:
    folder = RunFolder(str(tmp_path / "r"))
    folder.write_json("job.json", job(*reasons, max_restarts=budget))
    exporter = Exporter()
    Restarts(exporter, folder)
    assert value(exporter, metric_names.RESTARTS_LEFT) == left


def test_before_the_restore_a_start_says_what_its_restart_was_decided_on(tmp_path: Path) -> None:
    """Not that no restart has ever brought a checkpoint, nor that all crashes of a month were today: an alert would fire."""
    folder = RunFolder(str(tmp_path / "r"))
    day = 24 * 3600.0
    old = [{"reason": "crash", "checkpoint": 10 * n, "train_seconds": n * day} for n in range(6)]
    folder.write_json("job.json", {"restarts": old, "max_restarts": 4})
    exporter = Exporter()
    Restarts(exporter, folder)
    assert value(exporter, metric_names.RESTARTS_IN_PLACE) == 1, "the newest one's checkpoint is still the newest"
    assert value(exporter, metric_names.RESTARTS_LEFT) == pytest.approx(0.75)


def test_without_a_job_there_are_no_restarts(tmp_path: Path) -> None:
    exporter = Exporter()
    Restarts(exporter, RunFolder(str(tmp_path / "r")))
    assert (exporter.values(metric_names.RESTARTS), value(exporter, metric_names.RESTARTS_LEFT)) == ([], 1.0)
