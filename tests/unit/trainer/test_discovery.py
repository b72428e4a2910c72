"""Files in a discovery folder: whole, readable by Prometheus, safe from names, of one start, and taken back."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from trainer import discovery
from trainer.config_text import with_overrides
from trainer.discovery import Announcement, Target, Targets
from trainer.errors import UserError
from trainer.recipes import load


def targets(
    run: str = "demo", job_id: str = "4711", *, folder: str = "", start: int = 0, scheme: str = "http"
) -> Targets:
    ranks = (Target("n1:9400", "n1", "0"), Target("[fe80::1]:9401", "n2", "1"))
    return Targets(run, job_id, folder or f"/runs/{run}", ranks, start=start, time=1000.0, scheme=scheme)


def test_a_group_a_rank_with_labels_and_what_relabelling_sees(tmp_path: Path) -> None:
    file = discovery.publish(str(tmp_path / "new"), targets(start=3, scheme="https"))
    assert os.path.basename(file).startswith("demo-4711-")
    second = json.loads(Path(file).read_text())[1]
    assert second == {
        "targets": ["[fe80::1]:9401"],
        "labels": {
            "run": "demo", "job_id": "4711", "node": "n2", "rank": "1", "__scheme__": "https",
            "__meta_loupe_folder": "/runs/demo", "__meta_loupe_start": "3", "__meta_loupe_time": "1000",
        },
    }  # fmt: skip
    assert os.listdir(tmp_path / "new") == [os.path.basename(file)], "no temporary file is left"


def test_others_may_read_it_whatever_the_run_is_called(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        file = discovery.publish(str(tmp_path), targets("../../etc/a b", "1;rm"))
    finally:
        os.umask(before)
    assert Path(file).parent == tmp_path
    assert os.path.basename(file).startswith("_.._etc_a_b-1_rm-")
    assert os.stat(file).st_mode & 0o777 == 0o644


def test_a_new_job_of_the_same_run_replaces_the_file_of_the_one_before_and_no_other(tmp_path: Path) -> None:
    path = str(tmp_path)
    discovery.publish(path, targets(job_id="1"))
    other = discovery.publish(path, targets(job_id="1", folder="/elsewhere/demo"))
    newest = discovery.publish(path, targets(job_id="2"))
    assert sorted(discovery.files_in(path)) == sorted([other, newest])
    worker = discovery.publish(path, targets(job_id="3"), alone=False)
    assert len(list(discovery.files_in(path))) == 3
    assert sorted(discovery.withdraw_all(path, "/runs/demo")) == sorted([newest, worker])
    assert list(discovery.files_in(path)) == [other]


def test_an_earlier_start_does_not_take_back_a_later_ones(tmp_path: Path) -> None:
    file = discovery.publish(str(tmp_path), targets(start=1))
    discovery.withdraw(file, 0)
    assert os.path.exists(file)
    discovery.withdraw(file, 1)
    assert not os.path.exists(file)
    discovery.withdraw(file, 1)


@pytest.mark.parametrize("bad", ["file", "missing parent", "relative", "url"])
def test_a_folder_that_cannot_be_written_is_told_and_nothing_more(tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").touch()
    path = {"file": f"{tmp_path}/file", "missing parent": f"{tmp_path}/file/below", "relative": "d", "url": "s3://b/d"}[
        bad
    ]
    told: list[str] = []
    announcement = Announcement(path, targets(), alone=True, on_failure=told.append)
    announcement.withdraw()
    assert len(told) == 1
    assert told[0].startswith(f"Prometheus does not find this by {path}: ")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(discovery.os, "makedirs", lambda *_, **__: release.wait(300))
    began = time.monotonic()
    assert discovery.in_time(lambda: discovery.publish(str(tmp_path), targets()), seconds=0.1) == (
        "it does not answer within 0 s"
    )
    assert time.monotonic() - began < 200
    release.set()


def test_a_file_is_renewed_and_written_again_where_somebody_removed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "BEAT_S", 0.05)
    announcement = Announcement(str(tmp_path), targets(), alone=True, on_failure=pytest.fail)
    (file,) = discovery.files_in(str(tmp_path))
    os.utime(file, (0, 0))
    _until(lambda: os.path.getmtime(file) > 1e9)
    os.unlink(file)
    _until(lambda: os.path.exists(file))
    announcement.withdraw()
    time.sleep(0.2)
    assert not os.path.exists(file), "nobody writes it again after its end"


def _until(condition: "object") -> None:
    end = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_record_of_a_run_folder_comes_back_as_it_was_and_an_old_one_too() -> None:
    written = targets(start=2)
    assert discovery.targets_of(written.as_record(), run="demo", folder="/runs/demo") == written
    old = discovery.targets_of({"targets": ["node:9000", "node:9001"], "attempt": 0}, run="demo", folder="f")
    assert [(t.node, t.rank) for t in old.targets] == [("node", "0"), ("node", "1")]
    assert old.job_id == "unknown"


@pytest.mark.parametrize(
    "bad",
    [{}, {"targets": "n1:1"}, {"targets": ["n1"]}, {"targets": ["n1:0"]}, {"targets": ["n1:65536"]},
     {"targets": ["http://n1:1/x?"]}, {"targets": ["a@b:1"]}, {"targets": [3]}, {"targets": ["n:1\n"]},
     {"targets": ["n:1"] * (discovery.MAX_TARGETS + 1)}],
)  # fmt: skip
def test_addresses_that_are_none_are_not_handed_on(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=discovery.TARGETS):
        discovery.targets_of(bad, run="demo", folder="f")


def test_labels_are_one_line_of_some_length() -> None:
    record = {"targets": ["n:1"], "nodes": ["a\nb" + "x" * 1000], "ranks": [None], "job_id": ["list"]}
    found = discovery.targets_of(record, run="demo", folder="f")
    assert found.targets[0].node.startswith("a_bxx")
    assert len(found.targets[0].node) == 256
    assert (found.targets[0].rank, found.job_id) == ("", "unknown")


def test_where_it_listens_and_what_others_call_that() -> None:
    assert discovery.listen_on(None, {}) == "127.0.0.1"
    assert discovery.listen_on(None, {"SLURM_JOB_ID": "1"}) == "0.0.0.0"
    assert discovery.listen_on(None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == "0.0.0.0"
    assert discovery.listen_on("127.0.0.1", {"SLURM_JOB_ID": "1"}) == "127.0.0.1", "the user's own word"
    assert discovery.address_of("0.0.0.0", 1, host="n1") == "n1:1"
    assert discovery.address_of("::1", 1, host="n1") == "[::1]:1"
    assert discovery.address_of("127.0.0.1", 1, host="n1") == "127.0.0.1:1"


def test_no_password_of_a_run_folder_is_published() -> None:
    assert discovery.public("s3://me:hunter2@bucket/runs/demo?sig=x#y") == "s3://bucket/runs/demo"
    assert discovery.public("/runs/a@b?c") == "/runs/a@b?c"


@pytest.mark.parametrize("path", ["s3://bucket/d", "discovery"])
def test_a_discovery_folder_is_a_whole_path_on_a_disk(path: str) -> None:
    with pytest.raises(UserError, match=r"metrics\.discovery_dir: .*whole path"):
        with_overrides(load("demo"), [f"metrics.discovery_dir={path}"])
