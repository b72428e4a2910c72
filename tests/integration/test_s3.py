"""Runs and their checkpoints on S3: the real client against a real server of its protocol."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save as to_bytes

from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import SHORT, train
from tests.distributed.test_training import losses
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture
from tests.slurm_jobs import steps_in
from tests.tiny import tiny
from tests.unit.trainer.test_checkpoint_manager import assert_restores, manager, tensors, zeros
from trainer.checkpoint.errors import CheckpointError
from trainer.errors import ExitCode, UserError
from trainer.parallel.world import World
from trainer.run_folder import RunFolder
from trainer.safetensors_source import SafetensorsSource


def attempts(world: World, local: str, remote: str) -> list[dict[str, Any]]:
    return [
        train(world, tiny(*SHORT), local),
        train(world, tiny(*SHORT), remote, stop_after=6),
        train(world, tiny(*SHORT), remote),
    ]


def test_a_run_on_s3_is_stopped_and_resumes_bit_equal(s3: str, tmp_path: Path) -> None:
    remote = f"{s3}/runs/one"
    for undisturbed, stopped, resumed in run_ranks(2, attempts, str(tmp_path / "run"), remote):
        assert undisturbed["code"] == resumed["code"] == ExitCode.DONE
        assert (stopped["code"], stopped["step"]) == (ExitCode.REQUEUE, 6)
    assert len(losses(remote)) == 12
    assert losses(remote) == losses(str(tmp_path / "run"))
    m = manager(f"{remote}/checkpoints", config_digest=None)
    assert [info.step for info in m.list()] == [6, 8, 12]
    for info in m.list():
        m.verify(info.path)
    folder = RunFolder(remote)
    assert folder.names("attempts") == ["0000.json", "0001.json"]
    assert folder.read_json("summary.json")["images_seen"] == 96
    first = steps_in(folder.read_text("metrics/0000.jsonl").splitlines())
    second = steps_in(folder.read_text("metrics/0001.jsonl").splitlines())
    assert (first, second) == ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12])  # no step was done twice


def shard_of(path: str) -> str:
    return f"{path}/shard-00000.safetensors"


def test_truncated_and_corrupt_objects_are_set_aside(s3: str) -> None:
    m = manager(f"{s3}/damage", keep_last=3)
    paths = []
    for step in (1, 2, 3):
        m.begin_save(tensors(step), step=step, images_seen=step, state={"step": step})  # from a thread of its own
        m.finish()
        saved = m.poll()
        assert saved is not None
        paths.append(saved.path)
    assert_restores(m, 3)
    fs = fsspec.filesystem("s3")
    fs.pipe_file(shard_of(paths[2]), fs.cat_file(shard_of(paths[2]))[:-1])
    damaged = bytearray(fs.cat_file(shard_of(paths[1])))
    damaged[-8] ^= 0x20
    fs.pipe_file(shard_of(paths[1]), bytes(damaged))
    told: list[str] = []
    assert_restores(m, 1, on_set_aside=lambda path, reason: told.append(reason))
    assert "bytes" in told[0]
    assert "were written" in told[0]
    assert "checksum does not match" in told[1]
    assert [info.path for info in m.list()] == paths[:1]
    assert json.loads(fs.cat_file(f"{paths[1]}/SET-ASIDE.json"))["reason"] == told[1]


def test_retention_and_holds(s3: str) -> None:
    m = manager(f"{s3}/retention")
    first = m.save(tensors(1), step=1, images_seen=1, state={"step": 1})
    m.hold(first, "export-1")
    for step in (2, 3, 4):
        m.save(tensors(step), step=step, images_seen=1, state={"step": step})
    assert [info.step for info in m.list()] == [1, 3, 4]
    m.release(first, "export-1")
    m.save(tensors(5), step=5, images_seen=1, state={"step": 5})
    assert [info.step for info in m.list()] == [4, 5]
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    assert len(fs.ls(f"{s3}/retention")) == 2
    assert m.restore(zeros()) is not None


def test_a_failed_upload_leaves_no_object(s3: str) -> None:
    folder = manager(f"{s3}/uploads").folder

    def fail() -> None:
        with folder.create("c/a") as file:
            for _ in range(8):  # 64 MiB: the upload has begun when it fails
                file.write(bytes(8 << 20))
            raise RuntimeError("tensor gone")

    with pytest.raises(CheckpointError, match="tensor gone"):
        fail()
    assert folder.sizes("c") == {}
    folder.write("c/a", b"whole")
    assert folder.sizes("c") == {"a": 5}


def test_a_mistyped_bucket_is_not_made(s3: str) -> None:
    url = "s3://no-such-bucket-of-ours/x"
    with pytest.raises(UserError, match=f"^{url}: the run folder cannot be written") as e:
        RunFolder(url).claim(tiny())
    assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match=f"^{url}/c/step-00000001-.*: cannot be written"):
        manager(f"{url}/c").save(tensors(1), step=1, images_seen=1, state={})
    assert not fsspec.filesystem("s3").exists("s3://no-such-bucket-of-ours")


def restores_here(url: str, out: "multiprocessing.Queue[int]") -> None:
    restored = manager(url).restore(zeros())
    assert restored is not None
    out.put(restored.step)


def test_a_child_process_reads_where_its_parent_has_written(s3: str) -> None:
    m = manager(f"{s3}/children")
    m.save(tensors(1), step=1, images_seen=1, state={"step": 1})
    context: Any = multiprocessing.get_context("spawn")  # as all our processes are started, none by fork
    out = context.Queue()
    child = context.Process(target=restores_here, args=(m.folder.url, out))
    child.start()
    try:
        assert out.get(timeout=300) == 1
    finally:
        child.join(10)
        child.kill()


def test_weights_in_safetensors(s3: str) -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    fsspec.filesystem("s3").pipe_file(f"{s3}/weights/x.safetensors", to_bytes(weights))
    read = SafetensorsSource(f"{s3}/weights/x.safetensors").read()
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
