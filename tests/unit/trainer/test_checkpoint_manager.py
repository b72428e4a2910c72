"""What one process can show: choice, set-aside, refusal, retention, crashes. Ranks: tests/distributed."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.distributed.harness import RankError, run_ranks
from tests.tiny import tiny
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import commit_for
from trainer.config import differences, explain_digests, run_digest
from trainer.errors import UserError
from trainer.parallel.world import World
from trainer.run_folder import RunFolder

Tensors = dict[str, torch.Tensor]


def manager(url: Path | str, **changes: Any) -> CheckpointManager:
    return CheckpointManager(str(url), **{"keep_last": 2, "config_digest": "d1", "code_version": "v1", **changes})


def tensors(step: int) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(64, 33, generator=generator)
    return {
        "model.q.weight": weight,
        "model.q.bias": weight[0].bfloat16(),
        "optim.state.q.weight.step": torch.tensor(float(step)),
        "ema.transposed": weight.T,
        "seen": torch.tensor([step, 2**62], dtype=torch.int64),
        "mask": weight[:, 0] > 0,
        "empty": torch.zeros(0, 3),
    }


def zeros() -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}


def save(m: CheckpointManager, step: int) -> Path:
    return Path(m.save(tensors(step), step=step, images_seen=step * 4, state={"step": step}))


def assert_restores(m: CheckpointManager, step: int, **arguments: Any) -> None:
    into = zeros()
    restored = m.restore(into, **arguments)
    assert restored is not None
    assert restored.step == step
    assert restored.state == {"step": step}
    for name, tensor in tensors(step).items():
        assert torch.equal(into[name], tensor), name


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("scheme", ["path", "file", "memory"])
def test_what_was_saved_comes_back(scheme: str, tmp_path: Path) -> None:
    url = {"path": str(tmp_path / "c"), "file": f"file://{tmp_path}/c", "memory": f"memory://{tmp_path.name}/c"}[scheme]
    m = manager(url)
    state = {"images": 12, "loss": 0.1 + 0.2, "names": ["ä", None], "nested": {"a": [True]}, "big": 2**70}
    path = m.save(tensors(3), step=3, images_seen=12, state=state)
    into = zeros()
    restored = m.restore(into)
    assert restored is not None
    assert (restored.path, restored.step, restored.state) == (path, 3, state)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(3).items())
    assert [(info.path, info.step) for info in m.list()] == [(path, 3)]
    m.verify(path)


def test_parameters_are_loaded_in_place(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    m = manager(tmp_path)
    m.save(dict(layer.named_parameters()), step=1, images_seen=1, state={})
    saved, place = layer.weight.detach().clone(), layer.weight.data_ptr()
    torch.nn.init.zeros_(layer.weight)
    m.restore(dict(layer.named_parameters()))
    assert torch.equal(layer.weight, saved)
    assert layer.weight.data_ptr() == place
    assert layer.weight.requires_grad


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert manager(tmp_path / "absent").restore(zeros()) is None
    assert manager(tmp_path / "absent").list() == []


def test_manifest_says_what_it_is(tmp_path: Path) -> None:
    path = save(manager(tmp_path), 7)
    assert path.name.startswith("step-00000007-")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["images_seen"] == 28
    assert manifest["world_size"] == 1
    assert manifest["config_digest"] == "d1"
    assert manifest["code_version"] == "v1"
    assert {o["path"]: o["bytes"] for o in manifest["objects"]} == {
        name: (path / name).stat().st_size for name in ("shard-00000.safetensors", "index.json")
    }


def test_one_step_saved_twice_overwrites_nothing(tmp_path: Path) -> None:
    m = manager(tmp_path)
    first = save(m, 5)
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    assert save(m, 5) != first
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before


# --------------------------------------------------------------------------------------------------------------- damage


def flip(name: str, at: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x10
        (path / name).write_bytes(data)

    return damage


def truncate(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


SHARD = "shard-00000.safetensors"


def empty(path: Path) -> None:
    (path / "COMMIT").write_bytes(b"")


def other_json(path: Path) -> None:
    (path / "COMMIT").write_bytes(b"[1]")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bit in a shard": flip(SHARD, 0.5),
    "last byte of a shard": flip(SHARD, 1.0),
    "shard truncated": truncate(SHARD),
    "shard deleted": lambda path: (path / SHARD).unlink(),
    "bit in the index": flip("index.json", 0.5),
    "index truncated": truncate("index.json"),
    "index deleted": lambda path: (path / "index.json").unlink(),
    "bit in the manifest": flip("manifest.json", 0.5),
    "manifest truncated": truncate("manifest.json"),
    "manifest deleted": lambda path: (path / "manifest.json").unlink(),
    "COMMIT emptied": empty,
    "COMMIT not an object": other_json,
    **{f"bit in COMMIT at {i}": flip("COMMIT", i / 10) for i in range(10)},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_is_set_aside_for_the_one_before(damage: Callable[[Path], None], tmp_path: Path) -> None:
    m = manager(tmp_path)
    save(m, 1)
    bad = save(m, 2)
    damage(bad)
    told: list[tuple[str, str]] = []
    assert_restores(m, 1, on_set_aside=lambda path, reason: told.append((path, reason)))
    [(path, reason)] = told
    assert path == str(bad)
    assert str(bad) in reason
    assert "\n" not in reason
    assert json.loads((bad / "SET-ASIDE.json").read_text())["reason"] == reason
    assert [info.step for info in m.list()] == [1]
    assert_restores(m, 1, on_set_aside=lambda path, reason: pytest.fail("told twice"))


def test_verify_reads_what_restore_does_not(tmp_path: Path) -> None:
    m = manager(tmp_path)
    path = save(m, 1)
    flip(SHARD, 0.005)(path)  # in the header, which no reader of ours uses
    assert_restores(m, 1)
    with pytest.raises(CorruptCheckpoint, match=r"shard-00000\.safetensors: its checksum"):
        m.verify(str(path))


def test_all_damaged_is_not_a_fresh_start(tmp_path: Path) -> None:
    m = manager(tmp_path)
    for step in (1, 2):
        flip(SHARD, 0.5)(save(m, step))
    for _ in range(2):
        with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
            m.restore(zeros())


def test_directory_without_commit_is_ignored(tmp_path: Path) -> None:
    m = manager(tmp_path)
    save(m, 1)
    (save(m, 2) / "COMMIT").unlink()
    (tmp_path / "step-00000003-0123abcd").mkdir()
    (tmp_path / "notes").mkdir()
    assert_restores(m, 1, on_set_aside=lambda path, reason: pytest.fail(reason))


def test_paths_in_the_manifest_stay_within_the_checkpoint(tmp_path: Path) -> None:
    m = manager(tmp_path)
    save(m, 1)
    path = save(m, 2)
    text = (path / "manifest.json").read_text().replace("shard-00000", "../shard-00000").encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMMIT").write_bytes(commit_for(text))
    reasons: list[str] = []
    assert_restores(m, 1, on_set_aside=lambda path, reason: reasons.append(reason))
    assert "objects.0.path" in reasons[0]


# -------------------------------------------------------------------------------------------------------------- refusal


def refused(m: CheckpointManager, into: Tensors, path: Path) -> str:
    with pytest.raises(UserError) as e:
        m.restore(into)
    assert not (path / "SET-ASIDE.json").exists()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_another_config_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = save(manager(tmp_path), 1)
    message = refused(manager(tmp_path, config_digest="d2"), zeros(), path)
    assert "d1" in message
    assert "d2" in message


def test_another_config_is_named_in_words_where_they_are_known(tmp_path: Path) -> None:
    config, data = tiny(), {"emoji": "d1"}
    path = save(manager(tmp_path, config_digest=run_digest(config, data)), 1)
    for here, words in (
        (run_digest(config, {"emoji": "d2"}), f"{path}: trained on other data: emoji is d1 there, emoji is d2 here"),
        (run_digest(tiny("seed=3"), data), f"{path}: written by a run of another config, whose numbers differ"),
    ):
        other = manager(tmp_path, config_digest=here, explain=partial(explain_digests, here=here))
        message = refused(other, zeros(), path)
        assert message.startswith(words)
        assert message.endswith("continue with that run's config, or take another run folder")


def test_fields_that_differ_are_named(tmp_path: Path) -> None:
    there = tiny()
    assert differences(there, tiny("checkpoint.every_steps=7", "metrics.every_steps=3", "data.num_workers=0")) == []
    assert differences(there, tiny("phases.low_resolution.steps=9", "optim.betas=[0.9, 0.98]")) == [
        "phases.low_resolution.steps: 8 there, 9 here",
        "optim.betas: [0.9, 0.99] there, [0.9, 0.98] here",
    ]
    assert differences(
        there, tiny("phases.perceptual.perceptual=null", "task.text={kind: classes, num_classes: 2}")
    ) == [
        "task.text.kind: bytes there, classes here",  # whose other fields are not comparable
        "phases.perceptual.perceptual: set there, absent here",
    ]
    folder = RunFolder(str(tmp_path))
    folder.claim(there)
    with pytest.raises(
        UserError, match=r"another config \(seed: 0 there, 1 here; task\.model\.num_blocks: 2 there, 3 here\); continue"
    ):
        folder.check(tiny("task.model.num_blocks=3", "seed=1"))


def test_without_a_digest_any_config_is_read_and_none_written(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    reader = manager(tmp_path, config_digest=None)
    assert_restores(reader, 1)
    with pytest.raises(AssertionError, match="only reads"):
        save(reader, 2)
    assert steps(reader) == [1]


def test_another_format_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = save(manager(tmp_path), 1)
    import trainer.checkpoint.records as records

    commit = json.loads((path / "COMMIT").read_text())
    del commit["xxh64"]
    commit["version"] = 2
    commit["new_field"] = "of a later version"
    (path / "COMMIT").write_text(json.dumps({**commit, "xxh64": records._seal(commit)}))
    message = refused(manager(tmp_path), zeros(), path)
    assert "version 2" in message
    assert "version 1" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("model.q.bias"), "has model.q.bias that this run lacks"),
        (lambda t: t.update(extra=torch.zeros(1)), "this run has extra that the checkpoint lacks"),
        (
            lambda t: t.update({"model.q.bias": torch.zeros(33)}),
            r"BF16 [33] in the checkpoint and F32 [33] in this run",
        ),
        (lambda t: t.update({"mask": t["mask"][1:]}), r"BOOL [64] in the checkpoint and BOOL [63] in this run"),
    ],
)
def test_other_tensors_are_refused_before_any_is_overwritten(
    change: Callable[[Tensors], None], expected: str, tmp_path: Path
) -> None:
    m = manager(tmp_path)
    path = save(m, 1)
    into = zeros()
    change(into)
    assert expected in refused(m, into, path)
    assert not any(tensor.any() for tensor in into.values())


@pytest.mark.parametrize(
    ("given", "state", "expected"),
    [
        ({"a": 3}, {}, "a is a int, not a tensor"),
        ({"a": torch.zeros(1, device="meta")}, {}, "meta device"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, {}, "complex64"),
        ({}, {"loss": float("nan")}, "not JSON"),
        ({}, {"f": torch.zeros(1)}, "not JSON"),
        ({}, {"pair": (1, 2)}, "state.pair"),
        ({}, {"by_step": {1: "a"}}, "state.by_step"),
    ],
)
def test_what_cannot_be_saved_is_named(
    given: dict[str, Any], state: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        manager(tmp_path / "c").save(given, step=1, images_seen=1, state=state)
    assert not (tmp_path / "c").exists()


def test_keep_last_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep_last"):
        manager(tmp_path, keep_last=1)


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/c.*cannot be made"):
        save(manager(tmp_path / "file" / "c"), 1)
    with pytest.raises(UserError, match="nosuch://x"):
        manager("nosuch://x")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match=r"locked/c.*cannot be made"):
            save(manager(tmp_path / "locked" / "c"), 1)


# -------------------------------------------------------------------------------------------------------- failed writes


class FailingFileSystem(LocalFileSystem):
    """Storage that fails when an object whose name ends so is opened for writing, with the given errno."""

    cachable = False

    def __init__(self, suffix: str, code: int) -> None:
        super().__init__()
        self.suffix, self.code = suffix, code

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and path.removesuffix(".tmp").endswith(self.suffix):
            raise OSError(self.code, os.strerror(self.code))
        return super().open(path, mode, **kwargs)


@pytest.mark.parametrize("suffix", [".safetensors", "index.json", "manifest.json", "COMMIT"])
@pytest.mark.parametrize(("code", "kind"), [(28, UserError), (5, CheckpointError)])
def test_failed_save_raises_and_leaves_nothing(suffix: str, code: int, kind: type[Exception], tmp_path: Path) -> None:
    m = manager(tmp_path)
    save(m, 1)
    good = m.folder.fs
    m.folder.fs = FailingFileSystem(suffix, code)
    with pytest.raises(kind, match="storage is full" if code == 28 else "Input/output error"):
        save(m, 2)
    m.folder.fs = good
    assert [path.name[:13] for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_restores(m, 1)
    save(m, 2)
    assert_restores(m, 2)


class KillingFileSystem(LocalFileSystem):
    """The process ends when it has written half of an object whose name ends so."""

    cachable = False

    def __init__(self, suffix: str) -> None:
        super().__init__()
        self.suffix = suffix

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super().open(path, mode, **kwargs)
        if "w" in mode and path.removesuffix(".tmp").endswith(self.suffix):
            file.write(b"half")
            file.flush()
            os._exit(9)
        return file


def save_and_be_killed(world: World, url: Path, suffix: str, where: str) -> None:
    m = manager(url)
    save(m, 1)
    m.folder.fs = KillingFileSystem(suffix)
    if where == "background":
        m.begin_save(tensors(2), step=2, images_seen=8, state={"step": 2})
        m.finish()
    save(m, 2)


@pytest.mark.parametrize(
    ("suffix", "where"),
    [(".safetensors", "here"), ("manifest.json", "here"), ("COMMIT", "here"), ("COMMIT", "background")],
)
def test_a_kill_at_any_stage_leaves_the_last_checkpoint(suffix: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code 9"):
        run_ranks(1, save_and_be_killed, tmp_path, suffix, where)
    [half] = tmp_path.glob("step-00000002-*")
    m = manager(tmp_path)
    assert_restores(m, 1, on_set_aside=lambda path, reason: pytest.fail(reason))
    save(m, 2)
    assert not half.exists()
    assert_restores(m, 2)


# ------------------------------------------------------------------------------------------------------------ retention


def steps(m: CheckpointManager) -> list[int]:
    return [info.step for info in m.list()]


def test_a_start_that_another_has_followed_commits_nothing(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    starts = [run.start_attempt({}) for _ in range(2)]
    older, newer = (manager(tmp_path / "checkpoints", may_commit=partial(run.check_newest, start)) for start in starts)
    save(newer, 3)
    with pytest.raises(CheckpointError, match="start 1 goes on with this run; start 0, this one, must end"):
        save(older, 9)
    assert_restores(newer, 3)
    assert len(newer.list()) == 1

    def follow_during_the_save() -> None:
        run.check_newest(1)
        run.start_attempt({})

    with pytest.raises(CheckpointError, match="start 2 goes on"):
        save(manager(tmp_path / "checkpoints", may_commit=follow_during_the_save), 9)
    assert_restores(newer, 3)
    newer = manager(tmp_path / "checkpoints", may_commit=partial(run.check_newest, 2))
    save(newer, 6)
    assert_restores(newer, 6)


def test_retention_keeps_the_newest_and_what_is_held(tmp_path: Path) -> None:
    m = manager(tmp_path)
    for step in (1, 2):
        save(m, step)
    m.hold(m.list()[0].path, "export")
    assert m.list()[0].holds == ("export",)
    for step in (3, 4, 5):
        save(m, step)
    assert steps(m) == [1, 4, 5]
    m.release(m.list()[0].path, "export")
    save(m, 6)
    assert steps(m) == [5, 6]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="hold"):
        m.hold(m.list()[0].path, "../x")


def test_nothing_is_deleted_before_the_newer_commit(tmp_path: Path) -> None:
    m = manager(tmp_path)
    for step in (1, 2):
        save(m, step)
    m.folder.fs = FailingFileSystem("COMMIT", 5)
    with pytest.raises(CheckpointError):
        save(m, 3)
    assert steps(m) == [1, 2]


def test_leftovers_of_earlier_attempts_go_once_a_commit_is_newer(tmp_path: Path) -> None:
    m = manager(tmp_path)
    old, ahead, foreign = (
        tmp_path / name for name in ("step-00000002-00000000", "step-00000009-00000000", "my-own-folder")
    )
    for folder in (old, ahead, foreign):
        folder.mkdir()
        (folder / SHARD).write_bytes(b"half")
    save(m, 1)
    assert old.exists()
    save(m, 3)
    assert not old.exists()
    assert ahead.exists()
    assert foreign.exists()


def test_set_aside_stays_until_all_kept_are_newer(tmp_path: Path) -> None:
    m = manager(tmp_path)
    save(m, 1)
    bad = save(m, 2)
    flip(SHARD, 0.5)(bad)
    assert_restores(m, 1)
    save(m, 2)
    assert bad.exists()
    assert steps(m) == [1, 2]
    save(m, 3)
    save(m, 4)
    assert not bad.exists()


def test_failed_deletion_does_not_fail_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Undeletable(LocalFileSystem):
        cachable = False

        def rm_file(self, path: str) -> None:
            raise PermissionError(13, "no")

    m = manager(tmp_path)
    m.folder.fs = Undeletable()
    for step in (1, 2, 3):
        save(m, step)
    assert steps(m) == [1, 2, 3]
    assert "could not be removed" in caplog.text
