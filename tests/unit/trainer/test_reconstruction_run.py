"""An autoencoder's evaluation while storage fails: images are left out and named, and nothing waits twice."""

from typing import Any

import pytest
import torch

from data.reader import BadShard, StorageError, open_dataset
from tests.stage1 import stage1
from trainer.config import resolve_url
from trainer.evaluate.reconstruction_run import ReconstructionEvaluation
from trainer.parallel.world import World
from trainer.tasks.autoencoder import AutoencoderTask

EMOJI = "repo://data/assets/emoji_64"


@pytest.mark.parametrize(
    ("error", "tried", "skipped"),
    [
        (StorageError("no answer in 120 s"), [0, 1, 8, 9, 10, 11], [(row, "storage") for row in range(1, 8)]),
        (BadShard("its sum is another"), list(range(12)), [(1, "damaged_shard")]),
    ],
    ids=["storage", "shard"],
)
def test_what_storage_does_not_give_is_left_out(
    alone: World, monkeypatch: pytest.MonkeyPatch, error: Exception, tried: list[int], skipped: list[Any]
) -> None:
    run = stage1("reconstructions={every_steps: 3, count: 12}")
    dataset = open_dataset(resolve_url(EMOJI), name="emoji", max_samples=12)
    evaluation = ReconstructionEvaluation(run, AutoencoderTask(run, torch.device("cpu")), alone, [dataset])
    read, rows = dataset.read, list[int]()

    def failing(row: int) -> Any:
        rows.append(row)
        if row == 1:
            raise error
        return read(row)

    monkeypatch.setattr(dataset, "read", failing)
    found = evaluation.measure()
    assert rows == tried, "passes of eight images"
    assert [(one["sample"], one["reason"]) for one in found.about["skipped"]] == skipped
    assert found.figures["psnr_db"] > 0
