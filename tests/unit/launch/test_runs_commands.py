"""What `loupe runs` and a submission say: of jobs that wait, start, or were ended by others; of options that do not fit."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch import console
from launch.cli import cli
from launch.entry import run_command
from launch.job import update_job
from launch.ranks import Outcome, cause_of, decide, last_line
from launch.runs.list import read_rows, table
from launch.runs.text import age
from launch.slurm_job.scancelled import is_scancelled
from tests.run_folders import NOW, make_run, record
from trainer.config import CODE_ROOT
from trainer.run_folder import RunFolder

Tools = Callable[..., None]
FORGOTTEN = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
"""squeue, of a job that SLURM does not know any more."""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, list(arguments), prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """SLURM's commands, as shell scripts by name; the others are not there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**scripts: str) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)

    return make


# ---------------------------------------------------------------------------------------------------------------- states


def test_why_a_job_waits_is_in_the_table_and_said_by_who_follows_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(str(tmp_path / "runs/r"), cluster="slurm", job_id="6", attempts=())
    state = tmp_path / "state"
    state.write_text("6|PENDING|N/A|(PartitionTimeLimit)|demo")
    tools(squeue=f'case "$*" in *%T\\|%j*) exit 0 ;; *) echo "$(< {state})" ;; esac')
    root = str(tmp_path / "runs")
    assert "pending (PartitionTimeLimit)" in call(capsys, "runs", "--root", root)[1]
    said: list[str] = []
    ends = iter([None, None, None, "done"])
    from launch.runs.waiting import waiting_of

    folder = RunFolder(f"{root}/r")
    console.watch(
        folder, console.PlainDisplay(said.append), lambda: next(ends), interval_s=0.01, poll_ended_s=0.0,
        waiting=lambda: waiting_of(folder),
    )  # fmt: skip
    assert said == ["waiting: SLURM job 6 is pending (PartitionTimeLimit)", "done"], "once"
    of_logs = iter([None, None, None, "done"])
    monkeypatch.setattr("launch.runs.logs.end_of", lambda folder: next(of_logs))
    monkeypatch.setattr("launch.runs.logs.LOOK_S", 0.05)
    monkeypatch.setattr("launch.runs.logs.POLL_S", 0.02)
    code, _, err = call(capsys, "runs", "logs", folder.url, "--follow")
    assert (code, err) == (0, "waiting: SLURM job 6 is pending (PartitionTimeLimit)\ndone\n")
    state.write_text("6|RUNNING|2026-01-01T00:00:00|n1|demo")
    assert waiting_of(folder) is None


def test_who_watches_begins_at_the_newest_interval(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"), attempts=((1, 2, 3), (3, 4, 5)))
    said: list[str] = []
    ends = iter([None, "done"])

    def end() -> str | None:
        found = next(ends)
        if found:
            writer = folder.metrics_writer(1)
            writer.write(record(6, NOW))
            writer.close()
        return found

    console.watch(folder, console.PlainDisplay(said.append), end, interval_s=0.01, poll_ended_s=0.0)
    assert [line.split()[1] for line in said[:-1]] == ["5/20", "6/20"]
    assert "left ?" not in said[0], "the pace is of what was not shown, too"


def test_a_new_start_is_starting_until_its_first_metrics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools
) -> None:
    folder = make_run(
        str(tmp_path / "r"), cluster="slurm", job_id="7", attempts=((1, 2), (3, 4)), chain=["7", "8", "9"]
    )
    tools(squeue='echo "7|RUNNING|2020-01-01T00:00:00|n1|demo"; echo "8|PENDING|N/A|(Dependency)|demo"')

    def shown() -> str:
        return call(capsys, "runs", "show", folder.url)[1]

    assert "state:         running" in shown()
    assert "speed:" in shown()
    assert "behind it:     SLURM job(s) 8, 9," in shown()
    folder.start_attempt({"time": time.time(), "world_size": 2})
    assert "state:         starting" in shown()
    assert "speed:" not in shown()
    assert "time left:" not in shown()
    writer = folder.metrics_writer(2)
    writer.write(record(5, time.time()))
    writer.close()
    assert "state:         running" in shown()
    later = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 60))
    tools(squeue=f'echo "7|RUNNING|{later}|n1|demo"')
    assert "state:         starting" in shown(), "SLURM has started it again, its ranks have not said so yet"
    found = json.loads(call(capsys, "runs", "show", folder.url, "--json")[1])
    assert (found["state"], found["starts"], found["slurm_jobs"], found["config"]) == (
        "starting",
        3,
        ["7", "8", "9"],
        "demo",
    )


