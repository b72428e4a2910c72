"""Exports and `loupe checkpoint` on S3: the real client against a real server of its protocol."""

import json
from pathlib import Path

import click.testing
import fsspec
import pytest
import safetensors.torch
import torch

from launch.commands.checkpoint import checkpoint
from launch.commands.export import export
from tests.export_runs import module_of, run_of, small
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from trainer.checkpoint.manager import CheckpointManager
from trainer.config_text import to_yaml
from trainer.errors import UserError
from trainer.export.run import push_export
from trainer.export.target import LAST, RECORD
from trainer.export.weights_file import export_weights


def bytes_at(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def test_weights_straight_to_a_bucket_and_by_push(s3: str, tmp_path: Path) -> None:
    run, out = str(run_of(tmp_path / "run", small())), f"{s3}/models/direct"
    export_weights(run, out)
    found = bytes_at(out)
    assert found.keys() == {"config.yaml", "export.json", "model.safetensors"}
    state, expected = safetensors.torch.load(found["model.safetensors"]), module_of(small(), 2).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert json.loads(found["export.json"])["files"]["model.safetensors"]["bytes"] == len(found["model.safetensors"])

    arguments = [run, str(tmp_path / "out"), "--format", "safetensors", "--weights", "raw", "--push", out]
    result = click.testing.CliRunner().invoke(export, arguments, catch_exceptions=False)
    assert f"copied to {out}" in result.output
    assert (
        bytes_at(out)["model.safetensors"]
        == (tmp_path / "out" / "model.safetensors").read_bytes()
        != found["model.safetensors"]
    )
    fsspec.core.url_to_fs(out)[0].pipe_file(f"{out.removeprefix('s3://')}/mine.txt", b"x")
    with pytest.raises(UserError, match=r"holds mine\.txt, which no export writes"):
        export_weights(run, out)
    with pytest.raises(UserError, match=r"s3://no-such-bucket-here/x: cannot be written"):
        push_export(str(tmp_path / "out"), "s3://no-such-bucket-here/x")


def test_an_upload_that_breaks_off_is_no_export_and_is_made_good(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = str(run_of(tmp_path / "run", small())), f"{s3}/models/broken"
    export_weights(run, str(tmp_path / "out"))
    push_export(str(tmp_path / "out"), out)
    fs, _ = fsspec.core.url_to_fs(out)
    put = fs.put_file

    def broken(local: str, remote: str, **options: object) -> None:
        if remote.endswith("config.yaml"):
            raise OSError("connection lost")
        put(local, remote, **options)

    monkeypatch.setattr(fs, "put_file", broken)
    with pytest.raises(UserError, match=r"cannot be written .*connection lost"):
        push_export(str(tmp_path / "out"), out)
    assert not set(LAST) & bytes_at(out).keys(), "what readers begin with went first"
    assert RECORD in bytes_at(out)
    monkeypatch.undo()
    push_export(str(tmp_path / "out"), out)
    assert set(bytes_at(out)) == {"config.yaml", "export.json", "model.safetensors"}


def test_checkpoints_of_a_run_on_s3(s3: str, tmp_path: Path) -> None:
    url = f"{s3}/runs/one"
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/config.yaml", to_yaml(small()).encode())
    manager = CheckpointManager(f"{url}/checkpoints", keep_last=9, config_digest="d", code_version="v")
    for step in (1, 2):
        tensors = {f"model.{name}": tensor for name, tensor in module_of(small(), step).state_dict().items()}
        manager.save(tensors, step=step, images_seen=step, state={})

    def ask(*arguments: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(checkpoint, list(arguments), catch_exceptions=False)

    rows = json.loads(ask("ls", url, "--json").output)
    assert [(row["step"], row["problem"]) for row in rows] == [(1, ""), (2, "")]
    assert rows[0]["time"] is not None
    assert ask("verify", url).exit_code == 0
    assert ask("convert", url, str(tmp_path / "x.safetensors"), "--weights", "raw").exit_code == 0
    state = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in module_of(small(), 2).state_dict().items())
    shard = f"{root}/checkpoints/{rows[0]['name']}/shard-00000.safetensors"
    damaged = bytearray(fs.cat_file(shard))
    damaged[-1] ^= 1
    fs.pipe_file(shard, bytes(damaged))
    assert ask("verify", url).exit_code == 1
    assert ask("diff", f"{url}/checkpoints/{rows[1]['name']}", url).exit_code == 0
    assert ask("rm", url, "--step", "1", "--yes").exit_code == 0
    assert [row["step"] for row in json.loads(ask("ls", url, "--json").output)] == [2]
