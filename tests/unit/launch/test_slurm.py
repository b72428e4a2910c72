"""The launcher's command: what it prints, what it refuses, and that refusing writes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.entry import run_command
from launch.job import LOCK, absolute_run_dir, live_job, load_config, process_start, time_limit_min
from launch.slurm import main
from trainer.config import CODE_ROOT, RunConfig
from trainer.config_text import to_yaml, with_overrides
from trainer.errors import UserError
from trainer.recipes import load
from trainer.run_folder import RunFolder

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that name data and a codec which are there; nothing reads more of them than dataset.json."""
    for name, index in (("emoji", "index.json"), ("codec", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / index).write_text("{}")
    (tmp_path / "emoji" / "dataset.json").write_bytes((CODE_ROOT / "data/assets/emoji_64/dataset.json").read_bytes())
    return (f"data.datasets.emoji.url={tmp_path}/emoji", f"task.codec.url={tmp_path}/codec")


@pytest.fixture
def command(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`launch/slurm.py demo --cluster slurm ARGUMENTS` from an empty folder without SLURM: (code, stdout, stderr)."""
    start = tmp_path / "start"
    start.mkdir()
    monkeypatch.chdir(start)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))

    def call(*arguments: str) -> tuple[int, str, str]:
        settings = [word for override in data for word in ("--set", override)]
        code = run_command(main, ["demo", "--cluster", "slurm", *settings, *arguments], prog_name="launch/slurm.py")
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def config(data: tuple[str, ...], *more: str) -> RunConfig:
    return with_overrides(load("demo"), [*data, *more])


def test_dry_run_prints_the_script_and_the_config_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(
        "--nodes", "2", "--gpus-per-node", "8", "--time", "1-12:00:00", "--partition", "train", "--cpus-per-task", "6",
        "--mem", "64G", "--set", "phases.perceptual.perceptual.weight=2.5", "--dry-run",
    )  # fmt: skip
    assert code == 0, err
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8", "#SBATCH --time=2160",
        "#SBATCH --partition=train", "#SBATCH --mem=64G", "#SBATCH --signal=USR2@120", "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    ):  # fmt: skip
        assert line in out.splitlines()
    assert "--kill-on-bad-exit=1" in out
    assert " --cpus-per-task=6 " in out, "srun does not take it over from sbatch"
    assert "PYTHONSAFEPATH=1" in out
    assert "weight: 2.5" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_cpu_jobs_and_defaults_ask_slurm_for_nothing_that_was_not_given(command: Command) -> None:
    _, out, _ = command("--cpu", "--dry-run")
    for option in ("gpus", "time", "partition", "account", "mem", "qos", "cpus-per-task", "constraint", "exclude"):
        assert f"#SBATCH --{option}" not in out


def test_dry_run_tells_no_secrets(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    _, out, err = command("--dry-run")
    assert "hunter2" not in out + err


def test_weights_to_begin_with_may_be_gone_when_a_run_goes_on(
    command: Command, data: tuple[str, ...], tmp_path: Path
) -> None:
    init_from = f"init_from={{url: {tmp_path}/source}}"
    given = ("--run-dir", str(tmp_path / "r"), "--set", init_from, "--dry-run")
    code, _, err = command(*given)
    assert code == 2
    assert f"init_from.url: no {tmp_path}/source; give" in err
    RunFolder(str(tmp_path / "r")).claim(config(data, init_from))
    assert command(*given)[0] == 0
    assert command(*given, "--fresh")[0] == 2


def test_the_dry_run_of_an_array_shows_its_script_and_every_config(command: Command, tmp_path: Path) -> None:
    code, out, err = command(
        "--array", "phases.0.learning_rate=1e-4,3e-4", "--seeds", "2", "--at-once", "3", "--dry-run"
    )
    assert code == 0, err
    assert "#SBATCH --array=0-3%3" in out
    for label in ("1e-4-seed-0", "1e-4-seed-1", "3e-4-seed-0", "3e-4-seed-1"):
        assert f"/runs/demo-learning_rate-{label}/config.yaml" in out
    assert (out.count("\nseed: 0\n"), out.count("\nseed: 1\n")) == (2, 2)
    assert not (tmp_path / "start/runs").exists()


def test_help_has_headings(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    headings = [line for line in out.splitlines() if line and not line.startswith(" ") and line.endswith(":")]
    assert headings == ["Options:", "SLURM:", "Environment:", "Container (SLURM):", "Several jobs (SLURM):"]


def test_local_dry_run_prints_each_ranks_command(command: Command) -> None:
    code, out, _ = command("--cluster", "local", "--nodes", "2", "--gpus-per-node", "2", "--dry-run")
    assert code == 0
    assert [f"RANK={rank} WORLD_SIZE=4 LOCAL_RANK={rank}" in out for rank in range(4)] == [True] * 4
    assert out.count("-m trainer.train --config") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "phases.0.batch_size=65", "--nodes", "2"), "do not divide over 2 ranks"),
        (("--set", "phases.0.batchsize=64"), "did you mean 'batch_size'"),
        (("--set", "data.datasets.emoji.url=nowhere"), "data.datasets.emoji.url: no folder /"),
        (("--set", "task.codec.url=."), "has no config.json"),
        (
            ("--set", "task.perceptual={kind: image_space, lpips: {url: nowhere}}"),
            "task.perceptual.lpips.url: no /",
        ),
        (("--set", "name=.."), "cannot be the name of a folder"),
        (("--time", "soon"), "--time soon"),
        (("--nodes", "0"), "--nodes 0"),
        (("--max-restarts", "-1"), "--max-restarts -1"),
        (("--run-dir", "memory://r"), "--code-dir: needed"),
        (("--run-dir", "nope://r"), "--run-dir nope://r"),
        (("--run-dir", "a%b"), "a % in it"),
        (("--rehearse-preemption", "5"), "--cluster local"),
        (("--cluster", "local", "--rehearse-preemption", "100000"), "the run has 660 steps"),
        ((), "sbatch: not found"),
        (("--time", "2"), "--time: 120 s are no longer than the warning"),
        (("--array", "seed=0,0"), "--array seed=0,0"),
        (("--array", "sed=0,1"), "did you mean 'seed'"),
        (("--seeds", "2", "--chain", "1"), "--chain: goes with one run"),
        (("--at-once", "2"), "--at-once: goes with --array"),
        (("--chain", "-1"), "--chain -1"),
        (("--after", "yesterday"), "--after yesterday"),
        (("--env", "MY_TOKEN=x"), "--env MY_TOKEN"),
        (("--profile", "--set", "profile=null"), "--profile: --set profile=null says that nothing is traced"),
        (("--include", "/etc/passwd"), "--include /etc/passwd"),
        (("--container-mount", "/a"), "--container-mount: goes with --container"),
        (("--container", "x", "--run-dir", "/a,b"), "--run-dir: /a,b cannot be mounted in a container"),
        (("--cluster", "local", "--seeds", "2"), "--seeds: goes with --cluster slurm"),
        (("--cluster", "local", "--container", "x"), "--container: goes with --cluster slurm"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_and_nothing_is_written(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["dmo", "--cluster", "slurm"], prog_name="x") == 2
    assert "did you mean 'demo'" in capsys.readouterr().err


def test_a_folder_of_another_config_is_refused(command: Command, data: tuple[str, ...], tmp_path: Path) -> None:
    RunFolder(str(tmp_path / "r")).claim(config(data, "seed=7"))
    code, _, err = command("--run-dir", str(tmp_path / "r"), "--dry-run")
    assert code == 2
    assert "another config" in err


def test_a_folder_that_is_no_run_is_never_removed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_text("")
    for more in ((), ("--fresh",)):
        code, _, err = command("--run-dir", str(tmp_path / "photos"), *more, "--dry-run")
        assert code == 2
        assert "not a run" in err
    (tmp_path / "photos/config.yaml").write_text("name: mine\n")  # another program's
    code, _, err = command("--run-dir", str(tmp_path / "photos"), "--fresh", "--dry-run")
    assert code == 2
    assert "--fresh removes runs only" in err
    assert (tmp_path / "photos/me.jpg").exists()


def test_fresh_does_not_remove_the_ground_under_its_feet(
    command: Command, data: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config(data)))
    code, _, err = command("--run-dir", str(tmp_path), "--fresh", "--dry-run")
    assert code == 2
    assert "does not remove that" in err


def test_a_folder_in_use_is_refused_by_pid_and_a_stale_one_is_not(
    command: Command, data: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "r"
    RunFolder(str(run_dir)).claim(config(data))
    job = {"cluster": "local", "pid": 2**22 + 1, "pid_start": 1, "host": "here", "ended": None}
    (run_dir / "job.json").write_text(json.dumps(job))
    code, _, err = command("--run-dir", str(run_dir), "--dry-run")
    assert code == 0, err
    hold = (
        "import fcntl, sys, time\n"
        "f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(1000)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(run_dir / LOCK)], stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    for more in ((), ("--fresh",)):
        code, _, err = command("--run-dir", str(run_dir), *more, "--dry-run")
        assert code == 2
        assert f"in use by process {2**22 + 1}" in err
    holder.kill()
    holder.wait()
    assert command("--run-dir", str(run_dir), "--dry-run")[0] == 0


def test_a_remote_folder_is_judged_by_pid_and_start_time() -> None:
    import socket

    folder = RunFolder("memory://live-test")
    job = {"cluster": "local", "pid": os.getpid(), "host": socket.gethostname(), "ended": None}
    folder.write_json("job.json", {**job, "pid_start": process_start(os.getpid())})
    assert live_job(folder)
    folder.write_json("job.json", {**job, "pid_start": 1})
    assert live_job(folder) is None, "the pid is another process's by now"
    folder.write_json("job.json", {**job, "host": "elsewhere", "pid_start": 1})
    with pytest.raises(UserError, match="cannot be asked from here"):
        live_job(folder)


def test_the_script_runs_from_a_folder_with_packages_of_our_names(data: tuple[str, ...], tmp_path: Path) -> None:
    for package in ("data", "trainer", "launch"):
        (tmp_path / "start" / package).mkdir(parents=True)
        (tmp_path / "start" / package / "__init__.py").write_text("raise SystemExit('the wrong one')")
    settings = [word for override in data for word in ("--set", override)]
    result = subprocess.run(
        [sys.executable, str(CODE_ROOT / "launch/slurm.py"), "demo", "--cluster", "slurm", *settings, "--dry-run"],
        cwd=tmp_path / "start", capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "#SBATCH" in result.stdout


def test_a_dry_run_imports_no_torch(data: tuple[str, ...], tmp_path: Path) -> None:
    settings = [word for override in data for word in ("--set", override)]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'diffusers', 'cv2'} & set(sys.modules)"
    )
    script = str(CODE_ROOT / "launch/slurm.py")
    result = subprocess.run(
        [sys.executable, "-c", code, script, "demo", "--cluster", "slurm", *settings, "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("01:30:00", 90), ("00:00:61", 2), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:30", 1441)],
)
def test_time_limits(text: str, minutes: int) -> None:
    assert time_limit_min(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "1h", "1-", "10:30", "00:00:59", "-5"])
def test_time_limits_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        time_limit_min(text)


def test_a_runs_own_config_goes_on_in_its_folder(tmp_path: Path) -> None:
    config = load_config("demo", [])
    assert absolute_run_dir(None, str(tmp_path / "mine" / "config.yaml"), config)[0] == str(tmp_path / "mine")
    assert absolute_run_dir(None, "demo", config)[0] == str(Path.cwd() / "runs" / "demo")
    assert absolute_run_dir("x", str(tmp_path / "mine" / "config.yaml"), config)[0] == str(Path.cwd() / "x")


def test_local_data_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["data.datasets.emoji.url=here", "data.datasets.more={url: 's3://bucket/x'}"])
    assert config.data.datasets["emoji"].url == str(tmp_path / "here")
    assert config.data.datasets["more"].url == "s3://bucket/x"
    assert config.task.kind == "latent_diffusion"
    assert config.task.codec.url.startswith("repo://")
