"""The table of runs: from folders alone, whatever is in them."""

import json
import os
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from launch.cancellation import ask_to_cancel
from launch.cli import cli
from launch.entry import run_command
from launch.folder_lock import locked
from launch.job import process_start, update_job
from launch.queue_states import ask_slurm
from launch.runs import find as runs_find
from launch.runs import read as runs_read
from launch.runs.read import in_parallel, read_all
from launch.runs.text import duration, printable
from tests.run_folders import NOW, job_of, make_run
from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.run_names import find_run, run_or_checkpoint


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, list(arguments), prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def listed(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> dict:  # type: ignore[type-arg]
    code, out, err = call(capsys, "runs", "--root", str(root), "--json", *arguments)
    assert code == 0, err
    return {run["name"]: run for run in json.loads(out)}


def test_a_table_of_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pid, started = os.getpid(), process_start(os.getpid())
    begin = time.time() - 100
    live = make_run(str(tmp_path / "live"), attempts=((1, 2), (2, 3, 4)), checkpoint=4, start=begin, pid=pid,
                    pid_start=started)  # fmt: skip
    over = make_run(str(tmp_path / "over"), attempts=((1, 20),), start=NOW - 90)
    update_job(over, ended={"code": 0, "why": "done", "time": NOW - 50})
    crashed = make_run(str(tmp_path / "crashed"))
    update_job(crashed, ended={"code": 93, "why": "no progress", "time": NOW})
    make_run(str(tmp_path / "lost"))
    stopped = make_run(str(tmp_path / "stopped"))
    update_job(stopped, ended={"code": 75, "why": "stopped after saving", "time": NOW})
    ask_to_cancel(stopped, job_of(tmp_path / "stopped"))
    (tmp_path / "no-run").mkdir()
    with locked(live.root, live.url):
        runs = listed(capsys, tmp_path)
        code, out, err = call(capsys, "runs", "--root", str(tmp_path))
    assert {name: run["state"] for name, run in runs.items()} == {
        "live": "running", "over": "done", "crashed": "stopped (93)", "lost": "lost", "stopped": "cancelled",
    }  # fmt: skip
    expected = {"phase": "low_resolution", "step": 4, "total_steps": 20, "images_per_s": 4.0, "restarts": 1,
                "checkpoint_step": 4, "damage": [], "alive": True}  # fmt: skip
    assert {name: runs["live"][name] for name in expected} == expected
    # by its last word, which was half a minute ago; and to the end of its job
    assert runs["live"]["goodput"] == pytest.approx(8 / 65)
    assert runs["live"]["goodput_seconds"]["down"] == pytest.approx(40, abs=1e-4)
    assert runs["over"]["goodput"] == pytest.approx(4 / 40)
    assert runs["over"]["time_left_s"] is None
    # 4 steps of 32 px are left at 4 images/s, and 12 of 64 px at a quarter of that
    assert runs["live"]["time_left_s"] == pytest.approx(4 * 8 / 4 + 12 * 8 / 1)
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["run", "state", "phase", "step"]
    assert lines[1].startswith("live"), "those that a job has come first"
    for part in ("running", "4/20", "4.0", "~2 min", "4, "):
        assert part in lines[1]
    assert len(lines) == 6
    assert code == 0
    assert "lost: killed, or its machine was lost" in err


def test_damage_is_a_row_and_no_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_read, "MAX_SMALL_BYTES", 1 << 16)
    names = ("config", "job", "nested", "large", "metrics", "checkpoint", "attempt")
    paths = {name: tmp_path / name for name in names}
    for path in paths.values():
        make_run(str(path), checkpoint=4)
    (paths["config"] / "config.yaml").write_text("name: [")
    (paths["job"] / "job.json").write_text('{"cluster": "slurm"')
    (paths["nested"] / "job.json").write_text("[" * 50_000)
    (paths["large"] / "job.json").write_text(json.dumps({"x": "x" * (1 << 17)}))
    with open(paths["metrics"] / "metrics/0000.jsonl", "a") as file:
        file.write('{"step": "many"}\n[1]\nnull\n\x00\n')
    (paths["attempt"] / "attempts/0000.json").write_bytes(b"\xff\xff")
    commit = next((paths["checkpoint"] / "checkpoints").glob("*/COMMIT"))
    commit.rename(commit.with_name("SET-ASIDE.json"))
    runs = listed(capsys, tmp_path)
    assert set(runs) == set(names)
    for name, part in {
        "config": "config.yaml: not YAML", "job": "job.json: ", "nested": "job.json: ", "large": "job.json: larger",
        "metrics": "metrics/0000.jsonl: 4 unreadable", "attempt": "attempts/0000.json",
    }.items():  # fmt: skip
        assert len(runs[name]["damage"]) == 1, runs[name]["damage"]
        assert runs[name]["damage"][0].startswith(part), runs[name]["damage"]
        assert "\n" not in runs[name]["damage"][0]
    assert runs["metrics"]["step"] == 4, "what can be read is shown"
    assert runs["job"]["state"] == runs["large"]["state"] == "damaged"
    assert runs["config"]["state"] == "lost"
    assert runs["checkpoint"]["checkpoint_step"] is None
    code, out, err = call(capsys, "runs", "--root", str(tmp_path))
    assert code == 0
    assert "unreadable: config.yaml" in out
    assert "/config: config.yaml: not YAML" in err


