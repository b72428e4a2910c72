"""`loupe sample`: a folder of pictures that can be continued, shared and not mixed, and the command's words."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from launch.cli import cli
from launch.entry import run_command
from tests.sampling_runs import PROMPTS, SAMPLES, files, options, run_of, save, weights_of
from tests.stage1 import stage1
from tests.tiny import tiny
from tests.unit.trainer.test_posthoc_ema import writer
from trainer.config import CODE_ROOT, EMAConfig
from trainer.config_text import to_yaml
from trainer.ema import EMA
from trainer.errors import ExitCode, UserError
from trainer.parallel.world import World
from trainer.sampling.drawing import lots_to_draw
from trainer.sampling.job import run
from trainer.sampling.options import Part
from trainer.tasks.latent_diffusion import TextToImage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("captions") / "run", "task.text.max_bytes=12")


def drawn(asked: Any) -> list[str]:
    """What it said, of a run that ended well."""
    said: list[str] = []
    assert run(asked, CPU, say=said.append) is ExitCode.DONE
    return said


def test_what_a_folder_has(captions: Path, tmp_path: Path) -> None:
    said = drawn(options(captions, tmp_path / "out", grid=str(tmp_path / "grid.png"), guidance_interval=(0.4, 1.0)))
    about = json.loads((tmp_path / "out/samples.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [(row["position"], row["prompt"], row["truncated"]) for row in rows] == [
        (i, prompt, False) for i, prompt in enumerate(PROMPTS)
    ]
    assert {row["file"] for row in rows} == {f"images/{name}" for name in files(tmp_path / "out")}
    assert about["complete"] is True
    assert about["cost"] == {"nfe": 2, "network_passes": 4}
    assert "NFE 2, 4 network passes a picture" in "\n".join(said)
    assert about["identity"]["settings"] == {
        "sampler": "euler", "steps": 2, "guidance": 2.0, "guidance_interval": [0.4, 1.0], "guidance_rescale": 0.0, "seed": 0,
        "resolution": 32, "width": None,
    }  # fmt: skip
    assert (about["identity"]["step"], about["identity"]["weights"], about["drawn"]) == (7, "ema", 6)
    assert about["versions"]["torch"] == torch.__version__
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (3 * 168 + 8, 2 * 202 + 8)


def test_batch_sizes_parts_and_memory_give_the_same_bytes(captions: Path, tmp_path: Path) -> None:
    drawn(options(captions, tmp_path / "whole"))
    drawn(options(captions, tmp_path / "batches", batch_size=1))
    for index in (1, 0):
        said = drawn(options(captions, tmp_path / "parts", part=Part(index, 2)))
        assert ("6 pictures, samples.json" in said[-1]) == (index == 0), "the last part completes the folder"
    drawn(options(captions, None, grid=str(tmp_path / "memory.png")))
    drawn(options(captions, tmp_path / "whole", grid=str(tmp_path / "folder.png")))
    expected = files(tmp_path / "whole")
    assert len(expected) == 6
    assert files(tmp_path / "batches") == files(tmp_path / "parts") == expected
    assert (tmp_path / "memory.png").read_bytes() == (tmp_path / "folder.png").read_bytes()
    assert lots_to_draw([0, 5, 6, 8, 9], 4, Part(1, 2)) == [[5, 6]]


def test_parts_add_up(captions: Path, tmp_path: Path) -> None:
    """Three lots of two; the second part is stopped after one of its own, and goes on later."""
    out = tmp_path / "out"
    asked = {i: options(captions, out, lot=2, batch_size=2, part=Part(i, 2)) for i in range(2)}

    def about() -> Any:
        return json.loads((out / "samples.json").read_text())

    looks = iter([False, True])
    assert run(asked[0], CPU, stop=lambda: next(looks), say=lambda line: None) is ExitCode.REQUEUE
    assert (about()["drawn"], about()["complete"]) == (2, False)
    drawn(asked[1])
    assert "would draw 2 of 6 pictures" in drawn(replace(asked[0], dry_run=True))[-1], "of its own"
    with pytest.raises(UserError, match="holds pictures that were drawn otherwise"):
        drawn(replace(asked[0], guidance=3.0, dry_run=True))
    anew = replace(asked[0], guidance=3.0, part=Part(), dry_run=True, overwrite=True)
    assert "would draw 6 of 6 pictures" in drawn(anew)[-1]
    drawn(asked[0])
    told = about()
    assert (told["drawn"], told["complete"]) == (6, True)
    assert {name: part["drawn"] for name, part in told["parts"].items()} == {"0-of-2": 4, "1-of-2": 2}
    assert told["seconds"] == pytest.approx(sum(part["seconds"] for part in told["parts"].values()), abs=1e-3)


def test_the_same_command_goes_on_where_it_ended(captions: Path, tmp_path: Path) -> None:
    drawn(options(captions, tmp_path / "whole"))
    out = tmp_path / "out"
    asked, looks = options(captions, out), iter([False, True])
    said: list[str] = []
    assert run(asked, CPU, stop=lambda: next(looks), say=said.append) is ExitCode.REQUEUE
    assert said[-1] == "stopped by a signal; the same command goes on"
    assert len(files(out)) == 4
    assert json.loads((out / "samples.json").read_text())["complete"] is False
    assert not (out / "samples.jsonl").exists()
    (out / "images/00000001.png").unlink()
    written = {p.name: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    assert "3 of 6 pictures are there" in drawn(asked)
    assert files(out) == files(tmp_path / "whole")
    assert all((out / "images" / name).stat().st_mtime_ns == time for name, time in written.items())
    about = json.loads((out / "samples.json").read_text())
    assert (about["complete"], about["drawn"]) == (True, 7)
    assert "drew 0 pictures" in "\n".join(drawn(asked))


def test_pictures_of_other_settings_are_not_mixed(captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    drawn(options(captions, out))
    (out / "mine.txt").write_text("kept")
    before = files(out)
    refused: dict[str, dict[str, Any]] = {
        "settings.seed: 0 there, 1 here": {"seed": 1},
        "prompts.count: 6 there, 1 here; prompts.sha256": {"prompts": ("dog",)},
        "weights: ema there, raw here": {"weights": "raw"},
        "lot: 4 there, 2 here": {"lot": 2},
    }
    for message, changes in refused.items():
        with pytest.raises(UserError, match="drawn otherwise") as e:
            drawn(options(captions, out, **changes))
        assert message in str(e.value)
    assert files(out) == before
    drawn(options(captions, out, prompts=("dog",), overwrite=True))
    assert set(files(out)) == {"00000000.png"}, "what is not drawn anew is gone"
    assert (out / "mine.txt").read_text() == "kept"
    (out / "samples.json").unlink()
    with pytest.raises(UserError, match=r"has pictures and no samples\.json"):
        drawn(options(captions, out, prompts=("dog",)))
    for damaged in ("{", "[]", '{"format": 9}'):
        (out / "samples.json").write_text(damaged)
        with pytest.raises(UserError, match=r"samples\.json: not"):
            drawn(options(captions, out, prompts=("dog",)))


def test_a_folder_stays_with_the_checkpoint_that_it_began_with(tmp_path: Path) -> None:
    """The run goes on meanwhile, and the same command must not mix two checkpoints."""
    source = run_of(tmp_path / "run")
    drawn(options(source, tmp_path / "before"))
    [first] = (tmp_path / "run/checkpoints").glob("step-*")
    asked, looks = options(source, tmp_path / "out"), iter([False, True])
    run(asked, CPU, stop=lambda: next(looks), say=lambda line: None)
    save(source, tiny("samples={sampler: euler}"), step=9)
    said = drawn(asked)
    assert said[0].startswith(f"{first}: step 7")
    assert files(tmp_path / "out") == files(tmp_path / "before")
    assert drawn(options(source, tmp_path / "new"))[0].split(": ")[1].startswith("step 9")
    [second] = (tmp_path / "run/checkpoints").glob("step-00000009-*")
    with pytest.raises(UserError, match=r"checkpoint: step-00000007-\w+ there, step-00000009"):
        drawn(options(second, tmp_path / "out"))


def test_what_cannot_be_written_is_told(captions: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"out": str(tmp_path / "file")}, "--out: .*file/images cannot be read .*; give another"),
        ({"out": "s3://bucket/x"}, "--out: s3://bucket/x is no local folder"),
        ({"out": None, "grid": str(tmp_path / "file/grid.png")}, "--grid: .* cannot be written"),
        ({"out": None}, "--out: nowhere to draw to"),
        ({"grid": "grid.jpg"}, "--grid: grid.jpg is no .png file"),
        ({"out": None, "grid": "g.png", "part": Part(0, 2)}, "--part: needs a folder"),
        ({"overwrite": True, "part": Part(0, 2)}, "--overwrite: goes without --part"),
        ({"out": None, "grid": "g.png", "per_prompt": 50}, "--out: 300 pictures need a folder"),
    )
    for changes, message in refused:
        with pytest.raises(UserError, match=message):
            drawn(options(captions, **{"out": str(tmp_path / "out"), **changes}))


def test_the_command(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def loupe(*words: str) -> tuple[int, str, str]:
        code = run_command(cli, ["sample", *words], prog_name="loupe")
        out = capsys.readouterr()
        return code, out.out, out.err

    handlers = signal.getsignal(signal.SIGTERM)
    words = ("--prompt", "a very long prompt", "--size", "32x64", "--grid", str(tmp_path / "g.png"))
    code, out, _ = loupe(str(captions), *words, "--dry-run")
    assert code == 0
    assert "1 picture of 32 x 64 px: euler, 3 steps, guidance 2, seed 0" in out, "as the run's own sample grids"
    assert "WARNING: 1 prompt is longer than the text encoder takes" in out
    assert "would draw 1 of 1 picture" in out
    assert not (tmp_path / "g.png").exists()
    code, _, _ = loupe("run", "--root", str(captions.parent), *words, "--sampler", "dpm-solver", "--steps", "2")
    assert code == 0
    assert Image.open(tmp_path / "g.png").size == (176, 210)
    assert signal.getsignal(signal.SIGTERM) == handlers
    for wrong, message in {
        ("--size", "32x"): "--size: '32x' is no size",
        ("--size", "0x64"): "--size: '0x64' is no size",
        ("--part", "4/4"): "--part: '4/4'; give the part's number",
        ("--part", "array"): "--part array: this is no job of a SLURM array",
        ("--device", "cuda:9"): "--device: cuda:9 is not there",
        ("--sampler", "magic"): "--sampler: 'magic' is none",
    }.items():
        code, _, err = loupe(str(captions), "--prompt", "dog", "--grid", str(tmp_path / "g.png"), *wrong)
        assert code == ExitCode.USAGE
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    (tmp_path / "classes.json").write_text("[1, 2]")
    for more, message in (
        (
            ("--prompt", "dog", "--prompts", str(tmp_path / "classes.json")),
            "--prompts: class 1 for a model that takes captions",
        ),
        (("--classes", "3"), "--classes: class 3 for a model that takes captions"),
    ):
        code, _, err = loupe(str(captions), *more, "--per-prompt", "2", "--grid", str(tmp_path / "g.png"))
        assert code == ExitCode.USAGE
        assert message in err
    code, _, err = loupe(str(tmp_path), "--prompt", "dog", "--grid", "g.png")
    assert code == ExitCode.USAGE
    assert "no run there" in err


def test_a_run_of_another_task_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(stage1()))
    with pytest.raises(UserError, match="a run of autoencoder, which draws no pictures"):
        drawn(options(tmp_path, tmp_path / "out"))


@pytest.mark.slow
def test_sigterm_ends_with_75_and_a_kill_loses_nothing_that_was_written(captions: Path, tmp_path: Path) -> None:
    """A real process: killed after its first pictures, then asked to stop, then left to end."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = [sys.executable, "-m", "launch.cli", "sample", str(captions), "--prompt", "dog", "--per-prompt", "24", "--out",
             str(out), "--size", "32", "--steps", "40", "--lot", "2", "--batch-size", "2"]  # fmt: skip

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words, cwd=CODE_ROOT, stdout=log.open("ab"), stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )  # fmt: skip

    def wait_for(process: subprocess.Popen[bytes], count: int) -> None:
        deadline = time.monotonic() + 120
        while not (out / "images").is_dir() or len(files(out)) < count:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    process = start()
    wait_for(process, 2)
    process.kill()
    process.wait()
    killed = files(out)
    assert 2 <= len(killed) < 24
    assert all(Image.open(out / "images" / name).size == (32, 32) for name in killed), "whole"
    process = start()
    wait_for(process, len(killed) + 1)
    process.terminate()
    assert process.wait(60) == ExitCode.REQUEUE, log.read_text()
    stopped = files(out)
    assert len(stopped) < 24
    assert stopped.items() >= killed.items()
    process = start()
    assert process.wait(120) == 0, log.read_text()
    assert files(out).items() >= stopped.items()
    assert len(files(out)) == 24
    assert len({data for data in files(out).values()}) == 24
    assert json.loads((out / "samples.json").read_text())["complete"] is True


