"""The parts of ops/bench/launch.py: figures from records, medians and tables. Whole cycles are the bench's own run."""

import json
from pathlib import Path
from typing import Any

import pytest

from ops.bench.launch import cycle_table, main, median_cycle, stall_table
from ops.bench.launch_runs import Cycle, Saves, commits, newest_commit, records, saves_of, step_seconds


def record(step: int, seconds: float, *, phase: str = "a") -> dict[str, Any]:
    return {"step": step, "images": 8 * step, "images_per_s": 8 / seconds, "phase": phase, "time": float(step)}


def test_steps_have_their_own_times_except_the_first_two() -> None:
    found = [record(step, 0.5 + step / 10) for step in (1, 2, 3, 4)] + [record(5, 9.0, phase="b")]
    assert step_seconds(found) == {3: pytest.approx(0.8), 4: pytest.approx(0.9)}


def test_what_saves_cost_is_told_apart_from_the_steps() -> None:
    # a save every 10 steps makes the first and third after it 0.3 and 0.1 s longer
    longer = {1: 0.3, 3: 0.1}
    found = [record(step, 0.5 + (longer.get(step % 10, 0.0) if step > 10 else 0.0)) for step in range(1, 45)]
    saves = saves_of(found, stall_s=0.02, every=10)
    assert saves.step_s == pytest.approx(0.5)
    assert saves.beside_s == pytest.approx(0.4)
    assert saves.saves == 4
    assert saves.share(200) == pytest.approx(0.02 / 100)
    assert saves.share_with_slower_steps(200) == pytest.approx(0.42 / 100)
    text = stall_table([saves], [Saves(0.5, 0.0, 5.0, 4)])
    assert "0.020%" in text
    assert "5.000%" in text


def test_records_leave_out_notes_and_a_line_that_is_being_written(tmp_path: Path) -> None:
    assert records(tmp_path, 0) == []
    (tmp_path / "metrics").mkdir()
    lines = [json.dumps({"note": "x"}), json.dumps(record(1, 1.0)), '{"step": 2']
    (tmp_path / "metrics/0000.jsonl").write_text("\n".join(lines))
    assert [found["step"] for found in records(tmp_path, 0)] == [1]


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    assert newest_commit(tmp_path) == 0.0
    for name in ("step-00000005-aa", "step-00000007-bb"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000005-aa/COMMIT").write_text("x")
    assert [step for step, _ in commits(tmp_path)] == [5]


def test_medians_are_of_each_figure_and_a_table_has_both_starts() -> None:
    found = [
        Cycle(
            1.0, 10.0 * i, 0.5, 1.0, 20.0, 0.0, [{"import": 6.0 * i, "compile": 50.0}, {"import": 6.0, "restore": 1.0}]
        )
        for i in (1, 2, 4)
    ]
    one = median_cycle(found)
    assert (one.first_step, one.starts[0]["import"]) == (20.0, 12.0)
    rows = {line.strip().split("  ")[0]: line.split()[-2:] for line in cycle_table("t", found).splitlines()}
    assert rows["import"] == ["12.00", "6.00"]
    assert rows["compile"] == ["50.00", "0.00"]
    assert rows["together"] == ["62.00", "7.00"]
    assert not any("scheduler" in row for row in rows)


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["launch", "everything"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "restart" in capsys.readouterr().err