COMPLETING = "JobId=7 JobState=COMPLETING Restarts={} PreemptTime={} RunTime=00:00:40 TimeLimit={}"


@pytest.mark.parametrize(
    ("facts", "cancelled"),
    [
        (COMPLETING.format(2, "None", "01:00:00"), True),
        (COMPLETING.format(2, "None", "UNLIMITED"), True),
        (COMPLETING.format(3, "None", "01:00:00"), False),  # SLURM queues it again
        (COMPLETING.format(2, "2026-01-01T00:00:00", "01:00:00"), False),
        (COMPLETING.format(2, "None", "00:00:40"), False),  # its time is over
        ("", False),
    ],
)
def test_what_scancel_ends_is_told_from_what_comes_back(facts: str, cancelled: bool) -> None:
    assert is_scancelled(facts, 2) == cancelled


def test_a_job_that_scancel_ended_is_noted_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools
) -> None:
    folder = make_run(str(tmp_path / "runs/r"), cluster="slurm", job_id="11", checkpoint=4)
    tools(squeue='echo "11|CANCELLED|N/A|n1|demo"')
    _, out, err = call(capsys, "runs", "--root", str(tmp_path / "runs"))
    assert out.splitlines()[1].split()[:2] == ["r", "cancelled"]
    assert err == ""
    tools(squeue=FORGOTTEN)
    _, out, err = call(capsys, "runs", "--root", str(tmp_path / "runs"))
    assert out.splitlines()[1].split()[:2] == ["r", "cancelled"]
    assert err == ""
    expected = "cancelled (by scancel of its job 11, newest checkpoint: step 4)"
    assert f"state:         {expected}" in call(capsys, "runs", "show", folder.url)[1]
    update_job(folder, ended=None)
    assert "lost" in call(capsys, "runs", "--root", str(tmp_path / "runs"))[1]


def test_a_narrow_terminal_gets_fewer_columns_and_whole_words(tmp_path: Path) -> None:
    for name in ("rates-learning_rate-0.0001-seed-0", "b"):
        make_run(str(tmp_path / name), checkpoint=4)
    now = time.time()
    rows, _ = read_rows([str(tmp_path)], now)

    def drawn(width: int) -> list[str]:
        screen = io.StringIO()
        Console(file=screen, width=width).print(table(rows, now, width))
        return screen.getvalue().splitlines()

    wide, narrow = drawn(160), drawn(80)
    assert "phase" in wide[0]
    assert "images/s" in wide[0]
    assert "phase" not in narrow[0]
    assert len(narrow) == 3, "no cell is broken"
    assert "rates-learning_rate-0.0001-seed-0" in "".join(narrow)
    assert re.search(r"4/20 .* 4, \d+s", narrow[1])
    assert [age(0, s) for s in (5, 61, 7200, 200_000)] == ["5s", "1m", "2h", "2d"]


# ---------------------------------------------------------------------------------------------------------------- cancel