def test_another_file_in_the_place_of_the_weights_is_seen(captions: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_file(weights_of(tiny("task.text.max_bytes=12"), 1), weights)
    drawn(options(captions, out, weights=str(weights)))
    (out / "images/00000001.png").unlink()
    before = files(out)
    save_file(weights_of(tiny("task.text.max_bytes=12"), 2), weights)
    with pytest.raises(UserError, match=r"drawn otherwise \(weights_sha256: "):
        drawn(options(captions, out, weights=str(weights)))
    assert files(out) == before


def test_a_folder_of_a_width_stays_with_its_snapshot(tmp_path: Path, alone: World) -> None:
    source = run_of(tmp_path / "run")
    config, module = EMAConfig(profiles=(0.05, 0.1), snapshot_steps=4), TextToImage(tiny(SAMPLES).task)  # type: ignore[arg-type]
    module.init_weights()
    ema = EMA(module, profiles=config.profiles)
    snapshots = writer(source, alone, ema, module, config, total=24)
    asked = options(source, tmp_path / "out", weights="ema:0.08")
    for done in range(1, 25):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ema.update(0.9, torch.tensor(0.0), done)
        if snapshots.due(done):
            snapshots.save(done, done)
            snapshots.finish()
        if done == 16:
            drawn(asked)
            before = files(tmp_path / "out")
            assert json.loads((tmp_path / "out/samples.json").read_text())["identity"]["weights"] == "ema:0.08@16"
            (tmp_path / "out/images/00000001.png").unlink()
    drawn(asked)
    assert files(tmp_path / "out") == before, "with the snapshot that it began with"
    drawn(replace(asked, out=str(tmp_path / "newest")))
    assert files(tmp_path / "newest") != before
