"""Progress read from the files of a run."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.console import Follower, MetricsTail, PlainDisplay, TerminalDisplay, where_things_are
from trainer.run_folder import RunFolder


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "total_steps": 100, "phase": "perceptual", "images_per_s": 12.5, "time": 1000.0 + 2 * step,
        "loss": {"denoising": 0.5, "lpl": None}, **changes,
    }  # fmt: skip


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write("".join(lines))


def test_reads_each_record_once_and_never_half_a_line(tmp_path: Path) -> None:
    tail, path = MetricsTail(RunFolder(str(tmp_path))), tmp_path / "metrics/0000.jsonl"
    assert tail.poll() == []
    whole = json.dumps(record(1)) + "\n"
    write(path, whole, whole[:20])
    assert [r["step"] for file in tail.poll() for r in file.records] == [1]
    write(path, whole[20:])
    assert [r["step"] for file in tail.poll() for r in file.records] == [1]
    assert tail.poll() == []


def test_the_last_records_of_an_attempt_are_not_lost_to_the_next(tmp_path: Path) -> None:
    tail = MetricsTail(RunFolder(str(tmp_path)))
    write(tmp_path / "metrics/0000.jsonl", json.dumps(record(1)) + "\n")
    tail.poll()
    write(tmp_path / "metrics/0000.jsonl", json.dumps(record(2)) + "\n")
    write(tmp_path / "metrics/0001.jsonl", json.dumps(record(2)) + "\n")
    assert [(file.name, len(file.records)) for file in tail.poll()] == [("0000.jsonl", 1), ("0001.jsonl", 1)]


def test_plain_lines_tell_phase_losses_speed_and_time_left(tmp_path: Path) -> None:
    lines: list[str] = []
    follower = Follower(RunFolder(str(tmp_path)), PlainDisplay(lines.append), from_now=False)
    write(tmp_path / "metrics/0000.jsonl", *(json.dumps(record(step)) + "\n" for step in (10, 20)))
    follower.poll()
    assert lines[0].endswith("left ?")
    assert lines[1] == "step 20/100  perceptual  denoising 0.5  lpl -  12.5 images/s  left 0:02:40"
    write(tmp_path / "metrics/0001.jsonl", json.dumps(record(20)) + "\n")
    follower.poll()
    assert lines[2] == "started again: attempt 0001"
    assert lines[3].endswith("left ?"), "the pause between two attempts is no pace"


def test_a_terminal_shows_the_same(tmp_path: Path) -> None:
    screen = io.StringIO()
    display = TerminalDisplay(Console(file=screen, force_terminal=True, width=120))
    display.show(record(50), "0:01:00")
    display.note("a [note]")
    display.close()
    text = screen.getvalue()
    for part in ("perceptual", "50/100", "denoising 0.5", "12.5 images/s", "a [note]"):
        assert part in text


def test_works_on_object_storage() -> None:
    folder = RunFolder("memory://console-test")
    folder.write_text("metrics/0000.jsonl", json.dumps(record(1)) + "\n")
    tail = MetricsTail(folder)
    assert len(tail.poll()) == 1
    folder.write_text("metrics/0000.jsonl", json.dumps(record(1)) + "\n" + json.dumps(record(2)) + "\n")
    assert [r["step"] for file in tail.poll() for r in file.records] == [2]
    folder.write_json("summary.json", {})
    assert "summary:       memory://console-test/summary.json" in where_things_are(folder)


def test_what_an_attempt_says_before_its_first_step_is_shown_once(tmp_path) -> None:
    folder, said = RunFolder(str(tmp_path)), list[str]()
    writer = folder.metrics_writer(0)
    writer.write({"time": 0.0, "note": "begins with 3 tensors of a run"})
    follower = Follower(folder, PlainDisplay(said.append), from_now=False)
    follower.poll()
    follower.poll()
    assert said == ["begins with 3 tensors of a run"]
    assert folder.metrics() == []
    writer.close()
