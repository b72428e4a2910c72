"""`loupe checkpoint`, on run folders as the trainer leaves them: damaged, held, half-written, of a job that goes on."""

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import click.testing
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from click.testing import Result
from torch import Tensor

from launch.commands.checkpoint import checkpoint
from tests.tiny import tiny
from trainer.checkpoint import opened
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Manifest
from trainer.config_text import to_yaml
from trainer.errors import UserError


def tensors(step: int) -> dict[str, Tensor]:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(step))
    return {
        "model.q.weight": weight, "model.q.bias": weight[0].bfloat16(), "model.count": torch.tensor([step, 2**62]),
        "ema.q.weight": weight + 1, "ema.q.bias": weight[0].bfloat16() + 1, "optim.step": torch.tensor(float(step)),
        "optim.mask": weight[:, 0] > 0, "optim.empty": torch.zeros(0, 3),
    }  # fmt: skip


def save(run: Path, step: int, *, digest: str = "d", changed: dict[str, Tensor] | None = None) -> Path:
    manager = CheckpointManager(f"{run}/checkpoints", keep_last=9, config_digest=digest, code_version="v")
    given = tensors(step) | (changed or {})
    return Path(manager.save(given, step=step, images_seen=step * 4, state={"step": step}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(tiny()))
    for step in (10, 20, 30):
        save(folder, step)
    return folder


def ask(*arguments: object, answer: str = "") -> Result:
    return click.testing.CliRunner().invoke(
        checkpoint, [str(a) for a in arguments], input=answer, catch_exceptions=False
    )


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").iterdir())


def of_step(run: Path, step: int) -> Path:
    [path] = (run / "checkpoints").glob(f"step-{step:08d}-*")
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_ls_says_what_is_wrong(run: Path) -> None:
    save(run, 40)
    (of_step(run, 10) / "COMMIT").unlink()
    (of_step(run, 20) / "shard-00000.safetensors").write_bytes(b"short")
    (of_step(run, 30) / "HOLD-eval-1").write_bytes(b"")
    (of_step(run, 40) / "SET-ASIDE.json").write_text("{}")
    lines = ask("ls", run).output.splitlines()
    assert lines[0].split() == ["step", "saved", "size", "complete", "valid", "held", "by", "name"]
    assert "not committed" in lines[1]
    assert "shard-00000.safetensors: 5 bytes" in lines[2]
    assert "eval-1" in lines[3]
    assert "  yes       yes  " in lines[3]
    assert "set aside" in lines[4]
    rows = json.loads(ask("ls", run, "--json").output)
    assert [(row["step"], row["complete"], row["problem"] == "") for row in rows] == [
        (10, False, False), (20, True, False), (30, True, True), (40, True, False)
    ]  # fmt: skip
    whole = of_step(run, 30)
    assert rows[2]["bytes"] == sum(path.stat().st_size for path in whole.iterdir())
    assert rows[2]["time"] == pytest.approx((whole / "COMMIT").stat().st_mtime, abs=1)


def test_verify_reads_every_byte_and_marks_nothing(run: Path) -> None:
    assert ask("verify", run).exit_code == 0
    damaged = of_step(run, 20) / "shard-00000.safetensors"
    flip(damaged, damaged.stat().st_size - 2)
    assert "problem" in ask("ls", run, "--json").output  # its size is as it was: only reading it tells
    assert json.loads(ask("ls", run, "--json").output)[1]["problem"] == ""
    result = ask("verify", run)
    assert result.exit_code == 1
    assert [("DAMAGED" in line, "whole" in line) for line in result.output.splitlines()] == [
        (False, True), (True, False), (False, True)
    ]  # fmt: skip
    assert f"{damaged}: its checksum does not match" in result.output
    assert ask("verify", of_step(run, 30)).exit_code == 0
    assert ask("verify", of_step(run, 20)).exit_code == 1
    assert not list(run.glob("checkpoints/*/SET-ASIDE.json"))


def test_verify_of_nothing_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(tiny()))
    assert ask("verify", tmp_path).exit_code == 1


