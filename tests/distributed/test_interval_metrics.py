"""What rank 0 tells of all ranks: means over everybody's samples, and the lowest and highest of them."""

import json
from pathlib import Path

import torch

from tests.distributed.harness import run_ranks
from trainer.config import PhaseConfig
from trainer.exporter import Exporter
from trainer.parallel.world import World
from trainer.progress import Progress
from trainer.reports import Reports
from trainer.run_folder import RunFolder
from trainer.step_plan import StepPlan


def report(world: World, folder: str) -> dict[str, float | None]:
    exporter = Exporter()
    records = RunFolder(folder).metrics_writer(0) if world.is_main else None
    reports = Reports(world, exporter, records, 10)
    rank = float(world.rank)
    for step in range(2):
        loss_B = torch.tensor([rank, rank + 1.0])
        # rank 0's samples have little noise, rank 1's much
        reports.add({"loss": loss_B}, torch.tensor(0.0), (torch.full((2,), 0.05 + 0.9 * rank), loss_B))
        reports.stages.begin("data")
        reports.stages.end_step()
        reports.count(step + 1, 4, 0.0, 1.0 + rank)
    phase = PhaseConfig(name="only", steps=10, resolution=32, batch_size=4, learning_rate=1e-4)
    plan = StepPlan(1, phase, 0, 4, 1e-4, 0, begins_phase=False, ends_phase=False)
    reports.tell(plan, Progress(step=2), gradient_norm=1.0, update_ratio=None, captions_cut=0)
    reports.tell(plan, Progress(step=2), gradient_norm=1.0, update_ratio=None, captions_cut=0)  # nothing is new
    if records:
        records.close()
    value = exporter.registry.get_sample_value
    return {stat: value("loupe_ranks_step_seconds", {"stat": stat}) for stat in ("min", "mean", "max")} | {
        bin_: value("loupe_loss_by_noise", {"bin": bin_}) for bin_ in ("0", "7")
    }


def test_statistics_are_of_all_ranks_and_the_same_on_each(tmp_path: Path) -> None:
    found = run_ranks(2, report, str(tmp_path))
    assert found[0] == found[1] == {"min": 1.0, "mean": 1.5, "max": 2.0, "0": 0.5, "7": 1.5}
    (line,) = next((tmp_path / "metrics").glob("*.jsonl")).read_text().splitlines()
    record = json.loads(line)
    assert record["loss"] == {"loss": 1.0}
    assert record["loss_by_noise"] == {"0": 0.5, "7": 1.5}
    assert record["ranks"]["step_s"] == {"min": 1.0, "mean": 1.5, "max": 2.0}
    assert record["stages"]["total"] == sum(s for name, s in record["stages"].items() if name != "total")
