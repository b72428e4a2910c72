"""What can be told from the command line and a run's config is told before torch is imported, which takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

from tests.stage1 import stage1
from tests.tiny import tiny
from trainer.config import CODE_ROOT
from trainer.config_text import to_yaml

ASK = """
import contextlib, io, json, sys
from launch.cli import cli
from launch.entry import run_command
for words in json.loads(sys.stdin.read()):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run_command(cli, words, prog_name="loupe")
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


def test_bad_words_are_refused_before_torch(tmp_path: Path) -> None:
    run, other, out = str(tmp_path / "run"), str(tmp_path / "stage1"), str(tmp_path / "out")
    for folder, config in ((run, tiny()), (other, stage1())):
        Path(folder).mkdir()
        (Path(folder) / "config.yaml").write_text(to_yaml(config))
    sample = ["sample", run, "--out", out]
    evaluate = ["evaluate", "run", run, "--reference", run, "--out", out]
    refused = {
        "no run there": ["sample", str(tmp_path / "none"), "--out", out, "--prompt", "dog"],
        "--sampler: 'magic' is none": [*sample, "--prompt", "dog", "--sampler", "magic"],
        "--size: 33 px is no multiple": [*sample, "--prompt", "dog", "--size", "33"],
        "--steps: 0 is not positive": [*sample, "--prompt", "dog", "--steps", "0"],
        "--prompt: nothing to draw": sample,
        "none.txt is not there; give a file of prompts": [*sample, "--prompts", str(tmp_path / "none.txt")],
        "--weights: 'best' is none of": [*sample, "--prompt", "dog", "--weights", "best"],
        "w.safetensors is not there": [*sample, "--prompt", "dog", "--weights", str(tmp_path / "w.safetensors")],
        "--weights: 'ema:wide'": [*sample, "--prompt", "dog", "--weights", "ema:wide"],
        "a run of autoencoder, which draws no pictures": ["sample", other, "--out", out, "--prompt", "dog"],
        "GENERATED: ": ["evaluate", "images", str(tmp_path / "none"), run, "--out", out],
        "REAL: ": ["evaluate", "images", run, str(tmp_path / "none"), "--out", out],
        "--reference: ": ["evaluate", "run", run, "--reference", str(tmp_path / "none"), "--out", out],
        "--sampler: 'wonder' is none": [*evaluate, "--sampler", "wonder"],
        "--count: goes without --prompts": [*evaluate, "--count", "5", "--prompts", "x"],
        "x.jsonl is not there": [*evaluate, "--prompts", str(tmp_path / "x.jsonl")],
        "--weights: 'worst' is none of": ["export", run, out, "--weights", "worst"],
        "--scale-of: is about an autoencoder's latents": ["export", run, out, "--scale-of", "x"],
        "of a run of autoencoder the average is exported": ["export", other, out, "--weights", "raw"],
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(list(refused.values())), cwd=CODE_ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (message, words), (code, said, imported) in zip(refused.items(), answers, strict=True):
        assert code == 2, words
        assert message in said, said
        assert not imported, words
    assert not Path(out).exists()
