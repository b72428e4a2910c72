"""`loupe doctor`: each check of the host where it is well and where it is not, how checks are run, and the command."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest

from launch.cli import cli
from launch.doctor import checks as doctor_checks
from launch.doctor.checks import (
    GIB,
    MIB,
    Check,
    Finding,
    cores,
    disk,
    memory,
    packages,
    ports,
    run_checks,
    shared_memory,
)
from launch.entry import run_command
from tests.tiny import TINY
from trainer.errors import UserError


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1
    return findings[0]


# -------------------------------------------------------------------------------------------------------- running them


def test_a_check_that_hangs_is_named_and_holds_up_no_other() -> None:
    released = threading.Event()

    def hangs() -> list[Finding]:
        released.wait(300)
        return []

    began = time.monotonic()
    found = run_checks([
        Check("stuck", hangs, 0.2, "node", "reboot it"),
        Check("well", lambda: [Finding("well", "ok", "1 GiB")], 250.0),
    ])  # fmt: skip
    released.set()
    assert time.monotonic() - began < 200
    assert [(f.name, f.status, f.blame) for f in found] == [("stuck", "failed", "node"), ("well", "ok", "nobody")]
    assert found[0].figure == "no answer within 0 s"
    assert found[0].mend == "reboot it"


def test_what_a_check_raises_is_its_finding() -> None:
    def users() -> list[Finding]:
        raise UserError("data.cache_dir: not yours")

    def others() -> list[Finding]:
        raise OSError("input/output\nerror")

    found = run_checks([Check("a", users, 5.0, "node"), Check("b", others, 5.0, "node")])
    assert [(f.status, f.blame, f.figure) for f in found] == [
        ("failed", "run", "data.cache_dir: not yours"),
        ("failed", "node", "OSError: input/output error"),
    ]


def test_secrets_in_urls_are_not_shown() -> None:
    said = "sftp://me:secret@host/run: not written (403, url='https://b.s3/x?X-Amz-Signature=secret&a=secret')"
    found = only(run_checks([Check("a", lambda: [Finding("a", "failed", said)], 5.0)]))
    assert found.figure == "sftp://***@host/run: not written (403, url='https://b.s3/x?***')"


# ------------------------------------------------------------------------------------------------------------- packages


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the metadata of an installed distribution `patient`."""
    folder = tmp_path / "patient-1.0.dist-info"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("requirement", "status", "said"),
    [
        ("click", "ok", "1 requirements met"),
        ("click<1", "failed", f"click is {metadata.version('click')}, not <1"),
        ("no-such-package-at-all>2", "failed", "no-such-package-at-all is missing"),
        ("no-such-package-at-all ; extra == 'dev'", "ok", "met"),
    ],
)
def test_what_is_required_is_installed(distribution: Path, requirement: str, status: str, said: str) -> None:
    (distribution / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: patient\nVersion: 1.0\nRequires-Dist: {requirement}\n"
    )
    found = only(packages(distribution / "constraints.txt", "patient"))
    assert found.status == status
    assert said in found.figure


def test_versions_are_compared_with_the_pins(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"# by make lock\nclick=={metadata.version('click')}\nnot-here==1\n")
    assert only(packages(constraints)).figure.endswith("versions as pinned")
    constraints.write_text("click==7.0\n")
    found = only(packages(constraints))
    assert found.status == "warning"
    assert f"click {metadata.version('click')}, tested with 7.0" in found.figure


def test_without_the_package_itself_nothing_is_fit(tmp_path: Path) -> None:
    found = only(packages(tmp_path / "none", "no-such-package-at-all"))
    assert (found.status, found.blame) == ("failed", "run")


# ------------------------------------------------------------------------------------------- processors, memory, disks


