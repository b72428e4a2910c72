"""What an export tells of its run: figures of the exported step or before it, and nothing that is private."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny
from trainer.config_text import to_yaml
from trainer.export.card import _phases, _results
from trainer.export.facts import HIDDEN, facts_of, public
from trainer.run_folder import RunFolder

RECORDS = [
    {"step": 10, "loss": {"denoising": 0.5}}, {"step": 20, "loss": {"denoising": 0.25}},
    {"time": 1.0, "evaluation": {"step": 15, "psnr_db": 21.5}}, {"time": 1.0, "evaluation": {"step": 30, "psnr_db": 31.5}},
    {"step": 30, "loss": {"denoising": 0.125}},
]  # fmt: skip


def measured(folder: Path, step: int, fid: float, digest: str) -> None:
    record = {
        "step": step,
        "weights": "ema",
        "figures": {"fid": {"value": fid}},
        "counts": {},
        "size": 64,
        "definition": "d",
        "sampling": {"sampler": "heun", "steps": step, "guidance": 2.5},
    }
    (folder / f"evaluations/step-{step:08d}-{digest}.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    for name in ("metrics", "evaluations"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics/0000.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 30, "prompt_accuracy": 0.75}))
    for step, fid, digest in ((10, 71.5, "a" * 12), (20, 61.5, "a" * 12), (20, 62.5, "b" * 12), (30, 51.5, "a" * 12)):
        measured(tmp_path, step, fid, digest)
    return RunFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("step", "shown"),
    [
        (30, ["interval up to step 30 | 0.125 |", "accuracy | 0.75", "evaluation at step 30 | 31.5",
              "step 30, weights ema, drawn by heun in 30 steps, guidance 2.5", "| 51.5 |"]),
        (29, ["interval up to step 20 | 0.25 |", "evaluation at step 15 | 21.5", "step 20, weights ema", "| 61.5 |",
              "| 62.5 |"]),
        (12, ["interval up to step 10 | 0.5 |", "step 10, weights ema", "| 71.5 |"]),
        (9, ["The run has left no figures up to step 9."]),
    ],
)  # fmt: skip
def test_figures_are_of_the_exported_step_or_before_it(run: RunFolder, step: int, shown: list[str]) -> None:
    text = _results(facts_of(run, step), step)
    assert [part for part in shown if part not in text] == [], text
    # none of another step
    every = ("0.125", "0.25", "| 0.5 |", "0.75", "31.5", "21.5", "51.5", "61.5", "62.5", "71.5")
    assert sum(figure in text for figure in every) == sum(figure in " ".join(shown) for figure in every), text


@pytest.mark.parametrize(
    ("step", "steps"), [(20, ["8", "6", "6"]), (14, ["8", "6"]), (9, ["8", "1 of 6"]), (7, ["7 of 8"]), (0, [])]
)
def test_phases_are_those_that_the_exported_step_has_seen(run: RunFolder, step: int, steps: list[str]) -> None:
    _, _, *rows = _phases(facts_of(run, step), step).splitlines()
    assert [row.split(" | ")[1] for row in rows] == steps


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ("https://host/set?X-Amz-Signature=abc&Expires=1", "https://host/set"),
        ("https://host/set#token", "https://host/set"),
        ("s3://me:hunter2@bucket/set", "s3://bucket/set"),
        ("s3://ME:hun/ter2@bucket/set", HIDDEN),
        ("simplecache::s3://me:hunter2@bucket/set?sig=x", "simplecache::s3://bucket/set"),
        ("zip://set.zip::/data/alice/all.zip", "zip://set.zip::all.zip"),
        ("filecache::file:///data/alice/set", "filecache::set"),
        ("/data/alice/weights.safetensors", "weights.safetensors"),
        ("~/weights/", "weights"),
        ("file:///data/alice/set", "set"),
        ("local:///data/alice/set", "set"),
        ("file:/data/alice/set", "set"),
        ("sftp://node/home/alice/set", "set"),
        ("networks:build=/home/alice/net.pth", "networks:build=net.pth"),
        ("weights of ~alice/runs/net.pth, rounded", "weights of net.pth, rounded"),
        ("AccountName=a;AccountKey=abc", HIDDEN),
        ({"url": "s3://bucket/a", "aws_secret_access_key": "abc"}, {"url": "s3://bucket/a", "aws_secret_access_key": HIDDEN}),
        ({"password": {"of": ["abc"]}, "hub_token": ""}, {"password": {"of": [HIDDEN]}, "hub_token": ""}),
        ("repo://data/assets/emoji_64", "repo://data/assets/emoji_64"),
        ("https://host/home/page", "https://host/home/page"),
        ("abfss://container@account.dfs.core.windows.net/set", "abfss://account.dfs.core.windows.net/set"),
        ("a red fox and/or a lighthouse", "a red fox and/or a lighthouse"),
        ({"max_tokens": 77, "sampler": "euler", "nothing": None}, {"max_tokens": 77, "sampler": "euler", "nothing": None}),
    ],
    ids=count(),
)  # fmt: skip
def test_nothing_private_is_told(tree: Any, told: Any) -> None:
    assert public(tree) == told