def test_old_runs_are_left_out_unless_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old = make_run(str(tmp_path / "old"), start=NOW - 40 * 86_400)
    update_job(old, submitted_at=NOW - 40 * 86_400, ended={"code": 0, "why": "done", "time": NOW - 39 * 86_400})
    make_run(str(tmp_path / "new"))
    assert set(listed(capsys, tmp_path)) == {"new"}
    assert set(listed(capsys, tmp_path, "--all")) == {"new", "old"}
    assert "1 more ended over 14 days ago" in call(capsys, "runs", "--root", str(tmp_path))[2]


def test_roots_and_names(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(str(tmp_path / "a/one"))
    make_run(str(tmp_path / "b/two"))
    make_run(str(tmp_path / "b/one"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOUPE_RUNS", "a b")
    assert find_run("two").url == "b/two"
    assert find_run("b/one").url == "b/one"
    assert find_run("one", ["a"]).url == "a/one"
    with pytest.raises(UserError, match="one: in a/one and b/one; give the folder itself"):
        find_run("one")
    with pytest.raises(UserError, match=r"three: no run there .*none of that name in a, b"):
        find_run("three")
    assert call(capsys, "runs")[1].count("one") == 2
    code, out, err = call(capsys, "runs", "--root", "a", "--root", "nowhere")
    assert (code, out.count("\n")) == (0, 2)
    assert "warning: nowhere: no such folder" in err
    assert call(capsys, "runs", "--root", "nowhere") == (
        2, "", "error: nowhere: no such folder; name the one that holds the runs with --root, or in LOUPE_RUNS\n"
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_checkpoints_name_may_be_cut(tmp_path: Path, kind: str) -> None:
    root = str(tmp_path) if kind == "disk" else f"memory://{tmp_path.name}/cut"
    make_run(f"{root}/one")
    run = RunFolder(f"{root}/one")
    assert run_or_checkpoint("one", [root]) == run.url
    of_run = f"{run.url}/checkpoints/step-"
    with pytest.raises(UserError, match="step-00000600: no checkpoint begins so; the run has none"):
        run_or_checkpoint(f"{of_run}00000600")
    for name in ("00000500-0a1b2c3d", "00000600-c91d94ec", "00000700-0a1b2c3d", "00000700-0a2b2c3d"):
        run.write_text(f"checkpoints/step-{name}/COMMIT", "")
    assert run_or_checkpoint(f"{of_run}00000600") == f"{of_run}00000600-c91d94ec"
    assert run_or_checkpoint("one/checkpoints/step-00000600-c9/", [root]) == f"{of_run}00000600-c91d94ec"
    assert run_or_checkpoint(f"{of_run}00000600-c91d94ec") == f"{of_run}00000600-c91d94ec"
    with pytest.raises(UserError, match="step-00000700-0a1b2c3d, step-00000700-0a2b2c3d begin so; give one whole"):
        run_or_checkpoint(f"{of_run}00000700")
    with pytest.raises(
        UserError, match=r"no checkpoint begins so; there are step-00000500-0a1b2c3d, step-00000600-c91d94ec, "
    ):
        run_or_checkpoint(f"{of_run}00000900")


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_runs_of_sweeps_have_a_folder_between(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path) if kind == "disk" else f"memory://{tmp_path.name}/runs"
    for name in ("one", "one/checkpoints/no-run", "sweep/a", "sweep/b", "deep/er/c", ".hidden/d"):
        make_run(f"{root}/{name}", attempts=((1,),))
    RunFolder(f"{root}/sweep").write_text("notes.txt", "no run")

    def names(*arguments: str) -> tuple[set[str], str]:
        code, out, err = call(capsys, "runs", "--root", root, "--json", *arguments)
        assert code == 0, err
        return {run["name"] for run in json.loads(out)}, err

    assert names("--depth", "1") == ({"one"}, "")
    assert names() == ({"one", "sweep/a", "sweep/b"}, ""), "what lies in a run is the run's"
    assert names("--depth", "3")[0] == {"one", "sweep/a", "sweep/b", "deep/er/c"}
    assert find_run("sweep/b", [root]).url == f"{root}/sweep/b"
    assert call(capsys, "runs", "--depth", "7")[0] == 2
    monkeypatch.setattr(runs_find, "MAX_FOLDERS", 4)
    few, said = names()
    assert few == {"one"}
    assert (
        said
        == f"warning: {root}: holds more than 4 folders, so not all of its levels are read; name a smaller --root\n"
    )


def test_states_that_cannot_be_asked_are_said_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(str(tmp_path / "slurm"), cluster="slurm", job_id="17")
    pods = make_run(str(tmp_path / "pods"))
    update_job(pods, cluster="kubernetes", job="demo-1")
    monkeypatch.setenv("PATH", str(tmp_path))
    runs = listed(capsys, tmp_path)
    assert [runs[name]["state"] for name in ("slurm", "pods")] == ["unknown here"] * 2
    assert "SLURM job 17: no squeue on this machine" in runs["slurm"]["state_detail"]
    assert "ask kubectl" in runs["pods"]["state_detail"]
    pods.write_json("pods/alive.json", {"job": "demo-1", "time": time.time()})
    assert listed(capsys, tmp_path)["pods"]["state"] == "running"
    assert ask_slurm(["1; rm -rf /", "$(x)"]) == {}, "only numbers are asked for"


def test_storage_that_hangs_is_a_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(str(tmp_path / "good"))
    make_run(str(tmp_path / "hung"))
    names = RunFolder.names

    def hanging(self: RunFolder, folder: str) -> list[str]:
        if self.url.endswith("hung"):
            time.sleep(600)
        return names(self, folder)

    monkeypatch.setattr(RunFolder, "names", hanging)
    started = time.monotonic()
    good, hung = read_all([RunFolder(str(tmp_path / name)) for name in ("good", "hung")], deadline_s=1.0)
    assert time.monotonic() - started < 300
    assert good.damage == []
    assert hung.damage == ["not read within 1 s"]


def test_an_error_of_ours_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_parallel([lambda: 1, lambda: 1 // 0])
    assert in_parallel([partial(int, i) for i in range(100)]) == list(range(100))


def test_show_tells_checkpoints_restarts_and_targets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"), checkpoint=3, host=socket.gethostname())
    restart = {"reason": "crash", "code": 1, "rank": 3, "step": 2, "time": NOW - 60}
    end = {"code": 143, "why": "cancelled", "time": NOW - 400}
    before = {"submitted_at": NOW - 500, "restarts": [{**restart, "reason": "preempted"}], "ended": end}
    update_job(folder, restarts=[restart], earlier=[before])
    folder.write_json("metrics_targets.json", {"targets": ["node:9000", "node:9001"]})
    folder.write_text("stacks/0000-rank-1.txt", "x")
    make_run(str(tmp_path / "other"), checkpoint=5)
    for checkpoint in (tmp_path / "other/checkpoints").iterdir():
        checkpoint.rename(tmp_path / "r/checkpoints" / checkpoint.name)
    shard = next((tmp_path / "r/checkpoints").glob("step-00000005-*/shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = call(capsys, "runs", "show", str(tmp_path / "r"))
    assert code == 0
    good, bad = (line for line in out.splitlines() if line.startswith("  step "))
    assert good.split()[:2] == ["step", "3"]
    assert "valid" in good
    assert "NOT VALID (shard-00000.safetensors: " in bad
    assert "crash at step 2: rank 3 ended with code 1" in out
    assert "preempted at step 2" in out
    assert "  cancelled\n" in out
    assert out.count("restarts:") == 1
    assert out.startswith("run:           r (config demo)\n")
    assert "restarts:      preempted 1, crash 1" in out
    assert "http://node:9000/metrics" in out
    assert "stacks of 1 file(s)" in out


def test_text_from_storage_cannot_command_a_terminal() -> None:
    assert printable("a\x1b[31mb\x1b]0;title\x07c\x9bd\x00e\tf") == "abcde\tf"
    assert printable(" 10%\r 20%\r") == " 20%"
    assert [duration(s) for s in (3, 89, 90, 3600, 50 * 3600)] == ["3 s", "89 s", "2 min", "1 h 00 min", "2 d 2 h"]


def test_show_says_on_what_the_time_of_each_start_went(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"), attempts=((1,), (2,), (3,), (4,), (5,)))
    parts = {"import": 6.125, "ranks": 0.01, "first_batch": 3.5}
    damaged = {"import": None, "model": "x"}
    for number, seconds in ((0, {"import": 99.0}), (1, {"restore": 77.0}), (3, parts), (4, damaged)):
        folder.add_to_attempt(number, start_seconds=seconds)
    code, out, _ = call(capsys, "runs", "show", str(tmp_path / "r"))
    assert code == 0
    lines = out.split("\nstarts:\n")[1].split("\n")[:4]
    assert lines[0].endswith("2 rank(s), first step after 77.0 s: restore 77.0"), "the newest four"
    assert lines[1].endswith("2 rank(s), no first step recorded")
    assert lines[2].endswith("first step after 9.6 s: import 6.1, first_batch 3.5")
    assert "first step after 0.0 s" in lines[3], "what is no number is none"
    (tmp_path / "r/attempts/0004.json").write_text("{")
    code, out, _ = call(capsys, "runs", "show", str(tmp_path / "r"))
    assert code == 0
    assert "attempts/0004.json" in out
