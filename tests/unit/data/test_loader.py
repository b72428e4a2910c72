"""The loader: the same batches however they are made, honest about bad images, and never hanging."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from data import loader as loader_module
from data.batches import Batch, BatchRequest, Substitution
from data.images import read_image
from data.loader import Loader, LoaderError
from data.plan import MixSegment, Mixture, SampleRef
from data.reader import Dataset, open_dataset
from data.slots import SlotRef, Slots
from trainer.errors import UserError

from .conftest import MakeDataset


def make_request(step: int, mixture: Mixture, batch: int = 4, delay_s: float = 0.0, die_at: int = -1) -> BatchRequest:
    time.sleep(delay_s)
    if step == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    resolution = 16 if step < 3 else 24  # two phases
    return BatchRequest(step, step * batch, mixture.refs(step * batch, batch), resolution)


def make_loader(dataset: Dataset, num_workers: int = 0, **options: Any) -> Loader:
    mixture = Mixture({"x": dataset.shard_sizes}, seed=5, window_shards=2, segments=[MixSegment(0, {"x": 1})])
    request: Callable[[int], BatchRequest] = partial(
        make_request, mixture=mixture, **{k: options.pop(k) for k in ("delay_s", "die_at") if k in options}
    )
    options = {"random_crop": True, "flip_probability": 0.5, "prefetch_steps": 2, "timeout_s": 60.0, **options}
    return Loader({"x": dataset}, request, seed=5, num_workers=num_workers, **options)


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.images_BCHW, other.images_BCHW)
        assert torch.equal(one.positions_B, other.positions_B)
        assert torch.equal(one.labels_B, other.labels_B)
        assert (one.step, one.captions, one.keys, one.substitutions) == (
            other.step, other.captions, other.keys, other.substitutions,
        )  # fmt: skip


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> Dataset:
    return open_dataset(str(make_dataset(11)), name="x")


def test_batches_are_what_was_asked_for(dataset: Dataset) -> None:
    batches = list(make_loader(dataset).steps(0, 5))
    assert [batch.step for batch in batches] == [0, 1, 2, 3, 4]
    assert [batch.images_BCHW.shape[-1] for batch in batches] == [16, 16, 16, 24, 24]
    assert batches[1].images_BCHW.dtype == torch.uint8
    assert batches[1].images_BCHW.shape == (4, 3, 16, 16)
    assert batches[1].positions_B.tolist() == [4, 5, 6, 7]
    assert batches[1].labels_B.tolist() == [-1] * 4
    for batch in batches:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert caption.endswith(f" caption of {int(key[2:6])}")
    captions = [caption for batch in batches for caption in batch.captions]
    assert {caption.split()[0] for caption in captions} == {"first", "second"}


def test_pixels_are_those_of_the_files(dataset: Dataset, tmp_path: Path) -> None:
    for batch in make_loader(dataset, random_crop=False, flip_probability=0.0, decode="exact").steps(2, 5):
        for key, image_CHW in zip(batch.keys, batch.images_BCHW, strict=True):
            pixels = read_image((tmp_path / "set-source" / key.removeprefix("x/")).read_bytes())
            expected = cv2.resize(pixels[:, 8:48], image_CHW.shape[1:], interpolation=cv2.INTER_AREA)
            assert np.array_equal(image_CHW.permute(1, 2, 0).numpy(), expected)


def test_crop_flip_and_caption_follow_from_the_position(dataset: Dataset) -> None:
    """The same sample twice in the stream looks different; a loader that begins later sees it as one that did not."""
    all_steps = list(make_loader(dataset).steps(0, 12))
    assert_equal(all_steps[7:], list(make_loader(dataset).steps(7, 12)))
    seen: dict[str, set[bytes]] = {}
    for batch in all_steps[3:]:
        for key, image in zip(batch.keys, batch.images_BCHW, strict=True):
            seen.setdefault(key, set()).add(image.numpy().tobytes())
    assert max(len(looks) for looks in seen.values()) > 1
    still = list(make_loader(dataset, random_crop=False, flip_probability=0.0).steps(3, 12))
    looks: dict[str, bytes] = {}
    for batch in still:
        for key, image in zip(batch.keys, batch.images_BCHW, strict=True):
            assert looks.setdefault(key, image.numpy().tobytes()) == image.numpy().tobytes()


def test_workers_change_nothing(dataset: Dataset) -> None:
    alone = list(make_loader(dataset).steps(0, 9))
    before = torch.get_rng_state()
    with make_loader(dataset, num_workers=2) as loader:
        assert_equal(alone, list(loader.steps(0, 9)))
        assert_equal(alone[4:6], list(loader.steps(4, 6)))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------- bad images


def test_an_undecodable_image_is_replaced_and_reported(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(str(make_dataset(11, bad=(3,))), name="x")
    batches = list(make_loader(dataset).steps(0, 12))
    made = [s for batch in batches for s in batch.substitutions]
    assert len(made) >= 4  # once an epoch
    assert {s.bad for s in made} == {SampleRef("x", 3)}
    assert {s.reason for s in made} == {"undecodable"}
    assert len({s.used for s in made}) == 1  # the same one, so that ranks and restarts agree
    first = made[0]
    batch = batches[first.position // 4]
    assert batch.keys[first.position % 4] == f"x/{first.used.index:04d}.jpg"
    assert not any("0003" in key for batch in batches for key in batch.keys)


def test_known_substitutions_are_applied_unread(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(str(make_dataset(11)), name="x")
    bad, used = SampleRef("x", 3), SampleRef("x", 8)

    class Careful(Dataset):
        def read(self, index: int) -> Any:
            assert index != bad.index
            return super().read(index)

    dataset.__class__ = Careful
    batches = list(make_loader(dataset, substitutions={bad: used}).steps(0, 3))
    (made,) = (s for batch in batches for s in batch.substitutions)
    assert made == Substitution(made.position, bad, used, "known")


def test_a_resumed_run_replaces_alike(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(str(make_dataset(11, bad=(3, 8))), name="x")
    straight = list(make_loader(dataset).steps(0, 12))
    known = {s.bad: s.used for batch in straight[:6] for s in batch.substitutions}
    resumed = list(make_loader(dataset, substitutions=known).steps(6, 12))
    assert [batch.keys for batch in resumed] == [batch.keys for batch in straight[6:]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_set_of_nothing_but_bad_images_is_an_error(make_dataset: MakeDataset, num_workers: int) -> None:
    dataset = open_dataset(str(make_dataset(5, bad=(0, 1, 2, 3, 4))), name="x")
    with (
        make_loader(dataset, num_workers=num_workers) as loader,
        pytest.raises(UserError, match=r"^dataset x: 8 replacements .*loupe data verify [^\n]*$"),
    ):
        next(iter(loader.steps(0, 2)))


def test_a_damaged_shard_is_a_one_line_error_from_a_worker_too(make_dataset: MakeDataset) -> None:
    folder = make_dataset(5)
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with (
        make_loader(open_dataset(str(folder), name="x"), num_workers=1) as loader,
        pytest.raises(UserError, match=r"^[^\n]*shard.00000.mds: has [^\n]*$"),
    ):
        next(iter(loader.steps(0, 2)))


# ------------------------------------------------------------------------------------------------------- workers


def test_a_dead_worker_is_noticed(dataset: Dataset) -> None:
    with (
        make_loader(dataset, num_workers=1, die_at=2) as loader,
        pytest.raises(LoaderError, match=r"data worker \d+ died \(by SIGKILL; out of memory\?\)"),
    ):
        list(loader.steps(0, 5))


def test_a_stall_ends_at_the_timeout_and_close_does_not_wait(dataset: Dataset) -> None:
    loader = make_loader(dataset, num_workers=1, delay_s=500, timeout_s=1.0)
    began = time.monotonic()
    with pytest.raises(LoaderError, match=r"step 0: no batch within data.timeout_s = 1 s"):
        next(iter(loader.steps(0, 5)))
    loader.close()
    assert time.monotonic() - began < 300


def test_workers_outlive_the_signals_that_the_trainer_answers(dataset: Dataset) -> None:
    with make_loader(dataset, num_workers=1, delay_s=0.1) as loader:
        steps = loader.steps(0, 12)
        next(steps)
        forkserver = int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(loader._workers[0].pid)]))
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            os.kill(loader._workers[0].pid or 0, number)
            os.kill(forkserver, number)
        assert len(list(steps)) == 11


SIGNALLED = """
import multiprocessing.resource_tracker as tracker, os, signal, sys
from data.reader import open_dataset
from tests.unit.data.test_loader import make_loader
if __name__ == "__main__":
    with make_loader(open_dataset(sys.argv[1], name="x"), num_workers=1) as loader:
        steps = loader.steps(0, 3)
        next(steps)
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(tracker._resource_tracker._pid, number)
        list(steps)