def test_fewer_cores_than_ranks_is_worth_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    count = len(os.sched_getaffinity(0))
    assert only(cores(count)).status == "ok"
    assert only(cores(count + 1)).status == "warning"
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0 * count, 0.0, 0.0))
    assert "others" in only(cores(1)).mend


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    plenty = only(memory(1, tmp_path))
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert plenty.figures["free_bytes"] == pytest.approx(1024 * int(available.split()[1]), rel=0.3)
    v2 = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), None)
    if v2 is None:
        pytest.skip("no control groups of version 2 here")
    group = tmp_path / v2[3:].lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{GIB}\n")
    (group / "memory.current").write_text(f"{900 * MIB}\n")
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {16 * MIB}\n")
    found = only(memory(1, tmp_path))
    assert found.figures["free_bytes"] == (1024 - 900 + 16) * MIB
    assert (found.status, found.blame) == ("failed", "node")


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(shared_memory(str(tmp_path / "none"))).status == "failed"
    free = only(shared_memory(str(tmp_path))).figures["free_bytes"]
    monkeypatch.setattr(doctor_checks, "LEAST_SHM_BYTES", free * 2)
    found = only(shared_memory(str(tmp_path)))
    assert (found.status, found.blame) == ("failed", "node")


def test_a_disk_is_written_to_and_has_room(tmp_path: Path) -> None:
    def look(path: Path, least: int = 1, usual: int = 1) -> Finding:
        return only(disk("d", str(path), least=least, usual=usual, blame="node", mend="make room"))

    assert look(tmp_path).status == "ok"
    assert look(tmp_path / "not" / "yet").status == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left, and no folder made"
    assert look(tmp_path, usual=1 << 60).status == "warning"
    full = look(tmp_path, least=1 << 60)
    assert (full.status, full.blame, full.mend) == ("failed", "node", "make room")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in look(tmp_path / "file").figure


def test_a_tmpdir_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert only(doctor_checks.temporary_files()).status in ("ok", "warning")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    found = only(doctor_checks.temporary_files())
    assert (found.status, found.blame) == ("failed", "node")
    deep = tmp_path / ("d" * doctor_checks.LONGEST_TMPDIR)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    assert "longer than 75 bytes" in only(doctor_checks.temporary_files()).figure
    assert f"no folder {tmp_path}/scratch" in found.figure


def test_the_longest_tmpdir_is_one_that_a_forkserver_can_use() -> None:
    """The real one binds its socket there."""
    code = "import multiprocessing.forkserver as f; f.ensure_running()"
    for extra, works in ((0, True), (1, False)):
        with tempfile.TemporaryDirectory(dir="/tmp") as short:
            folder = Path(short, "d" * (doctor_checks.LONGEST_TMPDIR - len(short) - 1 + extra))
            folder.mkdir()
            result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)},
                                    capture_output=True, text=True, check=False)  # fmt: skip
            assert (result.returncode == 0) == works, result.stderr


def test_ports() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        taken = sock.getsockname()[1]
        found = only(ports({"metrics": ("127.0.0.1", taken)}))
        assert found.status == "warning"
        assert f"{taken} for metrics" in found.figure
    assert only(ports({"metrics": ("127.0.0.1", taken)})).status == "ok"


# ---------------------------------------------------------------------------------------------------------- the command


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, ["doctor", "--cpu", "--quick", "--gpus", "1", *arguments], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_recipe_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = [word for override in TINY for word in ("--set", override)]
    code, out, _ = doctor(capsys, "demo", *settings, "--run-dir", str(tmp_path / "run"))
    lines = {line.partition("  ")[0]: line for line in out.splitlines()}
    assert code == 0, out
    for name in ("packages", "memory", "CPUs", "CPU memory", "CPU matmul", "run folder", "clock", "dataset emoji"):
        assert name in lines
    assert "one CPU" in lines["CPU all-reduce"]
    assert " MB/s written" in lines["run folder"]
    assert "fit to train on" in out.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "a check leaves nothing"


def test_a_dataset_that_is_not_there_ends_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = doctor(capsys, "demo", "--set", f"data.datasets.emoji.url={tmp_path}/none", "--run-dir",
                          str(tmp_path / "run"), "--json")  # fmt: skip
    assert code == 1
    tree = json.loads(out)
    assert tree["fit"] is False
    failed = {finding["name"]: finding for finding in tree["findings"] if finding["status"] == "failed"}
    assert list(failed) == ["dataset emoji"]
    assert f"{tmp_path}/none" in failed["dataset emoji"]["figure"]
    assert failed["dataset emoji"]["blame"] == "run"


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = doctor(capsys, "--set", "seed=1")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: --set: ")
    assert doctor(capsys, "no-such-recipe")[0] == 2