def test_several_are_cancelled_and_what_is_over_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools
) -> None:
    root = tmp_path / "runs"
    for name, job_id in (("e1", "1"), ("e2", "2"), ("e3", "3"), ("other", "4")):
        make_run(str(root / name), cluster="slurm", job_id=job_id, checkpoint=4)
    update_job(RunFolder(str(root / "e3")), ended={"code": 0, "why": "done", "time": NOW})
    called = tmp_path / "called"
    tools(
        scancel=f'echo "scancel $*" >> {called}; : > {tmp_path}/gone-${{!#}}',
        squeue=f'for a in "$@"; do [[ $a =~ ^[0-9]+$ ]] && id=$a; done; echo "ask $id" >> {called}; '
        f'[ -e {tmp_path}/gone-$id ] && exit 0; echo "$id|PENDING|N/A|(Priority)|demo"',
    )
    code, out, err = call(capsys, "runs", "cancel", "e*", "--root", str(root))
    assert code == 0, err
    lines = [line for line in called.read_text().splitlines() if line.startswith("scancel")]
    assert lines == ["scancel 1", "scancel 2"]
    assert out.count("cancelled in the queue") == 2
    assert f"{root}/e1: SLURM job 1 is PENDING: scancel" in out
    assert out.index("SLURM job 2 is PENDING") < out.index(f"{root}/e1: cancelled"), "all are asked first"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW))
    code, _, err = call(capsys, "runs", "cancel", "e3", "--root", str(root))
    assert (code, err) == (2, f"error: {root}/e3: no job has it, it is done since {when}\n")
    code, out, err = call(capsys, "runs", "cancel", "e1", "other", "--root", str(root))
    assert code == 2
    assert "e1: no job has it, it has ended since" in err
    assert f"{root}/other: cancelled in the queue" in out, "one that fails keeps no other"
    assert "no run of such a name" in call(capsys, "runs", "cancel", "x*", "--root", str(root))[2]


def test_a_run_that_was_done_before_it_could_be_cancelled_is_not_to_be_resumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools
) -> None:
    folder = make_run(str(tmp_path / "r"), cluster="slurm", job_id="1", checkpoint=4)
    end = '{"code": 0, "why": "done"}'
    tools(
        scancel=f"""/usr/bin/sed -i 's/"ended": null/"ended": {end}/' {tmp_path}/r/job.json; : > {tmp_path}/gone""",
        squeue=f'[ -e {tmp_path}/gone ] || echo "1|PENDING|N/A|(Priority)|demo"',
    )
    code, out, err = call(capsys, "runs", "cancel", folder.url)
    assert code == 0, err
    assert f"{folder.url}: done" in out
    assert "resume" not in out


# --------------------------------------------------------------------------------------------------- options that do not fit


def test_what_resume_refuses_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"))
    for option in (("--seeds", "2"), ("--array", "seed=0-1"), ("--sweep", "seed=0-1")):
        code, out, err = call(capsys, "runs", "resume", folder.url, *option, "--dry-run")
        assert (code, out) == (2, "")
        assert "makes other runs" in err
    code, _, err = call(capsys, "runs", "resume", folder.url, "--set", "phases.0.learning_rate=1", "--dry-run")
    assert code == 2
    assert "cannot change within a run; drop --set" in err
    assert "learning_rate" in err
    folder.write_json("summary.json", {})
    assert f"`loupe submit {folder.url}/config.yaml --fresh`" in call(capsys, "runs", "resume", folder.url)[2]


@pytest.mark.parametrize(
    "option", [("--partition", "low"), ("--mem", "8G"), ("--time", "90"), ("--exclude", "n1"), ("--chain", "2")]
)
def test_options_of_slurm_are_not_taken_in_silence_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: tuple[str, str]
) -> None:
    arguments = (
        "submit",
        "demo",
        "--cluster",
        "local",
        "--cpu",
        "--run-dir",
        str(tmp_path / "r"),
        *option,
        "--dry-run",
    )
    assert call(capsys, *arguments)[::2] == (2, f"error: {option[0]}: goes with --cluster slurm\n")


def test_a_job_of_slurm_is_resumed_on_this_machine_without_its_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools
) -> None:
    folder = make_run(str(tmp_path / "r"), cluster="slurm", job_id="3")
    update_job(
        folder, options={"partition": "low", "time_limit": "90"}, ended={"code": 143, "why": "cancelled", "time": NOW}
    )
    tools(git='exec /usr/bin/git "$@"', squeue=FORGOTTEN)
    code, out, err = call(capsys, "runs", "resume", folder.url, "--cluster", "local", "--dry-run")
    assert code == 0, err
    assert "--partition" not in err
    assert out.startswith("# rank 0\nRANK=0 ") or "# rank 0\n" in out
    assert "\n " not in out.partition("config.yaml\n")[0], "no line begins with a blank"


