"""Bad input to a job: exit code 93, one line that names what and the mend, and nothing written that looks like a result."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import TrainerProcess
from tests.text_models import write_clip
from tests.tiny import tiny
from trainer.config_text import to_yaml
from trainer.errors import ExitCode

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "data" / "assets" / "emoji_64"


def job(folder: Path, *overrides: str, files: Path | None = None) -> tuple[int, str]:
    """Exit code and output of one rank alone. `files`: where its config and its log go, beside the run unless said."""
    files = files or folder.parent
    config, log = files / "config.yaml", files / "rank.log"
    config.write_text(to_yaml(tiny("data.num_workers=0", "phases.low_resolution.steps=1", *overrides)))
    log.write_text("")
    arguments = ["--config", str(config), "--run-dir", str(folder)]
    rank = TrainerProcess(arguments, log, environment={**os.environ, "OMP_NUM_THREADS": "1"}, folder=str(ROOT))
    try:
        return rank.wait(timeout=300), log.read_text()
    finally:
        rank.kill()


def refused(folder: Path, *overrides: str) -> str:
    code, output = job(folder, *overrides)
    assert code == ExitCode.STOP, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in output
    assert not (folder / "summary.json").exists()
    assert not list(folder.glob("checkpoints/*/COMMIT"))
    return errors[0]


def copy_of_the_dataset(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET, tmp_path / "dataset"))


def test_missing_dataset(tmp_path) -> None:
    error = refused(tmp_path / "run", f"data.datasets.emoji.url={tmp_path}/nowhere")
    assert "nowhere" in error
    assert "loupe data build" in error


def test_shard_with_a_wrong_hash(tmp_path) -> None:
    dataset = copy_of_the_dataset(tmp_path)
    shard = dataset / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    error = refused(tmp_path / "run", f"data.datasets.emoji.url={dataset}")
    assert "shard.00000.mds" in error
    assert "hash" in error


def submission_refused(*arguments: str) -> str:
    """The one line that `launch/slurm.py demo` says before any job exists."""
    done = subprocess.run(
        [sys.executable, "launch/slurm.py", "demo", "--cluster", "local", "--cpu", *arguments],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_resolution_that_patches_do_not_divide(tmp_path) -> None:
    where = ("--run-dir", str(tmp_path / "run"))
    error = submission_refused(*where, "--set", "phases.full_resolution.resolution=60")
    assert "phases.1.resolution: 60 px is no multiple of 8" in error
    error = submission_refused(*where, "--set", "phases.0.resolution=40", "--set", "task.model.patch_size=2")
    assert "40 px is no multiple of 16: the codec's downsampling of 8 times task.model.patch_size 2" in error
    assert not (tmp_path / "run").exists()


def test_codec_with_other_channels_than_declared(tmp_path) -> None:
    error = refused(tmp_path / "run", "task.codec.latent_channels=16")
    assert "task.codec.latent_channels: 16, but the autoencoder at" in error
    assert "has 4" in error


def test_encoder_of_another_width_than_declared(tmp_path) -> None:
    encoder = write_clip(tmp_path / "clip", width=32).model_copy(update={"width": 48})
    error = refused(tmp_path / "run", f"task.text={{kind: frozen, encoders: [{encoder.model_dump_json()}]}}")
    assert "task.text.encoders.0.width: 48, but the encoder at" in error
    assert "has 32" in error


def test_a_run_of_another_layout(tmp_path) -> None:
    folder = tmp_path / "run"
    code, output = job(folder, "phases.full_resolution.steps=1", "phases.perceptual.steps=1")
    assert code == ExitCode.DONE, output
    (folder / "summary.json").unlink()
    error = refused_layout(folder, "task.model.layout=shared")
    assert "task.model.layout" in error
    assert "sd3" in error
    assert "shared" in error


def refused_layout(folder: Path, *overrides: str) -> str:
    code, output = job(folder, "phases.full_resolution.steps=1", "phases.perceptual.steps=1", *overrides)
    assert code == ExitCode.STOP
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    return error


def test_missing_codec(tmp_path) -> None:
    assert f"{tmp_path}/codec" in refused(tmp_path / "run", f"task.codec.url={tmp_path}/codec")


def test_checkpoint_of_other_data_and_a_damaged_one(tmp_path) -> None:
    dataset, folder = copy_of_the_dataset(tmp_path), tmp_path / "run"
    steps = ("phases.full_resolution.steps=1", "phases.perceptual.steps=2", "checkpoint.every_steps=2")
    here = f"data.datasets.emoji.url={dataset}"
    code, output = job(folder, *steps, here)
    assert code == ExitCode.DONE, output
    (folder / "summary.json").unlink()

    # bit rot in every checkpoint must not look like a fresh start
    kept = {path: path.read_bytes() for path in folder.glob("checkpoints/*/*.safetensors")}
    assert len(kept) == 2
    for path, data in kept.items():
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    code, output = job(folder, *steps, here)
    assert code == ExitCode.STOP
    assert "checkpoints are damaged and set aside" in output
    for path, data in kept.items():
        path.write_bytes(data)
        (path.parent / "SET-ASIDE.json").unlink()

    # other data at the same place: the stream would not be the one that the checkpoint stands in
    index = dataset / "index.json"
    index.write_text(index.read_text() + " ")
    text = (dataset / "dataset.json").read_text()
    from data.schema import DatasetInfo, index_digest

    info = DatasetInfo.model_validate_json(text).model_copy(update={"index_digest": index_digest(index.read_bytes())})
    (dataset / "dataset.json").write_text(info.model_dump_json())
    code, output = job(folder, *steps, here)
    assert code == ExitCode.STOP
    assert "emoji is" in output
    assert " there, emoji is " in output


def test_unwritable_run_folder_at_submission() -> None:
    done = subprocess.run(
        [sys.executable, "launch/slurm.py", "demo", "--cluster", "local", "--cpu", "--run-dir", "/proc/loupe"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.USAGE
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["/proc/loupe", "file"])
def test_unwritable_run_folder(where, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    target = Path(where) if where.startswith("/") else tmp_path / "file" / "run"
    code, output = job(target, files=tmp_path)
    assert code == ExitCode.STOP
    assert "cannot be written" in output