def test_verify_tells_what_a_training_deletes_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = of_step(run, 20)
    original = opened.verify

    def verify(folder: CheckpointFolder, entry: Entry, *more: Any) -> Manifest:
        if entry.step == 20 and gone.exists():  # retention, after it was listed
            folder.remove(entry.name)
        return original(folder, entry, *more)

    monkeypatch.setattr(opened, "verify", verify)
    result = ask("verify", run)
    assert result.exit_code == 0
    assert f"{gone}: deleted meanwhile" in result.output.splitlines()
    assert "DAMAGED" not in result.output
    save(run, 20)
    gone = of_step(run, 20)
    assert ask("verify", gone).exit_code == 1, "nothing whole was seen"


@pytest.mark.parametrize("weights", ["ema", "raw", "all"])
def test_convert_to_one_safetensors_file(weights: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.safetensors"
    assert "of step 30" in ask("convert", run, out, "--weights", weights).output
    found, stored = safetensors.torch.load_file(out), tensors(30)
    expected = stored
    if weights != "all":
        prefix = {"ema": "ema.", "raw": "model."}[weights]
        expected = {name: stored[f"{prefix}q.{name[2:]}"] for name in ("q.weight", "q.bias")} | {
            "count": stored["model.count"]
        }
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    assert [path.name for path in out.parent.iterdir()] == ["x.safetensors"]
    with pytest.raises(UserError, match="exists; give another name"):
        ask("convert", run, out)
    assert not list(run.glob("checkpoints/*/HOLD-*"))


def test_convert_to_torch_distributed_checkpoint(run: Path, tmp_path: Path) -> None:
    ask("convert", of_step(run, 20), tmp_path / "dcp", "--to", "dcp", "--weights", "all")
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors(20).items()}
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(20).items())
    assert json.loads((tmp_path / "dcp" / "loupe.json").read_text()) == {
        "step": 20, "images_seen": 80, "state": {"step": 20}
    }  # fmt: skip