def test_a_dry_run_asks_slurm_what_the_submission_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tools: Tools
) -> None:
    arguments = ["submit", "demo", "--cluster", "slurm", "--cpu", "--run-dir", str(tmp_path / "r"), "--dry-run"]
    git = 'exec /usr/bin/git "$@"'
    tools(git=git)
    code, out, err = call(capsys, *arguments, "--partition", "gpux")
    assert code == 0
    assert "#SBATCH --partition=gpux" in out
    assert "WARNING: sbatch: not on this machine, so the partition" in err
    tools(sbatch='echo "sbatch: fatal: Could not establish a configuration source" >&2; exit 1', srun="", squeue="")
    code, out, err = call(capsys, *arguments, "--partition", "gpux")
    assert code == 0
    assert "WARNING: sbatch: no SLURM is reached from here" in err
    listing = 'case "$*" in *%P*) echo "gpu*|1:00:00" ;; *) printf "n1|(null)|8\\nn2|(null)|8\\n" ;; esac'
    tools(sbatch="exit 0", sinfo=listing, squeue=FORGOTTEN)
    code, out, err = call(capsys, *arguments, "--partition", "gpux")
    assert (code, out) == (2, "")
    assert "--partition gpux: not on this cluster, which has gpu" in err
    assert "--nodes 4" in call(capsys, *arguments, "--nodes", "4")[2]
    assert "--time" in call(capsys, *arguments, "--time", "99:00:00")[2]
    code, out, err = call(capsys, *arguments, "--after", "999")
    assert code == 0
    assert "WARNING: --after 999: SLURM knows no such job" in err
    tools(sbatch='echo "sbatch: error: Batch job submission failed: Invalid feature specification" >&2; exit 1')
    code, out, err = call(capsys, *arguments, "--constraint", "x")
    assert code == 2
    assert "Invalid feature specification" in err
    assert "--constraint" in err
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------------------------------------------- the rest


def test_a_reader_of_the_output_that_goes_is_no_error_of_storage(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"), attempts=())
    folder.write_text("logs/rank-0.log", "a line of some length\n" * 20_000)
    words = [sys.executable, "-m", "launch.cli", "runs", "logs", folder.url, "--since-start"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=CODE_ROOT, env={**os.environ, "PYTHONPATH": str(CODE_ROOT)}
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(timeout=240)


def test_an_export_finds_the_run_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(str(tmp_path / "runs/first"))
    monkeypatch.setenv("LOUPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    for arguments in (("runs", "export", "first", "out"), ("export", "first", "out", "--root", str(tmp_path / "runs"))):
        code, _, err = call(capsys, *arguments)
        assert code == 2
        assert "no checkpoint to draw with; train first" in err, "it was found"
        assert "no run there" not in err


def test_the_cause_of_a_kill_is_no_line_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text(
        "ValueError: the reason\n/x/y.py:5: UserWarning: resource_tracker: leaked\n  warnings.warn('resource_tracker: x')\n"
    )
    assert last_line(log) == "ValueError: the reason"
    for code in (-9, 137):
        assert cause_of(code, log).startswith("killed, most often for want of memory; see --mem")
    assert cause_of(1, log) == "ValueError: the reason"
    folder = make_run(str(tmp_path / "r"))
    decision = decide(folder, Outcome("crash", -9, 0), preempted=False, max_restarts=1, log=log)
    assert "SIGKILL (code -9): killed, most often for want of memory" in decision.why


def test_a_stop_by_sigusr2_is_no_preemption_for_sure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"), checkpoint=4)
    for signal in ("SIGUSR2", "SIGTERM"):
        assert decide(
            folder, Outcome("requeue", 75, 0), preempted=True, max_restarts=0, log=tmp_path / "x", asked_by=signal
        ).restart
    shown = call(capsys, "runs", "show", folder.url)[1]
    assert "asked by SIGUSR2: its time limit, or a preemption that warns at step 4" in shown
    assert "preempted at step 4" in shown
    assert "preempted 1" in shown
