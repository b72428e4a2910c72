"""What a report and curves.png show of validations."""

import json
import math
import time
from pathlib import Path

from launch.report.charts import charts_of
from launch.report.gather import gather
from launch.report.history import read_history
from tests.run_folders import make_run
from trainer.pictures import _panels
from trainer.run_folder import RunFolder

LEVELS = 3


def with_validations(folder: Path, name: str, *, damaged: bool = False) -> Path:
    make_run(str(folder / name))
    with open(folder / name / "metrics" / "0000.jsonl", "a", encoding="utf-8") as file:
        for step in (2, 4):
            terms = {"denoising": [1.0 / step, None if step == 2 else 0.5, 0.25], "lpl": [2.0 * step] * LEVELS}
            found = {"time": time.time(), "note": "validation", "validation": {"step": step, "terms": terms}}
            file.write(json.dumps(found) + "\n")
        if damaged:
            for validation in ({"step": 3, "terms": [1]}, {"step": 3, "terms": {"x": 5}}, {"step": 3}):
                file.write(json.dumps({"time": 1.0, "validation": validation}) + "\n")
            wide = {f"term{i}": [0.0] * 1000 for i in range(100)}
            file.write(json.dumps({"time": 1.0, "validation": {"step": 5, "terms": wide}}) + "\n")
    return folder / name


def test_a_curve_a_level_in_a_chart_a_term(tmp_path: Path) -> None:
    folder = with_validations(tmp_path, "run")
    report = gather(RunFolder(str(folder)), time.time(), name="run", picture_bytes=0)
    charts = {chart["id"]: chart for chart in charts_of([report])}
    denoising = charts["validation-denoising"]
    assert [trace["name"] for trace in denoising["traces"]] == ["0 (least noise)", "1", "2 (most noise)"]
    assert (denoising["traces"][0]["x"], denoising["traces"][0]["y"]) == ([2, 4], [0.5, 0.25])
    assert denoising["traces"][1]["x"] == [4], "a value that was not finite is left out"
    assert denoising["section"] == "losses"
    assert [trace["y"] for trace in charts["validation-lpl"]["traces"]] == [[4.0, 8.0]] * LEVELS


def test_of_several_runs_the_mean_of_each(tmp_path: Path) -> None:
    reports = [
        gather(RunFolder(str(with_validations(tmp_path, name))), time.time(), name=name, picture_bytes=0)
        for name in "ab"
    ]
    charts = {chart["id"]: chart for chart in charts_of(reports)}
    assert [(t["name"], t["y"]) for t in charts["validation-lpl"]["traces"]] == [("a", [4.0, 8.0]), ("b", [4.0, 8.0])]
    assert charts["validation-denoising"]["traces"][0]["x"] == [4]


def test_damaged_records_are_counted_and_large_ones_cut(tmp_path: Path) -> None:
    history = read_history(RunFolder(str(with_validations(tmp_path, "run", damaged=True))))
    assert history.unreadable == 3
    assert set(history.validations) == {2, 4, 5}
    assert math.isnan(history.validations[2]["denoising"][1])
    assert (len(history.validations[5]), len(history.validations[5]["term0"])) == (8, 64)


def test_curves_have_a_panel_a_term() -> None:
    validations = [{"step": step, "terms": {"denoising": [0.5, None]}} for step in (1, 2)]
    record = {"step": 1, "phase": "a", "loss": {"loss": 1.0}, "images_per_s": 1.0}
    panels = {panel.title: panel.curves for panel in _panels([record], [], validations)}
    assert panels["validation: denoising by noise level"] == {"level 0": [(1, 0.5), (2, 0.5)]}
