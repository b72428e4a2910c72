"""Logs of all ranks in one stream: order, prefixes, following, and the ends of logs that a remote folder keeps."""

import threading
import time
from pathlib import Path

import pytest

from launch import log_tails
from launch.cli import cli
from launch.entry import run_command
from launch.job import update_job
from launch.log_tails import split_tail, tail_of, tails_kept
from launch.runs import logs as runs_logs
from launch.runs.log_lines import Clock, merged, timed
from launch.runs.logs import Log, Logs
from tests.run_folders import NOW, make_run, record
from trainer.run_folder import RunFolder

HEADER = "==== {} start {}, rank {} of 2"


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S +0000", time.gmtime(1_800_000_000 + seconds))


def logs_in(folder: RunFolder, **texts: list[str]) -> None:
    for name, lines in texts.items():
        folder.write_text(f"logs/{name.replace('_', '-')}.log", "".join(f"{line}\n" for line in lines))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    code = run_command(cli, ["runs", "logs", *arguments], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two ranks, two starts: rank 1 says things between steps of rank 0, in each way that a time can be told."""
    folder = make_run(str(tmp_path / "r"), attempts=())
    writer = folder.metrics_writer(0)
    for step in (1, 2, 3):
        writer.write(record(step, 1_800_000_000 + 10 * step))
    writer.close()
    logs_in(
        folder,
        rank_0=[HEADER.format(at(0), 0, 0), "hello", "step 1/20  a", "step 2/20  b", HEADER.format(at(100), 1, 0), "again"],
        rank_1=[
            HEADER.format(at(0), 0, 1), f"{at(15)[:19]},5 WARNING between 1 and 2",
            f"[rank1]:[W{time.strftime('%m%d %H:%M:%S', time.gmtime(1_800_000_025))}.250000000 x.cpp:1] after 2",
            "of the same moment", HEADER.format(at(99), 1, 1), "earlier again",
        ],
    )  # fmt: skip
    return folder


def test_lines_of_all_ranks_in_order_of_time_with_the_rank_before(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = call(capsys, run.url, "--since-start")
    assert code == 0
    assert [(line.partition(" | ")[0], line.partition(" | ")[2][:12]) for line in lines] == [
        ("rank 0", "==== 2027-01"), ("rank 0", "hello"), ("rank 1", "==== 2027-01"), ("rank 0", "step 1/20  a"),
        ("rank 1", "2027-01-15 0"), ("rank 0", "step 2/20  b"), ("rank 1", "[rank1]:[W01"), ("rank 1", "of the same "),
        ("rank 1", "==== 2027-01"), ("rank 1", "earlier agai"), ("rank 0", "==== 2027-01"), ("rank 0", "again"),
    ]  # fmt: skip
    assert [line.partition(" | ")[2] for line in call(capsys, run.url, "--tail", "1")[1]] == ["earlier again", "again"]
    assert len(call(capsys, run.url, "--tail", "2", "--rank", "1")[1]) == 2
    assert call(capsys, run.url, "--rank", "7")[0] == 2
    assert call(capsys, run.url, "--tail", "100")[1] == lines[-4:], "of the newest start only"


def test_a_step_done_again_has_the_time_of_its_own_start() -> None:
    clock = Clock({5: [1_800_000_010.0, 1_800_000_200.0]})
    assert clock.of("step 5/9  x") == 1_800_000_010.0
    assert clock.of(HEADER.format(at(100), 1, 0)) == 1_800_000_100.0
    assert clock.of("step 5/9  x") == 1_800_000_200.0
    assert clock.of("2020-01-01 00:00:00 older than its place") == 1_800_000_200.0
    assert clock.of("2020-13-99 99:00:00 no date") == 1_800_000_200.0
    a = timed("a", ["x", HEADER.format(at(5), 0, 0)], Clock())
    b = timed("b", [HEADER.format(at(1), 0, 0), "y"], Clock())
    assert [(line.label, line.text[:1]) for line in merged([a, b])] == [("a", "x"), ("b", "="), ("b", "y"), ("a", "=")]


def test_slurms_own_output_is_there_and_what_commands_a_terminal_is_not(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_text("slurm/17_0_log.out", "job 17: queued again\n 10%\r 20%\n\x1b[2Jevil\n")
    run.write_text("slurm/17_1_log.out", "task one\n")
    run.write_text("slurm/17_submission.sh", "not a log\n")
    _, lines, _ = call(capsys, run.url)
    assert [line for line in lines if not line.startswith("rank")] == [
        "slurm  | job 17: queued again", "slurm  |  20%", "slurm  | evil", "task 1 | task one",
    ]  # fmt: skip


def test_long_logs_are_read_in_pieces_and_their_ends_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {i} " + "x" * (i % 50) for i in range(5000)]
    path = tmp_path / "logs/rank-0.log"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(runs_logs, "READ_BYTES", 1000)
    log = Log(RunFolder(str(tmp_path)), "logs/rank-0.log", "rank 0", 0, False, Clock())
    assert list(log.whole()) == lines
    monkeypatch.setattr(runs_logs, "MAX_TAIL_BYTES", 1000)
    log.read_to = 0
    found = list(log.tail(100))
    assert found == lines[-len(found) :]
    assert 10 < len(found) < 100
    with open(path, "a") as file:
        file.write("half")
    assert log.new() == []
    with open(path, "a") as file:
        file.write(" and half\nmore")
    assert log.new() == ["half and half"]
    assert log.flush() == ["more"]


def test_followed_until_the_run_ends(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_logs, "POLL_S", 0.05)
    monkeypatch.setattr(runs_logs, "LOOK_S", 0.1)
    looks: list[str] = []
    written = threading.Event()

    def end_of(folder: RunFolder) -> str | None:
        looks.append(folder.url)
        return "done" if written.is_set() else None

    monkeypatch.setattr(runs_logs, "end_of", end_of)

    def write() -> None:
        while len(looks) < 2:
            time.sleep(0.01)
        with open(f"{run.root}/logs/rank-1.log", "a") as file:
            file.write("new line\n")
        logs_in(run, rank_2=["a rank that came later", "last words"])
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    code, lines, err = call(capsys, run.url, "--tail", "0", "--follow")
    thread.join()
    assert code == 0
    assert [line.partition("| ")[2] for line in lines] == ["new line", "a rank that came later", "last words"]
    assert err == "done\n"


def test_the_ends_of_logs_are_kept_in_a_remote_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://logs-{tmp_path.name}"
    folder = make_run(url, attempts=(), start=NOW)
    update_job(folder, work_dir="/nonexistent/work")
    log = tmp_path / "rank-0.log"
    with tails_kept(url, [log, tmp_path / "rank-9.log"], interval_s=0.05):
        log.write_text("first\n")
        deadline = time.monotonic() + 60
        while folder.names("logs") != ["rank-0.log"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with open(log, "a") as file:
            file.write("last words\n")
    code, lines, err = call(capsys, url)
    assert code == 0
    assert lines == ["rank 0 | first", "rank 0 | last words"]
    assert "the whole ones are in /nonexistent/work/logs" in err
    (tmp_path / "here").mkdir()
    with tails_kept(str(tmp_path / "here"), [log]):
        pass
    assert not (tmp_path / "here/logs").exists(), "on a disk they lie there anyway"


def test_an_end_of_a_log_says_where_it_begins_and_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tails, "TAIL_BYTES", 20)
    path = tmp_path / "rank-0.log"
    path.write_text("aaaaaaaa\nbbbbbbbb\ncccccccc\n")
    assert split_tail(tail_of(path)) == (9, b"bbbbbbbb\ncccccccc\n")
    folder = RunFolder(f"memory://tails-{tmp_path.name}")
    log = Log(folder, "logs/rank-0.log", "rank 0", 0, True, Clock())
    folder.write_bytes(log.name, tail_of(path))
    assert log.new() == ["bbbbbbbb", "cccccccc"]
    assert log.new() == []
    for added, expected in (
        ("dddddddd\n", ["dddddddd"]),
        ("e" * 8 + "\n" + "f" * 8 + "\n" + "g" * 8 + "\n", ["f" * 8, "g" * 8]),
    ):
        with open(path, "a") as file:
            file.write(added)
        folder.write_bytes(log.name, tail_of(path))
        assert log.new() == expected


def test_storage_that_refuses_or_hangs_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("x\n")

    def refuse(self: RunFolder, name: str, data: bytes) -> None:
        raise OSError("503")

    monkeypatch.setattr(RunFolder, "write_bytes", refuse)
    with tails_kept("memory://refused", [log], interval_s=0.02):
        time.sleep(0.2)
    said = capsys.readouterr().out
    assert said.count("warning: memory://refused/logs/rank-0.log: cannot be written (503)") == 1
    monkeypatch.setattr(RunFolder, "write_bytes", lambda self, name, data: time.sleep(600))
    started = time.monotonic()
    with tails_kept("memory://hung", [log], interval_s=0.02, last_s=0.2):
        time.sleep(0.1)
    assert time.monotonic() - started < 300
    assert "were not written within" in capsys.readouterr().out


def test_logs_of_pods_are_one_a_start(run: RunFolder) -> None:
    run.write_text("logs/rank-3.20270115-080000.log", f"{HEADER.format(at(50), 0, 3)}\npod\n")
    found = Logs(run, [3])
    assert [line.text for line in found.lines(1)] == ["pod"]
    assert [log.label for log in found.logs.values()] == ["rank 3"]