def test_convert_of_a_damaged_one_leaves_nothing(run: Path, tmp_path: Path) -> None:
    damaged = of_step(run, 30) / "shard-00000.safetensors"
    flip(damaged, damaged.stat().st_size // 2)
    out = tmp_path / "out"
    for arguments in ((out / "x.safetensors", "--weights", "all"), (out / "x", "--to", "dcp", "--weights", "all")):
        with pytest.raises(UserError, match="checksum"):
            ask("convert", run, *arguments)
        assert not list(out.iterdir())
    result = ask("convert", run, tmp_path / "x")
    assert result.exit_code == 2
    assert "ends in .safetensors" in result.output


def test_diff(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(to_yaml(tiny("optim.weight_decay=0.5")))
    assert ask("diff", run, run).exit_code == 0
    mine = tensors(30)
    changed = {"model.q.weight": mine["model.q.weight"] + 0.25, "model.count": torch.zeros(3, dtype=torch.int64),
               "extra": torch.ones(2)}  # fmt: skip
    save(other, 30, digest="e", changed=changed)
    result = ask("diff", run, other)
    assert result.exit_code == 1
    text = result.output
    relative = 0.25 * 1200**0.5 / mine["model.q.weight"].double().norm().item()
    for line in (
        "optim.weight_decay: 0.0 there, 0.5 here", "tensors there alone: 1\n  extra",
        "model.count: I64 [2] here, I64 [3] there", f"  model.q.weight: 0.25; {relative:.4g}", "equal bit by bit: 6",
    ):  # fmt: skip
        assert line in text, text
    assert "tensors here alone" not in text
    assert "equal bit by bit: 2" in ask("diff", run, other, "--prefix", "ema.").output
    wrong = ask("diff", run, other, "--prefix", "emma.")
    assert wrong.exit_code == 2, "nothing was compared"
    assert "--prefix: no tensor's name begins with emma.; there are ema., " in wrong.output
    first = ask("diff", of_step(run, 10), run, "--prefix", "optim.step").output
    assert "optim.step: 20; 2" in first  # |10 - 30| and over |10|


def test_diff_counts_nan(run: Path, tmp_path: Path) -> None:
    """Two at one place are equal, whatever bits they have; one against a number differs, and the numbers are compared."""
    mine, other = tensors(30), tmp_path / "other"
    here, there = mine["model.q.weight"].clone(), mine["model.q.weight"].clone()
    here[0, :2] = there[0, :2] = float("nan")
    there.view(torch.int32)[0, 1] += 1  # another NaN
    assert there[0, 1].isnan()
    infinite = mine["ema.q.weight"].clone()
    infinite[0, 0] = float("inf")
    save(run, 40, changed={"model.q.weight": here, "ema.q.weight": infinite})
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    save(other, 40, changed={"model.q.weight": there, "ema.q.weight": infinite})
    result = ask("diff", run, other)
    assert result.exit_code == 0, result.output
    there[1, :3] = float("nan")
    there[2, 2] += 0.5
    save(other, 50, changed={"model.q.weight": there, "ema.q.weight": infinite})
    result = ask("diff", of_step(run, 40), other, "--prefix", "model.q.weight")
    assert result.exit_code == 1
    relative = 0.5 / here[here.isfinite()].double().norm().item()
    assert f"  model.q.weight: 0.5; {relative:.4g}; 3 NaN on one side alone" in result.output


def test_rm_asks_and_says_what(run: Path) -> None:
    assert "1 would be deleted" in ask("rm", of_step(run, 10), "--dry-run").output
    result = ask("rm", run, "--keep-last", "2", answer="n\n")
    assert result.exit_code == 1
    assert steps_of(run) == [10, 20, 30]
    assert str(of_step(run, 10)) in result.output
    with pytest.raises(UserError, match=r"^--yes: nothing was deleted, as there is no terminal to ask on"):
        ask("rm", run, "--keep-last", "2", answer="")
    assert steps_of(run) == [10, 20, 30]
    assert ask("rm", run, "--keep-last", "2", answer="y\n").exit_code == 0
    assert steps_of(run) == [20, 30]
    assert ask("rm", run, "--step", "20", "--yes").exit_code == 0
    assert steps_of(run) == [30]
    assert "nothing to delete" in ask("rm", run, "--keep-last", "1", "--yes").output
    assert ask("rm", run).exit_code == 2
    assert ask("rm", run, "--step", "30", "--keep-last", "1").exit_code == 2
    with pytest.raises(UserError, match="--step: no checkpoint of step 99"):
        ask("rm", run, "--step", "99", "--yes")


def test_rm_never_takes_the_last_that_is_valid(run: Path) -> None:
    flip(of_step(run, 30) / "manifest.json", 5)
    (of_step(run, 20) / "COMMIT").unlink()
    with pytest.raises(UserError, match="the only valid checkpoint, and without one the training is lost"):
        ask("rm", of_step(run, 10), "--yes")
    with pytest.raises(UserError, match="the only valid checkpoint"):
        ask("rm", run, "--step", "10", "--step", "30", "--yes")
    ask("rm", run, "--step", "20", "--step", "30", "--yes")  # what is none may go
    assert steps_of(run) == [10]


def test_rm_never_takes_one_that_is_held(run: Path) -> None:
    hold = of_step(run, 10) / "HOLD-export-1"
    hold.write_bytes(b"")
    with pytest.raises(UserError, match="held by export-1, which reads it"):
        ask("rm", run, "--keep-last", "1", "--yes")
    assert steps_of(run) == [10, 20, 30]
    hold.unlink()
    ask("rm", run, "--keep-last", "1", "--yes")
    assert steps_of(run) == [30]


def test_rm_beside_a_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This very process has the run, as `loupe submit --cluster local` has it."""
    from launch.runs import state

    (run / "job.json").write_text(json.dumps({"cluster": "local", "host": socket.gethostname(), "pid": os.getpid()}))
    monkeypatch.setattr(state, "live_job", lambda folder: f"process {os.getpid()}")
    with pytest.raises(UserError, match=r"a job has the run .*, and would go on from it"):
        ask("rm", of_step(run, 30), "--yes")
    assert ask("rm", of_step(run, 10), "--yes").exit_code == 0
    (of_step(run, 20) / "COMMIT").unlink()
    with pytest.raises(UserError, match="may be writing it"):
        ask("rm", of_step(run, 20), "--yes")
    assert steps_of(run) == [20, 30]


def test_names_that_are_none(run: Path) -> None:
    for arguments, said in (
        (("ls", run / "nothing"), "no run there"),
        (("verify", run / "checkpoints" / "step-00000010-00000000"), "no such checkpoint"),
        (("convert", run / "checkpoints" / "step-00000010-00000000", "x.safetensors"), "no such checkpoint"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            ask(*arguments)
