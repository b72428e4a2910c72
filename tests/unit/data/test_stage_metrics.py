"""A stage's progress as metrics: states that add up, counters that only rise, and nothing of a run that trains."""

import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import prometheus_client
import pytest

from data.commands.exported import MetricsOptions, exported, ticking
from data.stages.leases import Holder
from data.stages.metrics import StageMetrics, items_by_state
from data.stages.status import PassStatus, StageStatus
from trainer import metric_names
from trainer.config import CODE_ROOT
from trainer.discovery import files_in, read_groups
from trainer.errors import UserError


def status(
    *, items: int = 10, done: int = 0, speed: float | None = None, nbytes: int = 0, **counts: int
) -> StageStatus:
    one = PassStatus("recaption", items=items, done=done, counted=done, counts=Counter(counts), bytes=nbytes)
    return StageStatus("recaption", [one, PassStatus("later")], finished=False, samples_per_s=speed)


def value(metrics: StageMetrics, name: str, **labels: str) -> float | None:
    return metrics.exporter.registry.get_sample_value(name, {"stage": "recaption", **labels})


def holder(worker: str, *, left_s: float = 60.0) -> Holder:
    return Holder(worker=worker, attempt="a", deadline=time.time() + left_s, samples=7, parts=0, deaths=0)


def test_every_item_is_in_one_state() -> None:
    one = PassStatus("p", items=10, done=4, failed={"f": "why", "g": "why"}, given_up={"u": "why"})
    one.holders = [("a", holder("w1")), ("b", holder("w2")), ("g", holder("w1"))]
    states = items_by_state(one)
    assert states == {"waiting": 2, "working": 2, "done": 3, "failed": 2, "given_up": 1}
    assert sum(states.values()) == 10
    assert tuple(states) == metric_names.STAGE_ITEM_STATES


def test_counts_are_told_apart_and_rise_to_what_the_receipts_say() -> None:
    metrics = StageMetrics("recaption")
    assert value(metrics, "loupe_data_stage_tokens_total") == 0, "there from the beginning"
    metrics.update(
        status(done=1, read=100, kept=90, captions=180, tokens=5000, **{"rejected/undecodable": 10}, nbytes=3)
    )
    metrics.update(
        status(
            done=2, read=200, kept=185, captions=370, tokens=9000, **{"rejected/undecodable": 15}, nbytes=8, speed=2.5
        )
    )
    of = {"pass": "recaption"}
    assert value(metrics, "loupe_data_stage_samples_total", **of, result="read") == 200
    assert value(metrics, "loupe_data_stage_samples_total", **of, result="rejected/undecodable") == 15
    assert value(metrics, "loupe_data_stage_counts_total", **of, what="captions") == 370
    assert value(metrics, "loupe_data_stage_counts_total", **of, what="tokens") is None
    assert value(metrics, "loupe_data_stage_tokens_total") == 9000
    assert value(metrics, "loupe_data_stage_bytes_total") == 8
    assert value(metrics, "loupe_data_stage_samples_per_second") == 2.5
    assert value(metrics, "loupe_data_stage_items", **{"pass": "later"}, state="waiting") is None, "not begun"


def test_a_counter_begins_anew_where_damage_was_taken_out() -> None:
    metrics = StageMetrics("recaption")
    metrics.update(status(done=2, read=200))
    metrics.update(status(done=1, read=100))
    assert value(metrics, "loupe_data_stage_samples_total", **{"pass": "recaption"}, result="read") == 100


def test_workers_are_those_whose_lease_holds() -> None:
    metrics = StageMetrics("recaption")
    now = status()
    now.passes[0].holders = [
        ("a", holder("w1")),
        ("b", holder("w1")),
        ("c", holder("w2")),
        ("d", holder("w3", left_s=-1)),
    ]
    metrics.update(now)
    assert value(metrics, "loupe_data_stage_workers") == 2
    metrics.died(3)
    assert value(metrics, "loupe_data_stage_worker_deaths_total") == 3


def test_nothing_of_a_run_is_exported_by_a_stage_and_nothing_of_a_stage_by_a_run() -> None:
    from trainer.exporter import Exporter

    def families(metrics: "object") -> set[str]:
        exporter = Exporter(metrics)  # type: ignore[arg-type]
        return {family.name for family in exporter.registry.collect()}

    of_stage, of_rank = families(metric_names.OF_STAGES), families(metric_names.OF_EVERY_RANK)
    of_main = families(metric_names.OF_RANK_0)
    assert of_stage & of_main == {"loupe_job", "loupe_build"}
    assert of_rank < of_main
    # at 0 on the ranks that do not set it, the newest checkpoint would be of 1970
    assert "loupe_checkpoint_last_success_timestamp_seconds" in of_main - of_rank


def test_the_command_answers_and_is_found_while_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(tmp_path / "discovery"), str(tmp_path / "captions")
    with exported("recaption", out, MetricsOptions(0, None, path)) as metrics:
        assert metrics is not None
        metrics.update(status(done=1, read=5))
        (file,) = files_in(path)
        (group,) = read_groups(file)
        assert group["labels"]["run"] == "captions"
        with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert prometheus_client.generate_latest(metrics.exporter.registry).decode().splitlines()[0] in text
        assert f"metrics on http://{group['targets'][0]}/metrics" in capsys.readouterr().err
    assert list(files_in(path)) == []
    with exported("recaption", out, MetricsOptions(None, None, None)) as metrics:
        assert metrics is None


def test_a_second_one_on_a_node_takes_the_next_port(tmp_path: Path) -> None:
    with exported("x", str(tmp_path), MetricsOptions(0, None, f"{tmp_path}/a")):
        (file,) = files_in(f"{tmp_path}/a")
        first = int(read_groups(file)[0]["targets"][0].rpartition(":")[2])
        with exported("x", str(tmp_path), MetricsOptions(first, None, f"{tmp_path}/b")):
            (file,) = files_in(f"{tmp_path}/b")
            assert first < int(read_groups(file)[0]["targets"][0].rpartition(":")[2]) < first + 50


def test_a_folder_that_cannot_be_written_does_not_end_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with exported("recaption", str(tmp_path), MetricsOptions(None, None, str(tmp_path / "file"))) as metrics:
        assert metrics is not None
    assert "the work goes on" in capsys.readouterr().err


def test_an_address_that_is_not_ours_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"192\.0\.2\.1"),
        exported("x", str(tmp_path), MetricsOptions(0, "192.0.2.1", None)),
    ):
        pass


def test_work_in_this_thread_is_looked_at_all_the_same() -> None:
    ticks: list[float] = []
    with ticking(lambda: ticks.append(time.monotonic()), every_s=0.02, wanted=True):
        end = time.monotonic() + 60
        while len(ticks) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
    with ticking(lambda: pytest.fail("nobody asked"), every_s=0.02, wanted=False):
        time.sleep(0.1)


def test_it_needs_no_torch() -> None:
    code = "import sys, data.commands.exported; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CODE_ROOT, check=False, timeout=60).returncode == 0