"""


def test_a_signal_to_the_whole_job_leaves_no_tracebacks(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """SLURM's reaches Python's own tracker of semaphores too, which knows SIGTERM but not SIGUSR2."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED)
    result = subprocess.run(
        [sys.executable, str(script), str(make_dataset(5))], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")


def test_leaving_early_ends_the_workers(dataset: Dataset) -> None:
    loader = make_loader(dataset, num_workers=1)
    steps = loader.steps(0, 100)
    next(steps)
    (worker,) = loader._workers
    steps.close()
    assert not worker.is_alive()


ORPHAN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from functools import partial
from data.reader import open_dataset
from tests.unit.data.test_loader import make_loader
if __name__ == "__main__":
    loader = make_loader(open_dataset(sys.argv[2], name="x"), num_workers=1, delay_s=0.2)
    steps = loader.steps(0, 1000)
    next(steps)
    print(loader._workers[0].pid, flush=True)
    time.sleep(600)
"""


def test_workers_die_with_a_killed_trainer(make_dataset: MakeDataset, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHAN)
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    trainer = subprocess.Popen(
        [sys.executable, str(script), root, str(make_dataset(5))], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert trainer.stdout
        worker = int(trainer.stdout.readline())
    finally:
        trainer.kill()
        trainer.wait()
    for _ in range(1000):
        stat = Path(f"/proc/{worker}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":  # nobody may reap it
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the trainer by 100 s")


# ------------------------------------------------------------------------------------------------- shared memory


def test_a_slot_is_of_nobody_else_until_it_is_given_back() -> None:
    slots = Slots(worker=1)
    first, a = slots.take((2, 3, 4, 4))
    second, b = slots.take((2, 3, 4, 4))
    assert first != second
    a.fill_(1)
    b.fill_(2)
    assert a.unique().tolist() == [1]
    slots.give_back((SlotRef(0, first.number), SlotRef(1, 99)))  # another worker's, and one that never was
    third, c = slots.take((2, 3, 4, 4))
    assert third not in (first, second)
    slots.give_back((first, first))
    fourth, d = slots.take((1, 3, 4, 4))
    assert fourth == first
    assert d.data_ptr() == a.data_ptr()
    fifth, _ = slots.take((1, 3, 4, 4))
    assert fifth not in (first, second, third)
    slots.give_back((fifth,))
    _, f = slots.take((9, 3, 4, 4))  # of a later phase, whose images are larger
    assert f.shape == (9, 3, 4, 4)
    assert c.is_shared()


def test_batches_are_the_trainers_own(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept and written to while later ones come through the same memory."""
    alone = list(make_loader(dataset).steps(0, 40))
    slots, unpacked = set(), loader_module.Packed.unpacked

    def noted(self: Any, *, pin: bool) -> Batch:
        slots.add(self.slot)
        return unpacked(self, pin=pin)

    monkeypatch.setattr(loader_module.Packed, "unpacked", noted)
    kept: list[Batch] = []
    with make_loader(dataset, num_workers=2, prefetch_steps=1) as loader:
        for batch in loader.steps(0, 40):
            kept.append(batch)
            if len(kept) > 3:
                kept[-3].images_BCHW.add_(1)
        assert_equal([alone[-1]], [kept[-1]])
    assert len(slots) <= 2 * (1 + 4)  # of each worker one for the first resolution, and few for the second
    for one, other in zip(alone[1:-2], kept[1:-2], strict=True):
        assert torch.equal(one.images_BCHW + 1, other.images_BCHW)
