"""The experiment's queue with real processes, and what its command refuses."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launch.cli import cli
from launch.entry import run_command
from launch.experiments.jobs import estimate
from launch.experiments.queue import Job, Queue, Stage
from trainer.recipes.lpl_experiment import FULL, PARADIGMS, planned_runs, run_name, variants


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def changed(self, job: Job, what: str) -> None:
        self.texts.append(f"{job.name}: {what}")

    def tick(self, queue: Queue) -> None:
        pass


def job(folder: Path, name: str, script: str = 'touch "$0"', *, after: tuple[str, ...] = ()) -> Job:
    made = folder / f"{name}.made"
    stage = Stage("training", ["sh", "-c", script, str(made)], made.exists, 1.0)
    return Job(name, [stage], str(folder / name), after=after)


def run(jobs: list[Job], workers: int = 2) -> tuple[bool, dict[str, str], list[str]]:
    notes = Notes()
    complete = Queue(jobs, workers=workers, watcher=notes, poll_s=0.01).run()
    return complete, {job.name: job.state for job in jobs}, notes.texts


def test_a_failure_blocks_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "bad", "echo first; echo 'error: no such file'; exit 93"),
        job(tmp_path, "lost", after=("bad",)),
        job(tmp_path, "lost too", after=("lost",)),
        job(tmp_path, "good"),
        job(tmp_path, "after good", after=("good",)),
        job(tmp_path, "makes nothing", "true"),
    ]
    complete, states, _ = run(jobs)
    assert not complete
    assert states == {"bad": "failed", "lost": "blocked", "lost too": "blocked", "good": "done", "after good": "done",
                      "makes nothing": "failed"}  # fmt: skip
    assert jobs[0].why == "training ended with code 93: error: no such file"
    assert jobs[1].why.startswith("bad is not there: training ended with code 93")


def test_what_is_there_is_not_made_again_and_a_job_goes_on_at_its_next_stage(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stages = [
        Stage(
            name, ["sh", "-c", f"echo {name} >> {log}; touch $0", str(tmp_path / name)], (tmp_path / name).exists, 1.0
        )
        for name in ("one", "two", "three")
    ]
    (tmp_path / "one").touch()
    for expected in (["two", "three"], ["two", "three"]):
        complete, states, _ = run([Job("job", stages, str(tmp_path / "job"))])
        assert complete
        assert states == {"job": "done"}
        assert log.read_text().split() == expected


def test_no_more_at_a_time_than_workers_and_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # the first waits for the second: they run at a time, however slow the machine is
    script = f"echo + >> {log}; until [ $(grep -c + {log}) -ge 2 ]; do sleep 0.02; done; echo - >> {log}; touch $0"
    complete, _, notes = run([job(tmp_path, f"job{i}", script) for i in range(5)])
    assert complete
    running = [0]
    for sign in log.read_text().split():
        running.append(running[-1] + (1 if sign == "+" else -1))
    assert max(running) == 2
    assert {note.partition(":")[0] for note in notes[:2]} == {"job0", "job1"}


def test_a_job_of_two_cores_runs_alone_and_none_passes_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f'echo "+$OMP_NUM_THREADS" >> {log}; sleep 0.2; echo - >> {log}; touch "$0"'
    # the last two wait for each other
    together = script.replace("sleep 0.2", f"until [ $(grep -c + {log}) -ge 4 ]; do sleep 0.02; done")
    jobs = [job(tmp_path, name, script) for name in ("one", "wide")]
    jobs += [job(tmp_path, name, together) for name in ("two", "three")]
    jobs[1].cores = 2
    assert Queue(jobs, workers=2, watcher=Notes()).left_s() == pytest.approx(5 / 2), "it counts twice"
    complete, _, _ = run(jobs)
    assert complete
    assert log.read_text().split() == ["+1", "-", "+2", "-", "+1", "+1", "-", "-"]
    wider = job(tmp_path, "wider")
    wider.cores = 8
    assert run([wider])[0], "a job that wants more cores than there are gets these"


def test_a_signal_lets_what_runs_save_and_starts_nothing_more(tmp_path: Path) -> None:
    """As the trainer does: SIGTERM, save, code 75; the same jobs go on later."""
    saved = tmp_path / "saved"
    script = f"trap 'touch {saved}; exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
    jobs = [job(tmp_path, "runs", script), job(tmp_path, "waits")]

    def ask() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    complete, states, _ = run(jobs, workers=1)
    assert not complete
    assert states == {"runs": "stopped", "waits": "waiting"}
    assert saved.exists()


def test_time_left_follows_what_was_measured(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"job{i}") for i in range(3)]
    queue = Queue(jobs, workers=2, watcher=Notes())
    assert queue.left_s() == pytest.approx(1.5)
    jobs[0].state, jobs[0].ran_s = "done", {"training": 4.0}  # where 1.0 was estimated
    assert queue.left_s() == pytest.approx(2 * 4.0 / 2)


# ------------------------------------------------------------------------------------------------------------- the plan


def test_variants_differ_from_the_baseline_by_their_loss_alone() -> None:
    runs = {run.name: run.config for run in planned_runs(FULL, variants("lpips.pth", "network"), "/runs")}
    base = runs[run_name("ddpm_eps", "baseline", 1)].model_dump()
    for name, config in runs.items():
        if name.startswith("eps-") and name.endswith("-1"):
            tree = config.model_dump()
            for field in ("perceptual", "paradigm"):
                tree["task"][field] = base["task"][field]
            assert tree["task"]["paradigm"]["kind"] == "ddpm_eps"
            tree["name"], tree["phases"][0]["perceptual"] = base["name"], None
            assert tree == base, name
    assert {config.seed for config in runs.values()} == {0, 1, 2, 3}, (
        "a continuation never repeats the pre-training's noise"
    )
    mains = [run_name(p, variant, seed) for p in PARADIGMS for variant in ("baseline", "lpl") for seed in range(3)]
    assert set(mains) <= set(runs)


def test_every_run_comes_after_what_it_begins_with() -> None:
    seen: set[str] = set()
    for run in planned_runs(FULL, variants("lpips.pth", "network"), "/runs"):
        assert set(run.after) <= seen
        assert (run.config.init_from is None) == (not run.after)
        if run.config.init_from:
            assert run.config.init_from.url == f"/runs/{run.after[0]}"
        seen.add(run.name)


# ---------------------------------------------------------------------------------------------------------- the command


def command(*arguments: str) -> int:
    return run_command(cli, ["experiment", "lpl", *arguments], prog_name="loupe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --features-weights: give a file with EfficientNet-Lite0's weights"),
        (("--features-weights", "none.pth"), "error: --features-weights none.pth: no such file"),
        (("--variant", "lpI"), "error: --variant lpI: no such variant; did you mean 'lpl'?"),
        (("--report-only",), "experiment: no experiment with results; run `loupe experiment lpl` first"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert command("--out", str(tmp_path / "experiment"), *arguments) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "experiment").exists(), "nothing is made for a command that is refused"


def test_one_is_no_plural() -> None:
    assert estimate(1, 50.0, 1) == "1 run, about 1 minute on 1 core"
    assert estimate(3, 1200.0, 2) == "3 runs, about 10 minutes on 2 cores"


def test_the_plan_is_told_and_nothing_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", str(tmp_path / "experiment"), "--dry-run", "--variant", "lpl") == 0
    out = capsys.readouterr().out
    assert "eps-lpl-2" in out
    assert "minutes on 2 cores" in out
    assert "21 runs" in out, "3 pre-trainings, and 3 seeds of 2 variants on 3 paradigms"
    assert not (tmp_path / "experiment").exists()
