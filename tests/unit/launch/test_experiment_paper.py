"""`loupe experiment table3` and the like: plans, and the script that queues the paper's size."""

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.experiments.command import experiment
from trainer.config_text import from_yaml
from trainer.recipes.paper_exhibits import EXHIBITS

STAND_IN = """#!/usr/bin/env bash
# answers as `loupe submit` and `loupe job` do, with the number of the call
count=$(($(cat "$CALLS/count" 2> /dev/null || echo 100) + 1))
echo $count > "$CALLS/count"
printf '%s\\n' "$@" > "$CALLS/$count"
echo "job $count: something on 8 nodes; run folder x"
"""


def run(*words: str) -> str:
    result = CliRunner().invoke(experiment, words, standalone_mode=False)
    assert result.exception is None, result.output
    return result.output


def test_each_table_and_figure_has_a_command() -> None:
    text = run("--help")
    for name in EXHIBITS:
        assert name in text
    assert "The paper: Reweighting is worse than the baseline" in " ".join(run("table6", "--help").split())


def test_runs_are_shared() -> None:
    text = run("paper", "table3", "figure5", "table6", "--small", "--dry-run")
    assert text.count("eps-plain-0 ") == 1
    # Figure 5 is of Table 3's runs; Table 6 adds two of three seeds
    assert "table3, figure5, table6: 27 runs, 24 looks at them, about" in text
    assert "without --dry-run it wants --network" in text
    assert text.index("eps-pretrain ") < text.index("eps-plain-0 ") < text.index("flow-lpl-1 ")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("paper", "table33", "--small"),
            "table33: no table or figure of the paper that is here; take of table2, table3",
        ),
        (("table3", "--small"), "--network: whose features the tables are of"),
        (("table2", "--small", "--dataset", "photos"), "--dataset photos: give NAME=URL"),
        (
            ("table3", "--small", "--network", "inceptionn=x"),
            "no network inceptionn; did you mean 'inception'?",
        ),
        (("table3", "--small", "--network", "inception"), "--network inception: give its weights, as inception=FILE"),
        (
            ("table3", "--small", "--dry-run", "--network", "clip=nowhere"),
            "--network clip=nowhere: nowhere is not there",
        ),
        (("table2", "--small", "--dataset", "photos=nowhere"), "--dataset photos=nowhere: nowhere is not there"),
        (("table2", "--dataset", "photos=x"), "--dataset photos=...: the paper's are imagenet, cc12m, s320m"),
    ],
    ids=["name", "network", "dataset", "no such", "no weights", "no file", "no folder", "another"],
)
def test_what_is_refused(words: tuple[str, ...], error: str) -> None:
    result = CliRunner().invoke(experiment, words, standalone_mode=False)
    assert error in str(result.exception)


def test_what_is_only_counted_queues_nothing() -> None:
    assert run("table8", "--dry-run") == "table8: counted here in a minute, on this machine; nothing is trained\n"


def test_the_papers_size_is_queued_in_order(tmp_path: Path) -> None:
    """Trainings after the one that they begin with, evaluations after theirs, and those of a checkpoint find it by its step."""
    out = tmp_path / "a folder"
    text = run("paper", "table3", "figure18", "--network", "inception=/x/inception.pth", "--out", str(out))
    assert f"{out}/submit.sh" in text
    config = from_yaml((out / "configs/eps-lpl-0.yaml").read_text(), source="x")
    assert config.phases[0].perceptual is not None
    assert config.phases[0].steps == 120_000
    (tmp_path / "loupe").write_text(STAND_IN)
    (tmp_path / "loupe").chmod(0o755)
    calls = tmp_path / "calls"
    calls.mkdir()
    environment = {**os.environ, "LOUPE": str(tmp_path / "loupe"), "CALLS": str(calls), "SUBMIT": "--nodes 8",
                   "JOB": "--gpus-per-task 1"}  # fmt: skip
    done = subprocess.run(
        [out / "submit.sh"], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    given = {int(path.name): path.read_text().splitlines() for path in calls.glob("[0-9]*")}
    trainings = {Path(words[1]).stem: number for number, words in given.items() if words[0] == "submit"}
    assert {"eps-pretrain", "flow-pretrain", "eps-plain-0", "flow-lpl-0", "eps-lpl-low-0"} <= set(trainings)
    lpl = given[trainings["flow-lpl-0"]]
    assert lpl[lpl.index("--after") + 1] == str(trainings["flow-pretrain"])
    assert lpl[-2:] == ["--nodes", "8"]
    assert lpl[lpl.index("--run-dir") + 1] == str(out / "runs/flow-lpl-0")
    assert "--after" not in given[trainings["flow-pretrain"]]
    looks = {words[words.index("--name") + 1]: words for words in given.values() if words[0] == "job"}
    whole = looks["flow-lpl-0-euler50-guidance2"]
    assert whole[whole.index("--after") + 1] == str(trainings["flow-lpl-0"])
    command = whole[whole.index("--") + 1 :]
    assert command[:4] == ["loupe", "evaluate", "run", str(out / "runs/flow-lpl-0")]
    assert command[command.index("--network") + 1] == "inception=/x/inception.pth"
    assert command[command.index("--size") + 1] == "512"
    early = looks["eps-lpl-low-0-ddim50-guidance1.5-step10000"]
    checkpoint = out / "runs/eps-lpl-low-0/checkpoints/step-00010000-0123abcd"
    checkpoint.mkdir(parents=True)
    # as the job would: its shell puts the checkpoint's whole name in
    shell = [word.replace(str(tmp_path / "loupe"), "echo") for word in early[early.index("--") + 1 :]]
    shown = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert f"evaluate run {checkpoint} --reference" in shown.stdout
