"""What the gallery's page rests on: weights that follow a run, one sampling at a time, fields checked. No browser."""

import asyncio
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from launch.commands.gallery import gallery as command
from tests.sampling_runs import CLASSES, SAMPLES, run_of, save
from tests.tiny import tiny
from trainer.errors import UserError
from trainer.gallery.gallery import MOST_WAITING, Gallery
from trainer.gallery.live_run import LiveRun
from trainer.gallery.requests import Request, field_of, parse
from trainer.sampling.job import run
from trainer.sampling.options import Options
from trainer.sampling.settings import SampleSettings

CPU = torch.device("cpu")
FIELDS = {"prompt": " dog ", "sampler": "euler", "steps": 2, "guidance": 2.0, "seed": 3, "size": 32.0, "per-prompt": 2}
REQUEST = Request("dog", 2, SampleSettings("euler", 2, guidance=2.0, seed=3, resolution=32))


@pytest.fixture
def live(tmp_path: Path) -> LiveRun:
    return LiveRun(str(run_of(tmp_path / "live")), CPU)


def test_newer_weights_are_taken_up(live: LiveRun) -> None:
    assert live.newer() is None
    old = live.model
    save(Path(live.source), tiny(SAMPLES), step=30)
    entry = live.newer()
    assert entry is not None
    assert entry.step == 30
    live.renew(entry)
    fresh = LiveRun(live.source, CPU)
    assert (live.title, live.trouble, live.newer()) == ("live, step 30, ema", None, None)
    assert live.model.codec is old.codec, "frozen networks are not read again"
    drawn, opened = (m.images(["dog"], [0], REQUEST.settings) for m in (live.model, fresh.model))
    assert torch.equal(drawn, opened)
    assert not torch.equal(drawn, old.images(["dog"], [0], REQUEST.settings))


def test_a_newer_checkpoint_without_averages_is_said_and_tried_once(live: LiveRun) -> None:
    old = live.model
    save(Path(live.source), tiny(SAMPLES), step=30, average=False)
    entry = live.newer()
    assert entry is not None
    live.renew(entry)
    assert live.model is old
    assert "step 30 cannot be read" in str(live.trouble)
    assert "--weights raw" in str(live.trouble)
    assert live.newer() is None


def test_a_damaged_newer_checkpoint_leaves_the_older_one_in_use(live: LiveRun) -> None:
    url = save(Path(live.source), tiny(SAMPLES), step=30)
    shard = next(Path(url).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    entry = live.newer()
    assert entry is not None
    live.renew(entry)
    assert (live.model.step, live.trouble) == (7, "step 30 does not verify")


def test_a_checkpoint_named_by_itself_stays(tmp_path: Path) -> None:
    source = next((run_of(tmp_path / "live") / "checkpoints").glob("step-*"))
    live = LiveRun(str(source), CPU)
    save(tmp_path / "live", tiny(SAMPLES), step=30)
    assert (live.newer(), live.model.step) == (None, 7)


def test_pictures_are_those_of_the_command(live: LiveRun, tmp_path: Path) -> None:
    gallery = Gallery([live])
    (shown,) = asyncio.run(gallery.draw(REQUEST))
    options = Options(source=live.source, prompts=("dog",), per_prompt=2, out=str(tmp_path / "out"), sampler="euler",
                      steps=2, guidance=2.0, seed=3, size=(32, 32))  # fmt: skip
    run(options, CPU, say=lambda line: None)
    expected = [(tmp_path / "out" / "images" / f"{i:08d}.png").read_bytes() for i in (0, 1)]
    assert [gallery.png(name) for name in shown.pictures] == expected
    assert (shown.step, shown.nfe, shown.truncated, gallery.png("other")) == (7, 2, False, None)


def test_one_sampling_at_a_time_and_newer_weights_between(live: LiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, lock, steps = Gallery([live], poll_s=0.01), threading.Lock(), []

    def slow(run: LiveRun, request: Request) -> Any:
        assert lock.acquire(blocking=False), "two samplings at once"
        before = run.model.step
        time.sleep(0.2)
        assert run.model.step == before, "other weights in the middle"
        steps.append(before)
        lock.release()

    async def session() -> None:
        following = asyncio.create_task(gallery.follow())
        drawing = [asyncio.create_task(gallery.draw(REQUEST)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(save, Path(live.source), tiny(SAMPLES), step=30)
        await asyncio.gather(*drawing)
        while live.model.step != 30:
            await asyncio.sleep(0.02)
        assert await gallery.draw(REQUEST, wanted=lambda: False) == []
        gallery.waiting = MOST_WAITING
        with pytest.raises(UserError, match="16 samplings wait"):
            await gallery.draw(REQUEST)
        following.cancel()

    monkeypatch.setattr(gallery, "_draw", slow)
    asyncio.run(asyncio.wait_for(session(), 60))
    assert len(steps) == 3


def test_captions_and_classes_do_not_go_together(live: LiveRun, tmp_path: Path) -> None:
    classes = LiveRun(str(run_of(tmp_path / "classes", CLASSES)), CPU)
    with pytest.raises(UserError, match="one takes captions and one classes"):
        Gallery([live, classes])
    ddpm = LiveRun(
        str(run_of(tmp_path / "ddpm", "task.paradigm={kind: ddpm_v}", "samples={sampler: ddim, num_steps: 3}")), CPU
    )
    both = Gallery([live, ddpm])
    assert (both.samplers, both.defaults().sampler) == (["dpm-solver"], "dpm-solver")


def test_fields_are_checked() -> None:
    own = SampleSettings("heun", 9, guidance_interval=(0.1, 0.7), guidance_rescale=0.3, resolution=64, width=96)
    # of the run's what has no field; sizes are squares
    settings = replace(REQUEST.settings, guidance_interval=(0.1, 0.7), guidance_rescale=0.3)
    assert parse(FIELDS, own, of_classes=False) == replace(REQUEST, settings=settings)
    assert parse(FIELDS | {"classes": 2}, own, of_classes=True).prompt == 2
    for name, value, message in [
        ("steps", 2.5, "give a whole number from 1 to 1000"), ("steps", None, "give a number"), ("steps", 10**7, "1000"),
        ("guidance", "x", "give a number"), ("guidance", float("nan"), "give a number"), ("seed", -1, "from 0 to"),
        ("size", 4096, "from 1 to 2048"), ("per-prompt", 17, "from 1 to 16"), ("prompt", "x" * 5000, "4000 at most"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as error:
            parse(FIELDS | {name: value}, own, of_classes=False)
        field, text = field_of(str(error.value))
        assert field == name
        assert message in text
    assert field_of("s3://runs/x: not finite; take less --guidance") == (
        None,
        "s3://runs/x: not finite; take less --guidance",
    )


def test_without_the_extra_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    result = CliRunner().invoke(command, ["runs/demo"])
    assert isinstance(result.exception, UserError)
    assert "pip install -e '.[gallery]' in the checkout" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["a", "b", "c"], "3 runs"), (["a", "--weights", "ema", "--weights", "raw"], "2 times for 1 runs"),
     (["a", "--host", "203.0.113.7"], "cannot be taken")],
)  # fmt: skip
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
