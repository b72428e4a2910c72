"""A worker of `recaption` is killed in the midst of a shard; another takes it over."""

import multiprocessing
import time
from pathlib import Path

import pytest

from data.recaption.captioner import Decoding
from data.recaption.model import find_model
from data.recaption.stage import Recaption
from data.stages.receipts import done_receipts
from data.stages.runner import Worker
from data.stages.store import StageStore
from tests.florence import write_chatty_model
from tests.sample_stages import read_parquets, write_samples

LEASE_S = 1.5


def work(stage: Recaption, url: str) -> None:
    Worker(stage, StageStore(url), lease_s=LEASE_S).run()


def names(folder: Path) -> list[str]:
    """Of what lies in it, but for files that are being written."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


@pytest.mark.shared
@pytest.mark.timeout(120)
def test_a_killed_workers_shard_is_taken_over(shared_dir: Path, tmp_path: Path) -> None:
    photos = sorted((shared_dir / "data/coco_open/images").iterdir())[:12]
    source, out = write_samples(str(tmp_path / "in"), photos, shard_samples=6), str(tmp_path / "out")
    stage = Recaption(
        source, find_model(str(write_chatty_model(shared_dir, tmp_path / "model"))), {"short": "<CAPTION>"},
        decoding=Decoding(max_new_tokens=20, batch_images=4, batch_captions=8),
    )  # fmt: skip
    process = multiprocessing.get_context("spawn").Process(target=work, args=(stage, out))
    process.start()
    leases = tmp_path / "out/work/recaption/leases"
    deadline = time.monotonic() + 60
    # It takes its lease before it loads the model, so it dies with the shard in its hands.
    while not names(leases):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    (held,) = names(leases)
    assert not (tmp_path / "out/work/recaption/done").exists()
    assert Worker(stage, StageStore(out), lease_s=LEASE_S).run() == []
    receipts = list(done_receipts(StageStore(out), "recaption"))
    assert [receipt["item"] for receipt in receipts] == ["00000-0000", "00001-0000"]
    assert held.startswith(tuple(receipt["item"] for receipt in receipts))
    keys = [row["key"] for row in read_parquets(out, "recaption", "captions")]
    empty = sum(receipt["counts"].get("captions/empty", 0) for receipt in receipts)
    assert len(keys) + empty == 12
    assert len(set(keys)) == len(keys)
    assert not names(leases)
